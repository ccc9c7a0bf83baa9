"""Reading files once, remembering them, and files that end the process that decodes them."""

import io
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.dataset import decoding
from pipeline.ingest import indexing
from pipeline.ingest.indexing import Inspected, inspect

TIME_STAMP_NS = indexing.TIME_STAMP_NS
OLD = 1_600_000_000_000_000_000  # ns: long before any test


def picture(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def age(*paths: Path) -> None:
    for path in paths:
        os.utime(path, ns=(OLD, OLD))


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A directory `images` with a bad file among good ones, below the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr(indexing, "TIME_STAMP_NS", -(10**12))  # nobody can make a file that changed long ago
    Path("images").mkdir()
    for number in range(4):
        Path("images", f"{number}.png").write_bytes(picture(number))
    Path("images", 'a\r\nb,"c".png').write_bytes(b"no image")
    found = sorted(path.name for path in Path("images").iterdir())
    age(*(Path("images", name) for name in found))
    return found


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of every file that is read."""
    seen: list[str] = []
    inspect_file = indexing.inspect_file

    def noted(path: str) -> Inspected:
        seen.append(Path(path).name)
        return inspect_file(path)

    monkeypatch.setattr(indexing, "inspect_file", noted)
    return seen


IMAGES = Path("images")


def test_a_file_is_described_by_its_content(tmp_path: Path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(80, dtype=np.uint8).reshape(8, 10) * 3).save(path, "JPEG", exif=exif)
    found = indexing.inspect_file(str(path))
    assert found.signature
    sha256 = decoding.sha256(path.read_bytes())
    expected = Inspected("", sha256, "JPEG", "L", "8", "10", "6", found.signature, "", found.sharpness)
    assert found == expected


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("absent", "cannot be read: No such file"), ("a pipe", "not a file any more"), ("large", "expected at most")],
)
def test_what_cannot_be_read_is_reported_and_does_not_hang(kind: str, reason: str, tmp_path: Path):
    path = tmp_path / "file.png"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "large":
        path.write_bytes(b"\x89PNG")
        os.truncate(path, indexing.LARGEST_FILE + 1)
    assert reason in indexing.inspect_file(str(path)).reason


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "none"),
        (b"<annotation/>", "none"),
        (b"P1 lesion", "none"),
        (b"BMW", "none"),
        (b"Python", "none"),
        (b"\0\0\0\x18ftypmp42", "none"),
        (b"\xff\xd8\xff\xe0 cut", ""),
        (b"\x89PNG\r\n", ""),
        (b"II*\0", ""),
        (b"version https://git-lfs.github.com/spec/v1", ""),
        (b"\0\0\0\x18ftypheic", ""),
    ],
)
def test_a_file_that_begins_like_no_image_is_told_from_a_broken_image(content: bytes, kind: str, tmp_path: Path):
    (tmp_path / "file").write_bytes(content)
    found = indexing.inspect_file(str(tmp_path / "file"))
    assert (bool(found.reason), found.format) == (True, kind)


def test_of_a_large_file_that_begins_like_no_image_only_the_start_is_read(tmp_path: Path):
    path = tmp_path / "film.mp4"
    path.write_bytes(b"\0\0\0\x18ftypmp42")
    os.truncate(path, 100 * indexing.LARGEST_FILE)  # sparse
    assert indexing.inspect_file(str(path)).format == indexing.NO_IMAGE


def test_unchanged_files_are_not_read_again(names: list[str], read: list[str]):
    first = inspect(IMAGES, names, 0)
    assert read == names
    assert inspect(IMAGES, names, 0) == first
    assert read == names
    assert inspect(IMAGES, names[::-1], 0) == first[::-1]
    assert read == names


@pytest.mark.parametrize("change", ["size", "mtime", "in place", "inode", "new", "renamed"])
def test_a_file_that_changed_is_read_again_and_no_other(change: str, names: list[str], read: list[str]):
    inspect(IMAGES, names, 0)
    read.clear()
    path = IMAGES / "1.png"
    if change == "size":
        path.write_bytes(picture(1) + b"tail")
        age(path)
    elif change == "mtime":
        os.utime(path, ns=(OLD, OLD + 1))
    elif change == "in place":  # size, mtime and inode stay
        with path.open("r+b") as file:
            file.write(picture(1)[:-1] + b"x")
        age(path)
    elif change == "inode":
        (IMAGES / "other").write_bytes(picture(1))
        (IMAGES / "other").replace(path)
        age(path)
    elif change == "new":
        path = IMAGES / "new.png"
        path.write_bytes(picture(9))
    else:
        path = path.rename(IMAGES / "z.png")
    names = sorted(entry.name for entry in IMAGES.iterdir())
    found = inspect(IMAGES, names, 0)
    assert read == [path.name]
    assert found == [indexing.inspect_file(str(IMAGES / name)) for name in names]


def test_verifying_reads_all_and_finds_what_changed_but_looks_unchanged(
    names: list[str], read: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    stamp = indexing._stamp  # of a file system that does not know when a file changed
    monkeypatch.setattr(indexing, "_stamp", lambda path: (found := stamp(path)) and found._replace(ctime_ns=0))
    before = inspect(IMAGES, names, 0)
    path = IMAGES / "2.png"
    content = bytearray(picture(2))
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    age(path)
    read.clear()
    assert inspect(IMAGES, names, 0) == before, "it looks as before"
    assert read == []
    found = inspect(IMAGES, names, 0, is_verifying=True)
    assert read == names
    assert found != before
    assert "1 files changed although they look unchanged, first images/2.png" in caplog.text
    read.clear()
    assert inspect(IMAGES, names, 0) == found
    assert read == []


def test_a_file_changed_while_it_may_be_read_is_not_remembered(
    names: list[str], read: list[str], monkeypatch: pytest.MonkeyPatch
):
    inspect(IMAGES, names, 0)
    time.sleep(2 * TIME_STAMP_NS / 1e9)
    os.utime(IMAGES / "3.png")
    monkeypatch.setattr(indexing, "TIME_STAMP_NS", TIME_STAMP_NS)
    inspect(IMAGES, names, 0)
    read.clear()
    inspect(IMAGES, names, 0)
    assert read == ["3.png"]


def test_a_file_that_could_not_be_read_is_tried_again(names: list[str], read: list[str]):
    (IMAGES / "1.png").unlink()
    assert inspect(IMAGES, names, 0)[names.index("1.png")].reason == "cannot be read: No such file or directory"
    (IMAGES / "1.png").write_bytes(picture(1))
    age(IMAGES / "1.png")
    assert not inspect(IMAGES, names, 0)[names.index("1.png")].reason


def test_edited_code_reads_all(names: list[str], read: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    inspect(IMAGES, names, 0)
    edited = tmp_path / "decoding.py"
    edited.write_text(Path(decoding.__file__).read_text().replace("not an image", "no image"))
    monkeypatch.setattr(indexing, "CODE", (str(edited), *indexing.CODE[1:]))
    inspect(IMAGES, names, 0)
    assert read == names * 2


def test_the_memory_lies_at_the_root_of_dvc(names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    inspect(IMAGES, names, 0)
    assert len(list((tmp_path / "main/data/.index").iterdir())) == 1
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"[]", b'{"0.png": 1}', b'{"0.png": [[1], ["a"]]}', b'{"a'])
def test_a_damaged_memory_costs_time_and_no_result(damage: bytes, names: list[str], read: list[str]):
    before = inspect(IMAGES, names, 0)
    (memory,) = Path("data/.index").iterdir()
    content = memory.read_bytes()
    memory.write_bytes(damage)
    assert inspect(IMAGES, names, 0) == before
    assert read == names * 2
    assert memory.read_bytes() == content


def test_an_interruption_keeps_what_was_read(names: list[str], read: list[str], monkeypatch: pytest.MonkeyPatch):
    inspect_file = indexing.inspect_file

    def interrupted(path: str) -> Inspected:
        if path.endswith("2.png"):
            raise KeyboardInterrupt
        return inspect_file(path)

    monkeypatch.setattr(indexing, "inspect_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inspect(IMAGES, names, 0)
    monkeypatch.setattr(indexing, "inspect_file", inspect_file)
    n_read = len(read)
    inspect(IMAGES, names, 0)
    assert read[n_read:] == names[names.index("2.png") :]


def many(directory: Path, n: int) -> list[str]:
    directory.mkdir()
    for number in range(n):
        (directory / f"{number:03}.png").write_bytes(picture(number))
    return [f"{number:03}.png" for number in range(n)]


def test_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names = many(tmp_path / "many", 100)
    alone = inspect(tmp_path / "many", names, 0, is_verifying=True)
    assert inspect(tmp_path / "many", names, 2, is_verifying=True) == alone


@pytest.mark.parametrize("at", [(0,), (40, 41, 99)])
def test_a_file_that_crashes_the_decoder_is_refused_and_the_others_are_read(
    at: Sequence[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    names = many(tmp_path / "many", 100)
    expected = inspect(tmp_path / "many", names, 0, is_verifying=True)
    crashing = [names[row] for row in at]
    examine, main = decoding.examine, os.getpid()
    fatal = {(tmp_path / "many" / name).read_bytes() for name in crashing}

    def crash(content: bytes, least_side: int) -> decoding.Decoded:
        if content in fatal:
            assert os.getpid() != main
            os.kill(os.getpid(), signal.SIGKILL)
        return examine(content, least_side)

    monkeypatch.setattr(decoding, "examine", crash)
    bystander = get_context("fork").Process(target=signal.pause, daemon=True)
    bystander.start()
    try:
        found = inspect(tmp_path / "many", names, 2, is_verifying=True)
        assert bystander.is_alive(), "only its own processes are ended"
    finally:
        bystander.kill()
        bystander.join()
    for name, one, other in zip(names, found, expected, strict=True):
        if name in crashing:
            assert one.reason.startswith("ended the process that decoded it")
        else:
            assert one == other
