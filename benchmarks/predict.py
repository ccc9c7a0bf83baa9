"""predict against extraction: views a second of the same network, images, views and engine, start-up excluded.

`python -m benchmarks.predict [--quick]` makes grey PNG files of 300 px, four flips each, and runs both in turn: the
extraction of features into an empty store, and the predictions of a saved head on the same base. Pixels are kept by
extraction as params.yaml says; predict keeps nothing.
"""

import contextlib
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from benchmarks.common import LITE, REPOSITORY, Line, choose, generate, run
from pipeline.features import extraction
from pipeline.features.extraction import Share
from pipeline.features.loading import open_loader
from pipeline.features.views import evaluation_views
from pipeline.network import backbones, cuts
from pipeline.network.device import choose_device
from pipeline.network.plans import BackbonePlan
from pipeline.params import HEAD_ONLY, load_params
from pipeline.tools import inference
from pipeline.training import heads, saved_networks
from pipeline.training.runs import Cost

VIEWS = ("identity", "flip_horizontal", "flip_vertical", "rotate_180")
N_IMAGES, N_QUICK, ROUNDS = 400, 120, 3


def measure(*, is_quick: bool) -> Iterator[Line]:
    """The rate of predict divided by that of extraction, the median of rounds that take turns."""
    n, params = N_QUICK if is_quick else N_IMAGES, load_params(REPOSITORY / "params.yaml")
    torch.set_num_threads(params.threads)
    device, codes = choose_device(params.runtime.device), evaluation_views(VIEWS)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        images, backbone = generate(n, Path(folder)), backbones.load(choose(LITE), None)
        prefix, _ = cuts.prefix_and_suffix(backbone, cuts.ALL, {cuts.ALL: cuts.Pool("none", 0)})
        plan = BackbonePlan(
            choice=choose(LITE),
            image_size=None,
            licence=None,
            weights_sha256=backbone.weights_sha256,
            preprocessing=backbone.preprocessing,
            feature_dim=backbone.feature_dim,
            cut=cuts.ALL,
            pool="none",
            prefix_tokens=0,
            feature_shape=(backbone.feature_dim,),
            parameters=0,
            flops_per_image=0,
        )
        options = params.head.model_copy(update={"kind": "linear"})
        card = saved_networks.Card(
            strategy=HEAD_ONLY,
            seed=0,
            class_names=("one", "other"),
            backbone=plan,
            augmentation=params.augmentation,
            evaluation_views=VIEWS,
            freeze_until=cuts.ALL,
            head=options,
            cost=Cost(trainable_params=0, train_flops=0, base_passes=0, cached_bytes=0),
            temperature=1.0,
        )
        saved_networks.save_model(card, heads.build(plan.feature_shape, 2, options, nn.Identity()), None)
        network = inference.open_network(Path("models", HEAD_ONLY, "seed_0.json"), n)
        computation = extraction.prepare(prefix, params.augmentation, params.features, device)
        paths, rows = extraction.locate(images, folder), [(name, code) for name in images.sha256 for code in codes]
        seconds: dict[str, list[float]] = {"predict": [], "extraction": []}
        for number in range(ROUNDS):
            start = time.perf_counter()
            deque(inference.run(network, [*paths.values()], params.runtime.workers), maxlen=0)
            seconds["predict"].append(time.perf_counter() - start)
            with mock.patch.dict(os.environ, DVC_ROOT=f"{folder}/{number}"):
                start = time.perf_counter()
                given = paths, plan.preprocessing, params.augmentation, codes, params.runtime, device
                with closing(open_loader(*given)) as loader:
                    extraction.fill(computation, loader, rows, params.runtime.store_max_gb, Share(0, 1))
                seconds["extraction"].append(time.perf_counter() - start)
    rates = {name: len(rows) / statistics.median(found) for name, found in seconds.items()}
    engines = network.runner.engine, computation.runner.engine
    print(f"  {rates['predict']:.0f} against {rates['extraction']:.0f} views/s ({' and '.join(engines)})", flush=True)
    ratio = rates["predict"] / rates["extraction"]
    yield Line("predict / extraction, tf_efficientnet_lite0", ratio, "times", "at least", 0.85)


if __name__ == "__main__":
    run(measure)
