"""What is left out of a directory: files of the system, and those that fit a pattern."""

from pathlib import Path

import pytest

from pipeline.ingest.directory import fits
from pipeline.ingest.listing import find_images


def touch(directory: Path, *names: str) -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


@pytest.mark.parametrize(
    ("pattern", "fitting", "others"),
    [
        ("masks", ["masks", "a/masks"], ["masks2", "a/masks/b"]),
        ("masks/", ["masks", "a/masks"], ["masks2"]),
        ("*_depth.png", ["a/1_depth.png"], ["a/1.png", "a/1_depth.png.txt"]),
        ("a/b", ["a/b"], ["x/a/b", "a", "b"]),
        ("./a/b", ["a/b"], ["x/a/b"]),
        ("/a", ["a"], ["x/a"]),
        ("a/*", ["a"], ["b", "x/a"]),
        ("a/**", ["a"], ["b"]),
        ("**/a/b", ["a/b", "x/a/b"], ["a", "b"]),
        ("cat [1]", ["cat [1]", "cat 1"], ["cat 2"]),
        ("cafe\u0301", ["caf\u00e9"], ["cafe"]),
    ],
)
def test_a_pattern_is_of_a_name_or_of_a_path(pattern: str, fitting: list[str], others: list[str]):
    assert all(fits(path, pattern) for path in fitting)
    assert not any(fits(path, pattern) for path in others)


@pytest.mark.parametrize(
    "name",
    [
        *("@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", ".Trash-1000", "__MACOSX", ".ipynb_checkpoints"),
        *("@Recycle", "System Volume Information", "__pycache__", ".git", "@__thumb"),
    ],
)
@pytest.mark.parametrize("place", ["", "cat/", "cat/deep/"])
def test_what_file_servers_and_desktops_put_there_is_counted_and_no_class(name: str, place: str, tmp_path: Path):
    touch(tmp_path, "cat/1.png", "dog/1.png", f"{place}{name}/1.png/THUMB.jpg", f"{place}{name}/2.png", "dog/Thumbs.db")
    found = find_images(tmp_path)
    assert list(found.images["path"]) == ["cat/1.png", "dog/1.png"]
    assert found.skipped == {"hidden or of the system": 3}
    assert found.warnings[0] == f"3 hidden or system files were left out: {name} (2), Thumbs.db (1)"


def test_what_fits_a_pattern_is_counted_and_a_pattern_that_fits_nothing_is_named(tmp_path: Path):
    touch(tmp_path, "cat/1.png", "cat/1_mask.png", "dog/1.png", "masks/a/1.png", "masks/2.png")
    found = find_images(tmp_path, ["masks", "*_mask.png", "mask"])
    assert list(found.images["path"]) == ["cat/1.png", "dog/1.png"]
    assert found.skipped == {"left out by dataset.exclude": 3}
    assert found.warnings == [
        "3 files were left out by dataset.exclude: masks (2), *_mask.png (1)",
        "dataset.exclude: 'mask' fits no file and no directory",
    ]


def test_a_pattern_leaves_out_rows_of_a_table_too(tmp_path: Path):
    touch(tmp_path, "a.png", "b.png", "old/c.png", "old/d.png", ".hidden.png")
    (tmp_path / "labels.csv").write_text("path,label\na.png,x\nb.png,y\nold/c.png,x\n.hidden.png,y\n")
    found = find_images(tmp_path, ["old"])
    assert list(found.images["path"]) == [".hidden.png", "a.png", "b.png"]
    assert found.skipped == {"left out by dataset.exclude": 2}
    assert found.warnings == [
        "2 files were left out by dataset.exclude: old (2)",
        "1 rows of labels.csv were left out by dataset.exclude",
        "1 images that labels.csv lists are hidden or of the system (thumbnails?), and used",
    ]


def test_a_placeholder_of_a_file_that_is_in_icloud_is_rejected_and_not_hidden(tmp_path: Path):
    touch(tmp_path, "cat/1.png", "cat/.2.png.icloud", "dog/1.png")
    ((path, reason),) = find_images(tmp_path).rejected
    assert (path, "download it" in reason) == ("cat/.2.png.icloud", True)
