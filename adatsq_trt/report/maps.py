"""Steps × layers: how sensitive each place is, and which format it got; drawn alike, so that the page can link them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from adatsq_trt.report.data import Array, ReportData
from adatsq_trt.report.numbers import power_of_ten, scientific, share
from adatsq_trt.report.theme import COLORMAP, INK, MUTED, WIDTH_INCHES, Chart, format_colors

# Inches. Both maps have the same margins: a place in one is the same place in the other.
_LEFT, _RIGHT, _TOP = 1.12, 0.06, 0.08
_KEY, _KEY_ROW, _KEY_COLUMNS = 0.68, 0.17, 3  # below the map: its legend or colour bar
_HEIGHT_RANGE, _ROW = (1.2, 5.6), 0.095
_MOST_NAMES = 24  # more layers than this are named by their block
_SMALLEST = 1e-30


def policy_map(data: ReportData) -> Chart:
    """The format of every (step, layer)."""
    formats, colors = data.settings.formats, format_colors(data.settings.formats)
    chosen = data.format_indices()
    figure, axes = _canvas(data)
    palette = np.array([*(to_rgb(colors[name]) for name in formats), to_rgb("white")])  # the last for -1
    axes.imshow(palette[chosen.T], aspect="auto", interpolation="none")
    runs = chosen[chosen >= 0]
    shares = np.bincount(runs, minlength=len(formats)) / runs.size
    top = _bottom(data) - _KEY
    _legend(figure, top, [(f"{name} {share(part)}", colors[name]) for name, part in zip(formats, shares, strict=True)])
    most = int(shares.argmax())
    return Chart(
        "policy",
        f"{formats[most]} serves {share(float(shares[most]))} of all places",
        "The format of every layer at every step, as built. Brighter formats have more bits; shares are parts of all "
        "(step, layer) places.",
        figure,
    )


def sensitivity_map(data: ReportData) -> Chart:
    """Draw the error of the cheapest format alone at every (step, layer); Fisher information where that is unknown."""
    values = data.information if data.sensitivity is None else data.sensitivity[0]
    step, layer = np.unravel_index(int(np.argmax(values)), values.shape)
    place = f"step\N{NO-BREAK SPACE}{step} in {data.policy.layers[layer]}"
    figure, axes = _canvas(data)
    least = values[data.format_indices() >= 0].min()
    positive = np.clip(values, max(values[values > 0].min(initial=1.0), _SMALLEST), None)
    image = axes.imshow(positive.T, aspect="auto", interpolation="none", cmap=COLORMAP, norm=_norm(positive))
    height = figure.get_figheight()
    box = (
        _LEFT / WIDTH_INCHES,
        (_bottom(data) - _KEY) / height,
        (WIDTH_INCHES - _LEFT - _RIGHT) / WIDTH_INCHES,
        0.09 / height,
    )
    bar = figure.colorbar(image, cax=figure.add_axes(box), orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.xaxis.set_major_locator(LogLocator(numticks=6))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(round(np.log10(value)))))
    bar.ax.xaxis.set_minor_locator(NullLocator())
    if data.sensitivity is None:
        caption = "Fisher information of every layer's weight at every step for the final latent."
        return Chart("sensitivity", f"The most sensitive place: {place}", caption, figure)
    return Chart(
        "sensitivity",
        f"{data.cheapest} would hurt most at {place}",
        f"Latent MSE if {data.cheapest} rounded this place and nothing else: a first-order estimate on the calibration "
        f"batch, from {scientific(float(least))} to {scientific(float(values.max()))}.",
        figure,
    )


def _norm(values: Array) -> LogNorm:
    """From the second percentile up: a few places that hardly matter must not take the colours from the rest."""
    low, high = float(np.quantile(values, 0.02)), float(values.max())
    return LogNorm(low, high if high > low else low * 10, clip=True)


def _canvas(data: ReportData) -> tuple[Figure, Axes]:
    """Axes for a map, with steps to the right and layers downwards."""
    layers, steps = data.policy.layers, data.policy.steps
    rows = float(np.clip(len(layers) * _ROW, *_HEIGHT_RANGE))
    bottom = _bottom(data)
    height = rows + _TOP + bottom
    figure = Figure(figsize=(WIDTH_INCHES, height))
    box = _LEFT / WIDTH_INCHES, bottom / height, (WIDTH_INCHES - _LEFT - _RIGHT) / WIDTH_INCHES, rows / height
    axes = figure.add_axes(box)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(_step_ticks(steps))
    axes.set_xlabel("step: noise → picture", labelpad=3)
    groups = _groups(layers)
    axes.set_yticks([first + (count - 1) / 2 for _, first, count in groups], [name for name, _, _ in groups])
    axes.tick_params(length=0, pad=4)
    for _, first, _ in groups[1:] if len(groups) < len(layers) else ():
        axes.axhline(first - 0.5, color="white", linewidth=1)
    return figure, axes


def _bottom(data: ReportData) -> float:
    """Room below a map, with that for a legend of all formats."""
    return _KEY + 0.13 + _KEY_ROW * max((len(data.settings.formats) - 1) // _KEY_COLUMNS, 1)


def _groups(layers: Sequence[str]) -> list[tuple[str, int, int]]:
    """(label, first row, rows) of each block; of each layer where there are few."""
    if len(layers) <= _MOST_NAMES:
        return [(_shortened(name), row, 1) for row, name in enumerate(layers)]
    groups, row = [], 0
    for block, members in groupby(layers, _block):
        count = len(list(members))
        groups.append((_shortened(block), row, count))
        row += count
    return groups


def _block(layer: str) -> str:
    """Module path up to the first number: transformer_blocks.3."""
    found = re.match(r".*?\.\d+(?=\.|$)", layer)
    return found.group() if found else layer


def _shortened(path: str) -> str:
    name = path.replace("transformer_blocks", "blocks")
    return name if len(name) <= 20 else f"…{name[-19:]}"


def _step_ticks(steps: int) -> list[int]:
    """At most about ten ticks, from step 0."""
    return list(range(0, steps, max(1, -(-steps // 10))))


def _legend(figure: Figure, top: float, entries: Sequence[tuple[str, str]]) -> None:
    """Swatches below the map, from so many inches downwards."""
    height = figure.get_figheight()
    for index, (text, color) in enumerate(entries):
        row, column = divmod(index, _KEY_COLUMNS)
        x, y = (_LEFT + column * 0.96) / WIDTH_INCHES, (top - row * _KEY_ROW) / height
        swatch = Rectangle((x, y), 0.11 / WIDTH_INCHES, 0.11 / height, transform=figure.transFigure, facecolor=color)
        swatch.set(edgecolor=MUTED, linewidth=0.4)
        figure.add_artist(swatch)
        figure.text(x + 0.16 / WIDTH_INCHES, y, text, color=INK, va="baseline")
