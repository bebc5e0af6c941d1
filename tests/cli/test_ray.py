"""`--ray`: the files of a run are those of one process, also when a worker is killed on the way."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

RUN = (
    "search",
    "digits-flux",
    "--device",
    "cpu",
    "--simulate",
    "--formats",
    "w4a4,w8a8",
    "--steps",
    "3",
    "--beam",
    "2",
)
# More samples than a unit of calibration and one of held-out samples hold.
SAMPLES = ("--candidates", "2", "--calibration-samples", "18", "--selection-samples", "6", "--held-out-samples", "65")
STAGES = ("calibrate", "quantize", "search")


def results(run: Path) -> dict[str, bytes]:
    """Every file that the stages wrote."""
    files = [file for stage in STAGES for file in (run / stage).rglob("*") if file.is_file()]
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in files}


def busy_worker(command: subprocess.Popen[bytes]) -> psutil.Process:
    """One of the command's workers that computes a unit."""
    while True:
        assert command.poll() is None, "the run ended before a worker was found"
        for process in psutil.Process(command.pid).children(recursive=True):
            try:
                if process.name().startswith("ray::_compute"):
                    return process
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.005)


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes in one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_two_workers_write_the_same_files_even_if_one_is_killed(cli, tmp_path: Path) -> None:
    # A worker has as many threads as its driver, and sums depend on their number.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    here, there = tmp_path / "here", tmp_path / "there"
    with one_thread():
        assert cli(*RUN, *SAMPLES, "--output", here).code == 0
    command = subprocess.Popen(
        cli.alone(*RUN, *SAMPLES, "--output", there, "--ray", "local:2"),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while not list((there / "search" / "columns").glob("*.safetensors")):
        assert command.poll() is None
        time.sleep(0.005)
    busy_worker(command).send_signal(signal.SIGKILL)
    _, told = command.communicate(timeout=300)
    assert command.returncode == 0, told.decode()
    expected = results(here)
    places = {"/".join(name.split("/")[:2]) for name in expected}
    assert {"search/policy.json", "quantize/w4a4", "calibrate/hessians"} < places
    assert results(there) == expected


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "--ray 127.0.0.1:1: no Ray cluster answers there (Connection refused); start one there with"),
        ("somewhere", "--ray somewhere: expected HOST:PORT of a Ray cluster's head, 'local', or 'local:N'"),
    ],
)
def test_a_wrong_address_is_refused_before_anything_is_written(cli, tmp_path: Path, address: str, message: str) -> None:
    assert message in cli(*RUN, "--output", tmp_path / "run", "--ray", address).refusal
    assert list(tmp_path.iterdir()) == []
