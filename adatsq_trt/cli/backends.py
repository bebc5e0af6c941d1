"""Values of `--backend` and `--offload`, the same for every command that runs bundles."""

from typing import Annotated, Literal

import typer

BackendName = Literal["auto", "rtx", "tensorrt", "cuda", "onnxruntime"]
_HELP = "Plans (rtx, tensorrt), cpu graphs on a GPU (cuda) or on the processor."
BackendOption = Annotated[BackendName, typer.Option("--backend", help=_HELP)]
_OFFLOAD = "expert: hold the one of two transformers whose steps are running, and load each when its first step comes."
OffloadOption = Annotated[Literal["none", "expert"], typer.Option("--offload", help=_OFFLOAD)]
