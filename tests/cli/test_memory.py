"""Memory: what is refused, what is estimated, and that the limit never decides a result."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adatsq_trt.calibration.hessian import layer_moments
from adatsq_trt.cli.options import open_run
from adatsq_trt.cli.stages import calibrate, quantize
from adatsq_trt.cli.stages.context import Memory
from adatsq_trt.cli.stages.memory import plan_memory
from adatsq_trt.errors import UserError
from adatsq_trt.files import MappedTensors, read_tensors


def test_hessians_in_many_passes_are_those_of_one(built: Path) -> None:
    context = open_run(built)
    blocks, folder = context.adapter.layers_by_block(), built / "calibrate"
    assert calibrate.hessian_passes(context, list(blocks)) == [list(blocks)]
    groups = calibrate.hessian_passes(replace(context, memory=Memory(0)), list(blocks))
    assert groups == [[block] for block in blocks]
    latents, alpha = read_tensors(folder / "trajectory.safetensors"), read_tensors(folder / "statistics.safetensors")
    weights = dict(zip(context.layers, alpha["alpha"].mT, strict=True))
    stored = [
        MappedTensors(folder / name / f"{block}.safetensors" for block in blocks)
        for name in (calibrate.HESSIANS, calibrate.PLAIN_HESSIANS)
    ]
    batch = context.workers.share(context.calibration)
    for group in groups[:2]:
        own = {layer: weights[layer] for block in group for layer in blocks[block]}
        found = layer_moments(context.workers, batch, latents["latents"], own, lambda: None)
        for layer, moments in found.items():
            assert torch.equal(moments.weighted, stored[0][layer])
            assert torch.equal(moments.plain, stored[1][layer])
            assert torch.equal(moments.largest, alpha["largest"][:, context.layers.index(layer)])


def test_weights_that_do_not_fit_are_dequantized_at_every_call(built: Path) -> None:
    context = open_run(built)
    outputs = []
    for memory in (Memory(), Memory(0)):
        with replace(context, memory=memory).simulated(quantize.load(context)).installed() as model:
            model.assign(dict.fromkeys(model.layers, context.formats[0]), 0)
            outputs.append(context.calibration.step(context.calibration.noise(), 0))
    assert torch.equal(*outputs)


def test_the_limit_that_a_refusal_names_is_accepted(built: Path) -> None:
    context = open_run(built)
    with pytest.raises(UserError, match=r"pass at least --memory-limit ([0-9.]+)GB") as refused:
        plan_memory(1_000_000, context.settings, context.model)
    named = float(str(refused.value).partition("at least --memory-limit ")[2].partition("GB")[0])
    limit = int(named * 1e9) + 200_000_000  # the process may have grown since
    assert plan_memory(limit, context.settings, context.model).limit_bytes == limit
