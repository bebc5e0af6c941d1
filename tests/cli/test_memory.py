"""Memory: what is refused, what is estimated, and that the limit never decides a result."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adatsq_trt.calibration.fisher import LayerGradients, backward_step, projections
from adatsq_trt.calibration.hessian import layer_moments
from adatsq_trt.errors import UserError
from adatsq_trt.files import MappedTensors, read_tensors
from adatsq_trt.search.resume import measure_sensitivity
from adatsq_trt.solver import State
from adatsq_trt.stages import calibrate, memory, quantize
from adatsq_trt.stages.context import Memory
from adatsq_trt.stages.memory import plan_memory
from adatsq_trt.stages.models import open_run

ROOT = Path(__file__).parents[2]


def test_hessians_in_many_passes_are_those_of_one(built: Path) -> None:
    context = open_run(built)
    blocks, folder = context.adapter.layers_by_block(), built / "calibrate"
    assert calibrate.hessian_passes(context, list(blocks)) == [list(blocks)]
    groups = calibrate.hessian_passes(replace(context, memory=Memory(0)), list(blocks))
    assert groups == [[block] for block in blocks]
    latents, found = read_tensors(folder / "trajectory.safetensors"), read_tensors(folder / "statistics.safetensors")
    stored = MappedTensors(folder / calibrate.PLAIN_HESSIANS / f"{block}.safetensors" for block in blocks)
    batch = context.executor.share(context.calibration)
    for group in groups[:2]:
        own = {layer: None for block in group for layer in blocks[block]}
        again = layer_moments(context.executor, batch, latents["latents"], own, lambda: None)
        for layer, moments in again.items():
            assert torch.equal(moments.plain, stored[layer])
            assert torch.equal(moments.largest, found["largest"][:, context.layers.index(layer)])


def test_weights_that_do_not_fit_are_dequantized_at_every_call(built: Path) -> None:
    context = open_run(built)
    outputs = []
    for limits in (Memory(), Memory(0)):
        with replace(context, memory=limits).simulated(quantize.load(context)).installed() as model:
            model.assign(dict.fromkeys(model.layers, context.formats[0]), 0)
            outputs.append(context.calibration.velocity(context.calibration.noise(), 0))
    assert torch.equal(*outputs)


def test_a_backward_pass_by_block_gives_the_sensitivities_of_one_at_once(built: Path, tmp_path: Path) -> None:
    context, found = open_run(built), []
    latents = read_tensors(built / "calibrate" / "trajectory.safetensors")["latents"]
    start = projections(latents.shape[1], context.adapter.latent_shape, 2, seed=0)
    store = quantize.load(context)
    for limits in (Memory(backward_bytes=1), Memory(0, backward_bytes=1)):
        by_block = replace(context, memory=limits).by_block(2)
        assert by_block == (limits.limit_bytes == 0)
        what = (context.calibration, latents, start, context.formats, store, tmp_path / str(by_block))
        found.append(measure_sensitivity(*what, lambda: None, context.executor, by_block))
    assert torch.equal(found[0][0].contributions, found[1][0].contributions)
    assert all(map(torch.equal, *([own.latent for own in adjoints] for _, adjoints in found)))


def test_the_plan_knows_what_a_backward_pass_keeps(built: Path) -> None:
    context = open_run(built)
    planned = plan_memory(None, context.settings, context.model)
    adapter, samples = context.adapter, context.calibration.part(slice(0, 16))
    latents = read_tensors(built / "calibrate" / "trajectory.safetensors")["latents"]
    start, shown = projections(len(samples.seeds), adapter.latent_shape, 1, seed=0), list[LayerGradients]()
    backward_step(samples, latents[0, :16], State(start), 0, shown.append)
    (layers,) = shown
    assert planned.projection_bytes == sum(gradient.nbytes for gradient in layers.gradients.values())


def test_only_stages_that_run_need_memory(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = open_run(built)
    large = replace(memory._model(context.settings, context.model, None), weights=10**11)
    monkeypatch.setattr(memory, "_model", lambda *_: large)
    settings = context.settings.model_copy(update={"simulate": False, "targets": ("sm120",), "layout": "embedded"})

    def refusal(until: str = "bundle", **changes: object) -> str:
        with pytest.raises(UserError) as refused:
            plan_memory(1, settings.model_copy(update=changes), context.model, until=until)
        return str(refused.value)

    assert "stage 'bundle' needs 80" in refusal()
    assert refusal().endswith("or --layout shared, whose plans hold no weights")
    for changes in ({"layout": "shared"}, {"simulate": True}, {"targets": ("cpu",)}, {"until": "export"}):
        assert "stage 'export' needs 60" in refusal(**changes)
    assert "stage 'export'" not in refusal(until="quantize")


SWEEPS = ("fisher:1", "sensitivity:1", "sensitivity:8", "gradients:1")  # and how many projections


@pytest.fixture(scope="module")
def swept() -> dict[str, tuple[int, int]]:
    """What was planned for each and what it took, in one process for all."""
    # The C library keeps smaller pieces for later; those of real models are beyond what it keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.cli.sweep_memory", *SWEEPS]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = (tuple(map(int, line.split())) for line in ended.stdout.splitlines())
    return dict(zip(SWEEPS, lines, strict=True))


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_sweep_by_block_takes_no_more_than_planned(swept: dict[str, tuple[int, int]], sweep: str) -> None:
    planned, taken = swept[sweep]
    assert 10_000_000 < taken <= planned


def test_the_limit_that_a_refusal_names_is_accepted(built: Path) -> None:
    context = open_run(built)
    with pytest.raises(UserError, match=r"pass at least --memory-limit ([0-9.]+)GB") as refused:
        plan_memory(1_000_000, context.settings, context.model)
    named = float(str(refused.value).partition("at least --memory-limit ")[2].partition("GB")[0])
    limit = int(named * 1e9) + 200_000_000  # the process may have grown since
    assert plan_memory(limit, context.settings, context.model).limit_bytes == limit
