"""Where a wrong graph begins to be wrong: the first layer, in the order of execution, that leaves its tolerance.

`polygraphy debug reduce` halves a graph again and again and starts a process for each half, which needs a reference
for every cut. Here all layers are outputs of one run (polygraphy's `ModifyOutputs`) and PyTorch has a reference for
each, so that the first wrong one is seen at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf
from pathlib import Path

from adatsq_trt.engines.accuracy.comparison import Arrays
from adatsq_trt.engines.accuracy.report import CheckReport, CheckRow, FirstLayer, write_report
from adatsq_trt.engines.accuracy.rows import check_layers
from adatsq_trt.engines.accuracy.written_formats import mismatched_layer, written_formats
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.errors import AdatsqError, UserError

# Step → module path → PyTorch's output of the layer, for evenly spaced rows of the step's inputs.
LayerReference = Callable[[int], Arrays]


def bisect(
    bundle: BundleFiles, report: CheckReport, folder: Path, layer_reference: LayerReference | None = None
) -> CheckReport:
    """Name the first wrong layer of every wrong graph, at the first step of each bucket at which it is wrong.

    Args:
        bundle: the bundle that the report is about.
        report: result of `check`.
        folder: the report's; `check.json` is written again, with the layers.
        layer_reference: for steps that are not the first of their bucket, whose layers the bundle does not hold; None
            where PyTorch's model is not at hand: those steps are told without a layer.

    Raises:
        OutputError: the folder cannot be written.
    """
    found = []
    for step, row in _first_wrong_steps(report.rows):
        candidates = [r for r in report.rows if (r.step, r.variant) == (step, row.variant)]
        if row.variant == "cpu" and layer_reference is not None and not any(r.layer for r in candidates):
            candidates = check_layers(bundle, step, layer_reference(step), folder)
        layer = _written_otherwise(bundle, row.variant, step) or _origin(candidates)
        if layer is not None:
            found.append(_first_layer(bundle, row, layer))
    complete = report.model_copy(update={"first_layers": tuple(found)})
    write_report(folder, complete)
    return complete


def _first_wrong_steps(rows: Iterable[CheckRow]) -> list[tuple[int, CheckRow]]:
    """The first failed step of each bucket and variant, with one of its rows."""
    first: dict[tuple[int, str], CheckRow] = {}
    for row in rows:
        # No layer of the full-precision model is stored, and of a plan no layer is known.
        if not row.passed and row.variant in ("cpu", "target"):
            key = (row.bucket, row.variant)
            first[key] = min(first.get(key, row), row, key=lambda r: r.step)
    return [(row.step, row) for row in first.values()]


def _written_otherwise(bundle: BundleFiles, variant: str, step: int) -> str | None:
    """The first layer in another format than the policy's; None also for a file that is no graph, as its row says."""
    try:
        return mismatched_layer(bundle, variant, step)
    except UserError:
        raise
    except AdatsqError:
        return None


def _origin(rows: Sequence[CheckRow]) -> str | None:
    """The first layer that leaves its tolerance; in a target block the one, up to that, at which the error grows most.

    In a target block a layer passes its error on to the next, so that a defect that hits few rows, such as a scale that
    is too small, may pass where it is and fail where attention has spread it.
    """
    layers = [row for row in rows if row.layer is not None]
    failed = next((index for index, row in enumerate(layers) if not row.passed), None)
    if failed is None:
        return None
    if layers[failed].separated:
        return layers[failed].layer
    errors = [inf if row.relative_error is None else row.relative_error for row in layers[: failed + 1]]
    growth = [error - max(errors[:index], default=0.0) for index, error in enumerate(errors)]
    return layers[growth.index(max(growth))].layer


def _first_layer(bundle: BundleFiles, row: CheckRow, layer: str) -> FirstLayer:
    fmt = bundle.policy.formats_at(row.step)[layer]
    written = written_formats(bundle, row.variant, row.step).get(layer, [fmt.name])
    scales = bundle.scales(row.step)
    signature = bundle.cpu_graph(row.step).scale_inputs.get(layer)
    return FirstLayer(
        step=row.step,
        assignment=row.assignment,
        variant=row.variant,
        layer=layer,
        format=fmt.name,
        graph_format=None if fmt.name in written else ",".join(written),
        activation_scale=float(scales[signature.name]) if signature is not None and signature.name in scales else None,
    )
