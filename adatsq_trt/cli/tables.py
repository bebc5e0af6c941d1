"""Tables and sentences about a run for the command line: its settings, its figures and its sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from adatsq_trt.settings import Settings
from adatsq_trt.stages.shapes import written

if TYPE_CHECKING:
    from adatsq_trt.costs import Limits
    from adatsq_trt.engines.sizes import SizeReport
    from adatsq_trt.report.summary import PolicyFigures, Summary

_NOT_SHOWN = {"schema_version", "weights_sha256", "model_sha256", "policy", "pipeline", "times"}


def settings_table(settings: Settings) -> Table:
    """Tabulate the settings of a run as they were understood."""
    table = Table("setting", "value", box=None, title="settings", title_justify="left")
    values = settings.model_dump(exclude=_NOT_SHOWN)
    if settings.pipeline is not None:
        values |= settings.pipeline.model_dump(exclude={"prompts"}) | {"prompts": len(settings.pipeline.prompts)}
    values["formats_for"] = tuple(f"{layer}={','.join(names)}" for layer, names in settings.formats_for.items())
    for name, value in values.items():
        value = tuple(map(written, value)) if name == "shapes" else value
        table.add_row(name, ", ".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return table


def policies_table(policies: Sequence[PolicyFigures], ms_source: str | None) -> Table:
    """Tabulate the costs of the chosen policy and simpler ones, and their errors against full precision."""
    # What fits in the 80 columns of a terminal: figures are never cut.
    table = Table(box=None, padding=(0, 1, 0, 0), caption_justify="left")
    table.add_column("policy", overflow="fold")
    figures = ("MB", "bits", "act.", *(["ms"] if ms_source else []), "#", "mean", "latent MSE")
    for name in figures:
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("of the chosen", overflow="fold")
    chosen = policies[0]
    for policy in policies:
        ms = [f"{policy.costs.ms:.3g}"] if policy.costs.ms is not None else []
        table.add_row(
            policy.name if policy.within_limits else f"{policy.name} *",
            f"{policy.costs.resident_bytes / 1e6:.4g}",
            f"{policy.resident_bits:.2f}",
            f"{policy.costs.activation_bits:.2f}",
            *ms,
            str(policy.assignments),
            f"{policy.mean_bits:.2f}",
            f"{policy.error:.2e} ± {policy.standard_error:.0e}".replace("e-0", "e-"),
            _ratio(policy, chosen),
        )
    table.caption = (
        "MB, bits: quantized weights as they are stored, each format of a layer once; act.: mean activation bits over "
        "multiply-accumulates; #: distinct assignments; mean: nominal bits of weights and activations"
    )
    table.caption += f"; ms per sample: {ms_source}" if ms_source else ""
    if not all(policy.within_limits for policy in policies):
        table.caption += "\n* exceeds a budget"
    return table


def _ratio(policy: PolicyFigures, chosen: PolicyFigures) -> str:
    """Of errors on the same samples, with a 95 % interval where there are enough of them."""
    from adatsq_trt.report.numbers import ratio

    if policy is chosen or not chosen.error:
        return ""
    interval = "" if policy.ratio is None else f" ({policy.ratio[1]:.2f} to {policy.ratio[2]:.2f})"
    return f"{ratio(policy.error / chosen.error)}{interval}"


def limits_text(limits: Limits, reference: str | None, max_assignments: int | None) -> str:
    """The budgets in one line."""
    parts = [] if limits.bits is None else [f"{limits.bits:g} mean bits"]
    parts += [] if limits.bytes is None else [f"{limits.bytes / 1e6:.4g} MB resident"]
    parts += [] if limits.activation_bits is None else [f"{limits.activation_bits:.4g} activation bits"]
    parts += [] if limits.ms is None else [f"{limits.ms:.4g} ms"]
    parts += [] if max_assignments is None else [f"{max_assignments} assignments"]
    why = "" if reference is None else f"; none was asked for, so a little more than uniform {reference} has"
    return f"budget: {', '.join(parts) or 'none'}{why}"


def summary_table(summary: Summary) -> Table:
    """The figures of a run beside those of simpler policies."""
    table = policies_table(summary.policies, summary.ms_source)
    from adatsq_trt.report.summary import remarks

    budget = limits_text(summary.limits, summary.reference, summary.max_assignments)
    table.caption = (
        f"{table.caption}\n{budget}\n{summary.buckets} buckets, {summary.assignments} distinct assignments; errors on "
        f"{summary.held_out_samples} held-out samples, beyond a budget on as many as tell a policy from the chosen "
        f"one; {summary.denoiser_calls} denoiser calls; {summary.engines} "
        f"engines or graphs, {summary.engine_bytes / 1e6:.1f} MB of plans"
    )
    for remark in remarks(summary):
        table.caption += f"\n{remark}"
    if summary.rounding_error is not None:
        table.caption += f"\n{_rounding(summary.base_type, summary.rounding_error)}"
    return table


def _rounding(base_type: str | None, error: float) -> str:
    """Say how much error the rounding of the checkpoint caused before anything was quantized."""
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
