"""`--device`: what cannot be computed on is refused before anything is written."""

from pathlib import Path

import pytest
import torch

from adatsq_trt.config import BuildConfig
from adatsq_trt.execution import InProcess
from adatsq_trt.execution.device import OnDevice
from adatsq_trt.stages.resolve import choose_executor

SEARCH = ("search", "digits-flux", "--simulate", "--formats", "w4a4,w8a8", "--steps", "2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "gpu"), "--device gpu: expected 'auto', 'cpu', 'cuda', or 'cuda:N' for the GPU of that number"),
        (("--device", "cuda:99"), "--device cuda:99: "),  # whether this machine has GPUs or not
        (("--device", "cuda", "--ray", "local"), "--device cuda: with --ray the workers' processors compute"),
    ],
)
def test_a_wrong_device_is_refused_before_anything_is_written(
    cli, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in cli(*SEARCH, "--output", tmp_path / "run", *options).refusal
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("device", "executor"), [(None, OnDevice), ("cpu", InProcess), ("auto", OnDevice), ("cuda:0", OnDevice)]
)
def test_who_computes_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str | None, executor: type[InProcess] | type[OnDevice]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    config = BuildConfig() if device is None else BuildConfig(device=device)
    with choose_executor(config) as chosen:
        assert type(chosen) is executor
