"""A figure for each target: error against milliseconds and resident bytes, all methods, panels for each model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adatsq_trt.files import write_bytes
from adatsq_trt.report.theme import ACCENT, CONTRAST, MUTED, STYLE, Chart, render
from benchmarks.hardware.rows import Results, Row

_COLORS = {"full": MUTED, "peer": CONTRAST, "ours": ACCENT}
_MARKERS = "sD^vP*X<>p"


def draw(results: Results, folder: Path) -> None:
    """Draw every target that has rows, as `hardware-TARGET.svg`."""
    with matplotlib.rc_context(STYLE):
        for target in dict.fromkeys(row.target for row in results.rows):
            chart = fronts(target, [row for row in results.rows if row.target == target and row.kind != "full"])
            write_bytes(folder / f"{chart.name}.svg", render(chart).svg)


def fronts(target: str, rows: Sequence[Row]) -> Chart:
    """PSNR of the mean squared error against both costs, a row of panels for each model."""
    models = list(dict.fromkeys(row.model for row in rows))
    figure = Figure(figsize=(6.4, 2.6 * len(models) + 0.6), layout="constrained")
    panels = figure.subplots(len(models), 2, squeeze=False, sharey="row")
    for model, (left, right) in zip(models, panels, strict=True):
        own = [row for row in rows if row.model == model]
        _panel(left, own, [row.ms for row in own])
        _panel(right, own, [row.resident for row in own])
        left.set(ylabel=f"{model}\nPSNR of the mean MSE, dB")
    panels[-1][0].set(xlabel="ms of a sample, roofline")
    panels[-1][1].set(xlabel="resident bytes, in those of 16 bits")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=7, ncols=4)
    caption = (
        "PSNR of the mean squared error against roofline milliseconds and resident bytes; bars are 95 % intervals."
    )
    return Chart(f"hardware-{target}", f"{target}: error against time and bytes", caption, figure)


def _panel(axes: Axes, rows: Sequence[Row], costs: Sequence[float]) -> None:
    axes.locator_params(axis="x", nbins=4)
    peers = [row.method for row in rows if row.kind == "peer"]
    for row, cost in zip(rows, costs, strict=True):
        figure = row.psnr_of_mean_db
        ours = row.kind == "ours"
        marker = "o" if ours else _MARKERS[peers.index(row.method) % len(_MARKERS)]
        label = "ours" if ours else row.method
        known = axes.get_legend_handles_labels()[1]
        axes.errorbar(
            [cost],
            [figure.value],
            yerr=[[figure.value - figure.low], [figure.high - figure.value]],
            fmt=marker,
            color=_COLORS[row.kind],
            markersize=4,
            linewidth=0.8,
            label=label if label not in known else "_",
        )
