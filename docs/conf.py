"""Sphinx configuration: Markdown pages, generated tables, captured outputs, formulas as SVG."""

import os
import sys
from pathlib import Path

from loraq_sim import __version__

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "extensions"))
# Tables of captured commands are as wide as the page.
os.environ["COLUMNS"] = "110"

project = "loraq-sim"
author = "the loraq-sim authors"
project_copyright = "2026, the loraq-sim authors"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxcontrib.bibtex",
    "svg_math",
    "page_sources",
    "docstrings",
]
exclude_patterns = ["_build", "extensions", "README.md"]

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

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "unsrt"
bibtex_reference_style = "author_year"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = False
napoleon_use_rtype = False
# A single backtick in a docstring is code that links where there is something to link to.
default_role = "py:obj"
# Quotes only: dashes would eat the hyphens of --options.
smartquotes_action = "q"

# `-n` checks every reference. Types in docstrings say shapes and dtypes ("ndarray of shape (M, K),
# int8"), which are no Python names, and backticks also name arguments.
nitpick_ignore_regex = [("py:class", ".*"), ("py:obj", ".*"), ("py:exc", ".*")]
