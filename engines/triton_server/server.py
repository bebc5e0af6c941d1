"""Start Triton server on this machine: the one that the wheel nvidia-pytriton carries, or an installed one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import Any, NoReturn, Self

from adatsq_trt.errors import AdatsqError, DependencyError, UserError

log = logging.getLogger(__name__)
HOST = "127.0.0.1"
INSTALL = "pip install --no-deps nvidia-pytriton==0.7.0"
_INSTALLED = Path("/opt/tritonserver/bin/tritonserver")  # in the vendor's images
APART = Path(sys.prefix) / "tritonserver"  # where `make test-serving` puts the wheel
_START_SECONDS, _POLL_SECONDS, _WATCH_SECONDS = 300, 0.1, 0.5
# Given to what it has accepted. A client's open stream uses up all of it, and the server may hang afterwards.
_FINISH_SECONDS, _STOP_SECONDS = 10, 15
_SHARED_MEMORY = Path("/dev/shm")
_STUB = f"python_backend_stubs/{sys.version_info.major}.{sys.version_info.minor}/triton_python_backend_stub"
_FRAME = re.compile(r"\s*\d+# ")  # of the stack that a server writes when it crashes
# Below those that the kernel gives to outgoing connections: a client that asks one of these again and again, while
# nobody listens there, would in the end connect to itself and hold the port.
_FREE_PORTS = range(20_000, 32_768)


@dataclass(frozen=True)
class Ports:
    """Where the server listens, on the loopback address."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


@dataclass(frozen=True)
class Installation:
    """A server on this machine.

    Attributes:
        wheel: folder that holds the unpacked wheel; None for an installation of the vendor's.
    """

    wheel: Path | None

    @classmethod
    def find(cls, folder: Path | None = None) -> Installation:
        """Find a server.

        Args:
            folder: pip's --target when the wheel was installed; unless given, it is looked for among this
                environment's packages and where 'make test-serving' puts it.

        Raises:
            DependencyError: there is none, or it is not whole, or not for this version of Python.
        """
        spec = importlib.util.find_spec("pytriton") if folder is None else None
        packages = [Path(spec.origin).parents[1]] if spec is not None and spec.origin else []
        for wheel in [*packages, APART] if folder is None else [folder]:
            server = wheel / "pytriton" / "tritonserver"
            if (server / "bin" / "tritonserver").is_file():
                for part in ("backends/python", _STUB):
                    if not (server / part).exists():
                        raise DependencyError(f"the Triton server in '{wheel}' has no '{part}'; run: {INSTALL}")
                return cls(wheel.resolve())
        if folder is None and _INSTALLED.is_file():
            return cls(None)
        where = "this environment" if folder is None else f"'{folder}'"
        raise DependencyError(
            f"no Triton server in {where}; run: {INSTALL} (without its dependencies, which pin numpy below 2)"
        )

    @property
    def detail(self) -> str:
        """Version, as far as the installation says it, and where it is."""
        if self.wheel is None:
            return str(_INSTALLED)
        found = importlib.metadata.distributions(name="nvidia-pytriton", path=[str(self.wheel)])
        return f"{next(filter(None, (one.version for one in found)), 'unknown version')} in {self.wheel}"

    def command(self, scratch: Path) -> tuple[list[str], dict[str, str]]:
        """The server's command line and environment.

        Args:
            scratch: an empty folder that lives as long as the server.
        """
        if self.wheel is None:
            return [str(_INSTALLED)], dict(os.environ)
        server = self.wheel / "pytriton" / "tritonserver"
        # The wheel keeps a stub for every version of Python; the backend wants one beside its library.
        backend = scratch / "backends" / "python"
        shutil.copytree(server / "backends" / "python", backend)
        shutil.copy(server / _STUB, backend)
        libraries = [str(self.wheel / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
        # The stub embeds Python, reads no PYTHON* variables, and takes its environment from the first python3 in PATH.
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(libraries), "PATH": path}
        binary = str(server / "bin" / "tritonserver")
        return [binary, f"--backend-directory={scratch / 'backends'}"], environment


class Server:
    """A running server; a context manager that ends it.

    Attributes:
        ports: those that it listens at.
        log_file: file of its log.
        process: of the server; a process for each model below it.
    """

    def __init__(
        self,
        repository: Path,
        ports: Ports,
        installation: Installation | None = None,
        options: Sequence[str] = (),
        log_file: Path | None = None,
    ) -> None:
        """Start a server.

        Args:
            repository: a model repository.
            ports: those that it is to listen at.
            installation: server to start; the one that is found unless given.
            options: further arguments of its command line.
            log_file: to which it writes at the end; one that goes with the server unless given.

        Raises:
            UserError: a port is in use.
            DependencyError: there is no server.
        """
        installation = installation or Installation.find()
        for port in (ports.http, ports.grpc, ports.metrics):
            require_free(port)
        self.ports = ports
        self._scratch = Path(mkdtemp(prefix="adatsq-tritonserver-"))
        self.log_file = log_file or self._scratch / "server.log"
        command, environment = installation.command(self._scratch)
        addresses = [f"--{kind}-{what}" for kind in ("http", "grpc", "metrics") for what in ("address", "port")]
        values = [HOST, ports.http, HOST, ports.grpc, HOST, ports.metrics]
        arguments = [f"{name}={value}" for name, value in zip(addresses, values, strict=True)]
        # One model that does not load must not end the server.
        arguments += [f"--model-repository={repository.resolve()}", "--exit-on-error=false"]
        arguments += [f"--exit-timeout-secs={_FINISH_SECONDS}"]
        arguments += [f"--backend-config=python,shm-region-prefix-name={self._scratch.name}", *options]
        with self.log_file.open("ab") as output:
            self._log_start = output.tell()
            # The folder it runs in comes first in the models' module search path.
            self.process = subprocess.Popen(
                [*command, *arguments],
                env=environment,
                cwd=self._scratch,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the command line, which then ends the server
            )

    def __enter__(self) -> Self:
        """Take the server."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.stop()

    def wait_until_ready(self, models: Sequence[str]) -> None:
        """Wait until models are loaded.

        Raises:
            AdatsqError: one does not load, or the server has ended or takes too long; with its own words.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self.wait()
            states = self._states()
            for name in models:
                if states.get(name, {}).get("state") == "UNAVAILABLE":
                    raise AdatsqError(f"model '{name}' does not load: {states[name].get('reason')}")
            # The endpoints start one after another, metrics last.
            if all(states.get(name, {}).get("state") == "READY" for name in models) and self._measures():
                return
            time.sleep(_POLL_SECONDS)
        raise AdatsqError(f"Triton server was not ready after {_START_SECONDS} seconds: {self._last_words()}")

    def wait(self, models: Sequence[str] = ()) -> NoReturn:
        """Wait until the server or the process of a model ends, which they do only when something is wrong.

        A server whose model has lost its process says that it is ready, and what it has passed to that process is never
        answered, even when the model is loaded again. So such a server is killed, which ends its clients' connections.

        Args:
            models: of the Python backend that are loaded; each has a process.

        Raises:
            AdatsqError: says what has ended; of the server, with its own words.
        """
        while (code := self.process.poll()) is None:
            if gone := sorted(set(models) - self._models_with_a_process()):
                self.process.kill()
                raise AdatsqError(f"the process of model '{gone[0]}' has ended")
            time.sleep(_WATCH_SECONDS)
        raise AdatsqError(f"Triton server ended with code {code}: {self._last_words()}")

    def _models_with_a_process(self) -> set[str]:
        """Of the Python backend; its processes are called with the path of "<model>/<version>/model.py"."""
        import psutil

        models = set()
        with suppress(psutil.NoSuchProcess):  # the server itself
            for child in psutil.Process(self.process.pid).children():
                with suppress(psutil.NoSuchProcess):  # one that has ended and that the server has not noticed, too
                    models |= {Path(part).parents[1].name for part in child.cmdline() if part.endswith("/model.py")}
        return models

    def _states(self) -> dict[str, dict[str, Any]]:
        """Name → entry of the server's model index; empty while it does not listen."""
        answer = _ask(f"http://{HOST}:{self.ports.http}/v2/repository/index", b"{}")
        return {entry["name"]: entry for entry in json.loads(answer or b"[]")}

    def _measures(self) -> bool:
        return _ask(f"http://{HOST}:{self.ports.metrics}/metrics") is not None

    def _last_words(self) -> str:
        written = self.log_file.read_bytes()[self._log_start :]
        lines = written.decode(errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip() and not _FRAME.match(line)]
        return " ".join(said[-3:]) or "it wrote nothing"

    def stop(self) -> None:
        """End the server: what it has accepted is finished first."""
        self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("Triton server did not end within %d seconds and is killed", _STOP_SECONDS)
        finally:  # a second Ctrl-C does not wait, and nobody would come back for it
            self._clear()

    def _clear(self) -> None:
        """Kill whatever still runs, and remove what it has left."""
        # The models' processes outlive a server that was killed or has crashed, wait for it and keep their memory.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for region in _SHARED_MEMORY.glob(f"{self._scratch.name}*"):
            region.unlink(missing_ok=True)
        shutil.rmtree(self._scratch, ignore_errors=True)


def _ask(address: str, body: bytes | None = None) -> bytes | None:
    """Return a server's answer; None while it gives none."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data=body), timeout=10) as response:
            return bytes(response.read())
    except (OSError, HTTPException):
        return None


def free_ports() -> Ports:
    """Three ports that nobody uses right now."""
    free = (port for port in random.sample(_FREE_PORTS, len(_FREE_PORTS)) if _refusal(port) is None)
    return Ports(next(free), next(free), next(free))


def require_free(port: int) -> None:
    """Refuse a port that is in use.

    Raises:
        UserError: says which.
    """
    if error := _refusal(port):
        raise UserError(f"port {port} on {HOST} cannot be used: {error.strerror}; choose another") from error


def _refusal(port: int) -> OSError | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error
    return None
