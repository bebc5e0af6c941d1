"""Weights are rounded once to the type of the graphs, and the checkpoint's own numbers can be had back."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adatsq_trt.errors import MismatchError
from adatsq_trt.files import MappedTensors, write_tensors
from adatsq_trt.models.declared import declare_type
from adatsq_trt.models.stored import LowRankChange, MappedLinear, named_weights
from tests.tiny_flux import make_tiny_flux
from tests.tiny_wan import make_tiny_wan

TYPES = (torch.bfloat16, torch.float16)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in named_weights(module)}


@pytest.mark.parametrize("dtype", TYPES)
def test_weights_become_numbers_of_the_type_and_what_is_computed_follows(dtype: torch.dtype) -> None:
    adapter = make_tiny_flux(width=32, patches=4)
    module = adapter.trace_module()
    inputs = adapter.guided_inputs(torch.ones(1, *adapter.latent_shape), 0.7, adapter.encode([1]), 1.0)
    before, buffers = weights(module), dict(module.named_buffers())
    with torch.no_grad():
        exact = adapter.predict(inputs)
        rounding = declare_type(module, dtype)
        rounded = adapter.predict(inputs)
        with rounding.undone():
            assert torch.equal(adapter.predict(inputs), exact)
            assert all(torch.equal(value, before[name]) for name, value in named_weights(module))
        assert torch.equal(adapter.predict(inputs), rounded)
    assert not rounding.changes_nothing
    assert not torch.equal(rounded, exact)
    for name, value in named_weights(module):
        assert value.dtype is torch.float32
        assert torch.equal(value, before[name].to(dtype).float()), name
    assert all(torch.equal(value, buffers[name]) for name, value in module.named_buffers())


def test_numbers_of_the_type_stay_as_they_are() -> None:
    module = make_tiny_wan().trace_module()
    before = weights(module)
    assert declare_type(module, torch.bfloat16).changes_nothing
    assert declare_type(module, torch.float32).changes_nothing
    assert all(torch.equal(value, before[name]) for name, value in named_weights(module))


def test_what_diffusers_keeps_in_float32_is_not_rounded() -> None:
    """As the trace: Wan's tables of shifts and scales, its embedding of the time, and its norms."""
    module = make_tiny_wan().trace_module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(2.0**-12)
    before = weights(module)
    declare_type(module, torch.bfloat16)
    kept = {name for name, value in named_weights(module) if torch.equal(value, before[name])}
    assert {name for name in before if "scale_shift_table" in name or "time_embedder" in name} <= kept
    assert "transformer.proj_out.weight" not in kept
    assert "transformer.blocks.0.attn1.to_q.weight" not in kept


@pytest.fixture(params=[torch.float32, torch.float16])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Sequential:
    """One layer whose weight is on disk."""
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)).to(request.param)
    write_tensors(tmp_path / "weights.safetensors", {"weight": weight})
    return nn.Sequential(MappedLinear(MappedTensors([tmp_path / "weights.safetensors"]), "weight", torch.zeros(32)))


def test_stored_weights_are_rounded_whenever_they_are_read(stored: nn.Sequential) -> None:
    layer = stored[0]
    own = layer.stored.float()
    rounding = declare_type(stored, torch.bfloat16)
    assert torch.equal(layer.weight, own.bfloat16().float())
    assert torch.equal(layer.plain().weight.to(torch.bfloat16).float(), layer.weight)  # what the trace makes of it
    x = torch.ones(2, 48)
    assert torch.equal(layer(x), nn.functional.linear(x, own.bfloat16().float(), layer.bias))
    with rounding.undone():
        assert torch.equal(layer.weight, own)
    assert torch.equal(layer.weight, own.bfloat16().float())
    layer.place(torch.device("cpu"), torch.bfloat16)
    assert torch.equal(layer.weight, own.bfloat16())


def test_a_weight_and_its_lora_are_added_in_float32_and_then_rounded_once(stored: nn.Sequential) -> None:
    """The sum of a rounded weight and the change would round twice; so the layer has the bits of one in memory."""
    layer, generator = stored[0], torch.Generator().manual_seed(1)
    up, down = torch.randn(32, 4, generator=generator), torch.randn(4, 48, generator=generator)
    layer.changes.append(LowRankChange(up, down, 0.01))
    fused = nn.Sequential(nn.Linear(48, 32))
    fused[0].weight.data = layer.weight.clone()
    for module in (stored, fused):
        assert not declare_type(module, torch.bfloat16).changes_nothing
    once = (layer.stored.float() + up @ down * 0.01).bfloat16().float()
    twice = (layer.stored.bfloat16().float() + up @ down * 0.01).bfloat16().float()
    assert not torch.equal(once, twice)
    for copy in (layer.weight, layer.in_memory().weight, layer.plain().weight.float(), fused[0].weight):
        assert torch.equal(copy, once)


def test_a_stored_weight_of_the_type_itself_costs_nothing(tmp_path: Path) -> None:
    write_tensors(tmp_path / "weights.safetensors", {"weight": torch.ones(2, 2, dtype=torch.bfloat16)})
    layer = MappedLinear(MappedTensors([tmp_path / "weights.safetensors"]), "weight", None)
    assert declare_type(nn.Sequential(layer), torch.bfloat16).changes_nothing
    assert layer.declared is None


def test_a_weight_that_is_too_large_for_the_type_is_named(tmp_path: Path) -> None:
    refusal = r"'0.weight' reaches 7e\+04, .* float16, which ends at 6.55e\+04; name bf16 instead of fp16"
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].weight.data[0, 0] = 7e4
    write_tensors(tmp_path / "weights.safetensors", {"weight": module[0].weight.data})
    stored = MappedLinear(MappedTensors([tmp_path / "weights.safetensors"]), "weight", None)
    for root in (module, nn.Sequential(stored)):
        with pytest.raises(MismatchError, match=refusal):
            declare_type(root, torch.float16)
        assert not declare_type(root, torch.bfloat16).changes_nothing
