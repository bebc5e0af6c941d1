"""Loading in several threads."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from adatsq_trt.models.stored import EmptyOnMeta
from adatsq_trt.zoo.loading import load_model


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as the interpreter lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless")
def test_threads_that_load_leave_torch_as_it_was() -> None:
    """Diffusers and accelerate replace functions of `torch.nn` while they load; later modules would have no values."""
    functions = {name: function for name, function in vars(nn.init).items() if callable(function)}
    register = nn.Module.register_parameter
    with ThreadPoolExecutor(2) as pool:
        loaded = list(pool.map(load_model, ["digits-flux"] * 8))
    assert nn.Module.register_parameter is register
    assert {name: vars(nn.init)[name] for name in functions} == functions
    states = [model.adapter.trace_module().state_dict() for model in loaded]
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in state)


def test_an_empty_model_concerns_its_own_thread_alone() -> None:
    with ThreadPoolExecutor(1) as pool, EmptyOnMeta():
        mine, other = nn.Linear(2, 2), pool.submit(nn.Linear, 2, 2).result()
    assert (mine.weight.device.type, other.weight.device.type) == ("meta", "cpu")
