"""Layers whose weights stay on disk compute what layers in memory compute, and keep nothing."""

import copy
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adatsq_trt.files import MappedTensors, write_tensors
from adatsq_trt.models import stored
from adatsq_trt.models.stored import MappedLinear, count_weights, fill, large_linears

ROWS, IN, OUT = 3, 48, 80


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32])
def tensors(request: pytest.FixtureRequest, tmp_path: Path) -> MappedTensors:
    """A file in which the weight lies at an odd place."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator).to(request.param)
    write_tensors(tmp_path / "weights.safetensors", {"a.odd": torch.zeros(3, dtype=torch.uint8), "b.weight": weight})
    return MappedTensors([tmp_path / "weights.safetensors"])


@pytest.fixture
def layers(tensors: MappedTensors) -> tuple[MappedLinear, nn.Linear]:
    """The same layer over its file and in memory."""
    plain = nn.Linear(IN, OUT)
    plain.weight.data = tensors["b.weight"].float().clone()
    return MappedLinear(tensors, "b.weight", plain.bias.detach().clone()), plain.requires_grad_(False)


def inputs() -> Tensor:
    return torch.randn(2, ROWS, IN, generator=torch.Generator().manual_seed(1))


def test_products_are_the_same_bits(layers: tuple[MappedLinear, nn.Linear]) -> None:
    own, plain = layers
    assert torch.equal(own(inputs()), plain(inputs()))
    assert torch.equal(own.weight, plain.weight)
    assert (own.in_features, own.out_features) == (IN, OUT)


def test_gradients_of_inputs_are_the_same_bits_and_can_be_taken_twice(layers: tuple[MappedLinear, nn.Linear]) -> None:
    found = []
    for layer in layers:
        x = inputs().requires_grad_()
        output = torch.tanh(layer(x))
        found += [[torch.autograd.grad(output[..., n].sum(), x, retain_graph=True)[0] for n in (0, 5)]]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_gradients_with_gaps_between_their_rows(layers: tuple[MappedLinear, nn.Linear]) -> None:
    """As behind a concatenation along the tokens, which is what the text of a Flux goes through."""
    found = []
    for layer in layers:
        x = inputs().requires_grad_()
        joined = torch.cat([layer(x), torch.ones(2, 2, OUT)], dim=1)
        found.append(torch.autograd.grad((joined * joined.detach()).sum(), x)[0])
    assert torch.equal(*found)


def test_the_backward_pass_keeps_no_weight(layers: tuple[MappedLinear, nn.Linear], monkeypatch) -> None:
    own, _ = layers
    copies: list[weakref.ref[Tensor]] = []
    copy_once = MappedLinear._copy

    def watched(layer: MappedLinear, dtype: torch.dtype) -> Tensor:
        made = copy_once(layer, dtype)
        copies.append(weakref.ref(made))
        return made

    monkeypatch.setattr(MappedLinear, "_copy", watched)
    output = own(inputs().requires_grad_())
    assert len(copies) == 1
    assert copies[0]() is None
    output.sum().backward()
    assert len(copies) == 2
    assert copies[1]() is None


def test_a_copy_needs_no_file(layers: tuple[MappedLinear, nn.Linear], tmp_path: Path) -> None:
    """Copies are made from the state that other processes are sent."""
    own, plain = layers
    twin = copy.deepcopy(own)
    (tmp_path / "weights.safetensors").unlink()
    assert torch.equal(twin(inputs()), plain(inputs()))
    assert twin.stored.untyped_storage().nbytes() == twin.stored.nbytes


def test_a_plain_layer_has_the_stored_type(layers: tuple[MappedLinear, nn.Linear], tensors: MappedTensors) -> None:
    own, _ = layers
    plain = own.plain()
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, tensors["b.weight"])
    assert plain.weight.dtype is tensors["b.weight"].dtype


def test_copies_in_bfloat16(layers: tuple[MappedLinear, nn.Linear]) -> None:
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
    assert list(large_linears(model)) == ["0.large"]
    with stored.EmptyOnMeta():
        twin = nn.Sequential(Block())
    model[0].counts += 7
    state["0.counts"] = model[0].counts
    write_tensors(file, state)
    fill(twin, MappedTensors([file]))
    assert isinstance(twin[0].large, MappedLinear)
    assert count_weights(twin) == count_weights(model) == sum(p.numel() for p in model.parameters())
    assert torch.equal(twin[0].large.weight, state["0.large.weight"].float())
    found = twin.state_dict() | {"0.angles": twin[0].angles}
    assert not any(value.is_meta for value in found.values())
    assert {value.dtype for name, value in found.items() if name != "0.counts"} == {torch.float32}
    assert torch.equal(twin[0].counts, torch.arange(3) + 7)
