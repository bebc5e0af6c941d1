"""`adatsq-trt serve`: a bundle in a real Triton server on this machine, for a try."""

from __future__ import annotations

import signal
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from adatsq_trt.cli.backends import BackendName


def serve(
    bundle: Annotated[Path, typer.Argument(help="A bundle or a run directory.")],
    name: Annotated[
        str | None, typer.Option("--name", help="What it is served as.", show_default="the model's name")
    ] = None,
    backend: Annotated[
        BackendName,
        typer.Option("--backend", help="Plans (rtx, tensorrt), cpu graphs on a GPU (cuda) or on the processor."),
    ] = "auto",
    http_port: Annotated[int, typer.Option("--http-port", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option("--grpc-port", min=1, max=65535)] = 8001,
    metrics_port: Annotated[int, typer.Option("--metrics-port", min=1, max=65535)] = 8002,
    ui: Annotated[bool, typer.Option("--ui", help="Also serve a web page.")] = False,
    ui_port: Annotated[int, typer.Option("--ui-port", min=1, max=65535)] = 8080,
    server: Annotated[
        Path | None,
        typer.Option(
            "--server",
            help="Folder into which nvidia-pytriton was installed with pip's --target.",
            show_default="this environment, where make test-serving puts it, or /opt/tritonserver",
        ),
    ] = None,
) -> None:
    """Serve a bundle with Triton server on the loopback address until Ctrl-C.

    A server that ends, or whose model loses its process, is started again.

    Example: adatsq-trt serve runs/demo --ui
    """
    # Ended by another process as by Ctrl-C: the server must not stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from adatsq_trt.engines.backends.selection import choose
    from adatsq_trt.engines.bundle import BundleFiles
    from adatsq_trt.engines.triton_server.page import Page
    from adatsq_trt.engines.triton_server.repository import Deployment, curl_line, write_repository
    from adatsq_trt.engines.triton_server.server import HOST, Installation, Ports
    from adatsq_trt.engines.triton_server.supervisor import Supervisor

    files, installation = BundleFiles.open(bundle), Installation.find(server)
    typer.echo(choose(files.manifest, backend).sentence, err=True)
    name = name or files.manifest.model
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="adatsq-serve-")))
        repository = folder / "models"
        write_repository([Deployment(name, files, backend=backend)], repository, link=True)
        ports = Ports(http_port, grpc_port, metrics_port)
        supervisor = stack.enter_context(Supervisor(repository, [name], ports, installation, folder / "server.log"))
        page = stack.enter_context(Page(ui_port, http_port, files, name)) if ui else None
        supervisor.start()
        typer.echo(f"serving {name}; the server's log is {supervisor.log_file}; try:\n")
        typer.echo(f"  {curl_line(name, f'{HOST}:{http_port}')}\n")
        if page is not None:
            typer.echo(f"or open http://{HOST}:{ui_port}\n")
        typer.echo("Ctrl-C ends it")
        with suppress(KeyboardInterrupt):
            supervisor.keep_running()
