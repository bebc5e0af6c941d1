"""The whole denoising loop of a bundle, on its own latents, against the loops that PyTorch ran."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np

from adatsq_trt.engines.accuracy.comparison import CPU_NAME, Figures, SavedArrays, compare
from adatsq_trt.engines.accuracy.references import Reference
from adatsq_trt.engines.accuracy.report import LoopReport, LoopRow
from adatsq_trt.engines.accuracy.tolerances import (
    Tolerance,
    loop_tolerances,
    plan_loop_tolerances,
    plan_tolerance,
)
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle

_REFERENCE_NAME = "PyTorch's loop, fake-quantized"


def check_loop(bundle: BundleFiles, folder: Path, fail_above: float | None, plans: Bundle | None = None) -> LoopReport:
    """Compare the latent after every step.

    Args:
        bundle: opened.
        folder: receives the latents in polygraphy's format.
        fail_above: largest relative error of the last latent against full precision; None for no limit.
        plans: the bundle on a GPU, whose loop it shall be; that of the cpu graphs without it.

    Raises:
        DamagedFileError: the bundle lacks the reference.
        OutputError: the folder cannot be written.
    """
    reference = Reference(bundle)
    expected, full = reference.loop("quantized"), reference.loop("full_precision")
    limits = {_name(step): tolerance for step, tolerance in enumerate(_tolerances(reference, plans is not None))}
    got, failure = _latents(bundle, reference, plans)
    arrays = [{_name(t): latents[t + 1] for t in range(len(latents) - 1)} for latents in (got, expected, full)]
    saved = SavedArrays(folder, "loop" if plans is None else "loop.plans")
    name = CPU_NAME if plans is None else plans.choice.name
    saved.save({"noise": expected[0]}, arrays[0], arrays[1], name, _REFERENCE_NAME)
    agreement, quantization = compare(arrays[0], arrays[1], limits), compare(arrays[0], arrays[2], limits)
    rows = tuple(
        LoopRow(
            step=step,
            error=agreement[name].relative,
            tolerance=limits[name].relative,
            quantization_error=quantization[name].relative,
            passed=agreement[name].passed,
        )
        for step, name in enumerate(limits)
    )
    return LoopReport(
        rows=rows,
        fail_above=fail_above,
        passed=all(row.passed for row in rows) and _is_below(quantization[_name(len(limits) - 1)], fail_above),
        failure=failure,
        command=saved.compare_command(arrays[1], limits),
    )


def _tolerances(reference: Reference, of_plans: bool) -> list[Tolerance]:
    bundle, policy = reference.bundle, reference.bundle.policy
    formats = policy.formats
    cpu = loop_tolerances(formats, reference.loop_spread())
    if not of_plans:
        return cpu
    outputs = [plan_output_tolerance(bundle, step).relative for step in range(policy.steps)]
    latents = reference.loop("quantized").astype(np.float64)
    sizes = [float(np.linalg.norm(latent)) for latent in latents[1:]]
    moves = [float(np.linalg.norm(move)) for move in np.diff(latents, axis=0)]
    scales = bundle.manifest.guidance, bundle.manifest.guidance_2 or 0.0
    guidance = max(scales, key=abs) if bundle.two_branches else 1.0
    rescaled = bundle.two_branches and bundle.manifest.rescaled_guidance
    return plan_loop_tolerances(outputs, moves, sizes, guidance, cpu, rescaled)


def plan_output_tolerance(bundle: BundleFiles, step: int) -> Tolerance:
    """Limits of what a step's plan puts out."""
    formats = list(bundle.policy.rows[bundle.policy.step_assignments[step]].values())
    return plan_tolerance(formats, bundle.index.base_type, len(bundle.index.blocks_of(bundle.expert(step))))


def _name(step: int) -> str:
    return f"latent_{step:03d}"


def _latents(bundle: BundleFiles, reference: Reference, plans: Bundle | None) -> tuple[list[np.ndarray], str | None]:
    """The noise and the latent after every step; or the noise alone and why the loop did not run."""
    prompts, seeds = reference.loop("prompts").tolist(), reference.loop("seeds").tolist()
    latents = [reference.loop("quantized")[0]]
    # ONNX Runtime documents no common base for what goes wrong with a graph or its inputs.
    try:
        with nullcontext(plans) if plans is not None else Bundle(bundle, "onnxruntime") as runnable:
            conditioning = runnable.conditioning(prompts)
            runnable.denoise(runnable.noise(seeds), conditioning, callback=lambda done: latents.append(done.latents))
    except Exception as error:
        return latents[:1], f"the loop does not run: {error}"
    return latents, None


def _is_below(quantization: Figures, fail_above: float | None) -> bool:
    if fail_above is None:
        return True
    return quantization.relative is not None and quantization.relative <= fail_above
