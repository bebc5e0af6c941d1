"""Serve a bundle on this machine: its repository, Triton server, and the pages in front of it."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Self

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.triton_server.page import Page
from adatsq_trt.engines.triton_server.pipeline import require_pipeline
from adatsq_trt.engines.triton_server.repository import Deployment, curl_line, write_repository
from adatsq_trt.engines.triton_server.server import HOST, Installation, Ports, require_free
from adatsq_trt.engines.triton_server.supervisor import Supervisor
from adatsq_trt.errors import DependencyError, UserError

if TYPE_CHECKING:
    from adatsq_trt.engines.triton_server.image_api import ImageApi


log = logging.getLogger(__name__)


def require_pages(ui_port: int | None, api_port: int | None) -> None:
    """Refuse pages that could not be served.

    Args:
        ui_port: of the web page; None for none.
        api_port: of the image API; None for none.

    Raises:
        UserError: a port is in use.
        DependencyError: a library is not installed.
    """
    for port in (ui_port, api_port):
        if port is not None:
            require_free(port)
    if api_port is not None and find_spec("aiohttp") is None:
        raise DependencyError("--image-api needs aiohttp; run: pip install 'adatsq-trt[image-api]'")


def known_pipeline(folder: Path | None, files: BundleFiles) -> Path | None:
    """The pipeline's folder if its text encoders are those that the bundle's prompts were encoded with.

    Args:
        folder: that the bundle is said to be built from; None for none.
        files: the bundle.
    """
    if folder is None or files.manifest.text is None:
        return None
    try:
        require_pipeline(folder, files)
    except UserError as error:
        log.warning("requests cannot be text: %s", error)
        return None
    return folder


class Serving:
    """A server of one bundle and the pages in front of it; a context manager that ends all of them."""

    def __init__(
        self,
        served: Deployment,
        installation: Installation,
        ports: Ports,
        ui_port: int | None = None,
        api_port: int | None = None,
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            served: the bundle.
            installation: of Triton server.
            ports: of Triton server.
            ui_port: of a web page; None for none.
            api_port: of the image API; None for none.
        """
        self._served, self._installation, self._ports = served, installation, ports
        self._ui_port, self._api_port = ui_port, api_port
        self._stack = ExitStack()
        self._supervisor: Supervisor

    def __enter__(self) -> Self:
        """Write the repository and start all.

        Raises:
            UserError: a port is in use, or the bundle is none that can be served so.
            DependencyError: a library is not installed.
        """
        served, ports = self._served, self._ports
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="adatsq-serve-")))
            repository, log = folder / "models", folder / "server.log"
            write_repository([served], repository, link=True)
            supervisor = Supervisor(repository, [served.name], ports, self._installation, log)
            self._supervisor = stack.enter_context(supervisor)
            if self._ui_port is not None:
                stack.enter_context(Page(self._ui_port, ports.http, served.files, served.name))
            if self._api_port is not None:
                stack.enter_context(self._image_api(self._api_port))
            self._supervisor.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all."""
        self._stack.close()

    def keep_running(self) -> None:
        """Start a server again that ends, or whose model loses its process; returns only by an exception."""
        self._supervisor.keep_running()

    @property
    def sentences(self) -> str:
        """How to ask it."""
        name, http = self._served.name, f"{HOST}:{self._ports.http}"
        said = f"serving {name}; the server's log is {self._supervisor.log_file}; try:\n\n"
        said += f"  {curl_line(name, http, text=self._served.pipeline is not None)}\n"
        if self._ui_port is not None:
            said += f"\nor open http://{HOST}:{self._ui_port}\n"
        if self._api_port is not None:
            said += f"\nimage API: http://{HOST}:{self._api_port}/v1, for POST to /v1/images/generations\n"
        return said

    def _image_api(self, port: int) -> ImageApi:
        from adatsq_trt.engines.triton_server.image_api import ImageApi

        return ImageApi(port, self._ports.http, self._served.files, self._served.name)
