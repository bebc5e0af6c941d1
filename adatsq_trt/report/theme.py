"""How figures look, and how one becomes files and a part of the page.

Figures are drawn in the colours of a light page. In the page these colours become CSS variables, so that the same
drawing is readable in the dark.
"""

from __future__ import annotations

import io
import re
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, MUTED, LINE, ACCENT, CONTRAST = "#1c2024", "#60646c", "#dfe1e6", "#0072b2", "#c1440e"
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", CONTRAST: "contrast"}
# Brighter is more, in both maps. Viridis keeps its order for every kind of colour vision and in grey.
COLORMAP = "viridis"
WIDTH_INCHES = 4.0
_TITLE_CHARACTERS, _MARGIN_INCHES, _PNG_DPI = 56, 0.12, 200

STYLE: dict[RcKeyType, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 8,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # names of layers are no formulas
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
}


@dataclass(frozen=True)
class Chart:
    """A figure with its words.

    Attributes:
        name: of its files and of its elements in the page.
        title: one sentence that says what it shows.
        caption: how it was measured and how to read it.
        figure: drawn without the title.
    """

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class RenderedChart:
    """A figure as the page and the folder of figures hold it.

    Attributes:
        name: of its files and of its elements in the page.
        title: one sentence that says what it shows.
        caption: how to read it.
        inline: SVG for the page, in the page's colours and font, without the title.
        svg: a file's content, on white, with the title.
        png: the same as pixels.
    """

    name: str
    title: str
    caption: str
    inline: str
    svg: bytes
    png: bytes


def format_colors(formats: tuple[str, ...]) -> dict[str, str]:
    """Format → colour as #rrggbb; brighter is more bits."""
    shades = matplotlib.colormaps[COLORMAP]
    last = max(len(formats) - 1, 1)
    return {name: to_hex(shades(0.12 + 0.83 * i / last)) for i, name in enumerate(formats)}


def render(chart: Chart) -> RenderedChart:
    """Write a figure in all its forms; the same figure gives the same bytes."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": chart.name}):
        inline = _for_page(_save(chart.figure, "svg", titled=False).decode(), chart)
        title = textwrap.fill(chart.title, _TITLE_CHARACTERS)
        above = 1 + 0.08 / chart.figure.get_figheight()
        chart.figure.text(0.01, above, title, ha="left", va="bottom", fontsize=9, fontweight="bold")
        svg, png = _save(chart.figure, "svg", titled=True), _save(chart.figure, "png", titled=True)
    return RenderedChart(chart.name, chart.title, chart.caption, inline, svg, png)


def _save(figure: Figure, kind: str, titled: bool) -> bytes:
    """A file's content; with the title, which stands above the drawing, on white."""
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format=kind,
        dpi=_PNG_DPI,
        facecolor="white" if titled else "none",
        bbox_inches="tight" if titled else None,
        pad_inches=_MARGIN_INCHES,
        # Neither date nor version: figures of unchanged runs do not change.
        metadata=dict.fromkeys(("Date", "Creator", "Format", "Type") if kind == "svg" else ("Software",)),
    )
    return buffer.getvalue()


def _for_page(svg: str, chart: Chart) -> str:
    """The <svg> element alone: fluid, named for screen readers, with ids of its own and the page's colours."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'(<svg [^>]*?)\bwidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)\bheight="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{chart.name}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{chart.name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-labelledby="{chart.name}-title" ', 1)
