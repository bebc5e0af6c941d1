"""Stage `calibrate`: what it writes is what the method says, and how memory groups its passes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adatsq_trt.calibration.fisher import temporal_weights
from adatsq_trt.calibration.hessian import hessian_bytes, layer_moments
from adatsq_trt.calibration.trajectory import trajectory
from adatsq_trt.execution import InProcess
from adatsq_trt.files import read_tensors
from adatsq_trt.stages import calibrate
from adatsq_trt.stages.context import Context, Memory
from adatsq_trt.stages.meter import resident_bytes
from tests.stages.tiny_run import tiny_context


@pytest.fixture(scope="module")
def tables(finished: Context) -> dict[str, torch.Tensor]:
    folder = calibrate.stage(finished).folder
    return {**read_tensors(folder / calibrate.TRAJECTORY), **read_tensors(folder / calibrate.STATISTICS)}


def test_the_trajectory_is_the_model_s_own(finished: Context, tables: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(tables["latents"], trajectory(finished.calibration))


def test_weights_of_steps_follow_from_the_information(finished: Context, tables: dict[str, torch.Tensor]) -> None:
    steps, layers = finished.settings.steps, len(finished.layers)
    assert tables["information"].shape == tables["largest"].shape == (steps, layers)
    assert bool((tables["information"] > 0).all())
    alpha = temporal_weights(tables["information"], finished.settings.temperature)
    torch.testing.assert_close(tables["alpha"], alpha)


@pytest.mark.parametrize("folder", [calibrate.HESSIANS, calibrate.PLAIN_HESSIANS])
def test_hessians_are_the_moments_of_the_inputs(
    finished: Context, tables: dict[str, torch.Tensor], folder: str
) -> None:
    executor = InProcess()
    weights = dict(zip(finished.layers, tables["alpha"].mT, strict=True))
    moments = layer_moments(executor, executor.share(finished.calibration), tables["latents"], weights, lambda: None)
    stored = calibrate.load_hessians(finished, folder)
    for name in finished.layers:
        own = moments[name].weighted if folder == calibrate.HESSIANS else moments[name].plain
        torch.testing.assert_close(stored[name], own)


def test_a_model_that_keeps_its_numbers_is_not_rounded(finished: Context, tmp_path: Path) -> None:
    assert float(read_tensors(calibrate.stage(finished).folder / calibrate.ROUNDING)["error"]) == 0.0
    with tiny_context(tmp_path / "run", formats=("fp8", "bf16"), targets=("sm89",)) as context:
        calibrate.run(context)
        rounded = read_tensors(calibrate.stage(context).folder / calibrate.ROUNDING)["error"]
        kept = trajectory(context.calibration)[-1]
        with context.model.rounding.undone():
            own = trajectory(context.calibration)[-1]
        assert float(rounded) == pytest.approx(float((kept - own).square().mean()), rel=1e-3)
        assert float(rounded) > 0


@pytest.fixture
def three_blocks(tmp_path: Path) -> Iterator[Context]:
    with tiny_context(tmp_path / "run", blocks=2) as context:
        yield context


def room(context: Context, bytes_free: int) -> Context:
    """The run with about as much memory."""
    memory = Memory(int((resident_bytes() + bytes_free) / 0.97) + 1)
    return Context(context.run, context.settings, context.model, memory)


def test_as_many_blocks_as_fit_share_a_pass(three_blocks: Context) -> None:
    blocks = three_blocks.adapter.layers_by_block()
    assert calibrate.hessian_passes(room(three_blocks, 8 << 30), list(blocks)) == [list(blocks)]
    nothing = Context(three_blocks.run, three_blocks.settings, three_blocks.model, Memory(0))
    assert calibrate.hessian_passes(nothing, list(blocks)) == [[block] for block in blocks], "one at least"
    linears = three_blocks.adapter.quantizable_layers()
    held = [hessian_bytes(linears[layer].in_features for layer in layers) for layers in blocks.values()]
    assert all(sums > 0 and passing > 0 for sums, passing in held)


def test_other_samples_are_another_stage_and_other_formats_are_not(finished: Context) -> None:
    assert calibrate.stage(finished).done
    for changes, done in (({"formats": ("w4a4",)}, True), ({"seed": 1}, False), ({"excluded": ("x",)}, False)):
        settings = finished.settings.model_copy(update=changes)
        assert calibrate.stage(Context(finished.run, settings, finished.model)).done is done
