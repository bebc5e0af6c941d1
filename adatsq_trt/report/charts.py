"""The figures that are no maps: what policies cost beside their error, error along the steps, the check, the stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from adatsq_trt.costs import Costs
from adatsq_trt.formats import format_named
from adatsq_trt.report.data import Array, Check, JudgedPolicy, ReportData
from adatsq_trt.report.numbers import duration, power_of_ten, ratio, scientific, share, size
from adatsq_trt.report.summary import SIXTEEN_BITS, PolicyFigures
from adatsq_trt.report.theme import ACCENT, CONTRAST, INK, LINE, MUTED, WIDTH_INCHES, Chart

_PROPORTION = 0.78
# What a comparison without a figure is drawn at: beyond every limit.
_NOT_COMPARABLE = 10.0
_SMALLEST = 1e-30


def error_by_memory(data: ReportData) -> Chart:
    """Resident bytes against the error of every policy that was measured on held-out samples."""
    name = "resident weights"
    figure, axes = _measured_policies(data, data.summary.limits.bytes, name, lambda costs: costs.resident_bytes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(round(value))))
    return Chart(
        "memory",
        _beside_uniform(data, "bytes", lambda costs: costs.resident_bytes),
        "Further to the lower left is better. Diamonds are uniform formats; those of 16 bits are not shown. Latent MSE "
        f"on {data.summary.held_out_samples:,} held-out samples, with its standard error.",
        figure,
    )


def error_by_time(data: ReportData) -> Chart:
    """Milliseconds, or activation bits where nobody knows them, against the error of the same policies."""
    summary = data.summary
    timed = summary.ms is not None
    limit = summary.limits.ms if timed else summary.limits.activation_bits
    name = "ms per sample" if timed else "activation bits"
    figure, _ = _measured_policies(data, limit, name, lambda costs: costs.time)
    source = f"Milliseconds: {summary.ms_source}." if timed else "Nobody knows the milliseconds of these formats."
    return Chart("time", _beside_uniform(data, "time" if timed else name, lambda costs: costs.time), source, figure)


def _measured_policies(
    data: ReportData, limit: float | None, name: str, cost: Callable[[Costs], float]
) -> tuple[Figure, Axes]:
    figure, axes = _figure()
    policies = data.summary.policies
    shown = [p for p in policies if p.error > 0 and (p is policies[0] or p.resident_bits < SIXTEEN_BITS)]
    labels = []
    for policy in shown:
        place, color = cost(policy.costs), _color(policy)
        marker, area = ("*", 11) if policy is policies[0] else ("D" if policy.kind == "uniform" else "s", 4.5)
        spread = min(policy.standard_error, 0.9 * policy.error)  # a logarithmic axis has no zero
        axes.errorbar(place, policy.error, yerr=spread, color=color, marker=marker, markersize=area, zorder=3)
        labels.append((policy.error, place, policy.name, color))
    _limit(axes, limit)
    axes.margins(x=0.3, y=0.15)  # names stand beside the marks
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set(xlabel=name, ylabel="latent MSE")
    if shown:
        _log_axis(axes)
        _names(axes, labels)
    return figure, axes


def _color(policy: PolicyFigures) -> str:
    if policy.name == "chosen":
        return ACCENT
    return CONTRAST if policy.kind == "uniform" else MUTED


def _names(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside their marks, far enough apart to be read; to the left of what is cheaper than the chosen policy."""
    low, high = axes.get_ylim()
    chosen = labels[0][1]
    apart, lowest = np.log10(high / low) / 17, dict[int, float]()
    for error, place, name, color in sorted(labels):
        side = round(float(np.clip(20 * (place / chosen - 1), -1, 1)))
        lowest[side] = max(np.log10(error), lowest.get(side, -np.inf) + apart)
        axes.annotate(
            name.removeprefix("uniform ").removeprefix("best "),
            (place, 10 ** lowest[side]),
            xytext=(-7 if side < 0 else 7, 0),
            textcoords="offset points",
            color=color,
            ha="right" if side < 0 else "left",
            va="center",
            fontweight=_weight(name),
        )


def _beside_uniform(data: ReportData, name: str, cost: Callable[[Costs], float]) -> str:
    """The chosen policy's cost and error in those of the cheapest format everywhere."""
    chosen, *others = data.summary.policies
    uniform = next((p for p in others if p.name == f"uniform {data.cheapest}"), None)
    if uniform is None or not uniform.error:
        return f"{name.capitalize()} and error of {len(data.summary.policies)} policies"
    costs, error = cost(chosen.costs) / cost(uniform.costs), chosen.error / uniform.error
    return f"{ratio(costs)} the {name} of uniform {data.cheapest}, {ratio(error)} its error"


def _limit(axes: Axes, limit: float | None) -> None:
    if limit is not None:
        axes.axvline(limit, color=LINE, linewidth=1.2, zorder=0)
        axes.text(limit, 0.02, " budget", color=MUTED, transform=axes.get_xaxis_transform())


def pareto(data: ReportData) -> Chart:
    """Mean bits against error of every policy that the search judged."""
    figure, axes = _figure()
    judged = [policy for policy in data.judged if 0 < policy.error < np.inf]
    searched = [policy for policy in judged if policy.kind != "uniform"]
    uniform = sorted((policy for policy in judged if policy.kind == "uniform"), key=lambda policy: policy.mean_bits)
    # Up to the first one above the budget: those far off would leave the searched policies no room.
    budget = data.settings.budget_bits
    beyond = [policy for policy in uniform if budget is not None and policy.mean_bits > budget][1:]
    shown = [policy for policy in judged if policy not in beyond]
    axes.scatter(*_places([policy for policy in searched if not policy.chosen]), s=9, color=MUTED, linewidth=0)
    front = sorted(_coordinates([policy for policy in shown if policy.on_front]))
    axes.plot(*np.array(front).reshape(-1, 2).T, color=MUTED, linewidth=0.8, drawstyle="steps-post", zorder=1)
    _limit(axes, budget)
    for policies, color, marker, area in (
        ([policy for policy in shown if policy.kind == "uniform"], CONTRAST, "D", 30),
        ([policy for policy in shown if policy.chosen], ACCENT, "*", 110),
    ):
        axes.scatter(*_places(policies), s=area, marker=marker, color=color, zorder=3)
        for policy in policies:
            _label(axes, policy, color)
    axes.margins(x=0.12, y=0.12)
    if judged:
        _log_axis(axes)
    axes.set(xlabel="mean bits", ylabel="latent MSE")
    outside = "".join(
        f" Not shown: uniform {policy.name}, {policy.mean_bits:g} bits, {scientific(policy.error)}."
        for policy in beyond
    )
    return Chart(
        "pareto",
        _pareto_title(data),
        "Every policy that was judged: searched ones (dots), uniform ones (diamonds), the chosen one (star). Those on "
        "the line are beaten by no other on the screening samples. Latent MSE on the selection samples; the shortlist "
        f"on all, the rest on the first of them.{outside}",
        figure,
    )


def _pareto_title(data: ReportData) -> str:
    uniform = data.summary.uniform_errors.get(data.cheapest)
    if not uniform:
        return f"The chosen policy averages {data.summary.mean_bits:.2f} bits"
    bits = data.summary.mean_bits
    return (
        f"{bits:.2f} bits instead of {format_named(data.cheapest).bits:g} leave "
        f"{ratio(data.summary.final_error / uniform)} the error"
    )


def _coordinates(policies: Sequence[JudgedPolicy]) -> list[tuple[float, float]]:
    return [(policy.mean_bits, policy.error) for policy in policies]


def _places(policies: Sequence[JudgedPolicy]) -> tuple[Array, Array]:
    x, y = np.array(_coordinates(policies)).reshape(-1, 2).T
    return x, y


def _label(axes: Axes, policy: JudgedPolicy, color: str) -> None:
    place = policy.mean_bits, policy.error
    axes.annotate(policy.label, place, xytext=(6, 5), textcoords="offset points", color=color)


def along_steps(data: ReportData) -> Chart:
    """Above how the error grows along the trajectory, below what each step spends."""
    figure = Figure(figsize=(WIDTH_INCHES, WIDTH_INCHES * 1.05), layout="constrained")
    errors, bits = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    ends = []
    for name, curve in data.trajectory_errors.items():
        color, style = _line(name)
        alone = "o" if len(curve) == 2 else None  # one point makes no line
        errors.plot(np.arange(1, len(curve)), np.clip(curve[1:], _SMALLEST, None), color=color, marker=alone, **style)
        ends.append((float(max(curve[-1], _SMALLEST)), name, color))
    _log_axis(errors)
    _end_labels(errors, ends, len(data.timesteps))
    errors.set(ylabel="latent MSE so far")
    means = [_mean_bits(data, step) for step in range(data.policy.steps)]
    bits.stairs(means, np.arange(data.policy.steps + 1), baseline=None, color=ACCENT, linewidth=1.4)
    bits.set(xlabel="steps done: noise → picture", ylabel="mean bits")
    bits.margins(y=0.15)
    richest = int(np.argmax(means))
    return Chart(
        "steps",
        f"Step {richest} gets the most bits: {means[richest]:.1f} on average",
        f"Above: latent MSE after each step, over {data.settings.calibration_samples} calibration samples; each policy "
        "denoises its own latents. Below: what the chosen policy spends on each step.",
        figure,
    )


def _line(name: str) -> tuple[str, dict[str, object]]:
    if name == "chosen":
        return ACCENT, {"linewidth": 2.2, "zorder": 4}
    return (MUTED, {"linestyle": (0, (3, 2))}) if name.startswith("best ") else (CONTRAST, {"linewidth": 1.1})


def _end_labels(axes: Axes, ends: Sequence[tuple[float, str, str]], steps: int) -> None:
    """Names at the ends of lines, from below upwards and far enough apart to be read."""
    low, high = axes.get_ylim()
    apart, lowest = np.log10(high / low) / 15, -np.inf
    axes.set_xlim(0, steps * 1.34)
    axes.set_xticks(range(0, steps + 1, max(1, -(-steps // 10))))
    for value, name, color in sorted(ends):
        lowest = max(np.log10(value), lowest + apart)
        axes.text(steps * 1.02, 10**lowest, name, color=color, va="center", fontweight=_weight(name))


def _weight(name: str) -> str:
    return "bold" if name == "chosen" else "normal"


def _mean_bits(data: ReportData, step: int) -> float:
    return float(np.mean([fmt.bits for fmt in data.policy.formats_at(step).values()]))


def check_chart(check: Check) -> Chart:
    """Every comparison as a part of its limit."""
    figure, axes = _figure(0.6)
    for passed, color, marker in ((True, ACCENT, "o"), (False, CONTRAST, "X")):
        rows = [row for row in check.comparisons if row.passed is passed]
        heights = [_NOT_COMPARABLE if row.of_limit is None else max(row.of_limit, 1e-6) for row in rows]
        axes.scatter([row.step for row in rows], heights, s=22, color=color, marker=marker, linewidth=0)
    axes.axhline(1, color=INK, linewidth=1)
    axes.text(0.995, 1, "limit", transform=axes.get_yaxis_transform(), ha="right", va="bottom", color=INK)
    _log_axis(axes)
    axes.set_ylim(top=max(3.0, axes.get_ylim()[1]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="step whose inputs were fed", ylabel="part of the limit")
    failed, total = sum(not row.passed for row in check.comparisons), len(check.comparisons)
    title = f"{failed} of {total} comparisons leave their limits" if failed else f"All {total} comparisons pass"
    caption = (
        "One mark for every comparison: the largest of its errors as a part of that error's limit. Limits follow from "
        "the formats in use."
    )
    return Chart("check", title, caption, figure)


def stages_chart(data: ReportData) -> Chart:
    """Seconds and peak memory of each stage."""
    stages = data.summary.stages
    figure = Figure(figsize=(WIDTH_INCHES, 0.7 + 0.3 * len(stages)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(stages)
    for axes, values, texts, color, title in (
        (left, [stages[n].seconds for n in names], [duration(stages[n].seconds) for n in names], ACCENT, "time"),
        (
            right,
            [stages[n].peak_bytes for n in names],
            [size(stages[n].peak_bytes) for n in names],
            MUTED,
            "peak memory",
        ),
    ):
        bars = axes.barh(names, values, height=0.55, color=color)
        axes.bar_label(bars, texts, padding=4)
        axes.set_xlim(right=max(max(values), 1) * 1.75)
        axes.set_title(title, loc="left", fontsize=8, color=MUTED)
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    left.invert_yaxis()
    total = sum(figures.seconds for figures in stages.values())
    slowest = max(names, key=lambda name: stages[name].seconds)
    return Chart(
        "stages",
        f"{slowest} takes {share(stages[slowest].seconds / max(total, 1e-9))} of {duration(total)}",
        "Wall-clock time of each stage, summed over all attempts, and the largest resident memory of the process "
        "meanwhile. Both belong to the machine that ran it.",
        figure,
    )


def _figure(proportion: float = _PROPORTION) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_INCHES, WIDTH_INCHES * proportion), layout="constrained")
    return figure, figure.add_subplot()


def _log_axis(axes: Axes) -> None:
    """A logarithmic vertical axis with powers of ten in Unicode: the names in figures are never read as formulas."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(length=0)


def _tick(value: float) -> str:
    """10⁻³, or 5 × 10⁻⁴."""
    mantissa, exponent = f"{value:.0e}".split("e")
    power = power_of_ten(int(exponent))
    return power if mantissa == "1" else f"{mantissa} × {power}"
