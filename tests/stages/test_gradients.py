"""Hessians of every form: resumed, in little memory and at once they are the same."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from adatsq_trt import zoo
from adatsq_trt.calibration.fisher import proportional_weights, temporal_weights
from adatsq_trt.calibration.hessian import layer_moments
from adatsq_trt.calibration.shared_gradients import GradientUnit
from adatsq_trt.config import HessianForm
from adatsq_trt.execution import InProcess, Shared
from adatsq_trt.files import MappedTensors, read_tensors
from adatsq_trt.settings import Settings
from adatsq_trt.stages import calibrate, gradients, memory
from adatsq_trt.stages.context import Context, Memory
from adatsq_trt.stages.memory import needed_bytes
from adatsq_trt.stages.run_directory import RunDirectory
from adatsq_trt.zoo.loading import LoadedModel, load_model
from tests.one_block import FLUX, write_model

SAMPLES, STEPS = 18, 2  # two parts of the batch


@cache
def digits() -> LoadedModel:
    """With one block of either kind."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        write_model(Path(folder) / FLUX.model, FLUX)
        patch.setattr(zoo, "ZOO_FOLDER", Path(folder))
        return load_model(FLUX.model)


def make_context(run: RunDirectory, form: HessianForm) -> Context:
    model = digits()
    settings = Settings(
        model=model.name,
        weights_sha256=model.weights_sha256,
        model_sha256=model.model_sha256,
        format_set="w4a4",
        formats=("w4a4",),
        targets=(),
        simulate=True,
        steps=STEPS,
        guidance=model.default_guidance,
        budget_bits=4.0,
        calibration_samples=SAMPLES,
        hessian=form,
    )
    return Context(run, settings, model)


def hessians(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / "calibrate" / "hessians").iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated at once, in the default form."""
    path = tmp_path_factory.mktemp("whole") / "run"
    with RunDirectory.open(path) as run:
        context = make_context(run, "coherent")
        assert gradients.gradient_passes(context, ["a", "b"][:0]) == []
        blocks = list(context.adapter.layers_by_block())
        assert gradients.gradient_passes(context, blocks) == [gradients.Pass(blocks, 16, by_block=False)]
        calibrate.run(context)
    return path


class Counting(InProcess):
    """Counts the sweeps, and stops before one of them."""

    def __init__(self, most: float = float("inf")) -> None:
        self.units: list[GradientUnit] = []
        self._most = most

    def map(self, function: Callable[..., Any], common: Shared[Any], items: Iterable[Any]) -> Iterator[Any]:
        def noted() -> Iterator[Any]:
            for item in items:
                if isinstance(item, GradientUnit):
                    if len(self.units) >= self._most:
                        raise KeyboardInterrupt
                    self.units.append(item)
                yield item

        return super().map(function, common, noted())


def test_little_memory_gives_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run") as run:
        little = replace(make_context(run, "coherent"), memory=Memory(0), executor=(counting := Counting()))
        blocks = list(little.adapter.layers_by_block())
        passes = [gradients.Pass([block], 1, by_block=True) for block in blocks]
        assert gradients.gradient_passes(little, blocks) == passes
        calibrate.run(little)
    assert [unit.at_once for unit in counting.units] == [1] * 2 * len(blocks)
    assert hessians(tmp_path / "run") == hessians(whole)


def test_an_interrupted_sweep_goes_on_after_the_parts_that_are_done(whole: Path, tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run") as run:
        context = make_context(run, "coherent")
        with pytest.raises(KeyboardInterrupt):
            calibrate.run(replace(context, executor=Counting(most=1)))
        sums = tmp_path / "run" / "calibrate" / gradients.FOLDER
        assert len(list(sums.iterdir())) == len(context.adapter.layers_by_block())
        calibrate.run(replace(context, executor=(counting := Counting())))
    assert [unit.samples for unit in counting.units] == [slice(16, SAMPLES)]
    assert list(sums.iterdir()) == []
    assert hessians(tmp_path / "run") == hessians(whole)


def test_blocks_that_are_done_are_not_computed_again(whole: Path, tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run") as run:
        context = replace(make_context(run, "coherent"), memory=Memory(0))
        with pytest.raises(KeyboardInterrupt):
            calibrate.run(replace(context, executor=Counting(most=3)))  # a block and half of the next
        calibrate.run(replace(context, executor=(counting := Counting())))
    assert len(counting.units) == 2 * len(context.adapter.layers_by_block()) - 3
    assert hessians(tmp_path / "run") == hessians(whole)


@pytest.mark.parametrize("form", ["paper", "linear", "plain"])
def test_forms_by_steps_are_weighted_sums_of_moments(form: HessianForm, tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run") as run:
        context = make_context(run, form)
        calibrate.run(context)
        folder = calibrate.stage(context).folder
        statistics = read_tensors(folder / calibrate.STATISTICS)
        information = statistics["information"]
        alpha = {
            "paper": temporal_weights(information, context.settings.temperature),
            "linear": proportional_weights(information),
            "plain": torch.full_like(information, 1 / STEPS),
        }[form]
        assert torch.equal(statistics["alpha"], alpha)
        weights = dict(zip(context.layers, alpha.mT, strict=True))
        latents = read_tensors(folder / calibrate.TRAJECTORY)["latents"]
        batch = context.executor.share(context.calibration)
        expected = layer_moments(context.executor, batch, latents, weights, lambda: None)
        stored = calibrate.load_hessians(context)
        for layer, moments in expected.items():
            assert moments.weighted is not None
            assert torch.equal(stored[layer], moments.weighted)
        assert not (folder / gradients.FOLDER).exists()


def test_the_row_form_needs_no_weight_gradients(whole: Path, tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run") as run:
        context = make_context(run, "row")
        calibrate.run(context)
        found = calibrate.load_hessians(context)
        blocks = list(context.adapter.layers_by_block())
        other = make_context(run, "coherent")
        assert memory_of(context) < memory_of(other)
    coherent = MappedTensors(whole / "calibrate" / "hessians" / f"{block}.safetensors" for block in blocks)
    for layer in context.layers:
        own = found[layer]
        assert torch.equal(own, own.mT) or float((own - own.mT).norm() / own.norm()) < 1e-5
        assert not torch.allclose(own / own.trace(), coherent[layer], rtol=1e-2)


def memory_of(context: Context) -> int:
    model = memory._model(context.settings, context.model, None)
    return memory.gradient_bytes(context.settings, model.flow, model.shapes)


def test_a_plan_counts_the_gradients_of_one_sample(whole: Path) -> None:
    """The widest layer's weight gradient is in what calibration needs, in the forms that keep it only."""
    context = make_context(RunDirectory.existing(whole), "coherent")
    model = memory._model(context.settings, context.model, None)
    wide = replace(model, shapes=(((4096, 16384),),))  # one layer of a large model
    needed = needed_bytes(context.settings, wide, 0)["calibrate"]
    plain = needed_bytes(context.settings.model_copy(update={"hessian": "plain"}), wide, 0)["calibrate"]
    square, gradient = 4 * 4096**2, 4 * 4096 * 16384
    assert needed - plain >= gradient + square
    assert needed >= gradient + (1 + 4 + 1 + 2) * square  # its row form; sums; what is added; a file


def test_earlier_runs_have_the_papers_hessians_and_their_key(tmp_path: Path) -> None:
    assert Settings.model_fields["hessian"].default == "paper"
    with RunDirectory.open(tmp_path / "run") as run:
        context = make_context(run, "paper")
        names = ("weights_sha256", "model_sha256", "steps", "guidance", "seed", "calibration_samples", "temperature")
        before = run.stage(calibrate.NAME, {**context.inputs(names), "hessians": "by block"}, [])
        assert calibrate.stage(context).key == before.key
        others = {calibrate.stage(make_context(run, form)).key for form in ("coherent", "row", "linear", "plain")}
        assert len(others | {before.key}) == 5
