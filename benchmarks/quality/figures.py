"""The figures of the comparison: sensitivity, policy, fronts of all methods, and pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure

from adatsq_trt.evaluation.methods import BITS, FULL_BITS, FULL_PRECISION, METHODS
from adatsq_trt.files import read_json_model, read_tensors, write_bytes
from adatsq_trt.formats import format_named
from adatsq_trt.report.contact_sheet import write_contact_sheet
from adatsq_trt.report.theme import ACCENT, COLORMAP, CONTRAST, MUTED, STYLE, Chart, format_colors, render
from adatsq_trt.search.select import SearchResult
from adatsq_trt.stages import search
from adatsq_trt.stages.evaluate import Cell, Evaluation

PICTURES = 20
_OURS = ("adatsq", "adatsq-fine", "adatsq-best")


def draw(evaluation: Evaluation, cells: Sequence[Cell], folder: Path) -> None:
    """All figures of a model whose cells are there."""
    model, best = evaluation.effort.model, evaluation.run_of(METHODS["adatsq-best"], "4/4")
    with matplotlib.rc_context(STYLE):
        _save(folder, fronts(model, cells))
        if (best / search.NAME / search.RESULT).is_file():
            _save(folder, sensitivity(model, best))
            _save(folder, policy(model, best))
    for bits in BITS:
        rows = [cell for cell in cells if cell.bits in (bits, FULL_BITS)]
        if len(rows) > 1:
            sheet(evaluation, rows, folder)


def _save(folder: Path, chart: Chart) -> None:
    write_bytes(folder / f"{chart.name}.svg", render(chart).svg)


def fronts(model: str, cells: Sequence[Cell]) -> Chart:
    """PSNR against stored bits per weight, a line for each method."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    shown = [cell for cell in cells if cell.psnr_db is not None]
    for number, method in enumerate(dict.fromkeys(cell.method for cell in shown)):
        points = sorted((c.effective_weight_bits, c.psnr_db or 0.0) for c in shown if c.method == method)
        color = ACCENT if method in _OURS else CONTRAST if "quant" in method else MUTED
        marker = "osD^vP*X"[number % 8]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, linewidth=1, label=method)
    axes.set(xlabel="stored bits per weight, branches included", ylabel="PSNR, dB")
    axes.legend(frameon=False, fontsize=7, ncols=2)
    caption = "Mean PSNR against the full-precision sample of the same seed; each line joins 3/3 and 4/4."
    return Chart(f"quality-{model}-fronts", f"{model}: error against bits", caption, figure)


def sensitivity(model: str, run: Path) -> Chart:
    """Draw the error of the cheapest candidate alone in the final latent, by step and layer."""
    errors = read_tensors(run / search.NAME / search.SENSITIVITY)["errors"][0].numpy()
    figure, axes = _map(errors.shape)
    positive = np.clip(errors, errors[errors > 0].min(), None).T
    norm = LogNorm(float(positive.min()), float(positive.max()))
    image = axes.imshow(positive, aspect="auto", interpolation="none", cmap=COLORMAP, norm=norm)
    figure.colorbar(image, ax=axes, label="latent MSE")
    caption = "First-order latent MSE if this (step, layer) alone had the cheapest candidate format."
    return Chart(f"quality-{model}-sensitivity", f"{model}: how sensitive steps and layers are", caption, figure)


def policy(model: str, run: Path) -> Chart:
    """The formats that the search chose for a mean of 4 bits."""
    result = read_json_model(run / search.NAME / search.RESULT, SearchResult)
    rows = result.points[result.chosen].formats
    used = {name for row in rows for name in row}  # cheapest first in the legend
    names = tuple(sorted(used, key=lambda name: (format_named(name).bits, name)))
    colors = format_colors(names)
    figure, axes = _map((len(rows), len(rows[0])))
    chosen = np.array([[names.index(name) for name in row] for row in rows]).T
    colormap = ListedColormap([colors[name] for name in names])
    axes.imshow(chosen, aspect="auto", interpolation="none", cmap=colormap, vmin=-0.5, vmax=len(names) - 0.5)
    for name in names:
        axes.plot([], [], "s", color=colors[name], label=name)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    caption = "Format of every layer at every step, adatsq-best at a mean of 4 bits."
    return Chart(f"quality-{model}-policy", f"{model}: the chosen policy", caption, figure)


def _map(shape: tuple[int, ...]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="step", ylabel="layer, in the order of execution")
    axes.set_xticks(range(0, shape[0], max(1, shape[0] // 10)))
    axes.grid(visible=False)
    return figure, axes


def sheet(evaluation: Evaluation, cells: Sequence[Cell], folder: Path) -> None:
    """The same prompts and seeds under every method."""
    panels, notes = {}, []
    for cell in cells:
        images = evaluation.images(cell.method, cell.bits)[:PICTURES]
        if images.ndim == 5:  # clips: the frame in the middle
            images = images[:, images.shape[1] // 2]
        panels[f"{cell.method} {cell.bits}"] = images
        notes.append("" if cell.method == FULL_PRECISION else f"{cell.psnr_db:.1f} dB")
    bits = cells[-1].bits.replace("/", "")
    write_contact_sheet(folder / f"quality-{evaluation.effort.model}-{bits}.png", panels, notes)
