"""What the command line prints of a run: its settings, its figures and its sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from adatsq_trt.settings import Settings
from adatsq_trt.stages.shapes import written

if TYPE_CHECKING:
    from adatsq_trt.engines.sizes import SizeReport
    from adatsq_trt.report.summary import Summary

_NOT_SHOWN = {"schema_version", "weights_sha256", "model_sha256", "policy", "pipeline", "times"}


def settings_table(settings: Settings) -> Table:
    """What a run was asked for, as it was understood."""
    table = Table("setting", "value", box=None, title="settings", title_justify="left")
    values = settings.model_dump(exclude=_NOT_SHOWN)
    if settings.pipeline is not None:
        values |= settings.pipeline.model_dump(exclude={"prompts"}) | {"prompts": len(settings.pipeline.prompts)}
    values["formats_for"] = tuple(f"{layer}={','.join(names)}" for layer, names in settings.formats_for.items())
    for name, value in values.items():
        value = tuple(map(written, value)) if name == "shapes" else value
        table.add_row(name, ", ".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return table


def summary_table(summary: Summary) -> Table:
    """The figures of a run beside those of simpler policies."""
    from adatsq_trt.report.numbers import ratio

    table = Table("policy", "mean bits", "latent MSE", "of the chosen", box=None)
    rows = [("chosen", f"{summary.mean_bits:.3f}", summary.final_error)]
    static = summary.static_errors
    rows += [
        (name, "" if summary.budget_bits is None else f"≤ {summary.budget_bits:g}", error)
        for name, error in (("best layer-only", static.layer_only), ("best time-only", static.time_only))
        if error is not None
    ]
    if summary.unlimited is not None:
        rows.append((f"without --max-assignments: {summary.unlimited.assignments}", "", summary.unlimited.error))
    rows += [(f"uniform {name}", "", error) for name, error in summary.uniform_errors.items()]
    for name, bits, error in rows:
        spread = f" ± {summary.final_standard_error:.0e}" if name == "chosen" else ""
        times = ratio(error / summary.final_error) if summary.final_error else ""
        table.add_row(name, bits, f"{error:.3e}{spread}", times)
    table.caption = (
        f"{summary.buckets} buckets, {summary.assignments} distinct assignments; errors on {summary.held_out_samples} "
        f"held-out samples; {summary.denoiser_calls} denoiser calls; engines {summary.engine_bytes / 1e6:.1f} MB"
    )
    if summary.rounding_error is not None:
        table.caption += f"\n{_rounding(summary.base_type, summary.rounding_error)}"
    if summary.budget_bytes is not None:
        resident, most = summary.resident_weight_bytes / 1e6, summary.budget_bytes / 1e6
        table.caption += f"\nquantized weights {resident:.4g} MB of a budget of {most:.4g} MB"
    if summary.budget_ms is not None:
        table.caption += (
            f"\n{summary.ms:.4g} ms per sample of a budget of {summary.budget_ms:g} ms: {summary.ms_source}"
        )
    return table


def _rounding(base_type: str | None, error: float) -> str:
    """What rounding the checkpoint cost before anything was quantized."""
    if error == 0:
        return f"{base_type} holds the checkpoint's weights exactly"
    return f"rounding the checkpoint's weights to {base_type} costs a latent MSE of {error:.3e}, which is in no row"


def size_table(report: SizeReport) -> Table:
    """Bytes of every layout beside the least that the policy needs; the plans of the one that is built."""
    table = Table("layout", "engines", "weights", "of the least", "plans", box=None)
    for row in report.layouts:
        plans = [
            f"{target} {size / 1e6:.1f} MB, {row.plan_overhead_bytes[target] / 1e6:.1f} MB beside weights"
            for target, size in row.plan_bytes.items()
        ]
        ratio = f"{row.weight_bytes / report.floor_bytes:.2f} ×"
        coded = f"{row.branches} branches" if row.branches else f"{row.engines} engines"
        unknown = f"not built: code of {coded} comes on top"
        table.add_row(
            row.layout, str(row.engines), f"{row.weight_bytes / 1e6:.1f} MB", ratio, "; ".join(plans) or unknown
        )
    table.caption = (
        f"the least: {report.floor_bytes / 1e6:.1f} MB, every weight grid of a layer and the rest of the model once"
    )
    if any(row.layout == "shared" and row.plan_bytes for row in report.layouts):
        table.caption += "\nplans without weights have run on no GPU yet: how fast they are is not measured"
    if report.operands:
        parts = [f"{o.name} {o.bytes / 1e3:.1f} kB in {o.layers} layers" for o in report.operands]
        table.caption += f"\ninputs of plugin nodes: {', '.join(parts)}"
    return table
