"""`--device`: what is computed on a device that is not the processor is what the processor computes."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adatsq_trt.errors import UserError
from adatsq_trt.execution import Shared
from adatsq_trt.execution.device import OnDevice, parse_device, raise_on_oom, to_device
from adatsq_trt.models.adapter import ModelAdapter
from tests.execution import pretend_run
from tests.execution.alike import assert_alike
from tests.execution.pretend_device import pretend_device
from tests.tiny_wan import make_tiny_wan


def alone(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process of its own, since PyTorch counts devices once; what it raises is raised here.

    The process comes from a server that has imported everything, and computed nothing.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([pretend_run.__name__])
    with ProcessPoolExecutor(1, context) as pool:
        pool.submit(function, *arguments).result()


@pytest.mark.parametrize(
    ("model", "stage", "formats", "transform"),
    [
        ("wan", "search", "w8a8,bf16", None),
        ("stored", "search", "w4a4,w8a8", None),
        pytest.param("flux", "export", "w4a4,nvfp4", None, marks=pytest.mark.slow),
        pytest.param("wan", "search", "w4a4,w8a8", "balance", marks=pytest.mark.slow),
        pytest.param("z-image", "search", "w4a4,fp8", "hadamard-low-rank", marks=pytest.mark.slow),
    ],
)
def test_a_device_of_its_own_changes_no_result(
    model: str, stage: str, formats: str, transform: str | None, tmp_path: Path
) -> None:
    here, there = tmp_path / "cpu", tmp_path / "pretend"
    for folder in (here, there):
        alone(pretend_run.run, folder, folder.name, model, stage, formats, transform)
    assert_alike(here, there, precision=1e-5)


def forget_a_tensor() -> None:
    there, here = torch.ones(2).to(pretend_device()), torch.ones(2)
    for operation in (lambda: there + here, lambda: torch.cat([there, here]), lambda: torch.stack([there[0], here[0]])):
        with pytest.raises(RuntimeError, match="one device"):
            operation()
    assert (there + here[0]).tolist() == [2.0, 2.0]


def test_a_forgotten_tensor_is_noticed() -> None:
    alone(forget_a_tensor)


def damaged_wan() -> ModelAdapter:
    adapter = make_tiny_wan()
    torch.nn.init.constant_(adapter.transformer.blocks[1].ffn.net[2].bias, float("nan"))
    return adapter


def run_damaged(folder: Path) -> None:
    pretend_run.MODELS["wan"] = damaged_wan
    pretend_run.run(folder, "pretend", "wan", "search", "w8a8,bf16", None)


def test_a_damaged_model_is_named_on_a_device_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 0: in full precision layer 'blocks\.1\.ffn\.net\.2' gives NaN"):
        alone(run_damaged, tmp_path / "run")


def test_what_is_shared_stays_shared_and_items_and_results_travel() -> None:
    weight, item = torch.ones(2), torch.ones(2)
    executor = OnDevice(torch.device("meta"))
    shared = executor.share(weight)
    assert shared.content is weight
    places = []

    def unit(_common: Tensor, own: tuple[Tensor, str]) -> str:
        places.append(own[0].device.type)
        return own[1]

    assert list(executor.map(unit, shared, [(item, "a"), Shared((item, "b"))])) == ["a", "b"]
    assert places == ["meta", "meta"]


def test_an_object_in_two_places_stays_one() -> None:
    tensor = torch.ones(2)
    pair = to_device({"a": (tensor,), "b": [tensor]}, "meta")
    assert pair["a"][0] is pair["b"][0]
    assert pair["a"][0].device.type == "meta"


def test_a_full_device_is_told() -> None:
    message = r"--device meta: its memory is too small \(no room\); use a smaller size"
    with pytest.raises(UserError, match=message), raise_on_oom(torch.device("meta")):
        raise torch.OutOfMemoryError("no\nroom")


@pytest.mark.parametrize("text", ["gpu", "cpu:0", "cuda:", "cuda:x", "auto:1", ""])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected 'auto', 'cpu', 'cuda', or 'cuda:N'"):
        parse_device(text)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_device("auto") == parse_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="finds no CUDA GPU; run 'adatsq-trt doctor'"):
        parse_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert parse_device("cuda") == torch.device("cuda", 1)
    assert parse_device("auto") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="the last GPU of this machine is cuda:1"):
        parse_device("cuda:2")
