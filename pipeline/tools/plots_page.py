"""The page that `dvc plots show` fills: .dvc/plots/page.html.

It carries Vega, Vega-Lite and Vega-Embed itself, as vl-convert bundles them, so that it works without a network; DVC's
own page loads them from one. To be run again when vl-convert-python changes; .dvc/config names the page.
"""

from pathlib import Path

import vl_convert

from pipeline.comparison.plots import VEGA_LITE
from pipeline.files import write_text

PAGE = Path(".dvc/plots/page.html")
SKELETON = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>Plots</title>
{refresh_tag}
<style>
  body { display: flex; flex-wrap: wrap; gap: 2rem; margin: 1.5rem; font-family: sans-serif; background: white; }
  body > div { max-width: 100%; overflow-x: auto; }
</style>
<script>
LIBRARIES
</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def page() -> str:
    """The page; DVC puts the plots in place of {plot_divs}."""
    libraries = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    return SKELETON.replace("LIBRARIES", libraries.replace("</script", r"<\/script"))


def write() -> None:
    """Write the page."""
    write_text(PAGE, page())
