"""`summary.json` and the policy at the top of the run directory, made from what the stages wrote."""

from __future__ import annotations

from pathlib import Path

from adatsq_trt.engines.bundle import Manifest
from adatsq_trt.errors import MismatchError
from adatsq_trt.files import read_json_model, read_tensors, sha256, write_bytes, write_json_model
from adatsq_trt.graph_index import INDEX_NAME, GraphIndex
from adatsq_trt.policy import Policy, resident_weight_bytes
from adatsq_trt.report.summary import PolicyFigures, Replaced, StageFigures, StaticErrors, Summary, Unlimited
from adatsq_trt.search.select import SearchResult
from adatsq_trt.settings import SETTINGS_NAME
from adatsq_trt.stages import budget, bundle, calibrate, embed, export, quantize, refine, search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.run_directory import RunDirectory

SUMMARY_NAME, POLICY_NAME = "summary.json", "policy.json"
_STAGES = (calibrate, quantize, search, export, bundle)


def write(context: Context) -> Summary:
    """Copy the policy to the top of the run directory and write the summary."""
    policy_file = search.stage(context).folder / search.POLICY
    write_bytes(context.run.path / POLICY_NAME, policy_file.read_bytes())
    summary = _summary(context, Policy.load(policy_file))
    write_json_model(context.run.path / SUMMARY_NAME, summary)
    return summary


def read(run: RunDirectory) -> Summary:
    """The summary of a finished build.

    Raises:
        MissingFileError: the build has not run to its end.
        MismatchError: a later command had other settings, so that stages may no longer be those of the build.
        DamagedFileError: the summary is truncated or of another schema version.
    """
    run.record(bundle.NAME)
    summary = read_json_model(run.path / SUMMARY_NAME, Summary)
    if sha256(run.path / SETTINGS_NAME) != summary.settings_sha256:
        raise MismatchError(
            f"'{run.path / SETTINGS_NAME}' is of a later command than the build in this folder, whose stages it may "
            "have replaced; run 'adatsq-trt build engine' to its end again"
        )
    return summary


def _summary(context: Context, policy: Policy) -> Summary:
    settings, result = context.settings, read_json_model(search.stage(context).folder / search.RESULT, SearchResult)
    shapes = budget.shapes_of(context)
    graphs = export.stage(context).folder / export.GRAPHS
    index = read_json_model(graphs / INDEX_NAME, GraphIndex)
    manifest = read_json_model(bundle.stage(context).folder / "manifest.json", Manifest)
    found = refine.result(context)
    refined = None if found is None or not found.kept else found.held_out
    chosen, policies = result.points[result.chosen], policy_figures(result, settings.max_assignments)
    if refined is not None:
        own = {"error": refined.error, "standard_error": refined.standard_error}
        policies = (policies[0].model_copy(update=own), *policies[1:])
    return Summary(
        settings_sha256=sha256(context.run.path / SETTINGS_NAME),
        model=settings.model,
        targets=settings.targets,
        formats=settings.formats,
        simulate=settings.simulate,
        steps=settings.steps,
        guidance=settings.guidance,
        guidance_2=settings.guidance_2,
        limits=result.limits,
        reference=settings.reference,
        max_assignments=settings.max_assignments,
        policies=policies,
        replaced=replaced(result),
        transform=result.transform,
        ms=chosen.costs.ms,
        ms_source=result.ms_source,
        buckets=len(policy.buckets),
        assignments=len(policy.assignments),
        unlimited=_unlimited(result),
        base_type=settings.base_type,
        rounding_error=float(read_tensors(calibrate.stage(context).folder / calibrate.ROUNDING)["error"]),
        mean_bits=policy.mean_bits,
        mean_weight_bits=policy.mean_weight_bits(shapes),
        mean_activation_bits=policy.mean_activation_bits(shapes),
        final_error=_held_out(result, result.chosen) if refined is None else refined.error,
        final_standard_error=_known(chosen.held_out_standard_error) if refined is None else refined.standard_error,
        chosen_kind=chosen.kind,
        uniform_errors={p.name: _held_out(result, i) for i, p in enumerate(result.points) if p.kind == "uniform"},
        static_errors=StaticErrors(
            layer_only=None if result.layer_only is None else _held_out(result, result.layer_only),
            time_only=None if result.time_only is None else _held_out(result, result.time_only),
        ),
        held_out_samples=settings.held_out_samples,
        held_out_seeds=(context.held_out.seeds[0], context.held_out.seeds[-1]),
        denoiser_calls=result.denoiser_calls,
        resident_weight_bytes=resident_weight_bytes(policy, {s.name: s for s in shapes}),
        engines=_engines(manifest, index),
        onnx_bytes=sum(_size(graphs / graph.path) for graph in index.graphs),
        weight_bytes=index.weight_bytes,
        engine_bytes=sum(plan.bytes for plan in manifest.plans),
        stages={name: _figures(context, name) for name in _stages(context)},
        versions=manifest.versions,
    )


def policy_figures(result: SearchResult, limit: int | None) -> tuple[PolicyFigures, ...]:
    """The chosen policy, then the others that were measured on held-out samples.

    Args:
        result: of the search.
        limit: most distinct assignments that were allowed.
    """
    names = {result.unlimited: "without limit", result.layer_only: "best layer-only"}
    names |= {result.time_only: "best time-only", result.chosen: "chosen"}
    measured = [i for i, point in enumerate(result.points) if point.held_out_error is not None]

    def figures(index: int) -> PolicyFigures:
        point = result.points[index]
        return PolicyFigures(
            name=names.get(index, f"uniform {point.name}" if point.kind == "uniform" else point.name),
            kind=point.kind,
            assignments=point.assignments,
            mean_bits=point.mean_bits,
            costs=point.costs,
            resident_bits=8 * point.costs.resident_bytes / result.weights,
            error=_held_out(result, index),
            standard_error=_known(point.held_out_standard_error),
            ratio=point.held_out_ratio,
            within_limits=(limit is None or point.assignments <= limit)
            and result.limits.kept_by(point.mean_bits, point.costs),
        )

    return tuple(map(figures, sorted(measured, key=lambda i: i != result.chosen)))


def replaced(result: SearchResult) -> Replaced | None:
    """A simple policy that the search's own is no better than."""
    found = result.dominated
    if found is None:
        return None
    by, figures = result.points[found.by], found.model_dump(include={"ratio", "low", "high", "samples"})
    name = f"uniform {by.name}" if by.kind == "uniform" else by.name
    returned = result.chosen == found.by
    return Replaced(searched=result.points[found.searched].name, by=name, returned=returned, **figures)


def _engines(manifest: Manifest, index: GraphIndex) -> int:
    """Count the plans of one target that the loop switches between, or the processor's graphs."""
    targets = {plan.target for plan in manifest.plans}
    return len(manifest.plans) // len(targets) if targets else sum(graph.variant == "cpu" for graph in index.graphs)


def _stages(context: Context) -> list[str]:
    """Names of the stages that this run has."""
    own = [] if context.settings.pipeline is None else [embed.NAME]
    refined = [refine.NAME] if context.settings.refine else []
    return [*own, *(module.NAME for module in _STAGES), *refined]


def _unlimited(result: SearchResult) -> Unlimited | None:
    if result.unlimited is None:
        return None
    point = result.points[result.unlimited]
    error = _held_out(result, result.unlimited)
    return Unlimited(assignments=point.assignments, mean_bits=point.mean_bits, error=error)


def _held_out(result: SearchResult, index: int) -> float:
    return _known(result.points[index].held_out_error)


def _known(figure: float | None) -> float:
    assert figure is not None, "the search measures every point that is reported"
    return figure


def _size(path: Path) -> int:
    return path.stat().st_size


def _figures(context: Context, name: str) -> StageFigures:
    record = context.run.record(name)
    return StageFigures(seconds=record.seconds, peak_bytes=record.peak_bytes)
