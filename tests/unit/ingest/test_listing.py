"""Listing a user's directory."""

import os
import re
from pathlib import Path

import pytest

from pipeline.ingest.listing import find_images


def touch(directory: Path, *names: str) -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(name))


def with_table(directory: Path, table: str) -> Path:
    touch(directory, "a.png", "b.png")
    (directory / "labels.csv").write_bytes(table.encode())
    return directory


# class directories


def test_each_sub_directory_is_a_class_and_its_files_are_sorted_by_path(tmp_path: Path):
    touch(tmp_path, "dog/2.png", "cat/z.png", "dog/1.png", "dog/deep/er/3.png")
    found = find_images(tmp_path).images
    assert list(found["path"]) == ["cat/z.png", "dog/1.png", "dog/2.png", "dog/deep/er/3.png"]
    assert list(found["label"]) == ["cat", "dog", "dog", "dog"]
    assert set(found["weight"]) == {"1"}
    assert set(found["group"]) | set(found["stratum"]) | set(found["subset"]) | set(found["split"]) == {""}


def test_hidden_and_loose_files_are_left_out_with_a_warning(tmp_path: Path):
    touch(tmp_path, "cat/1.png", "cat/.DS_Store", "cat/.thumbs/2.png", ".git/3.png", "README.md", "cat/Thumbs.db")
    found = find_images(tmp_path)
    assert list(found.images["path"]) == ["cat/1.png"]
    assert found.rejected == []
    assert found.warnings == [
        "1 files lie in no class directory and were left out: 'README.md'",
        "4 hidden or system files were left out: .DS_Store (1), .git (1), .thumbs (1), Thumbs.db (1)",
    ]


def test_what_is_no_file_within_the_directory_is_rejected_with_a_reason(tmp_path: Path):
    directory, outside = tmp_path / "data", tmp_path / "outside"
    touch(directory, "cat/1.png")
    touch(outside, "secret.png")
    links = {
        "cat/link.png": "1.png",
        "cat/out.png": "../../outside/secret.png",
        "cat/broken.png": "nowhere.png",
        "cat/circle.png": "circle.png",
        "cat/folder": ".",
        "outer": "../outside",
        "linked": "cat",
    }
    for name, target in links.items():
        (directory / name).symlink_to(target)
    os.mkfifo(directory / "cat/pipe")
    found = find_images(directory)
    assert list(found.images["path"]) == ["cat/1.png", "cat/link.png"]
    assert dict(found.rejected) == {
        "cat/out.png": "is a link that leads out of the directory",
        "cat/broken.png": "is a broken link",
        "cat/circle.png": "is a link that runs in a circle",
        "cat/folder": "is a link to a directory, which is not followed",
        "cat/pipe": "is a pipe; expected a file",
        "outer": "is a link that leads out of the directory",
        "linked": "is a link to a directory, which is not followed",
    }
    assert found.warnings == [
        "3 directories and all images in them were left out: 'cat/folder' (is a link to a directory, which is not "
        "followed), 'linked' (is a link to a directory, which is not followed), 'outer' (is a link that leads out of "
        "the directory); put a copy in place of a link (cp -rL), rename, or make readable"
    ]


@pytest.mark.parametrize("split", ["", "train/"])
def test_a_class_whose_name_is_not_utf8_is_a_warning(split: str, tmp_path: Path):
    touch(tmp_path, f"{split}cat/1.png", f"{split}cat/2.png")
    touch(tmp_path, f"{split}{os.fsdecode(b'caf' + bytes([0xE9]))}/1.png")
    (warning,) = find_images(tmp_path).warnings
    assert warning.startswith("1 directories and all images in them were left out: ")
    assert "(has a name that is not UTF-8); put" in warning
    assert "xe9" in warning


def test_an_empty_class_directory_is_named(tmp_path: Path):
    touch(tmp_path, "cat/1.png", "dog/.hidden")
    with pytest.raises(ValueError, match=r"dog: class without an image"):
        find_images(tmp_path)


@pytest.mark.parametrize("name", ["NA", "null", "1", "1.0", "True"])
def test_a_class_may_be_called_anything(name: str, tmp_path: Path):
    touch(tmp_path, f"{name}/1.png")
    assert list(find_images(tmp_path).images["label"]) == [name]


def test_a_directory_without_images_says_what_is_expected(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no image found; expected a sub-directory per class, or a labels\.csv"):
        find_images(tmp_path)


def test_a_missing_directory_names_the_key(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"dataset\.path: .*nowhere is not a directory"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "nowhere.dvc").touch()
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a directory; run: dvc pull .*nowhere"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="~/photos is not a directory; write the whole path"):
        find_images(Path("~/photos"))


# splits


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Train", "Validation", "TEST"), ("training", "valid", "testing")]
)
def test_directories_of_splits_hold_the_classes(names: tuple[str, str, str], tmp_path: Path):
    for name in names:
        touch(tmp_path, f"{name}/cat/1.png", f"{name}/dog/deep/2.png")
    touch(tmp_path, f"{names[0]}/loose.png")
    found = find_images(tmp_path)
    rows = {(row["path"], row["label"], row["split"]) for row in found.images.to_dict("records")}
    assert rows == {
        (f"{name}/{rest}", label, split)
        for name, split in zip(names, ("train", "val", "test"), strict=True)
        for rest, label in (("cat/1.png", "cat"), ("dog/deep/2.png", "dog"))
    }
    assert found.warnings == [f"1 files lie in no class directory and were left out: '{names[0]}/loose.png'"]


def test_train_alone_or_with_one_other_split_is_a_split_and_among_other_names_a_class(tmp_path: Path):
    touch(tmp_path, "train/cat/1.png", "train/dog/1.png")
    assert set(find_images(tmp_path).images["split"]) == {"train"}
    touch(tmp_path, "test/cat/1.png")
    assert set(find_images(tmp_path).images["split"]) == {"train", "test"}
    (tmp_path / "test").rename(tmp_path / "plane")
    (tmp_path / "plane" / "cat").rename(tmp_path / "plane" / "jet")
    found = find_images(tmp_path).images
    assert set(found["label"]) == {"train", "plane"}
    assert set(found["split"]) == {""}


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["train/cat/1.png", "test/cat/1.png", "extra/1.png"], "extra/ lies beside test/, train/; expected train/,"),
        (["train/cat/1.png", "val/cat/1.png", "valid/cat/1.png"], "train/, val/, valid/ are not one of each split"),
        (["train/cat/1.png", "test/1.png"], "test: no class directory in it; expected one per class"),
        (["train/cat/1.png", "val/cat/1.png", "val/dog/.hidden"], "val/dog: class without an image"),
    ],
)
def test_splits_that_cannot_be_meant_are_refused(names: list[str], problem: str, tmp_path: Path):
    touch(tmp_path, *names)
    with pytest.raises(ValueError, match=re.escape(problem)):
        find_images(tmp_path)


def test_a_table_may_call_the_splits_by_their_other_names(tmp_path: Path):
    found = find_images(with_table(tmp_path, "path,label,split\na.png,cat,Validation\nb.png,dog,training\n"))
    assert list(found.images["split"]) == ["val", "train"]


# labels.csv


def test_a_table_decides_over_directories_and_its_rows_are_sorted_by_path(tmp_path: Path):
    touch(tmp_path, "unlisted/1.png")
    found = find_images(with_table(tmp_path, "path,label,weight,note\nb.png,dog,0.5,x\na.png,cat,2,y\n")).images
    assert found.to_dict("list") == {
        "path": ["a.png", "b.png"],
        "label": ["cat", "dog"],
        "weight": ["2", "0.5"],
        "group": ["", ""],
        "stratum": ["", ""],
        "subset": ["", ""],
        "split": ["", ""],
    }


def test_every_optional_column_is_taken_over(tmp_path: Path):
    table = "subset,split,stratum,group,weight,label,path\nsun,test,s,g,3,cat,a.png\n"
    (found,) = find_images(with_table(tmp_path, table)).images.to_dict("records")
    assert found == {
        "path": "a.png",
        "label": "cat",
        "weight": "3",
        "group": "g",
        "stratum": "s",
        "subset": "sun",
        "split": "test",
    }


def test_a_table_as_excel_saves_it_is_read(tmp_path: Path):
    found = find_images(with_table(tmp_path, "\ufeffpath,label\r\na.png,grün\r\nb.png,NA\r\n")).images
    assert list(found["path"]) == ["a.png", "b.png"]
    assert list(found["label"]) == ["grün", "NA"]


@pytest.mark.parametrize("weight", ["nan", "0", "-1", "inf", "", "heavy", "1,5", "1_0"])
def test_a_weight_is_a_number_above_zero(weight: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"labels\.csv: row 3: weight '.*'; expected a number above 0"):
        find_images(with_table(tmp_path, f'path,label,weight\na.png,cat,1\nb.png,dog,"{weight}"\n'))


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("c.png", "does not exist"),
        ("", "is no plain path"),
        ("../a.png", "leads out of the directory"),
        ("x/../a.png", "leads out of the directory"),
        ("a.png/", "is no plain path"),
        ("/etc/passwd", "leads out of the directory"),
        ("x\\a.png", "is no plain path"),
        ("a\0.png", "is no plain path"),
        ("folder", "is a directory; expected a file"),
        ("broken.png", "is a broken link"),
        ("circle/c.png", "is a link that runs in a circle"),
        ("pipe.png", "is a pipe; expected a file"),
        ("out.png", "a link that leads out of the directory"),
        ("out/secret.png", "a link that leads out of the directory"),
        ("out/nowhere.png", "a link that leads out of the directory"),
    ],
)
def test_a_path_that_is_absent_or_leads_out_is_rejected_with_a_reason(path: str, problem: str, tmp_path: Path):
    directory, outside = tmp_path / "data", tmp_path / "outside"
    touch(outside, "secret.png")
    touch(directory, "folder/x.png")
    (directory / "out.png").symlink_to(outside / "secret.png")
    (directory / "out").symlink_to(outside)
    (directory / "broken.png").symlink_to("nowhere")
    (directory / "circle").symlink_to("circle")
    os.mkfifo(directory / "pipe.png")
    found = find_images(with_table(directory, f"path,label\na.png,cat\n{path},dog\nb.png,dog\n"))
    assert list(found.images["path"]) == ["a.png", "b.png"]
    ((rejected, reason),) = found.rejected
    assert rejected == path
    assert problem in reason


def test_a_class_all_of_whose_rows_are_rejected_is_named_with_the_first(tmp_path: Path):
    table = "path,label\na.png,cat\nx.png,dog\ny.png,cat\n/z.png,dog\n"
    with pytest.raises(
        ValueError, match=r"labels\.csv: no row of class 'dog' can be used \(of 2\), first row 3: 'x"
    ) as e:
        find_images(with_table(tmp_path, table))
    assert "first row 3: 'x.png' does not exist; expected paths below the directory, such as 'a.png'" in str(e.value)


def test_a_table_all_of_whose_rows_are_rejected_says_so(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"labels\.csv: no row can be used \(of 2\), first row 2: '\.\./a\.png' leads out"
    ):
        find_images(with_table(tmp_path, "path,label\n../a.png,cat\nx.png,dog\n"))


def test_nothing_outside_is_looked_at_for_a_path_that_leads_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    looked, outside = [], tmp_path / "outside"
    touch(outside, "secret.png")
    directory = with_table(tmp_path / "data", "path,label\na.png,cat\n../outside/secret.png,cat\nout/secret.png,cat\n")
    (directory / "out").symlink_to(outside)
    for name in ("stat", "lstat", "open"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda path, *a, real=real, **k: (looked.append(os.fspath(path)), real(path, *a, **k))[1]
        )
    assert len(find_images(directory).rejected) == 2
    assert str(directory / "labels.csv") in looked
    assert str(outside / "secret.png") not in looked


def test_a_link_within_the_directory_is_an_image(tmp_path: Path):
    (tmp_path / "c.png").symlink_to("a.png")
    assert list(find_images(with_table(tmp_path, "path,label\nc.png,cat\n")).images["path"]) == ["c.png"]


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("file,label\na.png,cat\n", "column 'path' is missing; found file, label; expected path and label"),
        ("path,class\na.png,cat\n", "column 'label' is missing; found path, class; expected path and label"),
        ("path,label\na.png,cat\nb.png,dog\na.png,dog\n", "row 4: 'a.png' is in row 2 already; expected it once"),
        ("path,label\na.png,\n", "row 2: label is empty"),
        ("path,label,split\na.png,cat,dev\n", "row 2: split 'dev'; expected train, val, test, unused or nothing"),
        ("", "column 'path' is missing"),
        ("path,label,path\na.png,cat,b.png\n", "column 'path' is there twice"),
        ("path;label\na.png;cat\n", "columns separated by semicolons (path;label); expected commas: save it so"),
        ("path,label\na.png,cat\nb.png,dog,1,2\n", "row 3: 4 fields; expected 2, as in row 1"),
        ("path,label\n\na.png,cat\n\nb.png\n", "row 5: 1 fields; expected 2, as in row 1"),
        ('path,label\n"a.png,cat\n', "not a CSV file in UTF-8"),
        ("path,label\na.png, \n", "row 2: label is empty"),
        ("path,label\n/a.png,\n", "row 2: label is empty"),
        ("path,label,weight\n/a.png,cat,0\n", "row 2: weight '0'"),
        ("path,label\na.png,cat\n/b.png,cat\n/b.png,cat\n", "row 4: '/b.png' is in row 3 already"),
    ],
)
def test_a_table_with_a_mistake_is_refused(table: str, problem: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"labels\.csv: ") as error:
        find_images(with_table(tmp_path, table))
    assert problem in str(error.value)


def test_a_table_in_another_encoding_is_refused(tmp_path: Path):
    with_table(tmp_path, "")
    (tmp_path / "labels.csv").write_bytes("path,label\na.png,grün\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"labels\.csv: not a CSV file in UTF-8"):
        find_images(tmp_path)


@pytest.mark.parametrize("header", ["path,label,Group", "path,label, split", "path,label,group,group"])
def test_a_mistyped_optional_column_is_an_error_and_not_left_out(tmp_path: Path, header: str):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "labels.csv").write_text(f"{header}\na.png,x{',g' * (header.count(',') - 1)}\n")
    with pytest.raises(ValueError, match=r"labels\.csv: column '.+'; expected '.+', once$"):
        find_images(tmp_path)


def test_train_beside_a_directory_with_the_same_classes_is_no_class(tmp_path: Path):
    for name in ("train/a/1.png", "train/b/2.png", "dev/a/3.png", "dev/b/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="dev/ lies beside train/"):
        find_images(tmp_path)
