"""The page that `dvc plots show` fills."""

import re
from pathlib import Path

import pytest

from pipeline.tools import plots_page
from tests.factories import REPOSITORY


@pytest.mark.slow
def test_the_page_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    plots_page.write()
    page = plots_page.PAGE.read_text(encoding="utf-8")
    assert page.count("{plot_divs}") == 1
    assert "{scripts}" not in page, "DVC would put scripts from the web there"
    assert "vegaEmbed" in page
    assert not re.findall(r'<script[^>]+src=|<link[^>]+href="http', page)


def test_dvc_uses_the_page_and_git_ignores_it():
    assert f"html_template = {plots_page.PAGE.relative_to('.dvc')}" in (REPOSITORY / ".dvc/config").read_text("utf-8")
    assert f"/{plots_page.PAGE}\n" in (REPOSITORY / ".gitignore").read_text("utf-8")
