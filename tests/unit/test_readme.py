"""What README.md and docs/ name exists, and what they show of the default run is what the default run reported."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.__main__ import cli

README = Path("README.md")
PAGES = [README, *sorted(Path("docs").glob("*.md")), Path("data/weights/README.md")]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
PARAMS = YAML(typ="safe", pure=True).load(Path("params.yaml"))
every_page = pytest.mark.parametrize("page", PAGES, ids=str)


def code(page: Path) -> list[str]:
    """Blocks and spans of code."""
    text = TEXT[page]
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return blocks + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def found(page: Path, pattern: str) -> set[str]:
    """What the pattern's group matches in the page's code."""
    return {name for span in code(page) for name in re.findall(pattern, span)}


def test_the_table_is_that_of_the_committed_run():
    table = Path("reports/comparison.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- comparison -->\n(.*?)<!-- /comparison -->", TEXT[README], re.DOTALL)
    assert shown.strip() == table.strip()


def test_the_rows_of_dvc_metrics_show_are_those_of_the_committed_run():
    rows = re.findall(
        r"^(reports/metrics/\w+\.json) +(\d+) +([\d.]+) +([\d.]+) +(\d+) +([\d.]+)$", TEXT[README], re.MULTILINE
    )
    assert len(rows) == len([*Path("reports/metrics").iterdir()])
    for path, *shown in rows:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        keys = ("seeds", "test_accuracy", "test_nll", "train_flops", "val_accuracy")
        assert [
            f"{found[key]:.5f}".rstrip("0") if isinstance(found[key], float) else f"{found[key]}" for key in keys
        ] == [value.rstrip("0") if "." in value else value for value in shown]


@every_page
def test_every_make_target_that_is_named_exists(page: Path):
    targets = set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert found(page, r"^make ([a-z-]+)") | found(page, r"\nmake ([a-z-]+)") <= targets


@every_page
def test_every_command_that_is_named_exists(page: Path):
    assert found(page, r"python -m pipeline ([a-z][a-z-]*)") <= {*cli.commands}
    for name in found(page, r"-m ((?:pipeline\.stages|benchmarks)\.\w+)"):
        assert Path(name.replace(".", "/") + ".py").is_file(), name


@every_page
def test_every_file_that_is_named_exists_or_is_made(page: Path):
    ignored = re.findall(r"^/(\w.*)$", Path(".gitignore").read_text(encoding="utf-8"), re.MULTILINE)
    reports = re.findall(r"- (reports/[\w.]+)", Path("dvc.yaml").read_text(encoding="utf-8"))
    made = (*ignored, *reports, "data/mine", "data/weights/ours")
    for name in found(page, r"(?<![\w./-])((?:benchmarks|data|docs|models|pipeline|reports|tests|\.github)/[\w./]*)"):
        assert Path(name).exists() or name.startswith(made), name


@every_page
def test_every_parameter_that_is_named_exists(page: Path):
    in_file = {*leaves(PARAMS)}
    defaults = PARAMS["fine_tune"]["defaults"]
    strategies = {name: defaults for name in PARAMS["fine_tune"]["strategies"]}
    merged = in_file | {*leaves({"fine_tune": {"strategies": strategies}})}
    sections = "|".join(PARAMS)
    named = found(page, rf"(?<![-\w./+])((?:{sections})\.[a-z_.]*[a-z_])(?![\w<.])")
    assert named <= merged
    assert found(page, r"-S '?([a-z][\w.]*)=") <= in_file  # DVC refuses other keys without a +


def leaves(value: dict, name: str = "") -> Iterator[str]:
    """Every dotted name in a mapping of mappings."""
    for key, inner in value.items():
        yield f"{name}{key}"
        if isinstance(inner, dict):
            yield from leaves(inner, f"{name}{key}.")


@every_page
def test_every_link_leads_somewhere(page: Path):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXT[page]):
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.is_file(), target
        headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, target


def test_the_readme_links_every_page():
    assert all(f"({page})" in TEXT[README] for page in PAGES if page.parent == Path("docs"))


def test_the_map_of_the_readme_has_every_package_and_stage_in_order():
    dvc = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))
    stages = re.findall(r"^\| `(\w+)` \|", TEXT[README], re.MULTILINE)
    assert stages == [*dvc["stages"]]
    packages = re.findall(r"^\| `(\w+)/` \|", TEXT[README], re.MULTILINE)
    assert {*packages} == {path.parent.name for path in Path("pipeline").glob("*/__init__.py")}
    described = Path("pipeline/__init__.py").read_text(encoding="utf-8")
    places = [described.index(f"\n    {name} ") for name in packages]
    assert places == sorted(places)
