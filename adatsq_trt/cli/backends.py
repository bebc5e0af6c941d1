"""Values of `--backend`, the same for every command that runs bundles."""

from typing import Literal

BackendName = Literal["auto", "rtx", "tensorrt", "cuda", "onnxruntime"]
