"""`adatsq-trt deploy triton`: a model repository for Triton server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

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
        Literal["onnxruntime", "rtx"],
        typer.Option("--backend", help="What runs the bundles: cpu graphs anywhere, or plans on a GPU."),
    ] = "onnxruntime",
    pipeline: Annotated[
        Path | None,
        typer.Option(
            "--pipeline",
            help="Folder of the diffusers pipeline that the bundles' model comes from: its text encoders and VAE are "
            "served too, so that requests can be text.",
            show_default="prompts of the bundle only",
        ),
    ] = None,
) -> None:
    """Write a model repository that Triton server loads: the whole denoising loop of each bundle.

    The repository is complete: it carries the bundles, a Dockerfile, and a README with the commands.

    Example: adatsq-trt deploy triton runs/demo --output model_repository
    """
    from adatsq_trt.engines.bundle import BundleFiles
    from adatsq_trt.engines.triton_server.repository import Deployment, write_repository

    if name and len(name) != len(bundles):
        raise UserError(f"got {len(name)} times --name for {len(bundles)} bundles; give one for each, or none")
    opened = [BundleFiles.open(path) for path in bundles]
    names = name or [files.manifest.model for files in opened]
    write_repository(
        [
            Deployment(n, files, step_model, max_samples, backend, pipeline)
            for n, files in zip(names, opened, strict=True)
        ],
        output,
    )
    typer.echo(f"{output}: {', '.join(names)}; start it as {output / 'README.md'} says")
