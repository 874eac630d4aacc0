"""Formulas as SVG drawn while the pages are built, so that they need no network and no script.

Ziamath sets LaTeX in STIX Two, whose outlines go into the page; the color is that of the text, so
formulas follow the dark mode. The LaTeX source is the accessible name.
"""

import html
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from sphinx.application import Sphinx

__all__ = ["setup"]

_SIZE = 16.0
_SCALE = 1.05


def _svg(latex: str, *, is_inline: bool) -> str:
    import ziamath

    drawn = ziamath.Latex(latex, size=_SIZE, color="currentColor", inline=is_inline)
    element = drawn.svgxml()
    width, height = (float(element.get(side)) / _SIZE * _SCALE for side in ("width", "height"))
    drop = drawn.getyofst() / _SIZE * _SCALE
    element.set("width", f"{width:.3f}em")
    element.set("height", f"{height:.3f}em")
    element.set("role", "img")
    element.set("aria-label", latex)
    if is_inline:
        element.set("style", f"vertical-align:{drop:.3f}em")
    return ElementTree.tostring(element, encoding="unicode")


def _visit_inline(self: Any, node: nodes.Element) -> None:
    self.body.append(f'<span class="formula">{_svg(node.astext(), is_inline=True)}</span>')
    raise nodes.SkipNode


def _visit_block(self: Any, node: nodes.Element) -> None:
    number = ""
    if node.get("number"):
        number = f'<span class="formula-number">({html.escape(str(node["number"]))})</span>'
    self.body.append(f'<div class="formula">{_svg(node.astext(), is_inline=False)}{number}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer under the name ``svg``."""
    app.add_html_math_renderer(
        "svg", inline_renderers=(_visit_inline, None), block_renderers=(_visit_block, None)
    )
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
