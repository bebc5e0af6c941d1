"""`adatsq-trt deploy triton`: a model repository for Triton server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adatsq_trt.cli.backends import BackendName
from adatsq_trt.errors import UserError


def triton(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles or run directories.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.", show_default=False)],
    name: Annotated[
        list[str] | None,
        typer.Option("--name", help="What a bundle is served as, once for each.", show_default="the models' names"),
    ] = None,
    step_model: Annotated[
        bool,
        typer.Option("--step-model", help="Also write models for single steps; they hold the weights once more."),
    ] = False,
    max_samples: Annotated[
        int, typer.Option("--max-samples", min=1, help="Most samples that run together, and most of one request.")
    ] = 32,
    backend: Annotated[
        BackendName,
        typer.Option(
            "--backend",
            help="What runs there: plans, cpu graphs on a GPU or the processor; tensorrt serves single steps only.",
            show_default="the best of the machine that serves",
        ),
    ] = "auto",
    pipeline: Annotated[
        Path | None,
        typer.Option("--pipeline", help="Saved diffusers pipeline of the model; requests can be text then."),
    ] = None,
) -> None:
    """Write a model repository that Triton server loads: the whole denoising loop of each bundle.

    The repository is complete: it carries the bundles, a Dockerfile, and a README with the commands.

    Example: adatsq-trt deploy triton runs/demo --output model_repository
    """
    from adatsq_trt.engines.bundle import BundleFiles
    from adatsq_trt.engines.triton_server.plan_models import write_plan_repository
    from adatsq_trt.engines.triton_server.repository import Deployment, write_repository

    if name and len(name) != len(bundles):
        raise UserError(f"got {len(name)} times --name for {len(bundles)} bundles; give one for each, or none")
    opened = [BundleFiles.open(path) for path in bundles]
    names = name or [files.manifest.model for files in opened]
    served = list(zip(names, opened, strict=True))
    if backend == "tensorrt":
        if step_model or pipeline is not None:
            raise UserError("--backend tensorrt serves single steps only; leave --step-model and --pipeline out")
        write_plan_repository(served, output)
    else:
        write_repository([Deployment(*one, step_model, max_samples, backend, pipeline) for one in served], output)
    typer.echo(f"{output}: {', '.join(names)}; start it as {output / 'README.md'} says")
