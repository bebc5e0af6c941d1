"""The hardware table in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.hardware.rows import SLACK, Comparison, Figure, Results, Row

_HEADS = (
    *("method", "resident bytes", "of 16 bits", "ms", "engines", "activation bits"),
    *("PSNR of the mean MSE, dB", "mean PSNR, dB", "worst 5 %, dB", "score"),
)


def tables(results: Results) -> str:
    """Every model and target: its rows, then the comparison; and what is missing."""
    parts = [_efforts(results)]
    for model, target in dict.fromkeys((row.model, row.target) for row in results.rows):
        rows = [row for row in results.rows if (row.model, row.target) == (model, target)]
        found = [c for c in results.comparisons if (c.model, c.target) == (model, target)]
        parts += [f"### {model}, {target}\n", _rows(rows), _comparisons(rows, found)]
    parts += [
        f"![{target}: error against time and bytes](figures/hardware-{target}.svg)\n"
        for target in dict.fromkeys(row.target for row in results.rows)
    ]
    parts.append(_ends(results))
    return "\n".join(part for part in parts if part)


def short_table(results: Results, model: str, target: str) -> str:
    """Each peer of a model on a target, and what is returned for its bytes and its milliseconds, for README."""
    rows = {row.method: row for row in results.rows if (row.model, row.target) == (model, target)}
    lines = [
        "| method | bytes, of bf16 | ms | mean PSNR, dB | ours | MSE, ours / its |",
        "|---|---:|---:|---:|---:|---|",
    ]
    found = (c for c in results.comparisons if (c.model, c.target) == (model, target))
    for comparison in sorted(found, key=lambda c: (rows[c.peer].resident_bytes, c.peer)):
        peer, ours = rows[comparison.peer], rows[comparison.ours]
        cells, ratio = (f"{row.psnr_db.value:.1f}" for row in (peer, ours)), comparison.ratio
        lines.append(
            f"| {peer.method} | {peer.resident:.2f} | {peer.ms:.4f} | {' | '.join(cells)} | "
            f"{ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f}) |"
        )
    return "\n".join(lines)


def _efforts(results: Results) -> str:
    lines = [
        f"- {e.model}: {e.samples} samples of {e.steps} steps, seed {e.seed}; calibrated on {e.calibration_samples} "
        f"trajectories with {e.projections} projections each, policies chosen on {e.selection_samples}."
        for e in results.efforts
    ]
    lines += [f"- {target}: roofline of the published rates of {card}." for target, card in results.cards.items()]
    return "\n".join(lines) + "\n"


def _rows(rows: Sequence[Row]) -> str:
    lines = [f"| {' | '.join(_HEADS)} |", f"|---|{'---:|' * (len(_HEADS) - 1)}"]
    for row in sorted(rows, key=lambda row: (row.kind != "full", row.resident_bytes, row.ms)):
        cells = [
            row.method,
            f"{row.resident_bytes:,}",
            f"{row.resident:.3f}",
            f"{row.ms:.4g}",
            str(row.engines),
            f"{row.activation_bits:.2f}",
            *(_cell(figure, digits) for figure, digits in _figures(row)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figures(row: Row) -> list[tuple[Figure | None, int]]:
    return [(row.psnr_of_mean_db, 2), (row.psnr_db, 2), (row.worst_psnr_db, 1), (row.score, 3)]


def _cell(figure: Figure | None, digits: int) -> str:
    if figure is None:
        return ""
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f} to {figure.high:.{digits}f})"


def _comparisons(rows: Sequence[Row], found: Sequence[Comparison]) -> str:
    if not found:
        return ""
    named = {row.method: row for row in rows}
    heads = ("peer", "ours, bytes", "ours, ms", "mean MSE, ours in the peer's", "")
    heads = (*heads, "mean PSNR, ours less the peer's, dB", "ours closer in")
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---:|---:|---|---:|---:|"]
    for comparison in found:
        peer, ours = named[comparison.peer], named[comparison.ours]
        size, ms = ours.resident_bytes / peer.resident_bytes, ours.ms / peer.ms
        lines.append(
            f"| {peer.method} | {size:.3f} × | {ms:.3f} × | {_cell(comparison.ratio, 2)} | {comparison.verdict} | "
            f"{_cell(comparison.psnr_difference_db, 2)} | {comparison.closer:.0%} |"
        )
    return "\n".join(lines) + "\n"


def _ends(results: Results) -> str:
    lines = [f"- Beaten: {d.ours} ({d.model}, {d.target}) by {d.by}." for d in results.dominated]
    if results.comparisons and not results.dominated:
        lines.append(f"- None of ours is beaten in bytes, ms and error together; ours may take {SLACK} of a peer's ms.")
    for reason in dict.fromkeys(results.impossible.values()):
        names = [name for name, own in results.impossible.items() if own == reason]
        told = re.sub(r" \(roofline [^)]*\)", "", reason)  # which is said above
        lines.append(f"- No policy keeps these budgets: {'; '.join(names)}. `{told}`")
    if results.missing:
        models = dict.fromkeys(name.split()[0] for name in results.missing)
        count = {model: sum(name.split()[0] == model for name in results.missing) for model in models}
        lines.append(f"- Not measured: {', '.join(f'{n} rows of {model}' for model, n in count.items())}.")
    return "\n".join(lines) + "\n"
