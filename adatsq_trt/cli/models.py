"""`adatsq-trt models`: the models that ship with the package."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True)
class ModelRow:
    """One model of the zoo.

    Attributes:
        name: as commands take it.
        architecture: diffusers class of the transformer.
        image_size: height and width in pixels.
        frames: of a video; None for images.
        weight_bytes: size of all its safetensors.
        default_steps: denoising steps when none are asked for.
        default_guidance: guidance scale when none is asked for.
        folder: its folder, in diffusers' layout.
    """

    name: str
    architecture: str
    image_size: int
    frames: int | None
    weight_bytes: int
    default_steps: int
    default_guidance: float
    folder: str


def list_models() -> list[ModelRow]:
    """All models of the zoo.

    Raises:
        DamagedFileError: a model's index is truncated or altered.
    """
    from adatsq_trt.zoo import zoo_models

    return [_row(name, folder) for name, folder in zoo_models().items()]


def _row(name: str, folder: Path) -> ModelRow:
    from adatsq_trt.files import read_json_model
    from adatsq_trt.zoo import ZooIndex

    index = read_json_model(folder / "model_index.json", ZooIndex)
    return ModelRow(
        name=name,
        architecture=index.transformer[1],
        image_size=index.image_size,
        frames=index.frames,
        weight_bytes=sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
        default_steps=index.default_steps,
        default_guidance=index.default_guidance,
        folder=str(folder),
    )


def models(
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List the models that ship with the package."""
    from rich.console import Console
    from rich.table import Table

    rows = list_models()
    if json:
        typer.echo(json_format.dumps([asdict(row) for row in rows], indent=2))
        return
    table = Table("name", "architecture", "pixels", "weights", "steps", "guidance", box=None)
    for row in rows:
        size = f"{row.image_size} x {row.image_size}" + (f" x {row.frames}" if row.frames else "")
        weights = f"{row.weight_bytes / 1e6:.2f} MB"
        table.add_row(row.name, row.architecture, size, weights, str(row.default_steps), f"{row.default_guidance:g}")
    Console().print(table)
