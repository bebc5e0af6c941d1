"""`adatsq-trt serve`: a bundle in a real Triton server on this machine, for a try."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from adatsq_trt.cli.backends import BackendName
from adatsq_trt.errors import DependencyError, UserError

if TYPE_CHECKING:
    from adatsq_trt.engines.bundle import BundleFiles
    from adatsq_trt.engines.triton_server.image_api import ImageApi
    from adatsq_trt.engines.triton_server.repository import Deployment
    from adatsq_trt.engines.triton_server.server import Installation, Ports

log = logging.getLogger(__name__)
_ServerFolder = Annotated[
    Path | None,
    typer.Option(
        "--server",
        help="Folder into which nvidia-pytriton was installed with pip's --target.",
        show_default="this environment, where make test-serving puts it, or /opt/tritonserver",
    ),
]


def serve(
    bundle: Annotated[
        Path, typer.Argument(help="A bundle, a run directory, or the folder of a diffusers pipeline, built first.")
    ],
    build: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTIONS]", help="For a pipeline: options of 'build engine'.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What it is served as.", show_default="the model's name")
    ] = None,
    backend: Annotated[
        BackendName,
        typer.Option("--backend", help="Plans (rtx, tensorrt), cpu graphs on a GPU (cuda) or on the processor."),
    ] = "auto",
    pipeline: Annotated[
        Path | None,
        typer.Option(
            "--pipeline",
            help="Saved diffusers pipeline that the bundle was built from; requests can be text then.",
            show_default="the one that the run says, where it is still there",
        ),
    ] = None,
    http_port: Annotated[int, typer.Option("--http-port", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option("--grpc-port", min=1, max=65535)] = 8001,
    metrics_port: Annotated[int, typer.Option("--metrics-port", min=1, max=65535)] = 8002,
    ui: Annotated[bool, typer.Option("--ui", help="Also serve a web page.")] = False,
    ui_port: Annotated[int, typer.Option("--ui-port", min=1, max=65535)] = 8080,
    image_api: Annotated[
        int | None,
        typer.Option(
            "--image-api", min=1, max=65535, metavar="PORT", help="Also serve /v1/images/generations at this port."
        ),
    ] = None,
    server: _ServerFolder = None,
) -> None:
    """Serve a bundle with Triton server on the loopback address until Ctrl-C.

    A pipeline is built first, or its run is reused. A server that ends, or whose model loses its process, is started
    again.

    Example: adatsq-trt serve runs/demo --ui
    """
    from adatsq_trt.engines.backends.selection import choose
    from adatsq_trt.engines.bundle import BundleFiles
    from adatsq_trt.engines.triton_server.repository import Deployment
    from adatsq_trt.engines.triton_server.server import Installation, Ports

    installation = Installation.find(server)
    run = _built(bundle, build or [])
    files = BundleFiles.open(run)
    typer.echo(choose(files.manifest, backend).sentence, err=True)
    served = Deployment(
        name or files.manifest.model, files, backend=backend, pipeline=pipeline or _pipeline_of(run, files)
    )
    _serve(served, installation, Ports(http_port, grpc_port, metrics_port), ui_port if ui else None, image_api)


def _serve(
    served: Deployment, installation: Installation, ports: Ports, ui_port: int | None, api_port: int | None
) -> None:
    """Start the server, say how to ask it, and keep it running."""
    # Ended by another process as by Ctrl-C: the server must not stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from adatsq_trt.engines.triton_server.page import Page
    from adatsq_trt.engines.triton_server.repository import curl_line, write_repository
    from adatsq_trt.engines.triton_server.server import HOST
    from adatsq_trt.engines.triton_server.supervisor import Supervisor

    name = served.name
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="adatsq-serve-")))
        repository = folder / "models"
        write_repository([served], repository, link=True)
        supervisor = stack.enter_context(Supervisor(repository, [name], ports, installation, folder / "server.log"))
        if ui_port is not None:
            stack.enter_context(Page(ui_port, ports.http, served.files, name))
        if api_port is not None:
            stack.enter_context(_image_api(api_port, ports, served))
        supervisor.start()
        typer.echo(f"serving {name}; the server's log is {supervisor.log_file}; try:\n")
        typer.echo(f"  {curl_line(name, f'{HOST}:{ports.http}', text=served.pipeline is not None)}\n")
        if ui_port is not None:
            typer.echo(f"or open http://{HOST}:{ui_port}\n")
        if api_port is not None:
            typer.echo(f"image API: http://{HOST}:{api_port}/v1, for POST to /v1/images/generations\n")
        typer.echo("Ctrl-C ends it")
        with suppress(KeyboardInterrupt):
            supervisor.keep_running()


def _image_api(port: int, ports: Ports, served: Deployment) -> ImageApi:
    try:
        from adatsq_trt.engines.triton_server.image_api import ImageApi
    except ModuleNotFoundError as error:
        raise DependencyError("--image-api needs aiohttp; run: pip install 'adatsq-trt[image-api]'") from error
    return ImageApi(port, ports.http, served.files, served.name)


def _built(place: Path, options: Sequence[str]) -> Path:
    """The run directory of a pipeline, which is built or reused; a bundle or a run directory as it is.

    Raises:
        UserError: options of the build for what is built already.
    """
    from adatsq_trt.checkpoints.source import INDEX
    from adatsq_trt.cli.build import engine

    if (place / INDEX).is_file():
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(engine)
        return Path(app([str(place), *options], prog_name="adatsq-trt build engine", standalone_mode=False))
    if options:
        raise UserError(
            f"got '{options[0]}' after '--', an option of 'build engine', and '{place}' is no pipeline to build; leave "
            "it out"
        )
    return place


def _pipeline_of(run: Path, files: BundleFiles) -> Path | None:
    """The pipeline that a run directory was built from, for its text encoders; None where there are none."""
    from adatsq_trt.checkpoints.source import find_source
    from adatsq_trt.files import read_json_model
    from adatsq_trt.settings import SETTINGS_NAME, Settings

    settings = run / SETTINGS_NAME
    if files.manifest.text is None or not settings.is_file():
        return None
    came_from = read_json_model(settings, Settings).pipeline
    assert came_from is not None, "a bundle that knows text encoders is of a pipeline"
    try:
        return find_source(came_from.path, came_from.base).folder
    except UserError as error:
        log.warning("requests cannot be text: %s", error)
        return None
