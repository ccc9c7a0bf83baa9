"""The templates of the page and of evaluation.html, which share their head, colours, style and thumbnails."""

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from pipeline.report import charts

HERE = Path(__file__).parent  # of the templates, the style and the script
PALETTES = {"light": charts.LIGHT, "dark": charts.DARK}


def load(name: str, **filters: Callable[..., str]) -> Template:
    """A template that escapes text, and takes an unknown name for an error."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"palettes": PALETTES, "style": Markup((HERE / "page.css").read_text(encoding="utf-8"))}
    environment.filters |= filters
    return environment.get_template(name)
