"""Units of work as tasks of a Ray cluster.

A task whose worker dies is started again, elsewhere if need be; what other tasks have done stays. A worker keeps the
last common value, so a model is read once by each. What is sent is pickled by Ray, between these processes and never
into a file.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from adatsq_trt import __version__
from adatsq_trt.errors import AdatsqError, DependencyError, MismatchError, UserError
from adatsq_trt.execution import CommonT, ItemT, ResultT, Shared, T

LOGGER = logging.getLogger(__name__)
LOCAL = "local"
# How often a task is started again when its worker died. One that kills its workers by itself must come to an end.
_RETRIES = 5
# Tasks that wait, or whose results wait, for each worker: enough to keep it busy, few enough to bound the memory.
_AHEAD = 3
_ANSWER_SECONDS = 5.0
_ADVICE = "start one there with 'ray start --head', correct the address, or use --ray local; the same command goes on"
_CACHE: dict[str, Any] = {}  # of a worker: the last common value, by its name in the cluster


@dataclass(frozen=True)
class Address:
    """Where the workers are.

    Attributes:
        cluster: HOST:PORT of a cluster's head, or None to start workers on this machine.
        workers: how many to start here; None for as many as there are processors for.
    """

    cluster: str | None
    workers: int | None = None


def parse_address(text: str) -> Address:
    """Read what follows `--ray`.

    Raises:
        UserError: neither HOST:PORT nor 'local' nor 'local:N'.
    """
    name, _, number = text.rpartition(":") if ":" in text else (text, "", "")
    if text == LOCAL:
        return Address(None)
    if name == LOCAL and number.isdecimal() and 1 <= int(number) <= 1024:
        return Address(None, int(number))
    if name and name != LOCAL and "/" not in name and number.isdecimal() and 1 <= int(number) <= 65535:
        return Address(text)
    raise UserError(
        f"--ray {text}: expected HOST:PORT of a Ray cluster's head, 'local', or 'local:N' for N workers on this machine"
    )


def require_cluster(address: Address) -> None:
    """Refuse, within seconds, what cannot work.

    Raises:
        DependencyError: Ray is not installed.
        UserError: nothing answers at the address.
    """
    if find_spec("ray") is None:
        raise DependencyError("--ray needs the library Ray; install it with: pip install 'adatsq-trt[ray]'")
    if address.cluster is None:
        return
    host, _, port = address.cluster.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "1":
                _require_http2(connection)
    except OSError as error:
        raise UserError(
            f"--ray {address.cluster}: no Ray cluster answers there ({error.strerror or error}); {_ADVICE}"
        ) from error


def _require_http2(connection: socket.socket) -> None:
    """See that a gRPC server is there, since Ray itself would try for minutes (RFC 9113, section 3.4).

    Raises:
        OSError: no answer in time, or another one.
    """
    empty_settings = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + empty_settings)
    header = connection.recv(len(empty_settings), socket.MSG_WAITALL)
    if header[3:4] != empty_settings[3:4]:
        raise OSError("something else than Ray listens")


@contextmanager
def connected(address: Address) -> Iterator[RayExecutor]:
    """Workers for the length of a block.

    Raises:
        UserError: no cluster answers, or none of its machines has room for a worker.
    """
    import torch

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray would otherwise change this for tasks without a GPU, which later versions no longer do.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address.cluster is None:
        # Ray listens to the whole network even so: answer only those who know this token. It is read on import.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    threads = torch.get_num_threads()
    start: dict[str, Any] = {"address": address.cluster}
    if address.cluster is None:
        count = address.workers or max(1, (os.cpu_count() or 1) // threads)
        start = {"num_cpus": count * threads, "include_dashboard": False}
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **start)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).strip()
        raise UserError(f"--ray {address.cluster or LOCAL}: Ray did not start ({reason}); {_ADVICE}") from error
    try:
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        count = sum(int(node["Resources"].get("CPU", 0)) // threads for node in nodes if node["Alive"])
        if count == 0:
            raise UserError(
                f"--ray {address.cluster}: no machine there has the {threads} processors of a worker, which computes "
                "with as many threads as this process would; set OMP_NUM_THREADS to fewer"
            )
        LOGGER.info("ray: %d workers, %d threads each (as OMP_NUM_THREADS has it in this process)", count, threads)
        yield RayExecutor(count, Surroundings.here())
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Surroundings:
    """Versions and settings that a worker must share with this process to compute the same bits.

    Attributes:
        version: of this package.
        torch: its version.
        instructions: those of the processor's instruction sets that PyTorch uses.
        threads: it computes with; sums over them are taken in another order with another number.
    """

    version: str
    torch: str
    instructions: str
    threads: int

    @classmethod
    def here(cls) -> Surroundings:
        """Those of this process."""
        import torch

        capability = torch.backends.cpu.get_cpu_capability()
        return cls(__version__, torch.__version__, capability, torch.get_num_threads())

    def require_here(self) -> None:
        """Set the threads and refuse other differences.

        Raises:
            MismatchError: says what differs.
        """
        import torch

        torch.set_num_threads(self.threads)
        here = Surroundings.here()
        if here != self:
            raise MismatchError(
                f"--ray: worker '{socket.gethostname()}' has adatsq-trt {here.version}, torch {here.torch} and "
                f"{here.instructions}, expected {self.version}, {self.torch} and {self.instructions} as in this "
                "process, or results would differ; use machines of one kind with the same versions"
            )


class RayExecutor:
    """Tasks of the cluster that this process is connected to."""

    def __init__(self, count: int, surroundings: Surroundings) -> None:
        """Use `connected`.

        Args:
            count: units that can run at the same time.
            surroundings: of this process.
        """
        self.count, self._surroundings = count, surroundings

    def share(self, value: T) -> Shared[T]:
        """Put the value into the cluster's memory, where it stays as long as the result is referred to."""
        import ray

        return Shared(ray.put(value))

    def map(
        self,
        function: Callable[[CommonT, ItemT], ResultT],
        common: Shared[CommonT],
        items: Iterable[ItemT] | Iterable[Shared[ItemT]],
    ) -> Iterator[ResultT]:
        """Start tasks some way ahead and give their results in the order of the items.

        Raises:
            AdatsqError: a unit raised it, or its workers died again and again.
        """
        import ray

        task = ray.remote(num_cpus=self._surroundings.threads, max_retries=_RETRIES)(_compute)
        waiting: deque[Any] = deque()
        try:
            for item in items:
                content = item.content if isinstance(item, Shared) else item
                waiting.append(task.remote(function, self._surroundings, [common.content], content))
                if len(waiting) > _AHEAD * self.count:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())
        finally:  # the caller may have had enough
            for reference in waiting:
                with suppress(ray.exceptions.RayError):
                    ray.cancel(reference, force=False)

    def _result(self, reference: Any) -> Any:
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, ModuleNotFoundError):
                message = f"--ray: a worker lacks '{cause.name}'; install the same versions on all machines"
                raise DependencyError(message) from error
            raise cause from error
        except (ray.exceptions.RaySystemError, ray.exceptions.WorkerCrashedError) as error:
            reason = " ".join(str(error).split())
            raise AdatsqError(
                f"--ray: a unit of work was lost with its worker, {_RETRIES + 1} times ({reason}); look at the memory "
                "of the machines; the same command goes on where this one stopped"
            ) from error


def _compute(function: Callable[[Any, Any], Any], surroundings: Surroundings, common: list[Any], item: Any) -> Any:
    """A task. The common value comes as a reference in a list, which Ray leaves alone, and is read once per worker."""
    import ray

    surroundings.require_here()
    (reference,) = common
    name = reference.hex()
    if name not in _CACHE:
        _CACHE.clear()
        _CACHE[name] = ray.get(reference)
    return function(_CACHE[name], item)
