"""The weights of every format and the activation scales of every step, in memory and on disk.

FOLDER/<format>.safetensors           <module path>.codes, .scales, .global_scale
FOLDER/activation_scales.safetensors  <format>: float32 [steps, layers]
FOLDER/transforms.safetensors         where weights and inputs are transformed before they are rounded
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from adatsq_trt.errors import DamagedFileError
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.models.transforms import IDENTITY, LayerTransform, load_transforms
from adatsq_trt.quantize import QuantizedWeight

SCALES_NAME, TRANSFORMS_NAME = "activation_scales.safetensors", "transforms.safetensors"
_PARTS = ("codes", "scales", "global_scale")


@dataclass(frozen=True)
class FormatStore:
    """Everything that the formats need: quantized weights and static activation scales.

    Attributes:
        weights: format name → module path → quantized weight.
        scales: format name → float32 [steps, layers], for formats with a static activation scale.
        transforms: module path → what happens to the layer's input, for layers where something does.
    """

    weights: Mapping[str, Mapping[str, QuantizedWeight]]
    scales: Mapping[str, Tensor]
    transforms: Mapping[str, LayerTransform] = field(default_factory=dict)

    def transform(self, layer: str) -> LayerTransform:
        """The layer's transform, or one that changes nothing."""
        return self.transforms.get(layer, IDENTITY)


def weights_name(format_name: str) -> str:
    """File name of a format's weights."""
    return f"{format_name}.safetensors"


def save_weights(path: Path, weights: Mapping[str, QuantizedWeight]) -> None:
    """Write one format's weights, whole or not at all."""
    write_tensors(path, {f"{layer}.{part}": t for layer, w in weights.items() for part, t in w.tensors().items()})


def load_weights(path: Path, layers: Iterable[str]) -> dict[str, QuantizedWeight]:
    """Read one format's weights.

    Raises:
        MissingFileError: no such file.
        DamagedFileError: not a complete file, or a layer is missing.
    """
    tensors = read_tensors(path)
    result = {}
    for layer in layers:
        if f"{layer}.codes" not in tensors:
            raise DamagedFileError(f"'{path}' has no weight for layer '{layer}'; delete it and quantize again")
        parts = {part: tensors[f"{layer}.{part}"] for part in _PARTS if f"{layer}.{part}" in tensors}
        result[layer] = QuantizedWeight(**parts)
    return result


def load_store(folder: Path, formats: Iterable[str], layers: Iterable[str]) -> FormatStore:
    """Read the weights of some formats, all activation scales and the transforms, if there are any.

    Raises:
        MissingFileError: a file is not there.
        DamagedFileError: a file is not complete.
    """
    names = list(layers)
    return FormatStore(
        {name: load_weights(folder / weights_name(name), names) for name in formats},
        read_tensors(folder / SCALES_NAME),
        load_transforms(folder / TRANSFORMS_NAME) if (folder / TRANSFORMS_NAME).is_file() else {},
    )
