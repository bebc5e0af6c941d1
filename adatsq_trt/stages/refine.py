"""Stage `refine`: the weights of the policy solved again, for the rounded inputs that they will multiply.

Block by block in the order of execution, each along the trajectory of the model as quantized so far. The result is kept
where it errs less on the selection batch. Nothing that the search measured changes: other policies' figures are of the
weights before.

refine/FORMAT/BLOCK.safetensors   as of stage `quantize`, for the formats and layers of the policy
refine/result.json                errors before and after
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from adatsq_trt.calibration.finite import require_finite_weight
from adatsq_trt.calibration.gptq import factorize, gptq_factored
from adatsq_trt.calibration.refine import Moments, QuantizedRun, corrected_weight, rounded_moments
from adatsq_trt.calibration.trajectory import Samples, final_latents
from adatsq_trt.calibration.units import parts
from adatsq_trt.execution.device import CPU, to_device
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.formats import Format, Grid, format_named
from adatsq_trt.models.format_store import BlockFiles, CandidateWeights, save_weights, weights_name
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import QuantizedWeight
from adatsq_trt.search.denoising import row_errors
from adatsq_trt.search.resume import Score
from adatsq_trt.stages import calibrate, quantize, search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.run_directory import Stage
from adatsq_trt.stages.work import Work
from adatsq_trt.transforms import LayerTransform

NAME = "refine"
RESULT = "result.json"


class Judged(BaseModel):
    """Errors of a policy on a batch.

    Attributes:
        error: latent MSE.
        standard_error: of that mean.
        capped_error: as `Score.capped_errors` has it, which is what weights are chosen by.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    error: float
    standard_error: float
    capped_error: float


class Refined(BaseModel):
    """Errors of the policy before and after its weights were solved again, and which weights are used.

    Attributes:
        schema_version: of this file.
        before, after: the policy with old and new weights on the selection batch.
        kept: whether the new weights are used.
        held_out: the policy with the weights that are used, on the held-out batch; None without such samples.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    before: Judged
    after: Judged
    kept: bool
    held_out: Judged | None


def stage(context: Context) -> Stage:
    """The stage for these settings."""
    calibrated = calibrate.stage(context).folder
    files = [search.stage(context).folder / search.POLICY, quantize.stage(context).folder]
    files += [calibrated / calibrate.HESSIANS, calibrated / calibrate.TRAJECTORY]
    names = ("model_sha256", "weights_sha256", "steps", "guidance", "seed", "damping", "calibration_samples")
    inputs = context.inputs((*names, "selection_samples", "held_out_samples"))
    return context.run.stage(NAME, inputs, files)


def run(context: Context) -> Stage:
    """Solve again, unless that is done."""
    this = stage(context)
    if this.done:
        return this
    policy = Policy.load(search.stage(context).folder / search.POLICY)
    blocks, used = context.adapter.layers_by_block(), sorted(policy.formats)
    with this.run():
        hessians = calibrate.load_hessians(context)
        with context.progress("refine", len(blocks)) as advance, context.on_device():
            store = _own_weights(quantize.load(context), used)
            for block, layers in blocks.items():
                _refine_block(context, this, policy, store, block, layers, hessians)
                advance()
            old = _own_weights(quantize.load(context), used)
            write_json_model(this.unit(RESULT), _judge(context, policy, old, store))
    return this


def work(context: Context) -> Work:
    """Count what there is to do."""
    settings, blocks = context.settings, len(context.adapter.layers_by_block())
    selection, held_out = settings.steps * settings.selection_samples, settings.steps * settings.held_out_samples
    moments = blocks * settings.steps * settings.calibration_samples
    rounded = moments + 2 * selection + held_out
    return Work(call=selection + held_out, rounded=rounded, layer=len(context.layers))


def _refine_block(
    context: Context,
    this: Stage,
    policy: Policy,
    store: CandidateWeights,
    block: str,
    layers: Sequence[str],
    hessians: Mapping[str, Tensor],
) -> None:
    """Put a block's new weights into the store, from its files where these are there."""
    used = _used(policy, layers)
    files = {name: this.unit(weights_name(name, block)) for name in sorted({name for name, _ in used})}
    if not all(file.is_file() for file in files.values()):
        moments = _moments(context, policy, store, layers)
        solved: dict[str, dict[str, QuantizedWeight]] = {name: {} for name in files}
        for layer in layers:
            for fmt, weight in _solve(context, store, layer, [n for n, own in used if own == layer], moments, hessians):
                require_finite_weight(layer, fmt, weight)
                solved[fmt.name][layer] = weight
        for name, weights in solved.items():
            save_weights(files[name], weights)
    _take(context, this, store, used)


def _take(context: Context, this: Stage, store: CandidateWeights, used: Sequence[tuple[str, str]]) -> None:
    """Replace weights of a store by those on disk."""
    for name, pairs in groupby(used, key=lambda pair: pair[0]):
        found = BlockFiles(this.folder / name, [])
        own = store.weights[name]
        assert isinstance(own, dict)
        own.update({layer: to_device(found[layer], context.adapter.device) for _, layer in pairs})


def _used(policy: Policy, layers: Sequence[str]) -> list[tuple[str, str]]:
    """(format, layer) of a policy that have weights to be solved, sorted."""
    pairs = {(name, layer) for row in policy.rows for layer, name in row.items()}
    return sorted((n, layer) for n, layer in pairs if layer in layers and not format_named(n).weight.is_float)


def _moments(context: Context, policy: Policy, store: CandidateWeights, layers: Sequence[str]) -> Moments:
    """Of the calibration batch under the policy, with the weights of the store."""
    formats = tuple(policy.formats_at(step) for step in range(policy.steps))
    with context.simulated(store).installed() as model:
        samples = context.calibration
        common = context.executor.share(QuantizedRun(model, samples, formats, tuple(layers)))
        sums: Moments = {}
        for found in context.executor.map(rounded_moments, common, parts(len(samples.seeds))):
            for key, moments in found.items():
                sums[key] = sums[key] + moments if key in sums else moments.clone()
    return sums


def _solve(
    context: Context,
    store: CandidateWeights,
    layer: str,
    names: Sequence[str],
    moments: Moments,
    hessians: Mapping[str, Tensor],
) -> list[tuple[Format, QuantizedWeight]]:
    """A layer in its formats; those with one weight grid share a weight, and the steps of all of them count for it."""
    transform: LayerTransform = store.transform(layer)
    weight = transform.rounded_weight(context.adapter.quantizable_layers()[layer].weight.detach())
    hessian = to_device(hessians[layer], weight.device)
    factored = factorize(transform.input_map.second_moment(hessian), context.settings.damping)
    grids: dict[Grid, list[Format]] = {}
    for fmt in (format_named(name) for name in names):
        grids.setdefault(fmt.weight, []).append(fmt)
    solved = []
    for formats in grids.values():
        total = torch.stack([moments[layer, fmt.name] for fmt in formats]).sum(dim=0)
        corrected = corrected_weight(weight, to_device(total, weight.device))
        again = gptq_factored(corrected, factored, formats[0])
        solved += [(fmt, to_device(again, CPU)) for fmt in formats]
    return solved


def _judge(context: Context, policy: Policy, before: CandidateWeights, after: CandidateWeights) -> Refined:
    """Old and new weights on the selection batch; the better ones on the held-out batch."""
    reference = final_latents(context.selection)
    old, new = (_score(context, policy, store, context.selection, reference) for store in (before, after))
    kept, held_out = new.capped_error < old.capped_error, None
    if context.settings.held_out_samples:
        held_out = _score(context, policy, after if kept else before, context.held_out, final_latents(context.held_out))
    return Refined(before=old, after=new, kept=kept, held_out=held_out)


def _score(context: Context, policy: Policy, store: CandidateWeights, samples: Samples, reference: Tensor) -> Judged:
    with context.simulated(store).installed() as model:
        latents = final_latents(samples, lambda step: model.assign(policy.formats_at(step), step))
    score = Score(row_errors(latents, reference).numpy())
    return Judged(error=score.error, standard_error=score.standard_error, capped_error=score.capped_error)


def _own_weights(store: CandidateWeights, formats: Iterable[str]) -> CandidateWeights:
    """Some formats of a store, whose weights can be replaced."""
    return CandidateWeights({name: dict(store.weights[name]) for name in formats}, store.scales, store.transforms)


def result(context: Context) -> Refined | None:
    """Read the stage's result; None where it was not asked for."""
    return read_json_model(stage(context).folder / RESULT, Refined) if context.settings.refine else None


def load(context: Context) -> CandidateWeights:
    """The weights that are used: those of `quantize`, or the policy's as they were solved again."""
    store, found = quantize.load(context), result(context)
    if found is None or not found.kept:
        return store
    weights = _own_weights(store, store.weights)
    policy = Policy.load(search.stage(context).folder / search.POLICY)
    _take(context, stage(context), weights, _used(policy, context.layers))
    return weights
