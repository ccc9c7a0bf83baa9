"""README.md and docs/ show what the default run reported, and name only what exists."""

import re
from pathlib import Path

import pytest

from pipeline import __main__ as command_line

PATHS = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
PAGES = {path.as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
EVERYTHING = "\n".join(PAGES.values())


def test_the_table_is_that_of_the_committed_run():
    table = Path("reports/comparison.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- comparison -->\n(.*?)<!-- /comparison -->", PAGES["README.md"], re.DOTALL)
    assert shown.strip() == table.strip()


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z-]+)", EVERYTHING, re.MULTILINE)
    assert named
    assert set(named) <= targets


def test_every_command_that_is_named_exists():
    named = set(re.findall(r"python -m pipeline ([a-z][a-z-]*)", EVERYTHING))
    assert named
    assert named <= set(command_line.cli.commands)


def test_every_file_that_is_named_exists_or_is_ignored():
    lines = Path(".gitignore").read_text(encoding="utf-8").splitlines()
    ignored = tuple(line.removeprefix("/") for line in lines if line.startswith("/"))
    for name in re.findall(r"`((?:data|reports|models|pipeline|benchmarks|tests)/[a-z_./]*)`", EVERYTHING):
        assert Path(name).exists() or name.startswith(ignored) or name == "data/mine", name


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: str):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith("http"):
            continue
        name, _, heading = link.partition("#")
        target = Path(page).parent / name if name else Path(page)
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
            assert heading in anchors, link
