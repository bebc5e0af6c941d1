"""Gather what a report shows from the files of a finished run."""

from __future__ import annotations

from pathlib import Path

from adatsq_trt.cli.stages import bundle, calibrate, search
from adatsq_trt.cli.stages.summary import POLICY_NAME, SUMMARY_NAME
from adatsq_trt.engines.accuracy.report import REPORT_NAME, CheckReport, CheckRow
from adatsq_trt.engines.bundle import MANIFEST_NAME, Manifest
from adatsq_trt.errors import MismatchError
from adatsq_trt.files import read_json_model, read_tensors, sha256
from adatsq_trt.policy import Policy
from adatsq_trt.report.data import STATIC_LABELS, Array, Check, Comparison, EngineFile, JudgedPolicy, ReportData
from adatsq_trt.report.summary import Summary
from adatsq_trt.run import RunDirectory
from adatsq_trt.search.select import SearchResult
from adatsq_trt.settings import SETTINGS_NAME, Settings

CHECK_FOLDER, SAMPLES_NAME = "check", "samples.png"


def gather(run: RunDirectory) -> ReportData:
    """Everything that the report shows; what was not made yet (check, pictures) is left out.

    Raises:
        MissingFileError: the build has not run to its end.
        MismatchError: a later search replaced the one that was built.
        DamagedFileError: a file is truncated or of another schema version.
    """
    folder = run.path
    run.record(bundle.NAME)
    summary = read_json_model(folder / SUMMARY_NAME, Summary)
    policy = Policy.load(folder / POLICY_NAME)
    if policy != Policy.load(folder / search.NAME / search.POLICY):
        raise MismatchError(
            f"'{folder / POLICY_NAME}' is not the policy of the search in '{folder / search.NAME}', which is newer; "
            "run 'adatsq-trt build engine' with the options of that search to its end"
        )
    manifest = read_json_model(folder / bundle.NAME / MANIFEST_NAME, Manifest)
    samples = folder / SAMPLES_NAME
    return ReportData(
        run_name=folder.name,
        summary=summary,
        settings=read_json_model(folder / SETTINGS_NAME, Settings),
        policy=policy,
        timesteps=manifest.schedule.timesteps,
        sigmas=manifest.schedule.sigmas,
        information=_arrays(folder / calibrate.NAME / calibrate.STATISTICS)["information"],
        sensitivity=_optional_arrays(folder / search.NAME / search.SENSITIVITY).get("errors"),
        judged=_judged(read_json_model(folder / search.NAME / search.RESULT, SearchResult)),
        trajectory_errors={
            STATIC_LABELS.get(name, name): errors
            for name, errors in _optional_arrays(folder / search.NAME / search.TRAJECTORY_ERRORS).items()
        },
        layout=manifest.layout,
        engines=tuple(EngineFile(plan.target, plan.assignment, plan.bytes) for plan in manifest.plans),
        check=_check(folder),
        samples_png=samples.read_bytes() if samples.is_file() else None,
    )


def _arrays(file: Path) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in read_tensors(file).items()}


def _optional_arrays(file: Path) -> dict[str, Array]:
    """Nothing where the search did not keep them: a given policy has no sensitivities."""
    return _arrays(file) if file.is_file() else {}


def _judged(result: SearchResult) -> tuple[JudgedPolicy, ...]:
    return tuple(
        JudgedPolicy(
            kind=point.kind,
            name=point.name,
            mean_bits=point.mean_bits,
            error=point.selection_error,
            held_out_error=point.held_out_error,
            on_front=point.on_front,
            chosen=index == result.chosen,
        )
        for index, point in enumerate(result.points)
    )


def _check(folder: Path) -> Check | None:
    file = folder / CHECK_FOLDER / REPORT_NAME
    if not file.is_file():
        return None
    report = read_json_model(file, CheckReport)
    current = report.manifest_sha256 == sha256(folder / bundle.NAME / MANIFEST_NAME)
    return Check(report.passed, current, tuple(_comparison(row) for row in report.rows))


def _comparison(row: CheckRow) -> Comparison:
    parts = [
        error / limit
        for error, limit in (
            (row.median_error, row.median_tolerance),
            (row.relative_error, row.relative_tolerance),
        )
        if error is not None
    ]
    return Comparison(
        step=row.step,
        graph=row.subject.partition(", ")[2],
        reference=row.reference,
        of_limit=max(parts, default=None),
        passed=row.passed,
        command=row.command,
    )
