"""A model whose process is killed: noticed by a probe, told to its clients, and started again, but not for ever."""

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from queue import SimpleQueue

import psutil
import pytest
import yaml

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.triton_server import supervisor as supervision
from adatsq_trt.engines.triton_server.page import Page
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from adatsq_trt.engines.triton_server.server import HOST, Installation, Ports, Server, free_ports
from adatsq_trt.engines.triton_server.supervisor import Supervisor
from adatsq_trt.errors import AdatsqError
from benchmarks.serving.client import GoneError, GrpcClient, HttpClient, RefusedError
from tests.serving.conftest import TINY, process_of, until

pytestmark = pytest.mark.serving
NOTICED_SECONDS = 20  # from the end of a process to an error for its clients, on a slow machine
STEP = f"{TINY}_step"
# Several samples never get beyond their first step, so that requests are under way when the process is killed.
ENDLESS = """
import time
from adatsq_trt.engines.triton_server.batching import StepBatcher

advance = StepBatcher.advance


def endlessly(self, chosen):
    if any(len(generation.latents) > 1 and generation.step for generation in chosen):
        time.sleep(0.1)
    else:
        advance(self, chosen)


StepBatcher.advance = endlessly
"""
BUSY = """
import time

execute = TritonPythonModel.execute


def busily(self, requests):
    time.sleep(10)
    return execute(self, requests)


TritonPythonModel.execute = busily
"""


@pytest.fixture
def own(tiny: BundleFiles, tmp_path: Path) -> Path:
    """A repository with a loop model that never finishes several samples, and its step model."""
    write_repository([Deployment(TINY, tiny, step_model=True)], tmp_path / "repository")
    with (tmp_path / "repository" / TINY / "1" / "model.py").open("a") as file:
        file.write(ENDLESS)
    return tmp_path / "repository"


def probe(repository: Path, ports: Ports, *options: str) -> subprocess.CompletedProcess[str]:
    """The written probe with a Python that has no packages."""
    command = [sys.executable, "-I", "-S", repository / "probe.py", "--address", f"{HOST}:{ports.http}", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


# ------------------------------------------------------------------------------------------------------ the probe


@pytest.mark.parametrize("model", [TINY, STEP])
def test_the_probe_notices_a_dead_process_which_the_health_pages_do_not(
    own: Path, start: Callable[..., Server], tmp_path: Path, model: str
) -> None:
    server, pid_file = start(own, (TINY, STEP)), tmp_path / "pid"
    pid_file.write_text(str(server.process.pid))
    alive = probe(own, server.ports, "--end-server", str(pid_file))
    assert (alive.returncode, alive.stderr) == (0, "")
    process_of(model, server.process.pid).kill()
    for page in ("v2/health/ready", f"v2/models/{model}/ready"):
        with urllib.request.urlopen(f"http://{HOST}:{server.ports.http}/{page}") as answer:
            assert answer.status == 200
    other = ({TINY, STEP} - {model}).pop()
    assert probe(own, server.ports, other).returncode == 0
    dead = probe(own, server.ports)
    assert (dead.returncode, server.process.poll()) == (1, None)
    assert dead.stderr.startswith(f"the process of model '{model}' is dead: ")
    assert probe(own, server.ports, "--end-server", str(pid_file)).returncode == 1
    assert server.process.wait(10) == -signal.SIGKILL
    gone = probe(own, server.ports)
    assert (gone.returncode, gone.stderr.count("\n")) == (1, 1)
    assert "does not answer: <urlopen error [Errno 111] Connection refused>" in gone.stderr


def test_the_probe_leaves_a_server_alone_that_is_only_slow(
    own: Path, start: Callable[..., Server], tmp_path: Path
) -> None:
    with (own / TINY / "1" / "model.py").open("a") as file:
        file.write(BUSY)
    server, pid_file = start(own, (TINY, STEP)), tmp_path / "pid"
    pid_file.write_text(str(server.process.pid))
    options = ("--end-server", str(pid_file), "--timeout", "2")
    slow = probe(own, server.ports, *options)
    assert (slow.returncode, server.process.poll()) == (1, None)
    assert slow.stderr == f"model '{TINY}' does not answer: timed out\n"
    unknown = probe(own, server.ports, *options, "nobody")
    assert (unknown.returncode, server.process.poll()) == (1, None)
    assert "nobody" in unknown.stderr


def test_the_commands_of_the_compose_file_end_a_server_with_a_dead_model(
    own: Path, installation: Installation, tmp_path: Path
) -> None:
    """Without Docker: `tritonserver` is a script that starts the wheel's, and /models and /tmp are folders here."""
    service = yaml.safe_load((own / "compose.yaml").read_text())["services"]["tritonserver"]
    assert (service["init"], service["restart"]) == (True, "unless-stopped")
    ports, scratch = free_ports(), tmp_path / "scratch"
    scratch.mkdir()
    command, environment = installation.command(scratch)
    listen = [f"--{kind}-port={getattr(ports, kind)}" for kind in ("http", "grpc", "metrics")]
    (tmp_path / "tritonserver").write_text(f'#!/bin/sh\nexec {shlex.join([*command, *listen])} "$@"\n')
    (tmp_path / "tritonserver").chmod(0o755)

    def here(text: str) -> str:
        return text.replace("$$", "$").replace("/tmp/", f"{tmp_path}/").replace("/models", str(own))

    variables = {**environment, "PATH": f"{tmp_path}:{environment['PATH']}"}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            shlex.split(here(service["command"])),
            env=variables,
            cwd=scratch,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        words = [here(word) for word in service["healthcheck"]["test"][1:]]
        words += ["--address", f"{HOST}:{ports.http}"]

        def healthy() -> bool:
            return subprocess.run(words, capture_output=True, check=False).returncode == 0

        until(healthy)
        process_of(STEP, server.pid).kill()
        assert not healthy()
        assert server.wait(10) == -signal.SIGKILL
    finally:
        os.killpg(server.pid, signal.SIGKILL)


# -------------------------------------------------------------------------------------------------- the supervisor


@pytest.fixture
def supervised(
    own: Path, installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Supervisor, Ports, "SimpleQueue[AdatsqError]"]]:
    """A supervisor in a thread, with two short pauses; what it gives up with comes through the queue."""
    monkeypatch.setattr(supervision, "_PAUSES_SECONDS", (0.1, 0.3))
    ports, ended = free_ports(), SimpleQueue[AdatsqError]()
    with Supervisor(own, [TINY, STEP], ports, installation, tmp_path / "server.log") as one:

        def keep_running() -> None:
            try:
                one.keep_running()
            except AdatsqError as error:
                ended.put(error)

        one.start()
        thread = threading.Thread(target=keep_running)
        thread.start()
        yield one, ports, ended
        # With its pauses used up it gives up at the next loss.
        while thread.is_alive():
            psutil.Process(one.process_id).kill() if one.process_id else None
            thread.join(0.5)


def test_requests_under_way_get_an_error_and_the_model_comes_back(
    supervised: tuple[Supervisor, Ports, "SimpleQueue[AdatsqError]"],
    tiny: BundleFiles,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, ports, _ = supervised
    endless = {"prompt": [0, 0], "seed": [1, 1]}

    def error_of(ask: Callable[[], object]) -> Exception:
        with pytest.raises((GoneError, RefusedError)) as caught:
            ask()
        return caught.value

    streaming = SimpleQueue[int]()

    def stream(port: int, path: str) -> str:
        """The last message."""
        body = json.dumps({**endless, "progress": True, "parameters": {"output": "latents"}}).encode()
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}{path}", data=body, timeout=60) as answer:
                first = answer.readline()
                streaming.put(json.loads(first.removeprefix(b"data: "))["step"])
                return [line for line in answer.read().decode().splitlines() if line][-1]
        except (OSError, HTTPException) as error:
            raise GoneError(str(error)) from error

    page = free_ports().http
    with Page(page, ports.http, tiny, TINY), ThreadPoolExecutor(4) as pool, caplog.at_level(logging.WARNING):
        clients = [
            pool.submit(error_of, lambda: HttpClient(ports).latents(TINY, **endless)),
            pool.submit(error_of, lambda: GrpcClient(ports).latents(TINY, **endless)),
            pool.submit(error_of, lambda: stream(ports.http, f"/v2/models/{TINY}/generate_stream")),
        ]
        shown = pool.submit(stream, page, "/generate")
        assert (streaming.get(timeout=60), streaming.get(timeout=60)) == (0, 0)
        time.sleep(1)
        assert not any(client.done() for client in (*clients, shown))
        process_of(TINY, one.process_id).kill()
        begun = time.monotonic()
        for client in clients:
            client.result(NOTICED_SECONDS)
        message = json.loads(shown.result(NOTICED_SECONDS).removeprefix("data: "))
        assert message == {"error": "Triton server went away before the answer; ask again"}
        assert time.monotonic() - begun < NOTICED_SECONDS
    until(lambda: "ready again" in one.log_file.read_text())
    assert len(HttpClient(ports).latents(TINY, prompt=0, seed=1)) == 64
    line = r"adatsq-trt: the process of model 'tiny' has ended; requests under way are lost; .* again in 0.1 s"
    assert len(re.findall(line, one.log_file.read_text())) == 1
    assert [record.message for record in caplog.records if "has ended" in record.message] != []


def test_killed_again_and_again_it_gives_up(supervised: tuple[Supervisor, Ports, "SimpleQueue[AdatsqError]"]) -> None:
    one, _, ended = supervised
    for times in range(3):
        until(lambda times=times: one.log_file.read_text().count("ready again") == times)
        process_of(STEP if times % 2 else TINY, one.process_id).kill()
    message = str(ended.get(timeout=60))
    assert message == "the process of model 'tiny' has ended; 3 failures in a row, so it is not started again"
    said = one.log_file.read_text()
    assert "is started again in 0.1 s" in said
    assert "is started again in 0.3 s" in said
    assert one.process_id is None
