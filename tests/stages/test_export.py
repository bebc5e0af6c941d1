"""Stage `export`: graphs of the policy's assignments, and what a bundle needs beside them."""

import pytest
import torch

from adatsq_trt.calibration.trajectory import trajectory
from adatsq_trt.engines.bundle import ScheduleRecord
from adatsq_trt.engines.exported import EXPORTED_NAME, Exported, array_hash
from adatsq_trt.files import read_json_model, read_tensors
from adatsq_trt.graph_index import INDEX_NAME, GraphIndex
from adatsq_trt.policy import Policy
from adatsq_trt.stages import export, quantize, search
from adatsq_trt.stages.context import Context


@pytest.mark.parametrize(
    ("targets", "simulate", "wanted"),
    [
        (("cpu",), False, ("cpu",)),
        (("sm89", "cpu"), False, ("target", "cpu")),
        (("sm89",), True, ("cpu",)),
        ((), True, ("cpu",)),
    ],
)
def test_graphs_for_tensorrt_are_written_where_plans_will_be(
    finished: Context, targets: tuple[str, ...], simulate: bool, wanted: tuple[str, ...]
) -> None:
    settings = finished.settings.model_copy(update={"targets": targets, "simulate": simulate})
    assert export.variants(Context(finished.run, settings, finished.model)) == wanted


def test_used_formats_are_those_of_all_assignments() -> None:
    policy = Policy.from_steps("m", "0" * 64, ["a", "b"], [["w8a8", "fp8"], ["fp8", "bf16"], ["w8a8", "fp8"]])
    assert export.used_formats(policy) == ("bf16", "fp8", "w8a8")


def test_the_index_has_every_assignment_all_together_and_the_reference(finished: Context) -> None:
    folder, policy = export.stage(finished).folder, Policy.load(search.stage(finished).folder / search.POLICY)
    index = read_json_model(folder / export.GRAPHS / INDEX_NAME, GraphIndex)
    found = [(graph.variant, graph.assignment) for graph in index.graphs]
    wanted = [("cpu", index) for index in (*range(len(policy.assignments)), None)]
    assert sorted(found, key=str) == sorted([*wanted, ("reference", None)], key=str)
    assert index.base_type == "float32"
    assert all((folder / export.GRAPHS / graph.path).is_file() for graph in index.graphs)


def test_the_reference_is_the_fake_quantized_model(finished: Context) -> None:
    tensors = read_tensors(export.stage(finished).folder / export.REFERENCE)
    policy = Policy.load(search.stage(finished).folder / search.POLICY)
    samples = finished.calibration.part(slice(0, export.CHECK_SAMPLES))
    torch.testing.assert_close(tensors["loop.full_precision"], trajectory(samples))
    with finished.simulated(quantize.load(finished)).installed() as model:
        loop = trajectory(samples, lambda step: model.assign(policy.formats_at(step), step))
    torch.testing.assert_close(tensors["loop.quantized"], loop)
    assert tensors["spread.outputs"].shape == (policy.steps,)
    layers = {name.partition("layer.")[2] for name in tensors if name.startswith("step_000.layer.")}
    assert layers == set(finished.layers)
    again = export.layer_reference(finished, policy, 0)
    for name in finished.layers:
        torch.testing.assert_close(again[name], tensors[f"step_000.layer.{name}"])


def test_encodings_of_all_prompts_and_their_hashes_are_kept(finished: Context) -> None:
    folder = export.stage(finished).folder
    prompts, adapter = read_tensors(folder / export.PROMPTS), finished.adapter
    count = len(adapter.prompts)
    encoded = adapter.encode(range(count))
    for name, value in encoded.conditional.items():
        assert torch.equal(prompts[f"conditional.{name}"], value)
    assert encoded.unconditional is not None
    for name, value in encoded.unconditional.items():
        assert torch.equal(prompts[f"unconditional.{name}"], value[:1])
    record = read_json_model(folder / EXPORTED_NAME, Exported)
    assert record.guidance == finished.settings.guidance
    assert record.schedule == ScheduleRecord.of(finished.schedule)
    assert record.arrays[export.PROMPTS] == {name: array_hash(value.numpy()) for name, value in prompts.items()}


def test_the_largest_relative_error_of_the_draws() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    draws = [expected + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), expected + torch.tensor([[0.5, 0.0], [0.0, 0.0]])]
    torch.testing.assert_close(export._largest_error(draws, expected), torch.tensor([0.2, 0.0]))
