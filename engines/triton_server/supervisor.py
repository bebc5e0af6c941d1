"""Keep a Triton server running: one that ends, or whose model loses its process, is started again."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from adatsq_trt.engines.triton_server.server import Installation, Ports, Server
from adatsq_trt.errors import AdatsqError

log = logging.getLogger(__name__)
# Before each further start. A server that has been ready for so long is well, and its next failure counts as the first.
_PAUSES_SECONDS, _WELL_SECONDS = (1, 2, 4, 8, 16), 60


class Supervisor:
    """A server that comes back; a context manager that ends it.

    Attributes:
        log_file: log of all its servers, with a line for each that was lost.
    """

    def __init__(
        self,
        repository: Path,
        models: Sequence[str],
        ports: Ports,
        installation: Installation | None,
        log_file: Path,
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            repository: a model repository.
            models: of the Python backend that are in it, all of them.
            ports: those that the server is to listen at.
            installation: server to start; the one that is found unless given.
            log_file: of the servers.
        """
        self.log_file = log_file
        self._repository, self._models, self._ports, self._installation = repository, models, ports, installation
        self._server = ExitStack()
        self._running: Server | None = None
        self._ready = math.inf

    def __enter__(self) -> Self:
        """Take the server."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the server."""
        self._server.close()

    @property
    def process_id(self) -> int | None:
        """Of the server; None while there is none."""
        return None if self._running is None else self._running.process.pid

    def start(self) -> None:
        """Start a server and wait until its models answer.

        Raises:
            UserError: a port is in use.
            DependencyError: there is no server.
            AdatsqError: it does not become ready; with its own words.
        """
        self._ready = math.inf
        server = Server(self._repository, self._ports, self._installation, log_file=self.log_file)
        self._server.enter_context(server).wait_until_ready(self._models)
        self._running, self._ready = server, time.monotonic()

    def keep_running(self) -> NoReturn:
        """Watch the server, and start another whenever it is lost.

        Raises:
            AdatsqError: servers are lost one after another.
        """
        failures = 0
        while True:
            try:
                if self._running is None:
                    self.start()
                    self._say("the server is ready again")
                else:
                    self._running.wait(self._models)
            except AdatsqError as error:
                well = time.monotonic() - self._ready > _WELL_SECONDS
                failures = 1 if well else failures + 1
                self._server.close()
                self._running = None
                if failures > len(_PAUSES_SECONDS):
                    raise AdatsqError(f"{error}; {failures} failures in a row, so it is not started again") from error
                pause = _PAUSES_SECONDS[failures - 1]
                self._say(f"{error}; requests under way are lost; the server is started again in {pause} s")
                time.sleep(pause)

    def _say(self, line: str) -> None:
        """Tell the terminal, and the log among what the server wrote."""
        log.warning(line)
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} adatsq-trt: {line}\n")
