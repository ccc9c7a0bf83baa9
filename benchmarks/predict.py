"""predict against extraction: views a second of the same network, images, views and engine, start-up excluded.

`python -m benchmarks.predict [--quick]` makes grey PNG files of 300 px, and runs both in turn: the predictions of the
head of seed 0 (needs `dvc repro train_head`), and the extraction of features of the same base into an empty store, of
the views that the head averages over. Pixels are kept by extraction as params.yaml says; predict keeps nothing.
"""

import os
import statistics
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from unittest import mock

import torch

from benchmarks.common import Line, generate, run, took
from pipeline.features import extraction
from pipeline.features.extraction import Share
from pipeline.features.loading import open_loader
from pipeline.features.views import evaluation_views
from pipeline.network import backbones, cuts
from pipeline.network.device import choose_device
from pipeline.params import HEAD_ONLY, load_params
from pipeline.tools import inference

CARD = inference.path_of(f"models/{HEAD_ONLY}/seed_0")
N_IMAGES, N_QUICK, ROUNDS = 400, 120, 3


def measure(*, is_quick: bool) -> Iterator[Line]:
    """The rate of predict divided by that of extraction, the median of rounds that take turns."""
    n, params = N_QUICK if is_quick else N_IMAGES, load_params()
    torch.set_num_threads(params.threads)
    device, network = choose_device(params.runtime.device), inference.open_network(CARD, n)
    plan, codes = network.card.backbone, evaluation_views(network.card.evaluation_views)
    prefix, _ = cuts.prefix_and_suffix(backbones.load_planned(plan, str(CARD)), plan.cut, cuts.pools(plan))
    computation = extraction.prepare(prefix, params.augmentation, params.features, device)
    seconds: dict[str, list[float]] = {"predict": [], "extraction": []}
    with tempfile.TemporaryDirectory() as folder:
        images = generate(n, Path(folder))
        paths, rows = extraction.locate(images, folder), [(name, code) for name in images.sha256 for code in codes]

        def predict() -> None:
            deque(inference.run(network, [*paths.values()], params.runtime.workers), maxlen=0)

        def extract() -> None:
            given = paths, plan.preprocessing, params.augmentation, codes, params.runtime, device
            with closing(open_loader(*given)) as loader:
                extraction.fill(computation, loader, rows, params.runtime.store_max_gb, Share(0, 1))

        for number in range(ROUNDS):
            seconds["predict"].append(took(predict))
            with mock.patch.dict(os.environ, DVC_ROOT=f"{folder}/{number}"):
                seconds["extraction"].append(took(extract))
    rates = {name: len(rows) / statistics.median(found) for name, found in seconds.items()}
    engines = network.runner.engine, computation.runner.engine
    print(f"  {rates['predict']:.0f} against {rates['extraction']:.0f} views/s ({' and '.join(engines)})", flush=True)
    ratio = rates["predict"] / rates["extraction"]
    yield Line(f"predict / extraction, {plan.choice.name.split('/')[1]}", ratio, "times", "at least", 0.85)


if __name__ == "__main__":
    run(measure)
