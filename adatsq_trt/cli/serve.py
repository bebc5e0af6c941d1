"""`adatsq-trt serve`: a bundle in a real Triton server on this machine, for a try."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from adatsq_trt.cli.backends import BackendName
from adatsq_trt.errors import UserError

_PipelineFolder = Annotated[
    Path | None,
    typer.Option(
        "--pipeline",
        help="Saved diffusers pipeline that the bundle was built from; requests can be text then.",
        show_default="the one that the run says, where it is still there",
    ),
]
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
    pipeline: _PipelineFolder = None,
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
    from adatsq_trt.engines.triton_server.serving import Serving, known_pipeline, require_pages
    from adatsq_trt.stages.models import pipeline_of

    installation, pages = Installation.find(server), (ui_port if ui else None, image_api)
    require_pages(*pages)  # before a build, which may take hours
    run = _built(bundle, build or [])
    files = BundleFiles.open(run)
    typer.echo(choose(files.manifest, backend).sentence, err=True)
    encoders = pipeline or known_pipeline(pipeline_of(run), files)
    served = Deployment(name or files.manifest.model, files, backend=backend, pipeline=encoders)
    ports = Ports(http_port, grpc_port, metrics_port)
    # Ended by another process as by Ctrl-C: the server must not stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Serving(served, installation, ports, *pages) as serving, suppress(KeyboardInterrupt):
        typer.echo(f"{serving.sentences}\nCtrl-C ends it")
        serving.keep_running()


def _built(place: Path, options: Sequence[str]) -> Path:
    """The run directory of a pipeline, which is built or reused; a bundle or a run directory as it is.

    Raises:
        UserError: options of the build for what is built already.
    """
    from adatsq_trt.checkpoints.source import INDEX, boundary_ratio
    from adatsq_trt.cli import build_app
    from adatsq_trt.engines.triton_server.repository import require_one_transformer

    if (place / INDEX).is_file():
        require_one_transformer(place, 1 if boundary_ratio(place) is None else 2)
        built = build_app(["engine", str(place), *options], prog_name="adatsq-trt build", standalone_mode=False)
        if not isinstance(built, Path):  # the exit code of --help and of Ctrl-C
            raise typer.Exit(built)
        return built
    if options:
        raise UserError(
            f"got '{options[0]}' after '--', an option of 'build engine', and '{place}' is no pipeline to build; leave "
            "it out"
        )
    return place
