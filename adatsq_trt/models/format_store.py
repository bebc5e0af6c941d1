"""The weights of every format and the activation scales or clipping ratios of every step, in memory and on disk.

FOLDER/<format>/<block>.safetensors   <module path>.codes, .scales, .global_scale of the layers of a block; formats that
                                      differ in activations only have those of the first of them
FOLDER/activation_scales.safetensors  <format>: float32 [steps, layers]
FOLDER/transforms.safetensors         where weights and inputs are transformed before they are rounded
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from adatsq_trt.errors import DamagedFileError, MissingFileError
from adatsq_trt.files import MappedTensors, read_tensors, write_tensors
from adatsq_trt.formats import Format, Grid, format_named
from adatsq_trt.quantizers import QuantizedWeight
from adatsq_trt.transforms import IDENTITY, LayerTransform, load_transforms

SCALES_NAME, TRANSFORMS_NAME = "activation_scales.safetensors", "transforms.safetensors"
_PARTS = ("codes", "scales", "global_scale")


@dataclass(frozen=True)
class CandidateWeights:
    """Everything that the formats need: quantized weights, static activation scales and clipping ratios.

    Attributes:
        weights: format name → module path → quantized weight.
        scales: format name → float32 [steps, layers], for formats with a static activation scale or a clipping ratio
            (`Format.scaled_activation`); without ratios nothing is clipped.
        transforms: module path → what happens to the layer's input, for layers where something does.
    """

    weights: Mapping[str, Mapping[str, QuantizedWeight]]
    scales: Mapping[str, Tensor]
    transforms: Mapping[str, LayerTransform] = field(default_factory=dict)

    def scale(self, fmt: Format, step: int, layer: int) -> Tensor | None:
        """Return the scale or clip ratio of the activation at a step: float32 [], or None where the format has none."""
        known = fmt.static_activation or (fmt.scaled_activation and fmt.name in self.scales)
        return self.scales[fmt.name][step, layer] if known else None

    def transform(self, layer: str) -> LayerTransform:
        """The layer's transform, or one that changes nothing."""
        return self.transforms.get(layer, IDENTITY)


def weight_owners(formats: Iterable[Format]) -> dict[str, str]:
    """Format name → name of the first one with the same weight grid, under which the weights of both are stored."""
    first: dict[Grid, str] = {}
    return {fmt.name: first.setdefault(fmt.weight, fmt.name) for fmt in formats}


def weights_name(format_name: str, block: str) -> str:
    """Where a block's weights in one format lie in the folder."""
    return f"{format_name}/{block}.safetensors"


def save_weights(path: Path, weights: Mapping[str, QuantizedWeight]) -> None:
    """Write some layers' weights in one format, whole or not at all."""
    write_tensors(path, {f"{layer}.{part}": t for layer, w in weights.items() for part, t in w.tensors().items()})


class BlockFiles(Mapping[str, QuantizedWeight]):
    """Module path → weight in one format, on disk: every lookup maps the layer's tensors anew."""

    def __init__(self, folder: Path, layers: Iterable[str]) -> None:
        """Find the layers.

        Args:
            folder: of the format.
            layers: those that have to be there.

        Raises:
            MissingFileError: there are no files.
            DamagedFileError: a file is not complete, or a layer is missing.
        """
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise MissingFileError(f"'{folder}' holds no weights; run 'adatsq-trt quantize', which writes them")
        self._tensors = MappedTensors(files)
        self._layers = tuple(layers)
        for layer in self._layers:
            if f"{layer}.codes" not in self._tensors:
                raise DamagedFileError(f"'{folder}' has no weight for layer '{layer}'; delete it and quantize again")

    def __getitem__(self, layer: str) -> QuantizedWeight:
        """The layer's weight."""
        parts = {part: self._tensors[f"{layer}.{part}"] for part in _PARTS if f"{layer}.{part}" in self._tensors}
        if not parts:
            raise KeyError(layer)
        return QuantizedWeight(**parts)

    def __iter__(self) -> Iterator[str]:
        """Layers."""
        return iter(self._layers)

    def __reduce__(self) -> tuple[type[dict[str, QuantizedWeight]], tuple[dict[str, QuantizedWeight]]]:
        """Workers on other machines are sent the weights: they do not have the files."""
        return dict, (dict(self),)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._layers)


def load_store(folder: Path, formats: Iterable[str], layers: Iterable[str]) -> CandidateWeights:
    """The weights of some formats, which stay on disk; all activation scales and the transforms, if there are any.

    Raises:
        MissingFileError: a file is not there.
        DamagedFileError: a file is not complete.
    """
    names, owners = list(layers), weight_owners(map(format_named, formats))
    files = {owner: BlockFiles(folder / owner, names) for owner in dict.fromkeys(owners.values())}
    return CandidateWeights(
        {name: files[owner] for name, owner in owners.items()},
        read_tensors(folder / SCALES_NAME),
        load_transforms(folder / TRANSFORMS_NAME) if (folder / TRANSFORMS_NAME).is_file() else {},
    )
