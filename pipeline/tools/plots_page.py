"""The page that `dvc plots show` fills: .dvc/plots/page.html, which .dvc/config names and git ignores.

It contains Vega, Vega-Lite and Vega-Embed, as vl-convert bundles them, so that it works without a network; DVC's own
page loads them from the web. `make venv` writes it.
"""

from pathlib import Path

import vl_convert

from pipeline.comparison.plots import VEGA_LITE
from pipeline.files import write_text

PAGE = Path(".dvc/plots/page.html")
SKELETON = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>Plots</title>
{refresh_tag}
<style>
  body { display: flex; flex-wrap: wrap; gap: 2rem; margin: 1.5rem; font-family: sans-serif; background: white; }
  body > div { max-width: 100%; overflow-x: auto; }
</style>
<script>LIBRARIES</script>
<body>
{plot_divs}
</body>
</html>
"""


def page() -> str:
    """The page; DVC replaces {plot_divs} by the plots."""
    libraries = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    return SKELETON.replace("LIBRARIES", libraries.replace("</script", r"<\/script"))


def write() -> None:
    """Write the page."""
    write_text(PAGE, page())
