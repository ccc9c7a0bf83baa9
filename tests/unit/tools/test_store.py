"""store: the commands show, check and remove; what is damaged or foreign is set aside when the store is opened."""

import builtins
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pipeline import files, logs
from pipeline.__main__ import cli
from pipeline.features import hdf5
from pipeline.features import store as feature_store
from pipeline.features.store import Store
from pipeline.features.views import AUGMENTED
from tests.factories import REPOSITORY, fill_store, store_key
from tests.factories import STORE_ROWS as ROWS
from tests.factories import STORE_VALUES as VALUES

DAY = 86_400

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the store lies."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "repository"))
    return tmp_path / "repository" / "data" / ".feature_store"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """What `python -m pipeline store …` prints; `answer` is what is typed, None where nobody is there."""

    def call(*arguments: str, answer: str | None = None) -> str:
        def typed(_prompt: str) -> str:
            if answer is None:
                raise EOFError
            return answer

        monkeypatch.setattr(builtins, "input", typed)
        cli(["store", *arguments], standalone_mode=False)
        return capsys.readouterr().out

    return call


def unused_for(directory: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(directory / "key.json", (then, then))


def flip_a_bit(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 8
    shard.write_bytes(content)


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-5])


def empty(shard: Path) -> None:
    shard.write_bytes(b"")


def bring_one_of_another_key(shard: Path) -> None:
    (foreign, *_) = fill_store(store_key("torchvision/resnet50"))
    shard.unlink()
    shutil.copyfile(foreign, shard.with_name(foreign.name))


def write_another_width(shard: Path) -> None:
    shard.unlink()
    hdf5.write_shard(shard.parent, shard.parent.name, ROWS[:4], np.zeros((4, 7), np.float32), np.zeros(4, np.float32))


def write_another_type(shard: Path) -> None:
    shard.unlink()
    hdf5.write_shard(shard.parent, shard.parent.name, ROWS[:4], np.zeros((4, 5), np.float16), np.zeros(4, np.float32))


def write_views_that_belong_elsewhere(shard: Path) -> None:
    shard.unlink()
    rows = [(name, AUGMENTED) for name, _ in ROWS[:4]]
    hdf5.write_shard(shard.parent, shard.parent.name, rows, VALUES[:4], np.zeros(4, np.float32))


def hide_a_link_and_name_it_rightly(shard: Path) -> None:
    with h5py.File(shard, "r+") as file:
        file.move("features", "elsewhere")
        file["features"] = h5py.SoftLink("/elsewhere")
    shard.rename(shard.with_stem(hashlib.sha256(shard.read_bytes()).hexdigest()))


def put_a_directory(shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


def put_a_pipe(shard: Path) -> None:
    shard.unlink()
    os.mkfifo(shard)


def link_to_it(shard: Path) -> None:
    shard.rename(shard.with_suffix(".elsewhere"))
    shard.symlink_to(shard.with_suffix(".elsewhere"))


def link_to_itself(shard: Path) -> None:
    shard.unlink()
    shard.symlink_to(shard)


@pytest.mark.parametrize(
    "damage",
    [
        *(put_a_directory, put_a_pipe, link_to_it, link_to_itself),
        *(flip_a_bit, truncate, empty, bring_one_of_another_key, write_another_width, write_another_type),
        *(write_views_that_belong_elsewhere, hide_a_link_and_name_it_rightly),
    ],
)
def test_shard_that_cannot_be_trusted_is_set_aside_and_the_others_stay(
    caplog: pytest.LogCaptureFixture, run: Run, damage: Callable[[Path], None]
) -> None:
    fill_store(store_key())
    directory = feature_store.root() / store_key().name(0)
    victim = next(path for path in directory.glob("*.h5") if hdf5.read_shard(path).rows == ROWS[:4])
    damage(victim)
    assert run("status")
    with suppress(ValueError):  # verify knows no widths
        run("verify")
    with caplog.at_level(logging.WARNING, "pipeline"):
        store = Store(store_key())
    assert store.missing(ROWS) == ROWS[:4]
    assert np.array_equal(store.read(ROWS[4:]), VALUES[4:])
    (aside,) = directory.glob("*.damaged")
    assert f"{aside.with_suffix('.h5')} is damaged" in caplog.text
    assert "its rows are computed again" in caplog.text
    assert len(list(directory.glob("*.h5"))) == 2
    store.write(ROWS[:4], VALUES[:4])
    assert np.array_equal(Store(store_key()).read(ROWS), VALUES)
    run("gc", "--days", "1", "--yes")
    assert not [*directory.glob("*.damaged")]
    assert np.array_equal(Store(store_key()).read(ROWS), VALUES)


def test_empty_store(run: Run, root: Path) -> None:
    assert run("status") == f"{root}: 0 keys, 0.0 MB\n"
    assert run("verify") == f"{root}: 0 shards, 0 damaged\n"
    assert run("gc", "--days", "0") == f"{root}: nothing to remove\n"


def test_status_describes_the_keys(run: Run, root: Path) -> None:
    fill_store(store_key())
    fill_store(store_key("timm/vgg16", store_dtype="fp16"), [(name, AUGMENTED) for name, _ in ROWS])
    unused_for(root / store_key().name(0), 40)
    newer, older, total = run("status").splitlines()
    assert newer.startswith(
        f"{store_key('timm/vgg16', store_dtype='fp16').name(AUGMENTED)}  12 rows, 0.0 MB, used today: timm/vgg16"
    )
    assert "augmented views, openvino fp32 on cpu, stored as fp16" in newer
    assert older.startswith(f"{store_key().name(0)}  12 rows, 0.0 MB, used 40 days ago: torchvision/resnet18")
    assert "(weights c0ffee00) at layer3, pool avg, 224 px, symmetries, openvino fp32 on cpu, stored as fp32" in older
    assert total.startswith(f"{root}: 2 keys, ")


def test_status_counts_what_is_damaged(run: Run) -> None:
    (shard, aside, _) = fill_store(store_key())
    shard.write_bytes(b"")
    aside.replace(aside.with_suffix(".damaged"))
    assert "  4 rows, 0.0 MB, used today, 2 damaged or left over: " in run("status")


def test_verify_finds_what_is_damaged_and_fails(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (shard, *_) = fill_store(store_key())
    assert run("verify").endswith(": 3 shards, 0 damaged\n")
    flip_a_bit(shard)
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    with pytest.raises(SystemExit) as caught:
        logs.run(lambda: cli(["store", "verify"], standalone_mode=False))
    assert caught.value.code == ("error: 1 damaged shards; the next run that uses them computes their rows again")
    printed = capsys.readouterr().out
    assert f"{shard}: its bytes do not have the SHA-256" in printed
    assert printed.endswith(": 3 shards, 1 damaged\n")
    assert shard.exists(), "verify only looks"


def test_damage_that_changes_no_time_is_found_by_verify_and_then_by_the_next_run(run: Run) -> None:
    (shard, *others) = fill_store(store_key())
    Store(store_key()).read(ROWS)  # all are whole, which is remembered
    status = shard.stat()
    with shard.open("r+b") as file:  # the same inode
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Store(store_key()).missing(ROWS) == []
    with pytest.raises(ValueError, match="1 damaged shards; the next run that uses them computes their rows again"):
        run("verify")
    missing = Store(store_key()).missing(ROWS)
    assert len(missing) == 4
    assert not shard.exists()
    assert all(path.exists() for path in others)


def test_status_describes_pixels(run: Run) -> None:
    description = {"pixels": "crop", "shape": [4, 4, 3], "interpolation": "bicubic", "store_dtype": "uint8"}
    description["jpeg_decoding"] = "fast"
    key = replace(store_key(), description=description, row_shape=(4, 4, 3))
    Store(key).write(ROWS, np.zeros((12, 4, 4, 3), np.uint8))
    assert "12 rows, 0.0 MB, used today: pixels (crop), 4 x 4 x 3, bicubic, JPEGs fast" in run("status")


def test_verify_finds_a_shard_of_another_key(run: Run) -> None:
    shards = fill_store(store_key())
    (foreign, *_) = fill_store(store_key("timm/vgg16"))
    shutil.copyfile(foreign, shards[0].with_name(foreign.name))
    with pytest.raises(ValueError, match="1 damaged shards"):
        run("verify")


def test_gc_removes_what_was_not_used_for_so_many_days_and_nothing_else(run: Run, root: Path) -> None:
    fill_store(store_key())
    fill_store(store_key("timm/vgg16"))
    unused_for(root / store_key().name(0), 31)
    unused_for(root / store_key("timm/vgg16").name(0), 29)
    printed = run("gc", "--days", "30", "--yes")
    assert f"{store_key().name(0)}  0.0 MB, used 31 days ago: torchvision/resnet18" in printed
    assert "1 keys and 0 left-overs of others" in printed
    assert [path.name for path in root.iterdir()] == [store_key("timm/vgg16").name(0)]
    assert Store(store_key("timm/vgg16")).missing(ROWS) == []
    assert Store(store_key()).missing(ROWS) == ROWS


@pytest.mark.parametrize(
    ("answer", "is_removed"), [("y", True), ("YES ", True), ("", False), ("n", False), ("x", False)]
)
def test_gc_asks_first(run: Run, root: Path, answer: str, is_removed: bool) -> None:
    fill_store(store_key())
    printed = run("gc", "--days", "0", answer=answer)
    assert (root / store_key().name(0)).exists() != is_removed
    assert ("nothing was removed" in printed) != is_removed


def test_gc_leaves_a_key_that_is_used_while_it_asks(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_store(store_key())
    unused_for(root / store_key().name(0), 31)
    monkeypatch.setattr(builtins, "input", lambda _: Store(store_key()) and "y")
    cli(["store", "gc", "--days", "30"], standalone_mode=False)
    assert Store(store_key()).missing(ROWS) == []


def test_file_that_a_run_takes_away_while_we_look_is_no_error(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = fill_store(store_key())
    for name in (".x.h5.1.tmp", "y.damaged"):
        (root / store_key().name(0) / name).write_bytes(b"x")
    stat = Path.stat

    def last_look(path: Path, **how: Any) -> os.stat_result:
        found = stat(path, **how)
        if path.suffix in (".tmp", ".damaged") or path in shards:
            path.unlink()
        return found

    monkeypatch.setattr(Path, "stat", last_look)
    assert run("status")
    assert run("verify")
    assert run("gc", "--days", "30", "--yes")


def test_gc_removes_nothing_without_a_standard_input(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_store(store_key())
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match=r"nobody answered; expected --yes"):
        cli(["store", "gc", "--days", "0"], standalone_mode=False)
    assert Store(store_key()).missing(ROWS) == []


def test_gc_removes_nothing_if_nobody_answers(run: Run, root: Path) -> None:
    fill_store(store_key())
    with pytest.raises(ValueError, match=r"gc asks before it removes anything, and nobody answered; expected --yes"):
        run("gc", "--days", "0")
    assert Store(store_key()).missing(ROWS) == []


@pytest.mark.parametrize("days", ["-1", "nan"])
def test_gc_wants_a_number_of_days(run: Run, root: Path, days: str) -> None:
    fill_store(store_key())
    with pytest.raises(ValueError, match=rf"--days: found {days}, expected 0 or more"):
        run("gc", "--days", days, "--yes")
    assert (root / store_key().name(0)).exists()


def test_gc_removes_left_overs_of_writers_that_are_gone(run: Run, root: Path) -> None:
    (shard, *_) = fill_store(store_key())
    damaged, old, young = (shard.parent / name for name in ("x.damaged", ".x.h5.1.tmp", ".y.h5.2.tmp"))
    for path in (damaged, old, young):
        path.write_bytes(b"x")
    then = time.time() - 7200
    os.utime(old, (then, then))
    assert "0 keys and 2 left-overs of others" in run("gc", "--days", "30", "--yes")
    assert [path.exists() for path in (damaged, old, young)] == [False, False, True]
    assert Store(store_key()).missing(ROWS) == []


@pytest.mark.parametrize("content", [[], 3, {}, {"schema": 4}, {"schema": 4, "augmentation": None, "preprocessing": 1}])
def test_key_of_any_content_is_shown_as_unknown_even_if_its_name_fits(run: Run, root: Path, content: object) -> None:
    files.write_json(root / files.digest(content)[:32] / "key.json", content)
    assert ", used today: " in run("status")
    assert run("verify").endswith("0 shards, 0 damaged\n")
    assert run("gc", "--days", "0", "--yes")
    assert not [*root.iterdir()]


@pytest.mark.parametrize("content", [None, "", "[]", "3", "{}", json.dumps({"schema": 1}), "not JSON"])
def test_directory_that_is_no_key_of_now_is_shown_left_alone_and_collected(
    run: Run, root: Path, content: str | None
) -> None:
    other = root / "0123456789abcdef"
    other.mkdir(parents=True)
    (other / "shard.h5").write_bytes(b"old")
    if content is not None:
        (other / "key.json").write_text(content)
    assert "0123456789abcdef  1 shards, 0.0 MB, used today: unknown" in run("status")
    assert run("verify").endswith("0 shards, 0 damaged\n")
    assert "nothing to remove" in run("gc", "--days", "1", "--yes")
    for path in other.iterdir():
        then = time.time() - 2 * DAY
        os.utime(path, (then, then))
    run("gc", "--days", "1", "--yes")
    assert not other.exists()


def test_ages_are_those_of_the_file_system_whatever_our_clock_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard, *_) = fill_store(store_key())
    being_written = shard.parent / ".x.h5.1.tmp"
    being_written.write_bytes(b"x")
    unused_for(shard.parent, 0.5)
    monkeypatch.setattr(time, "time", lambda: os.stat(being_written).st_mtime + 5 * DAY)
    assert "used today" in run("status")
    assert "nothing to remove" in run("gc", "--days", "1", "--yes")
    assert being_written.exists()


def test_the_store_lies_where_params_yaml_says(
    run: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shard, *_) = fill_store(store_key())
    text = (REPOSITORY / "params.yaml").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for place, expected in (("sto re/é", root.parents[1] / "sto re/é"), (tmp_path / "team", tmp_path / "team")):
        Path("params.yaml").write_text(text.replace("  store: null ", f"  store: {place} "), encoding="utf-8")
        assert run("status") == f"{expected}: 0 keys, 0.0 MB\n"
        shutil.copytree(root, expected)
        assert f"{expected}: 1 keys" in run("status")
        assert run("verify") == f"{expected}: 3 shards, 0 damaged\n"
    run("gc", "--days", "0", "--yes")
    assert (shard.exists(), [*expected.iterdir()]) == (True, [])


def test_gc_leaves_what_else_lies_in_the_directory(run: Run, root: Path) -> None:
    fill_store(store_key())
    others = [root / name / "file" for name in ("photos", "data", "0123", f"{'a' * 32}.old", "A" * 32)]
    for path in others:
        path.parent.mkdir()
        path.write_bytes(b"mine")
    assert "1 keys" in run("status")
    run("gc", "--days", "0", "--yes")
    assert {*root.iterdir()} == {path.parent for path in others}


@pytest.mark.parametrize("name", ["thesis/data.txt", "photo.png"])
def test_gc_leaves_a_directory_whose_name_fits_but_not_what_is_in_it(run: Run, root: Path, name: str) -> None:
    fill_store(store_key())
    other = root / ("0123456789abcdef" * 2) / name
    other.parent.mkdir(parents=True)
    other.write_bytes(b"mine")
    assert "1 keys" in run("status")
    run("gc", "--days", "0", "--yes")
    assert [*root.iterdir()] == [root / ("0123456789abcdef" * 2)]
    assert other.read_bytes() == b"mine"


def test_key_of_another_version_is_shown_as_such(run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_store, "SCHEMA", 1)
    fill_store(store_key())
    monkeypatch.undo()
    monkeypatch.setenv("DVC_ROOT", str(root.parents[1]))
    assert "3 shards, 0.0 MB, used today: of another version of this pipeline" in run("status")


def test_gc_removes_nothing_outside_the_store(run: Run, root: Path, tmp_path: Path) -> None:
    fill_store(store_key())
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "photo.png").write_bytes(b"mine")
    os.utime(outside / "photo.png", (0, 0))
    (root / "link").symlink_to(outside)
    run("gc", "--days", "0", "--yes")
    assert (outside / "photo.png").exists()
    assert not (root / store_key().name(0)).exists()


def test_checkpoints_of_interrupted_training_are_counted_and_the_old_ones_collected(run: Run, root: Path) -> None:
    fill_store(store_key())
    checkpoints = root.with_name(".checkpoints")
    checkpoints.mkdir()
    then = time.time() - 31 * DAY
    for name, is_old in (("0a1b", True), ("0a1c", False), (".0a1d.c0ffee.tmp", True)):
        (checkpoints / name).write_bytes(bytes(10**5))
        if is_old:
            os.utime(checkpoints / name, (then, then))
    assert run("status").splitlines()[-1] == f"{checkpoints}: 3 files of interrupted training, 0.3 MB"
    assert "0 keys and 2 left-overs of others and of training, 0.2 MB" in run("gc", "--days", "30", "--yes")
    assert [path.name for path in checkpoints.iterdir()] == ["0a1c"]
    assert run("gc", "--days", "30", "--yes") == f"{root}: nothing to remove\n"


def test_what_cannot_be_removed_is_named_with_the_words_of_the_system(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))

    fill_store(store_key())
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(OSError, match=r"could not be removed \(\[Errno 13\] Permission denied: "):
        cli(["store", "gc", "--days", "0", "--yes"], standalone_mode=False)
