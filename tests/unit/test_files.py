"""Files are whole or absent."""

import errno
import json
import os
from pathlib import Path

import pytest

from pipeline.files import digest, replacing, shared, write_json, write_text


def test_a_file_appears_with_its_directories(tmp_path: Path):
    write_text(tmp_path / "new/folder/file", "é\n")
    assert (tmp_path / "new/folder/file").read_bytes() == b"\xc3\xa9\n"
    assert [path.name for path in (tmp_path / "new/folder").iterdir()] == ["file"]


def test_the_file_is_the_old_one_until_the_block_has_ended(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_an_exception_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_what_is_no_number(value: float, tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "file.json", {"deep": [value]})
    assert list(tmp_path.iterdir()) == []


def test_json_reads_back_and_keeps_letters(tmp_path: Path):
    value = {"größe": [1, 0.1, None, "é"], "a": {}}
    write_json(tmp_path / "file.json", value)
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "größe" in text
    assert text.endswith("}\n")


def test_json_holds_a_list_of_numbers_on_one_line_and_texts_as_they_are(tmp_path: Path):
    value = {"confusion": [[10, -2], [3, 4.5e-07]], "names": ["[\n1\n]", "[ 1 ]"], "none": [], "mixed": [None, 1]}
    write_json(tmp_path / "file.json", value)
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert '"confusion": [\n    [10, -2],\n    [3, 4.5e-07]\n  ]' in text


def test_a_digest_depends_on_values_but_not_on_the_order_of_keys():
    assert digest({"a": 1, "b": [2.5, None]}) == digest({"b": [2.5, None], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest([1, 2]) != digest([2, 1])
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_experiments_share_the_directories_of_the_main_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    assert shared(".index") == Path("data/.index")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert shared(".index") == tmp_path / "data/.index"


def test_the_error_for_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*features\.h5'"),
        replacing(tmp_path / "features.h5"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not [*tmp_path.iterdir()]
