"""Layers whose weights stay on disk compute what layers in memory compute, and keep nothing."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adatsq_trt.files import MappedTensors, write_tensors
from adatsq_trt.models import stored
from adatsq_trt.models.stored import StoredLinear, count_weights, fill, keep, large_linears

ROWS, IN, OUT = 3, 48, 80


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32])
def tensors(request: pytest.FixtureRequest, tmp_path: Path) -> MappedTensors:
    """A file in which the weight lies at an odd place."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator).to(request.param)
    write_tensors(tmp_path / "weights.safetensors", {"a.odd": torch.zeros(3, dtype=torch.uint8), "b.weight": weight})
    return MappedTensors([tmp_path / "weights.safetensors"])


@pytest.fixture
def layers(tensors: MappedTensors) -> tuple[StoredLinear, nn.Linear]:
    """The same layer over its file and in memory."""
    plain = nn.Linear(IN, OUT)
    plain.weight.data = tensors["b.weight"].float().clone()
    return StoredLinear(tensors, "b.weight", plain.bias.detach().clone()), plain.requires_grad_(False)


def inputs() -> Tensor:
    return torch.randn(2, ROWS, IN, generator=torch.Generator().manual_seed(1))


def test_products_are_the_same_bits(layers: tuple[StoredLinear, nn.Linear]) -> None:
    own, plain = layers
    assert torch.equal(own(inputs()), plain(inputs()))
    assert torch.equal(own.weight, plain.weight)
    assert (own.in_features, own.out_features) == (IN, OUT)


def test_gradients_of_inputs_are_the_same_bits_and_can_be_taken_twice(layers: tuple[StoredLinear, nn.Linear]) -> None:
    found = []
    for layer in layers:
        x = inputs().requires_grad_()
        output = torch.tanh(layer(x))
        found += [[torch.autograd.grad(output[..., n].sum(), x, retain_graph=True)[0] for n in (0, 5)]]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_the_backward_pass_keeps_no_weight(layers: tuple[StoredLinear, nn.Linear]) -> None:
    kept: list[tuple[int, ...]] = []

    def keep_shape(value: Tensor) -> Tensor:
        kept.append(tuple(value.shape))
        return value

    for layer, count in zip(layers, (0, 1), strict=True):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep_shape, lambda value: value):
            layer(inputs().requires_grad_())
        weights = [shape for shape in kept if shape in ((OUT, IN), (IN, OUT))]
        assert len(weights) == count


def test_a_copy_needs_no_file(layers: tuple[StoredLinear, nn.Linear], tmp_path: Path) -> None:
    """Copies are made from the state that other processes are sent."""
    own, plain = layers
    twin = copy.deepcopy(own)
    (tmp_path / "weights.safetensors").unlink()
    assert torch.equal(twin(inputs()), plain(inputs()))
    assert twin.stored.untyped_storage().nbytes() == twin.stored.nbytes


def test_a_plain_layer_has_the_stored_type(layers: tuple[StoredLinear, nn.Linear], tensors: MappedTensors) -> None:
    own, _ = layers
    dtype = tensors["b.weight"].dtype
    plain = own.plain(dtype)
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, tensors["b.weight"])
    assert plain.weight.dtype is dtype
    assert own.plain(torch.float64).weight.dtype is torch.float64


def test_copies_in_bfloat16(layers: tuple[StoredLinear, nn.Linear]) -> None:
    own, plain = layers
    own.place(torch.device("cpu"), torch.bfloat16)
    x = inputs().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = own(x)
        expected = plain(inputs())
    assert torch.equal(output, expected)
    assert torch.autograd.grad(output.sum(), x)[0].dtype is torch.float32
    own.place(torch.device("cpu"), torch.float32)
    assert torch.equal(own(inputs()), plain(inputs()))


class Block(nn.Module):
    """A large and a small layer, a parameter of its own and two buffers, of which one is part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(IN, OUT, bias=False), nn.Linear(2, 3)
        self.table = nn.Parameter(torch.ones(4))
        self.register_buffer("counts", torch.arange(3))
        self.register_buffer("angles", torch.linspace(0, 1, 5), persistent=False)


def test_filling_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "LEAST_NUMBERS", IN * OUT)
    model, file = nn.Sequential(Block()), tmp_path / "model.safetensors"
    state = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    write_tensors(file, state)
    assert list(large_linears(model)) == ["0.large"]
    twin = nn.Sequential(Block())
    for name, parameter in list(twin.named_parameters()):
        parent = twin.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], nn.Parameter(parameter.to("meta")))
    twin[0].counts = twin[0].counts.to("meta")
    fill(twin, MappedTensors([file]))
    assert isinstance(twin[0].large, StoredLinear)
    assert count_weights(twin) == count_weights(model) == sum(p.numel() for p in model.parameters())
    assert torch.equal(twin[0].large.weight, state["0.large.weight"].float())
    found = twin.state_dict() | {"0.angles": twin[0].angles}
    assert not any(value.is_meta for value in found.values())
    assert {value.dtype for name, value in found.items() if name != "0.counts"} == {torch.float32}
    assert torch.equal(twin[0].counts, torch.arange(3))


def test_keeping_a_loaded_modules_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "LEAST_NUMBERS", IN * OUT)
    model = nn.Sequential(nn.Linear(IN, OUT)).bfloat16().requires_grad_(False)
    expected = copy.deepcopy(model).float()(inputs())
    keep(model)
    assert isinstance(model[0], StoredLinear)
    assert model[0].stored.dtype is torch.bfloat16
    assert torch.equal(model(inputs()), expected)
