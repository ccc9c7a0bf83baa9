"""What the README says of the default run is what the default run said."""

import re
from pathlib import Path

README = Path("README.md").read_text(encoding="utf-8")


def test_the_table_is_that_of_the_committed_run():
    table = Path("reports/comparison.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- comparison -->\n(.*?)<!-- /comparison -->", README, re.DOTALL)
    assert shown.strip() == table.strip()


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets


def test_every_file_that_is_named_exists_or_is_ignored():
    lines = Path(".gitignore").read_text(encoding="utf-8").splitlines()
    ignored = tuple(line.removeprefix("/") for line in lines if line.startswith("/"))
    for name in re.findall(r"`((?:data|reports|models|pipeline)/[a-z_./]*)`", README):
        assert Path(name).exists() or name.startswith(ignored) or name == "data/mine", name
