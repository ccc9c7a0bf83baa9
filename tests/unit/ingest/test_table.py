"""Which file a path in labels.csv means, and what the columns are called."""

from pathlib import Path

import pytest

from pipeline.ingest.listing import find_images

FILES = ("a/x.png", "a/y.JPG", "b/z.tar.png", "b/x.png", "c/cafe\u0301.png", "c/Q.png", "c/q.png", "d/w.png", "d/w.jpg")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        path = Path("data/mine", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return Path("data/mine")


def write(directory: Path, *rows: str, header: str = "path,label") -> Path:
    (directory / "labels.csv").write_text("\n".join([header, *rows, ""]))
    return directory


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("./a/x.png", "a/x.png"),
        ("a//x.png", "a/x.png"),
        ("a/./x.png", "a/x.png"),
        ("a\\x.png", "a/x.png"),
        (".\\a\\x.png", "a/x.png"),
        (" a/x.png ", "a/x.png"),
        ("data/mine/a/x.png", "a/x.png"),
        ("./data/mine/a/x", "a/x.png"),
        ("mine\\a\\x.png", "a/x.png"),
        ("{absolute}/a/x.png", "a/x.png"),
        ("{absolute}//a/./x", "a/x.png"),
        ("a/x", "a/x.png"),
        ("a/y", "a/y.JPG"),
        ("a/y.jpg", "a/y.JPG"),
        ("A/X.PNG", "a/x.png"),
        ("b/z.tar", "b/z.tar.png"),
        ("y.JPG", "a/y.JPG"),
        ("y", "a/y.JPG"),
        ("c/caf\u00e9.png", "c/cafe\u0301.png"),
        ("./c/q.png", "c/q.png"),
    ],
)
def test_a_path_is_taken_as_the_only_file_that_it_can_mean(text: str, meant: str, directory: Path):
    text = text.format(absolute=directory.resolve())
    found = find_images(write(directory, f'"{text}",p', "b/x.png,q"))
    assert set(found.images["path"]) == {meant, "b/x.png"}
    taken = "1 paths of labels.csv were taken as the only file that they can mean"
    assert found.warnings[-1] == f"{taken}, first {text!r} as {meant!r}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x.png", "does not exist; it may mean 'a/x.png', 'b/x.png': write one of them"),
        ("d/w", "does not exist; it may mean 'd/w.jpg', 'd/w.png': write one of them"),
        ("c/q", "does not exist; it may mean 'c/Q.png', 'c/q.png': write one of them"),
        ("a/x.jpg", "does not exist; if 'a/x.png' is meant, write that"),
        ("/home/someone/photos/a/x.png", "leads out of the directory; expected a path below it; if 'a/x.png' is meant"),
        (
            "C:\\photos\\a\\x.png",
            "is no plain path below the directory; expected folder/file, with / only; if 'a/x.png'",
        ),
        ("photos/a/x.png", "does not exist; if 'a/x.png' is meant, write that"),
        ("../mine/a/x.png", "leads out of the directory; expected a path below it"),
        ("{absolute}/a/n.png", "leads out of the directory; expected a path below it; there is no such file"),
        ("nothing", "does not exist"),
        ("https://example.org/a.png", "is no plain path"),
        ("a", "is a directory; expected a file"),
    ],
)
def test_a_path_that_can_mean_several_files_or_none_is_rejected_with_what_would_do(
    text: str, reason: str, directory: Path
):
    found = find_images(write(directory, f"{text.format(absolute=directory.resolve())},p", "b/x.png,p", "a/y.JPG,q"))
    assert set(found.images["path"]) == {"b/x.png", "a/y.JPG"}
    ((_, why),) = found.rejected
    assert why.startswith(reason)


def test_two_rows_that_mean_one_file_are_an_error(directory: Path):
    with pytest.raises(ValueError, match=r"row 3: '\./a/x', which is 'a/x\.png', is in row 2 already"):
        find_images(write(directory, "a/x.png,p", "./a/x,q"))


def test_no_path_is_looked_up_outside_or_through_a_link_out(directory: Path):
    Path("outside").mkdir()
    Path("outside/s.png").write_bytes(b"")
    (directory / "out").symlink_to("../../outside")
    found = find_images(write(directory, "out/s,p", "out\\s.png,p", "a/x.png,p", "b/x.png,q"))
    assert set(found.images["path"]) == {"a/x.png", "b/x.png"}
    assert len(found.rejected) == 2


def test_columns_are_called_as_is_said(directory: Path):
    write(directory, "a/x,breed 1,p7,l", "a/y,breed 2,p8,l", header="id,breed,Group,label")
    found = find_images(directory, columns={"path": "id", "label": "breed", "group": "Group"}).images
    assert found[["path", "label", "group"]].to_numpy().tolist() == [
        ["a/x.png", "breed 1", "p7"],
        ["a/y.JPG", "breed 2", "p8"],
    ]


@pytest.mark.parametrize(
    ("header", "columns", "problem"),
    [
        (
            "id,breed",
            {"path": "id", "label": "Breed"},
            "column 'Breed' (params.yaml: dataset.columns.label) is missing",
        ),
        (
            "id,breed,id",
            {"path": "id", "label": "breed"},
            "column 'id' (params.yaml: dataset.columns.path) is there twice",
        ),
        (
            "id,label",
            {},
            "column 'path' is missing; found id, label; expected path and label, separated by commas, or set",
        ),
        ("Path,label", {}, "or set dataset.columns: {path: 'Path'}"),
        ("path, label", {}, "or set dataset.columns: {label: ' label'}"),
        ("path\tlabel", {}, "columns separated by tabs (path\\tlabel); expected commas: save it so"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_the_way_out(
    header: str, columns: dict[str, str], problem: str, directory: Path
):
    with pytest.raises(ValueError, match=r"labels\.csv: column") as error:
        find_images(write(directory, header=header), columns=columns)
    assert problem in str(error.value)


def test_columns_without_a_table_are_an_error(directory: Path):
    with pytest.raises(ValueError, match=r"dataset\.columns: found \{'path': 'id'\}, but .*labels\.csv does not exist"):
        find_images(directory, columns={"path": "id"})
