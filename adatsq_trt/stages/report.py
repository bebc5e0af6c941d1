"""Pictures of a bundle, and what a report shows of the files of a finished run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

import numpy as np

from adatsq_trt.engines.accuracy.report import REPORT_NAME, CheckReport, CheckRow, LoopReport
from adatsq_trt.engines.bundle import MANIFEST_NAME, Manifest
from adatsq_trt.engines.runtime import Bundle, Conditioning, Size
from adatsq_trt.errors import DamagedFileError, MismatchError
from adatsq_trt.files import read_json_model, read_tensors, sha256
from adatsq_trt.policy import Policy
from adatsq_trt.report.contact_sheet import write_contact_sheet, write_panel
from adatsq_trt.report.data import (
    STATIC_LABELS,
    Array,
    Check,
    Comparison,
    EngineFile,
    JudgedPolicy,
    Pictures,
    ReportData,
)
from adatsq_trt.search.select import SearchResult
from adatsq_trt.settings import SETTINGS_NAME, Settings
from adatsq_trt.stages import bundle, calibrate, search
from adatsq_trt.stages.run_directory import RunDirectory
from adatsq_trt.stages.summary import POLICY_NAME
from adatsq_trt.stages.summary import read as read_summary

CHECK_FOLDER, SAMPLES_NAME = "check", "samples.png"
SAMPLES_WITH_LORA = "samples-with-lora.png"  # no report shows it


def gather(run: RunDirectory) -> ReportData:
    """Everything that the report shows; what was not made yet (check, pictures) is left out.

    Raises:
        MissingFileError: the build has not run to its end.
        MismatchError: a later command replaced what the build was made of.
        DamagedFileError: a file is truncated or of another schema version.
    """
    folder, summary = run.path, read_summary(run)
    settings = read_json_model(folder / SETTINGS_NAME, Settings)
    policy = Policy.load(folder / POLICY_NAME)
    if policy != Policy.load(folder / search.NAME / search.POLICY):
        raise MismatchError(
            f"'{folder / POLICY_NAME}' is not the policy of the search in '{folder / search.NAME}', which is newer; "
            "run 'adatsq-trt build engine' with the options of that search to its end"
        )
    manifest = read_json_model(folder / bundle.NAME / MANIFEST_NAME, Manifest)
    shape = policy.steps, len(policy.layers)
    sensitivity = folder / search.NAME / search.SENSITIVITY
    return ReportData(
        run_name=folder.name,
        summary=summary,
        settings=settings,
        policy=policy,
        timesteps=manifest.schedule.timesteps,
        sigmas=manifest.schedule.sigmas,
        information=_table(folder / calibrate.NAME / calibrate.STATISTICS, "information", shape),
        # A given policy has no sensitivities.
        sensitivity=_table(sensitivity, "errors", (len(settings.formats), *shape)) if sensitivity.is_file() else None,
        judged=_judged(read_json_model(folder / search.NAME / search.RESULT, SearchResult)),
        trajectory_errors={
            STATIC_LABELS.get(name, name): errors.numpy()
            for name, errors in read_tensors(folder / search.NAME / search.TRAJECTORY_ERRORS).items()
        },
        layout=manifest.layout,
        engines=tuple(EngineFile(plan.target, plan.assignment, plan.bytes) for plan in manifest.plans),
        check=_check(folder),
        pictures=_pictures(folder / SAMPLES_NAME),
    )


def draw_both(
    bundle: Bundle,
    noise: np.ndarray,
    conditioning: Conditioning,
    size: Size | None,
    progress: Callable[[str, int], AbstractContextManager[Callable[[], None]]],
) -> dict[str, np.ndarray]:
    """Draw the same samples as the policy has it and in full precision, each with the bundle's LoRAs.

    Args:
        bundle: open; nothing of it runs yet.
        noise: first latents, [samples, *latent_shape].
        conditioning: of every sample.
        size: in pixels, one of the bundle's; None for its own.
        progress: makes, of a title and a number of steps, a block that is told of each step.

    Returns:
        "quantized" and "full precision": float32 [samples, (frames,) height, width, channels] in [0, 1].
    """
    sheets = {}
    for name, quantized in (("quantized", True), ("full precision", False)):
        # One after the other: what draws the first gives its memory back.
        again = Bundle(bundle.files, bundle.choice.name, bundle.offload)
        with again as panel, progress(f"generate: {name}", bundle.policy.steps) as advance:
            for lora in bundle.loras:
                panel.add_lora(lora)
            latents = panel.denoise(noise, conditioning, callback=lambda _: advance(), quantized=quantized, size=size)
            sheets[name] = panel.decode(latents, size)
    return sheets


def write_samples(sheet: Path, panels: Mapping[str, np.ndarray], notes: Sequence[str]) -> None:
    """Write a contact sheet, and both of its panels beside it, which a report shows.

    Args:
        sheet: path of the sheet.
        panels: title → images, quantized ones and those in full precision, as of `write_contact_sheet`.
        notes: one per panel, likewise.

    Raises:
        OutputError: the folder cannot be written.
    """
    write_contact_sheet(sheet, panels, notes)
    for file, images in zip(panel_files(sheet), panels.values(), strict=True):
        write_panel(file, images)


def panel_files(sheet: Path) -> tuple[Path, Path]:
    """Files beside a contact sheet with its samples, quantized and in full precision."""
    return sheet.with_name(f"{sheet.stem}-quantized.webp"), sheet.with_name(f"{sheet.stem}-full-precision.webp")


def _pictures(sheet: Path) -> Pictures | None:
    files = panel_files(sheet)
    return Pictures(*(file.read_bytes() for file in files)) if all(file.is_file() for file in files) else None


def _table(file: Path, name: str, shape: tuple[int, ...]) -> Array:
    """One number for each place.

    Raises:
        DamagedFileError: there is no such table, or it holds other places or something else than numbers.
    """
    table = read_tensors(file).get(name)
    if table is None or table.shape != shape or not bool(table.isfinite().all()):
        got = "none" if table is None else f"{table.dtype} {list(table.shape)}"
        raise DamagedFileError(
            f"'{file}', '{name}': got {got}, expected {list(shape)} finite numbers; run 'adatsq-trt build engine' again"
        )
    return cast(Array, table.numpy())


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
    unequal = (
        Comparison(0, f"{row.subject}: {row.failure}", "what was exported", None, False, f"adatsq-trt check {folder}")
        for row in report.exact
        if not row.passed
    )
    loops = (*_loop_comparisons(report.loop), *_loop_comparisons(report.plan_loop, "loop of plans"))
    return Check(report.passed, current, (*map(_comparison, report.rows), *unequal, *loops))


def _loop_comparisons(loop: LoopReport | None, name: str = "loop") -> Iterator[Comparison]:
    """The latent after every step, and the user's own limit."""
    if loop is None:
        return
    for row in loop.rows:
        part = _part(row.error, row.tolerance)
        yield Comparison(row.step, f"{name}, latent so far", "PyTorch's loop", part, row.passed, loop.command)
    if loop.fail_above is not None and loop.rows:
        last = loop.rows[-1]
        within = last.quantization_error is not None and last.quantization_error <= loop.fail_above
        part = _part(last.quantization_error, loop.fail_above)
        yield Comparison(last.step, f"{name}, last latent", "full precision", part, within, loop.command)


def _comparison(row: CheckRow) -> Comparison:
    parts = [_part(row.median_error, row.median_tolerance), _part(row.relative_error, row.relative_tolerance)]
    return Comparison(
        step=row.step,
        graph=row.subject.partition(", ")[2],
        reference=row.reference,
        of_limit=max((part for part in parts if part is not None), default=None),
        passed=row.passed,
        command=row.command,
    )


def _part(error: float | None, limit: float | None) -> float | None:
    return None if error is None or not limit else error / limit
