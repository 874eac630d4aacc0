"""Sphinx configuration: Markdown pages, formulas as SVG."""

import sys
from pathlib import Path

from loraq_sim import __version__

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "extensions"))

project = "loraq-sim"
author = "the loraq-sim authors"
project_copyright = "2026, the loraq-sim authors"
version = release = __version__

extensions = [
    "myst_parser",
    "svg_math",
    "page_sources",
]
root_doc = "README"
exclude_patterns = ["_build", "extensions"]

html_math_renderer = "svg"
html_theme = "furo"
html_title = f"loraq-sim {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "tango"
pygments_dark_style = "github-dark"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

# Quotes only: dashes would eat the hyphens of --options.
smartquotes_action = "q"
