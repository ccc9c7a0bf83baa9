"""advise: print reports/advice.json in plain words, what each strategy costs here, and a table of networks.

The stage `advise` computes everything but the minutes. Those come from a few batches of each strategy, timed now.
"""

import json
import logging
import statistics
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML
from torch import nn

from pipeline.advice.words import percent
from pipeline.dataset import manifest
from pipeline.dataset.manifest import Images, Labels, Split
from pipeline.features import engine, extraction, store
from pipeline.features.loading import Loader, open_loader
from pipeline.features.views import evaluation_views, training_views
from pipeline.fine_tuning import fit
from pipeline.fine_tuning.fit import Batch, Task
from pipeline.network import backbones, cuts, plans
from pipeline.network.device import choose_device, place
from pipeline.network.plans import NON_COMMERCIAL, BackbonePlan, StrategyPlan
from pipeline.params import HEAD_ONLY, PARAMS, STORE_DTYPES, Params, Strategy, load_params
from pipeline.report import provenance
from pipeline.tools import experiments
from pipeline.tools.first_look import check_images
from pipeline.training import heads, novelty

ADVICE = Path("reports/advice.json")
WIDTH = 100  # of printed paragraphs
STEPS = 5  # batches of training that are timed, the first of which is not counted
VIEWS = 256  # that are predicted, in pieces, and go through a frozen prefix; several pieces are under way at a time
HERE = "(this directory)"
SETTINGS = ("dataset", "split", "backbone", "features", "advise")  # sections of params.yaml
IN_TABLE = ("backbone.name", "backbone.weights", "features.image_size", "features.cut")
MOST_NAMES = 3  # of experiments with the same advice
Json = dict[str, Any]
log = logging.getLogger("pipeline")


def show(*, is_timed: bool) -> None:
    """Run what is missing of the stage, and print its words and tables."""
    params = load_params()
    check_images(params.dataset)
    experiments.dvc("repro", "advise")
    found = json.loads(ADVICE.read_text(encoding="utf-8"))
    print(as_text(found["words"]), end="\n\n")
    if not found["cannot_tell"]:
        print(as_table(found), end="\n\n", flush=True)
    if is_timed:
        print(as_costs(estimate(params)))


def as_text(words: Sequence[str]) -> str:
    """Paragraphs without emphasis, in lines."""
    return "\n\n".join(textwrap.fill(each.replace("**", ""), WIDTH, break_on_hyphens=False) for each in words)


def as_table(found: Json) -> str:
    """Markdown: accuracy by depth."""
    lines = ["| features after | width | linear head (95 % interval) | nearest neighbours |", "|---|---|---|---|"]
    rows = [(block["cut"], block["width"], block["linear"], block["nearest"]) for block in found["blocks"]]
    if "together" in found:
        rows.append(("all blocks together", sum(block["width"] for block in found["blocks"]), found["together"], None))
    if "random_weights" in found:
        width = found["blocks"][-1]["width"]
        rows.append((f"{found['blocks'][-1]['cut']}, random weights", width, found["random_weights"], None))
    for name, width, linear, nearest in rows:
        near = f"{nearest['value']:.1%}".replace("%", " %") if nearest else ""
        lines.append(f"| {name} | {width:,} | {percent(linear)} | {near} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Estimate:
    """What one seed of a strategy takes from nothing: seconds, and bytes in the feature store."""

    seconds: float
    cached_bytes: int


def as_costs(estimates: dict[str, Estimate]) -> str:
    """Markdown: minutes and GB of each strategy."""
    lines = ["| strategy | minutes a seed, about | GB of cache |", "|---|---|---|"]
    for name, found in estimates.items():
        lines.append(f"| {name} | {found.seconds / 60:.1f} | {found.cached_bytes / 1e9:.2g} |")
    first = f"Timed on a few batches now. {HEAD_ONLY}: the features of all images, which every head uses."
    return f"{first}\n\n" + "\n".join(lines)


@dataclass
class Clock:
    """Loads batches from memory, and notes when each was asked for: by call, a list of seconds."""

    batches: dict[tuple, torch.Tensor]
    device: torch.device
    asked: list[list[float]] = field(default_factory=list)

    def load(self, batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
        """The batches in order."""
        times: list[float] = [self.now()]
        self.asked.append(times)
        for batch in batches:
            times.append(self.now())
            yield torch.cat([self.batches[pair] for pair in batch])
        times.append(self.now())

    def now(self) -> float:
        """Seconds, after what the GPU was given is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def estimate(params: Params) -> dict[str, Estimate]:
    """What the features, and each strategy that runs, would take."""
    base, images, labels = plans.read_backbone(), manifest.read_images(), manifest.read_labels()
    seed = (*params.fine_tune.seeds, *params.split.seeds)[0]
    split = manifest.read_split(seed, labels.image_id)
    torch.set_num_threads(params.threads)
    store.put_at(params.runtime.store)
    device, evaluated = choose_device(params.runtime.device), evaluation_views(params.evaluation.views)
    paths = extraction.locate(images, params.dataset.path)
    codes = {*training_views(params.augmentation, params.features.views), *evaluated}
    opened = open_loader(paths, base.preprocessing, params.augmentation, evaluated, params.runtime, device)
    with closing(opened) as loader:
        backbone = backbones.load_planned(base, str(plans.BACKBONE))
        whole, _ = cuts.prefix_and_suffix(backbone, base.cut, cuts.pools(base))
        probe = Probe(params, base, images, labels, split, loader, device)
        row = np.prod(base.feature_shape) * np.dtype(STORE_DTYPES[params.features.store_dtype]).itemsize
        n = len(codes) * len(images.sha256)
        of_view, _ = probe.of_prefix(whole)
        found = {HEAD_ONLY: Estimate(n * of_view, int(n * row))}
        for name in params.fine_tune.run:
            found[name] = probe.of_strategy(plans.read_strategy(name), of_view)
    return found


@dataclass(frozen=True)
class Probe:
    """Times a few batches of the images at hand."""

    params: Params
    base: BackbonePlan
    images: Images
    labels: Labels
    split: Split
    loader: Loader
    device: torch.device

    def of_prefix(self, prefix: cuts.Prefix) -> tuple[float, dict[tuple, torch.Tensor]]:
        """Seconds a view through the engine, decoding included; and the activations (1, *shape) by (row, view)."""
        computation = extraction.prepare(prefix, self.params.augmentation, self.params.features, self.device)
        size, pairs = computation.runner.piece, self.pairs()
        batches = [
            [(self.images.sha256[row], view) for row, view in pairs[i : i + size]] for i in range(0, len(pairs), size)
        ]
        times, outputs = [time.perf_counter()], []
        for output in computation.runner.run(self.loader.load(batches)):
            outputs.append(torch.from_numpy(output))
            times.append(time.perf_counter())
        steps = np.diff(times)[1:] if len(times) > 2 else np.diff(times)  # workers start with the first
        seconds = float(steps.sum()) / max(sum(map(len, batches[-len(steps) :])), 1)
        values = torch.cat(outputs)
        return seconds, {pair: values[i : i + 1].float() for i, pair in enumerate(pairs)}

    def pairs(self) -> list[tuple[int, int]]:
        """Some images of train and validation, in all evaluation views."""
        rows = np.flatnonzero(np.isin(self.split.split, ["train", "val"]))
        views = evaluation_views(self.params.evaluation.views)
        return [(int(row), view) for row in rows[: max(VIEWS // len(views), 1)] for view in views]

    def of_strategy(self, plan: StrategyPlan, of_whole: float) -> Estimate:
        """The time of its steps, of its validations, and of its activations, each from a few batches.

        `of_whole`: seconds a view through the whole base, as which training and validation images pass at the end.
        """
        recipe, base, begin = plan.recipe, self.base, time.perf_counter()
        n_train, n_val, n_test = (len(self.split.rows(part)) for part in ("train", "val", "test"))
        backbone = backbones.load_planned(base, str(plans.BACKBONE), recipe.drop_path)
        prefix, suffix = cuts.prefix_and_suffix(backbone, plan.boundary, cuts.pools(base))
        n_evaluation, n_rows, seconds = len(self.params.evaluation.views), 0, time.perf_counter() - begin
        seconds += (min(n_train, novelty.MAX_IMAGES) + min(n_val, novelty.MAX_IMAGES)) * of_whole
        if plan.is_cached:
            n_rows = n_train * max(recipe.n_views, 1) + (n_val + n_test) * n_evaluation
            of_view, values = self.of_prefix(prefix)
            seconds += n_rows * of_view
        else:
            pairs = self.pairs()
            (loaded,) = self.loader.load([[(self.images.sha256[row], view) for row, view in pairs]])
            values = {pair: loaded[i : i + 1] for i, pair in enumerate(pairs)}
        _, dense = cuts.split(backbone, base.cut)
        head = heads.build(base.feature_shape, len(self.labels.class_names), self.params.head, dense)
        network = nn.Sequential(nn.Identity() if plan.is_cached else prefix.module, suffix, head)
        step, start_up, of_view = self.time_training(network, recipe, values)
        epochs = trained_epochs(recipe)
        seconds += epochs * n_train / recipe.batch_size * step
        seconds += (epochs + 3) * start_up + ((epochs + 2) * n_val + n_test) * n_evaluation * of_view
        return Estimate(seconds, n_rows * plan.cached_bytes_per_image)

    def time_training(
        self, network: nn.Sequential, recipe: Strategy, values: dict[tuple, torch.Tensor]
    ) -> tuple[float, float, float]:
        """Seconds of a step of training, of starting the engine of evaluation, and of a view in it."""
        params, device = self.params, self.device
        views = evaluation_views(params.evaluation.views)
        size = params.features.batch_size.on(device.type)
        example = torch.cat([*values.values()][:1] * size)
        used = engine.prepare(params.features.engine, network, example, recipe.precision, device).engine
        place(network, device)
        rows = np.unique([row for row, _ in values])
        clock, view = Clock(values, device), views[0]
        train = np.resize(rows, STEPS * recipe.batch_size)
        one = recipe.with_rates(recipe.learning_rate_base, recipe.learning_rate_head)
        one = one.model_copy(update={"epochs": 1, "warmup_epochs": 0, "patience": None})
        task = Task(clock.load, self.labels.label, self.labels.weight, train, rows, [view], views, used, size)
        network[0].eval()
        level = log.level
        log.setLevel(logging.WARNING)
        try:
            fit.train(network, replace(task), one, 0, "timed")
        finally:
            log.setLevel(level)
        before, training, *_ = clock.asked[:3]
        step = statistics.median(np.diff(training[2:]).tolist() or [training[-1] - training[1]])
        pieces = np.diff(before[2:])
        of_view = float(pieces.sum()) / max(len(values) - engine.piece_size(size, device), 1)
        start_up = training[0] - before[0] - len(values) * of_view
        return step, max(start_up, 0.0), of_view


def trained_epochs(recipe: Strategy) -> float:
    """Epochs of all learning rates together, at most; those of halving in full."""
    n, epochs, length = max(len(recipe.learning_rates), 1), 0.0, recipe.halving_epochs
    while n > recipe.halving_keeps:
        epochs += n * min(length, recipe.epochs)
        n, length = max(recipe.halving_keeps, -(-n // 2)), 2 * length
    return epochs + n * recipe.epochs


def show_networks() -> None:
    """Print one table of the networks whose advice is of the same images: of this directory, and of experiments."""
    found: dict[str, Json] = {}
    settings: dict[str, dict[str, str]] = {}
    if ADVICE.exists():
        found[HERE] = json.loads(ADVICE.read_text(encoding="utf-8"))
        settings[HERE] = own_settings()
    states = experiments.states()
    for name in sorted(name for name, state in states.items() if state == experiments.FINISHED):
        try:
            with experiments.reading(name) as read:
                found[name], settings[name] = json.loads(read(ADVICE)), settings_of(read(provenance.LOCK))
        except ValueError as error:
            log.info("%s: left out: %s", name, error)
    known = {name: advice for name, advice in found.items() if not advice["cannot_tell"]}
    lacking = unfinished(states)
    if not known:
        raise ValueError(
            f"no advice is there{f' ({lacking})' if lacking else ''}; run: dvc exp run --queue -S 'fine_tune.run=[]' "
            "-S backbone.weights=default -S backbone.name=NAME,NAME advise, and then: dvc exp run --run-all"
        )
    first = next(iter(known.values()))
    same = {name: advice for name, advice in known.items() if advice["data_sha256"] == first["data_sha256"]}
    print(as_networks(same, settings))
    if others := [name for name in known if name not in same]:
        print(f"\nOf other images or labels, so left out: {', '.join(others)}.")
    if lacking:
        print(f"\nNot in the table: {lacking}.")


def unfinished(states: dict[str, str]) -> str:
    """How many experiments run, wait and failed, with their names and a command; "" if none."""
    ways = {"queued": "; to run: dvc exp run --run-all", "failed": "; why: dvc queue logs NAME"}
    named = {state: sorted(name for name in states if states[name] == state) for state in sorted({*states.values()})}
    named.pop(experiments.FINISHED, None)
    found = [(len(each), state, ", ".join(each) + ways.get(state, "")) for state, each in named.items()]
    return ", ".join(f"{n} {state} ({which})" for n, state, which in found)


def own_settings() -> dict[str, str]:
    """Those of the advice of this directory; none, and a warning, if dvc.lock is not of this advice."""
    try:
        provenance.check(provenance.read_lock(), [str(ADVICE)])
    except ValueError as error:
        log.warning("the settings of %s are not known: %s", ADVICE, error)
        return {}
    return settings_of(provenance.LOCK.read_bytes())


def settings_of(lock: bytes) -> dict[str, str]:
    """The parameters that dvc.lock has of an advice, as text, but for those that the table shows anyway."""
    stages, found = YAML(typ="safe", pure=True).load(lock)["stages"], {}
    for stage in ("index", "split", "plan", "advise"):
        for key, value in stages.get(stage, {}).get("params", {}).get(str(PARAMS), {}).items():
            found |= {f"{key}.{part}": one for part, one in value.items()} if isinstance(value, dict) else {key: value}
    shown = {key: value for key, value in found.items() if key.partition(".")[0] in SETTINGS and key not in IN_TABLE}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in shown.items()}


def as_networks(found: dict[str, Json], settings: dict[str, dict[str, str]]) -> str:
    """Markdown: a row for each network and its settings, the best head first; of settings, those that differ."""
    rows: dict[str, list[str]] = {}  # the same advice by several names is one row
    for name, advice in found.items():
        rows.setdefault(json.dumps([advice["network"], advice["head"], settings[name]]), []).append(name)
    known = {(key, value) for name in found for key, value in settings[name].items()}
    differing = sorted(key for key, n in Counter(key for key, _ in known).items() if n > 1)
    columns = ["network", "cut", *differing, "linear head (95 % interval)", "GFLOPs a view", "parameters", "licence"]
    lines = [f"| {' | '.join([*columns, 'experiment'])} |", "|---" * (len(columns) + 1) + "|"]
    for names in sorted(rows.values(), key=lambda names: -found[names[0]]["head"]["value"]):
        advice, own = found[names[0]], settings[names[0]]
        network = advice["network"]
        licence = network["licence"] or ("none" if network["weights"] == "random" else "unknown")
        licence += ", excludes commercial use" if NON_COMMERCIAL.search(licence) else ""
        what = f"{network['name']} ({network['weights']}, {network['image_size']} px)"
        cells = [what, ", ".join(network["cuts"]), *(own.get(key, "not known") for key in differing)]
        cells += [percent(advice["head"]), f"{network['flops_per_image'] / 1e9:.2f}", f"{network['parameters']:,}"]
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        lines.append(f"| {' | '.join([*cells, licence, ', '.join(names[:MOST_NAMES]) + more])} |")
    any_one = next(iter(found.values()))
    return f"Cross-validated heads on the same {any_one['images']:,} images.\n\n" + "\n".join(lines)
