"""Hooks record what went through and leave nothing behind."""

import pytest
import torch
from torch import nn

from adatsq_trt.models.capture import captured


@pytest.fixture
def layers() -> dict[str, nn.Linear]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {"first": nn.Linear(3, 4), "second": nn.Linear(4, 2)}


def test_inputs_and_output_gradients_are_recorded(layers: dict[str, nn.Linear]) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with captured(layers) as capture:
        middle = layers["first"](x)
        (layers["second"](torch.tanh(middle)).square().sum() / 2).backward()
    assert torch.equal(capture.inputs["first"], x)
    assert torch.equal(capture.inputs["second"], torch.tanh(middle))
    output = layers["second"](torch.tanh(middle))
    torch.testing.assert_close(capture.output_gradients["second"], output)
    back = (output @ layers["second"].weight) * (1 - torch.tanh(middle) ** 2)
    torch.testing.assert_close(capture.output_gradients["first"], back)


def test_recorded_inputs_hold_no_graph(layers: dict[str, nn.Linear]) -> None:
    with captured(layers) as capture:
        layers["first"](torch.ones(1, 3, requires_grad=True))
    assert not capture.inputs["first"].requires_grad


def test_without_a_graph_only_inputs_are_recorded(layers: dict[str, nn.Linear]) -> None:
    with captured(layers) as capture, torch.no_grad():
        layers["first"](torch.ones(2, 3))
    assert list(capture.inputs) == ["first"]
    assert not capture.output_gradients


def test_the_last_call_counts(layers: dict[str, nn.Linear]) -> None:
    with captured(layers) as capture:
        layers["first"](torch.zeros(2, 3))
        layers["first"](torch.ones(2, 3))
    assert torch.equal(capture.inputs["first"], torch.ones(2, 3))


def test_hooks_are_removed_even_after_an_exception(layers: dict[str, nn.Linear]) -> None:
    with pytest.raises(ZeroDivisionError), captured(layers) as capture:
        1 / 0  # noqa: B018
    layers["first"](torch.ones(2, 3))
    assert not capture.inputs
    assert not any(layer._forward_hooks for layer in layers.values())
