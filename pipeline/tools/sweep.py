"""sweep: how deep to train, by successive halving over freeze boundaries; every training is a DVC experiment of HEAD.

Reads   params.yaml, and of each experiment data/labels.csv and reports/runs/
Prints  a table for each rung, and the `freeze_until` to put in params.yaml, with its evidence

Validation judges, cross-fitted over the epochs from 1 on. Test predictions are not looked at.
"""

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from io import BytesIO
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ruamel.yaml import YAML
from safetensors.numpy import load

from pipeline.comparison import influence, intervals, outcomes, paired
from pipeline.comparison.intervals import Interval
from pipeline.comparison.outcomes import Outcomes
from pipeline.comparison.paired import Difference, Study
from pipeline.comparison.tables import teraflops
from pipeline.dataset import manifest
from pipeline.dataset.units import FEW_UNITS, unit_of
from pipeline.network import backbones, cuts
from pipeline.params import HEAD_ONLY, PARAMS, Params, Strategy, load_params
from pipeline.tools import experiments, halving
from pipeline.tools.experiments import Read
from pipeline.training.runs import RUNS, Candidates

DEFAULT = "partial_freeze"  # the strategy, if params.yaml has it
WEIGHTS = Path("data/weights")
BEFORE_TRAINING = re.compile(r"\bepoch 0\b")  # in the name of a candidate of a fine-tuned run
log = logging.getLogger("pipeline")


@dataclass(frozen=True)
class Depth:
    """A freeze boundary as params.yaml names it, and the FLOPs of an image before and behind it, forward."""

    freeze_until: str | int
    flops_before: int
    flops_behind: int

    def flops(self, epochs: int) -> int:
        """Of training on one image, about: each epoch takes a new view through the prefix, and trains the suffix."""
        return epochs * (self.flops_before + 3 * self.flops_behind)


@dataclass(frozen=True)
class Result:
    """What training one depth gave: cross-fitted outcomes on validation for each seed, and their figures.

    `head`: outcomes of the head alone; `study`: labels, weights and units of the images; `share`: of the parameters
    that are trained; `train_flops` as in runs.Cost, the mean over the seeds.
    """

    depth: Depth
    experiments: list[str]
    val: list[Outcomes]
    head: list[Outcomes]
    study: Study
    share: float
    train_flops: float

    @cached_property
    def over_head(self) -> Difference:
        """The NLL minus that of the head alone."""
        return self.minus(self.head)

    @property
    def nll(self) -> float:
        """In nats, the mean over the seeds."""
        return self.over_head.value

    @property
    def accuracy(self) -> Interval:
        """With its 95 % interval."""
        runs = intervals.distinct(self.val, intervals.digest_of)
        study = self.study
        hits = [influence.mean(run.predicted == study.label[run.rows], study.weight[run.rows]) for run in runs]
        found = intervals.interval(hits, [run.rows for run in runs], study.unit)
        assert found is not None  # as no run lacks a value
        return found

    def minus(self, other: list[Outcomes]) -> Difference:
        """The NLL minus that of other outcomes on the same images, paired by unit."""
        return paired.compare(self.val, other, self.study)


def show(strategy: str | None, at: Sequence[str], seeds: Sequence[int], n_depths: int, minutes: float | None) -> None:
    """Run the sweep, or read as much of it as there is; print every rung and the proposal.

    ValueError for a strategy, depth or seed that does not fit, and for a workspace that differs from HEAD.
    """
    params = load_params()
    name = choose_strategy(params, strategy)
    seeds = [*dict.fromkeys(seeds)] or [*params.fine_tune.seeds, *params.split.seeds][:1]
    if unsplit := [seed for seed in seeds if seed not in params.split.seeds]:
        raise ValueError(f"--seed {unsplit[0]}: expected some of split.seeds, {[*params.split.seeds]}")
    head = experiments.check_workspace()
    experiments.check_images(params.dataset.path, [f"data/raw/{each}" for each in params.dataset.fetch])
    recipe = params.fine_tune.strategies[name]
    depths = find_depths(params, at, n_depths)
    epochs = halving.epochs_by_rung(len(depths), recipe.epochs, recipe.warmup_epochs + 1)
    trainer = Trainer(params, name, seeds, head, experiments.names())
    start = time.perf_counter()

    def may_enter(entered: list[Depth], new: Depth) -> bool:
        if minutes is None:
            return True
        cost = trainer.cost(new, epochs[0]) + sum(halving.dearest([*entered, new], epochs, trainer.cost))
        return time.perf_counter() - start + halving.estimate_seconds(trainer.timed, cost) <= 60 * minutes

    print(describe(name, seeds, len(depths), epochs), flush=True)
    finalists: list[Result] = []
    for number, (length, by_number) in enumerate(halving.halve(depths, epochs, trainer.train, may_enter)):
        finalists = [*by_number.values()]
        print(f"\n### {length} epoch{'s' if length > 1 else ''}\n\n{as_table(finalists)}", flush=True)
        left_out = [str(depth.freeze_until) for i, depth in enumerate(depths) if i not in by_number]
        if number == 0 and left_out:
            print(f"\nNot tried, because of --minutes {minutes:g}: {', '.join(left_out)}.", flush=True)
    print(f"\n### Proposal\n\n{as_proposal(name, finalists)}")


def choose_strategy(params: Params, name: str | None) -> str:
    """The strategy to vary: it starts from the cached head, and trains from activations cached at its boundary.

    By default partial_freeze, else the first that does so. ValueError if `name` does not, or if there is none.
    """
    strategies = params.fine_tune.strategies
    fitting = [each for each, recipe in strategies.items() if not _misfit(recipe)]
    listed = f"expected one that starts from the cached head and has a boundary cache: {', '.join(fitting) or 'none'}"
    if name is None:
        if not fitting:
            raise ValueError(f"fine_tune.strategies: {listed}")
        return DEFAULT if DEFAULT in fitting else fitting[0]
    if name not in strategies:
        raise ValueError(f"{name} is not in fine_tune.strategies; {listed}")
    if found := _misfit(strategies[name]):
        raise ValueError(f"fine_tune.strategies.{name}: found `{found}`; {listed}")
    return name


def _misfit(recipe: Strategy) -> str:
    wrong = {"init": "random", "boundary_cache": "off", "freeze_until": cuts.NONE}
    return next((f"{key}: {value}" for key, value in wrong.items() if getattr(recipe, key) == value), "")


def find_depths(params: Params, at: Sequence[str], n: int) -> list[Depth]:
    """The freeze boundaries `at`, or at most `n` spread over the depth; first the one that trains least.

    The latter are the last cut points of blocks. Between each and the next, and behind the last, there are convolution
    or linear layers. ValueError for a network without cut points, and for a boundary that is none of the base.
    """
    # Random weights: where the network can be cut does not depend on them, and nothing is downloaded
    choice = params.backbone.model_copy(update={"weights": "random"})
    backbone = backbones.load(choice, params.features.image_size)
    points = cuts.describe(backbone, 1)
    if not points:
        raise ValueError(f"{backbone.name} has no cut point: it can be frozen only whole or not at all")
    place = {cuts.NONE: -1, **{point.name: i for i, point in enumerate(points)}, cuts.ALL: len(points) - 1}
    try:
        end = place[cuts.resolve_cuts(backbone, params.features.cut, params.features.pool)[-1]]
    except ValueError as error:
        raise ValueError(f"params.yaml: features.cut: {error}") from None
    place[cuts.ALL] = end
    flops = [point.flops_before for point in points] + [0]  # the last for none, at place -1

    def depth(freeze_until: str | int, i: int) -> Depth:
        return Depth(freeze_until, flops[i], flops[end] - flops[i])

    if at:
        given = [int(each) if each.isdecimal() else each for each in at]
        found = {}
        for each in given:
            try:
                found[place[cuts.resolve(backbone, each)]] = each
            except ValueError as error:
                raise ValueError(f"--at {each}: {error}") from None
        if behind := [each for i, each in found.items() if i > end]:
            raise ValueError(f"--at {behind[0]}: lies behind features.cut, {params.features.cut}, where the base ends")
        return [depth(found[i], i) for i in sorted(found, reverse=True)]
    last = {point.weight_layers_before: i for i, point in enumerate(points[: end + 1])}  # of equal ones, the cheapest
    blocks = {cuts.block(backbone.module, points[i].name): i for i in last.values()}
    ends = sorted(i for i in blocks.values() if i < end)  # `end` stands for all behind the last layer
    if not ends:
        raise ValueError(f"{backbone.name}: no cut point lies between two of its layers; name one with --at")
    names = {i: block for block, i in blocks.items() if cuts.resolve(backbone, block) == points[i].name}
    return halving.spread([depth(names.get(i, points[i].name), i) for i in reversed(ends)], n)


@dataclass
class Trainer:
    """Trains a depth as an experiment for each seed, or reads those that are there.

    `existing`: names of the finished experiments of the commit `head`; `timed`: cost and seconds of those run here.
    """

    params: Params
    strategy: str
    seeds: Sequence[int]
    head: str
    existing: set[str]
    timed: list[tuple[float, float]] = field(default_factory=list)
    first: Result | None = None

    def name(self, depth: Depth, epochs: int, seed: int) -> str:
        """Of an experiment: all that differs between those of one commit."""
        return f"sweep-{self.strategy}-{depth.freeze_until}-epochs-{epochs}-seed-{seed}"

    def cost(self, depth: Depth, epochs: int) -> float:
        """FLOPs, per image, of what is still to be trained; 0 if all experiments of the depth are there."""
        return depth.flops(epochs) * sum(self.name(depth, epochs, seed) not in self.existing for seed in self.seeds)

    def train(self, depth: Depth, epochs: int) -> Result:
        """Train what is not there, and read it. ValueError if that fails, or if an experiment is of other inputs."""
        cost, start = self.cost(depth, epochs), time.perf_counter()
        for seed in self.seeds:
            name = self.name(depth, epochs, seed)
            if name in self.existing:
                log.info("%s: read", name)
                continue
            experiments.check_workspace(self.head)
            log.info("%s: dvc exp run", name)
            weights = (WEIGHTS / self.params.backbone.weights).as_posix()
            copied = [] if experiments.has(weights) else [weights]
            experiments.run(name, self.changes(depth, epochs, seed), copied, f"fine_tune@{self.strategy}-{seed}")
            self.existing.add(name)
        if cost:
            self.timed.append((cost, time.perf_counter() - start))
        return self.read(depth, epochs)

    def changes(self, depth: Depth, epochs: int, seed: int) -> dict[str, Any]:
        """What the experiment has in params.yaml instead of HEAD's values, by dotted key."""
        tuned, key = self.params.fine_tune, f"fine_tune.strategies.{self.strategy}"
        changes: dict[str, Any] = {f"{key}.freeze_until": depth.freeze_until, f"{key}.epochs": epochs}
        if self.strategy not in tuned.run:  # the matrix of dvc.yaml has no such run
            changes["fine_tune.run"] = [*tuned.run, self.strategy]
        if seed not in tuned.seeds:
            changes["fine_tune.seeds"] = [*self.params.split.seeds]
        return changes

    def read(self, depth: Depth, epochs: int) -> Result:
        """Read a depth's experiments; ValueError if one has other parameters, labels or heads than those before it."""
        names = [self.name(depth, epochs, seed) for seed in self.seeds]
        with experiments.reading(names[0]) as read:
            table = pd.read_csv(BytesIO(read(manifest.LABELS)), dtype=str, keep_default_na=False)
        labels = manifest.make_labels(table)
        study = Study(labels.label, labels.weight, unit_of(labels), metric="nll")
        val, head, described = [], [], []
        for seed, name in zip(self.seeds, names, strict=True):
            check_params(name, self.changes(depth, epochs, seed))
            with experiments.reading(name) as read:
                described.append(json.loads(read(RUNS / self.strategy / f"seed_{seed}" / "run.json")))
                val.append(read_validation(read, self.strategy, seed, study))
                head.append(read_validation(read, HEAD_ONLY, seed, study))
        share = described[0]["cost"]["trainable_params"] / described[0]["network"]["params"]
        flops = float(np.mean([each["cost"]["train_flops"] for each in described]))
        found = Result(depth, names, val, head, study, share, flops)
        self.first = self.first or found
        if inputs(found) != inputs(self.first):
            raise ValueError(
                f"{names[0]} has other labels, images or weights than {self.first.experiments[0]}; "
                "remove the older one with: dvc exp remove"
            )
        return found


def check_params(name: str, changes: Mapping[str, Any]) -> None:
    """ValueError unless params.yaml of an experiment is that of HEAD with these changes."""
    expected, found = (_read_params(revision) for revision in ("HEAD", name))
    for key, value in changes.items():
        *sections, last = key.split(".")
        reduce(getitem, sections, expected)[last] = value
    if found != expected:
        raise ValueError(f"{name} has other parameters than a sweep of HEAD gives it; run: dvc exp remove {name}")


def _read_params(revision: str) -> dict[str, Any]:
    with experiments.reading(revision) as read:
        return YAML(typ="safe", pure=True).load(read(PARAMS))


def read_validation(read: Read, strategy: str, seed: int, study: Study) -> Outcomes:
    """Cross-fitted outcomes of a run on the validation images.

    Epoch 0 is no candidate: the network before training is the same at every depth, and can be better than what a few
    epochs reach. All depths would then look the same.
    """
    folder = RUNS / strategy / f"seed_{seed}"
    names, arrays = json.loads(read(folder / "run.json"))["candidates"], load(read(folder / "predictions.safetensors"))
    fields = ("predicted", "true_log_probability", "positive_log_probability")
    trained = [number for number, name in enumerate(names) if not BEFORE_TRAINING.search(name)]
    candidates = Candidates([names[i] for i in trained], *(arrays[f"candidates_{each}"][trained] for each in fields))
    return outcomes.cross_fitted(arrays["val_rows"], candidates, study.weight, study.unit)


def inputs(result: Result) -> list[bytes]:
    """What all results of one commit share: labels, units, and the predictions of the head alone."""
    study = result.study
    arrays = (study.label, study.weight, study.unit)
    return [*(array.tobytes() for array in arrays), *(intervals.digest_of(run) for run in result.head)]


def describe(strategy: str, seeds: Sequence[int], n_depths: int, epochs: Sequence[int]) -> str:
    """The heading, and what is about to happen."""
    return (
        f"## How deep? {strategy}, seed {', '.join(map(str, seeds))}\n\n"
        f"Freeze boundaries: {n_depths}. Epochs of the rungs: {', '.join(map(str, epochs))}. "
        "The better half by validation NLL enters the next rung."
    )


def as_table(results: Sequence[Result]) -> str:
    """Markdown of one rung, validation figures only."""
    best = min(results, key=lambda one: one.nll)
    lines = [
        "| frozen until | trained share | validation NLL (nats) | minus the lowest (95 % interval) "
        "| validation accuracy (95 % interval) | training TFLOPs | experiment |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results:
        difference = "lowest" if one is best else _signed(one.minus(best.val))
        accuracy = f"{one.accuracy.value:.1%} ({one.accuracy.low:.1%} to {one.accuracy.high:.1%})"
        lines.append(
            f"| {one.depth.freeze_until} | {one.share:.1%} | {one.nll:.3f} | {difference} | {accuracy} "
            f"| {teraflops(round(one.train_flops))} | {', '.join(one.experiments)} |"
        )
    return "\n".join(lines)


def is_worse(one: Result, best: Result) -> bool:
    """Whether the 95 % interval of the difference in NLL lies above 0."""
    return one.minus(best.val).low > 0


def as_proposal(strategy: str, finalists: Sequence[Result]) -> str:
    """The line for params.yaml, and what is known of it: against the runner-up, and against the head alone."""
    chosen = halving.propose(finalists, is_worse)
    others = sorted((one for one in finalists if one is not chosen), key=lambda one: one.nll)
    differences = {f"{one.depth.freeze_until}": chosen.minus(one.val) for one in others}
    n_units = len(np.unique(np.concatenate([chosen.study.unit[run.rows] for run in chosen.val])))
    lines = [
        f"In params.yaml, at fine_tune.strategies.{strategy}:\n",
        f"      freeze_until: {_as_yaml(chosen.depth.freeze_until)}\n",
        f"Its validation NLL (nats, 95 % intervals over {n_units:,} units; negative is better):\n",
        *(f"- minus that of {name}, the runner-up: {_signed(found)}" for name, found in [*differences.items()][:1]),
        f"- minus that of the head alone: {_signed(chosen.over_head)}\n",
    ]
    if unclear := [name for name, found in differences.items() if found.low <= 0 <= found.high]:
        lines.append(f"Validation cannot tell it from {', '.join(unclear)}; the cheapest of them is proposed.")
    if chosen.over_head.low > 0:
        lines.append("It is worse than the head alone, which needs no fine-tuning.")
    elif chosen.over_head.high >= 0:
        lines.append("It is not shown to be better than the head alone, which needs no fine-tuning.")
    if n_units < FEW_UNITS:
        lines.append(f"With fewer than {FEW_UNITS} units, the intervals are rough.")
    return "\n".join(lines)


def _signed(difference: Difference) -> str:
    return f"{difference.difference:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def _as_yaml(freeze_until: str | int) -> str:
    """Quoted where YAML would read the name of a cut point as a number."""
    is_plain = isinstance(freeze_until, int) or freeze_until[0].isalpha() or freeze_until[0] == "_"
    return f"{freeze_until}" if is_plain else f"'{freeze_until}'"
