"""hdf5: what was written is read, and whatever else a file may be is refused in one line."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.features import hdf5
from pipeline.features.hdf5 import Row
from tests.factories import provenance

ROWS: list[Row] = [(f"{number:064x}", number % 3) for number in range(6)]
VALUES = np.arange(6 * 4, dtype=np.float32).reshape(6, 2, 2)
ROUNDING = np.linspace(0, 1, 6, dtype=np.float32)
CONTENTS = {
    "features": VALUES,
    "rounding": ROUNDING,
    "sha256": np.array([name.encode() for name, _ in ROWS], "S64"),
    "view": np.array([view for _, view in ROWS], np.int32),
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hdf5.write_shard(tmp_path_factory.mktemp("store"), "key", ROWS, VALUES, ROUNDING)


def test_shard_is_read_as_it_was_written(shard: Path) -> None:
    found = hdf5.read_shard(shard)
    assert (found.path, found.key, found.rows) == (shard, "key", ROWS)
    assert (found.shape, found.dtype) == ((2, 2), np.float32)
    assert np.array_equal(found.rounding, ROUNDING)
    assert np.array_equal(np.memmap(shard, found.dtype, "r", found.offset, VALUES.shape), VALUES)


def test_threads_write_shards_at_the_same_time(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(40, 500, 20)).astype(np.float32)

    def write(number: int) -> Path:
        rows = [(f"{number:032x}{row:032x}", 0) for row in range(500)]
        return hdf5.write_shard(tmp_path, "key", rows, values[number], np.zeros(500, np.float32))

    with ThreadPoolExecutor(8) as pool:
        assert len({*pool.map(write, range(40))}) == 40


def test_shard_is_named_by_its_bytes_which_its_rows_decide(shard: Path, tmp_path: Path) -> None:
    assert shard.stem == hashlib.sha256(shard.read_bytes()).hexdigest()
    again = hdf5.write_shard(tmp_path, "key", ROWS, VALUES, ROUNDING)
    assert (again.name, again.read_bytes()) == (shard.name, shard.read_bytes())
    assert hdf5.write_shard(tmp_path, "other", ROWS, VALUES, ROUNDING).name != shard.name
    assert hdf5.write_shard(tmp_path, "key", ROWS, VALUES + 1, ROUNDING).name != shard.name


def refused(path: Path, reason: str | None = None) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        hdf5.read_shard(path)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_bit_can_flip_unnoticed(shard: Path, tmp_path_factory: pytest.TempPathFactory, position: float, bit: int):
    content = bytearray(shard.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    damaged = tmp_path_factory.mktemp("damaged") / shard.name
    damaged.write_bytes(content)
    refused(damaged, "do not have the SHA-256 that it is named by")


@pytest.mark.parametrize("size", [0, 1, 100, 2048, -1])
def test_truncated_or_extended_shard_is_refused(shard: Path, tmp_path: Path, size: int) -> None:
    for content in (shard.read_bytes()[:size], shard.read_bytes() + b"x"):
        (tmp_path / shard.name).write_bytes(content)
        refused(tmp_path / shard.name)


def test_shard_under_another_name_is_refused(shard: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{'0' * 64}.h5"
    path.write_bytes(shard.read_bytes())
    refused(path)


def values_of(file: h5py.File, name: str) -> np.ndarray:
    return file[name][()]  # pyright: ignore[reportIndexIssue, reportReturnType]


def soft_link(file: h5py.File, name: str) -> None:
    file["real"] = file[name]
    del file[name]
    file[name] = h5py.SoftLink("/real")


def external_link(file: h5py.File, name: str) -> None:
    del file[name]
    file[name] = h5py.ExternalLink("other.h5", name)


def external_storage(file: h5py.File, name: str) -> None:
    values = values_of(file, name)
    del file[name]
    file.create_dataset(name, values.shape, values.dtype, external=[("params.yaml", 0, values.nbytes)])


def virtual(file: h5py.File, name: str) -> None:
    values = values_of(file, name)
    del file[name]
    layout = h5py.VirtualLayout(values.shape, values.dtype)
    layout[:] = h5py.VirtualSource("other.h5", name, values.shape)
    file.create_virtual_dataset(name, layout)


def replaced_by(**how: object) -> Callable[[h5py.File, str], None]:
    def replace(file: h5py.File, name: str) -> None:
        values = values_of(file, name)
        del file[name]
        file.create_dataset(name, **{"data": values, **how})  # pyright: ignore[reportArgumentType]

    return replace


def group(file: h5py.File, name: str) -> None:
    del file[name]
    file.create_group(name)


def absent(file: h5py.File, name: str) -> None:
    del file[name]


def one_more(file: h5py.File, name: str) -> None:
    file[f"{name}2"] = 1


def hidden_group(file: h5py.File, name: str) -> None:
    file.create_group(f"more/{name}")


def name_that_is_no_text(file: h5py.File, name: str) -> None:
    file[name.encode() + b"\xff"] = 1


def attribute(file: h5py.File, name: str) -> None:
    file.attrs["more"] = name


def attribute_of_the_dataset(file: h5py.File, name: str) -> None:
    file[name].attrs["more"] = 1


def no_attribute(file: h5py.File, name: str) -> None:
    del name
    for key in list(file.attrs):
        del file.attrs[key]


def numeric_attribute(file: h5py.File, name: str) -> None:
    del name
    for key in list(file.attrs):
        file.attrs[key] = 3


def other_shape(file: h5py.File, name: str) -> None:
    values = values_of(file, name)[:-1]
    del file[name]
    file[name] = values


CHANGES: dict[str, Callable[[h5py.File, str], None]] = {
    change.__name__: change
    for change in (
        *(soft_link, external_link, external_storage, virtual, group, absent, one_more, hidden_group),
        *(name_that_is_no_text, attribute, attribute_of_the_dataset, no_attribute, numeric_attribute, other_shape),
    )
} | {
    "text": replaced_by(data=["x"] * 6, dtype=h5py.string_dtype()),
    "objects": replaced_by(data=None, shape=(6,), dtype=h5py.vlen_dtype(np.float32)),
    "compound": replaced_by(data=np.zeros(6, [("a", "f4"), ("b", "f4")])),
    "references": replaced_by(data=None, shape=(6,), dtype=h5py.ref_dtype),
    "complex": replaced_by(data=np.zeros(6, np.complex64)),
    "chunked": replaced_by(chunks=True),
    "compressed": replaced_by(chunks=True, compression="gzip"),
    "scalar": replaced_by(data=np.float32(1)),
    "no space yet": replaced_by(data=None, shape=(6, 2, 2), dtype=np.float32),
}


def under_its_right_name(directory: Path, change: Callable[[h5py.File], None] = lambda _: None) -> Path:
    """A shard that is changed before its bytes are digested."""
    draft = directory / "draft.h5"
    with h5py.File(draft, "w") as file:
        for key, values in CONTENTS.items():
            file[key] = values
        file.attrs["key"] = "key"
        change(file)
    return draft.rename(directory / f"{hashlib.sha256(draft.read_bytes()).hexdigest()}.h5")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["features", "sha256"])
def test_shard_of_any_other_structure_is_refused_even_if_its_name_fits(tmp_path: Path, change: str, name: str) -> None:
    assert hdf5.read_shard(under_its_right_name(tmp_path)).rows == ROWS, "unchanged, it is one"
    refused(under_its_right_name(tmp_path, lambda file: CHANGES[change](file, name)))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"view": np.full(6, 0.5, np.float32)}, id="views that are fractions"),
        pytest.param({"view": np.full(6, b"1")}, id="views that are texts"),
        pytest.param({"view": np.full(6, -1, np.int32)}, id="views below 0"),
        pytest.param({"rounding": np.full(6, b"0")}, id="errors that are texts"),
        pytest.param({"rounding": np.full(6, np.nan, np.float32)}, id="errors that are no numbers"),
        pytest.param({name: values.flat[0] for name, values in CONTENTS.items()}, id="numbers"),
    ],
)
def test_shard_whose_arrays_make_no_sense_is_refused_even_if_its_name_fits(
    tmp_path: Path, other: dict[str, np.ndarray]
) -> None:
    def change(file: h5py.File) -> None:
        for name, values in other.items():
            del file[name]
            file[name] = values

    refused(under_its_right_name(tmp_path, change))


# data/features.h5

NAMES = [f"{number:064x}" for number in range(6)]
EVALUATION = -VALUES[:, :1]


def write(path: Path) -> None:
    hdf5.write_features(path, iter([VALUES[:4], VALUES[4:]]), iter([EVALUATION]), NAMES, provenance())


def test_features_are_read_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "features.h5")
    found = hdf5.read_features(tmp_path / "features.h5")
    assert isinstance(found.values, np.memmap)
    assert isinstance(found.evaluation, np.memmap)
    assert np.array_equal(found.values, VALUES)
    assert np.array_equal(found.evaluation, EVALUATION)
    assert (found.sha256, found.provenance) == (NAMES, provenance())


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["features", "evaluation_features", "sha256"])
def test_file_that_is_not_as_this_pipeline_writes_it_is_refused(tmp_path: Path, change: str, name: str) -> None:
    path = tmp_path / "features.h5"
    write(path)
    with h5py.File(path, "r+") as file:
        CHANGES[change](file, name)
    with pytest.raises(ValueError, match=r"features\.h5: not written by this pipeline .* dvc repro extract") as caught:
        hdf5.read_features(path)
    assert "\n" not in str(caught.value)


def test_views_that_are_the_same_are_stored_once(tmp_path: Path) -> None:
    once, twice = tmp_path / "once.h5", tmp_path / "twice.h5"
    large = np.repeat(VALUES, 100, axis=2)
    hdf5.write_features(once, [large], None, NAMES, provenance())
    hdf5.write_features(twice, [large], [large], NAMES, provenance())
    found = hdf5.read_features(once)
    assert np.array_equal(found.values, large)
    assert np.array_equal(found.evaluation, large)
    assert twice.stat().st_size - once.stat().st_size >= large.nbytes


@pytest.mark.parametrize("other", [EVALUATION[:5], EVALUATION[..., :1], EVALUATION.astype(np.float16), EVALUATION[0]])
def test_evaluation_features_that_do_not_fit_are_refused(tmp_path: Path, other: np.ndarray) -> None:
    path = tmp_path / "features.h5"
    write(path)
    with h5py.File(path, "r+") as file:
        del file["evaluation_features"]
        file["evaluation_features"] = other
    with pytest.raises(
        ValueError, match=r"features\.h5: not written by this pipeline \(its arrays have the (shapes|types)"
    ):
        hdf5.read_features(path)


def test_missing_features_name_the_stage_that_writes_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"features\.h5: not found; run: dvc repro extract$"):
        hdf5.read_features(tmp_path / "features.h5")


def test_features_without_views_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "features.h5"
    hdf5.write_features(path, [VALUES.reshape(6, 4)], [VALUES.reshape(6, 4)], NAMES, provenance())
    with pytest.raises(ValueError, match="not written by this pipeline"):
        hdf5.read_features(path)


@pytest.mark.parametrize("provenance", ["{", "", "3", "null", "[]", "{}"])
def test_features_with_a_broken_provenance_are_refused(tmp_path: Path, provenance: str) -> None:
    path = tmp_path / "features.h5"
    write(path)
    with h5py.File(path, "r+") as file:
        file.attrs["provenance"] = provenance
    with pytest.raises(ValueError, match="not written by this pipeline"):
        hdf5.read_features(path)


@pytest.mark.parametrize("damaged", [lambda _: b"", lambda _: b"no HDF5", lambda content: content[:-1000]])
def test_file_that_is_no_hdf5_or_truncated_is_refused(tmp_path: Path, damaged: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "features.h5"
    write(path)
    path.write_bytes(damaged(path.read_bytes()))
    with pytest.raises(ValueError, match="not written by this pipeline"):
        hdf5.read_features(path)


def test_features_that_the_system_does_not_open_are_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """h5py raises so for a file of another user, and for one that another program has locked."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Unable to synchronously open file (errno = 13, error message = 'Permission denied')")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(OSError, match=r"features\.h5: \[Errno 13\] Unable .* 'Permission denied'\)$"):
        hdf5.read_features(tmp_path / "features.h5")
