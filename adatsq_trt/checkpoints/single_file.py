"""A transformer in one file, in diffusers' names or its authors', with a prefix or without; nothing in it is lost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from adatsq_trt.checkpoints.tracing import sources, trace
from adatsq_trt.checkpoints.weights import WeightFiles
from adatsq_trt.errors import MismatchError, one_line
from adatsq_trt.models.family import Family

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
# Of checkpoints that hold a whole pipeline, as ComfyUI and older tools write them.
_OTHER_PARTS = ("vae.", "first_stage_model.", "text_encoders.", "text_encoder", "cond_stage_model.", "conditioner.")
# What ComfyUI, bitsandbytes, GPTQ and Nunchaku keep beside the weights that they have quantized.
_QUANTIZED = re.compile(
    r"(.*\.)?(scale_weight|scale_input|weight_scale(_\d)?|input_scale|scaled_fp8|comfy_quant|(nested_)?absmax|"
    r"(nested_)?quant_map|quant_state\..*|qweight|qzeros|wscales|wzeros)"
)
_BASE = "name the base that it was trained from, or another file"


def transformer_weights(family: Family, weights: WeightFiles) -> WeightFiles:
    """The transformer of a file that may hold a whole pipeline, its names without their prefix.

    Raises:
        MismatchError: it is quantized already, or holds something that belongs to no known part.
    """
    (file,) = weights.files
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in weights.shapes)), "")
    own = [name for name in weights.shapes if name.startswith(prefix) and not name.startswith(_OTHER_PARTS)]
    for name in weights.shapes:
        if _QUANTIZED.fullmatch(name) and not name.startswith(_OTHER_PARTS):
            raise MismatchError(
                f"'{file}' holds '{name}': it is quantized already; give the checkpoint in 16 or 32 bits"
            )
        if not name.startswith((prefix, *_OTHER_PARTS)):
            raise MismatchError(
                f"'{file}' holds '{name}' beside the transformer's '{prefix}...', expected also only other parts of a "
                f"pipeline ({', '.join(_OTHER_PARTS)}); give another file"
            )
    short = {name.removeprefix(prefix): name for name in own if name.removeprefix(prefix) not in family.unused_weights}
    return replace(
        weights,
        shapes={name: weights.shapes[full] for name, full in short.items()},
        places={name: file for name in short},
        dtypes={name: weights.dtypes[full] for name, full in short.items()},
        prefix=prefix,
    )


def require_layout(family: Family, weights: WeightFiles, model: nn.Module, config: Path) -> None:
    """Refuse a file that has not exactly the configured model's weights, in diffusers' names or its authors'.

    Args:
        family: of the pipeline.
        weights: those that `transformer_weights` has found.
        model: made from the configuration, on any device.
        config: the configuration, as messages name it.

    Raises:
        MismatchError: a tensor is missing, too much, or of another shape; names it.
    """
    (file,) = weights.files
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {
        name: trace(torch.empty(shape, device="meta"), f"{weights.prefix}{name}")
        for name, shape in weights.shapes.items()
    }
    layout, reason = given, ""
    try:
        converted = convert(family, dict(given))
    except Exception as error:  # what is raised depends on the file
        reason = f"it has no tensor {error}" if isinstance(error, KeyError) else one_line(error)
    else:
        layout = min(given, converted, key=lambda names: len(set(names) ^ set(expected)))
    if reason and not set(given) & set(expected):
        raise MismatchError(
            f"'{file}' is no {family.transformer} in diffusers' names or its authors' ({reason}), which '{config}' "
            f"expects; {_BASE}"
        )
    for name in sorted(set(layout) - set(expected)):
        raise MismatchError(
            f"'{file}' holds '{_called(name, layout[name])}', which a model of '{config}' does not have; {_BASE}"
        )
    lost = sorted(sources(given.values()) - sources(layout.values()))
    if lost:
        raise MismatchError(
            f"'{file}' holds '{lost[0]}' beside another tensor for the same weight, of which one would be lost; {_BASE}"
        )
    for name, shape in expected.items():
        if name not in layout:
            raise MismatchError(f"'{file}' has no tensor '{name}', which '{config}' expects as {[*shape]}; {_BASE}")
        if layout[name].shape != shape:
            raise MismatchError(
                f"'{file}' holds '{_called(name, layout[name])}' as {[*layout[name].shape]}, '{config}' expects "
                f"{[*shape]}; {_BASE}"
            )


def convert(family: Family, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """From the authors' names to diffusers', by its own converter, with what that leaves over.

    Args:
        family: of the pipeline.
        tensors: by their names without prefix; emptied.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    loadable = SINGLE_FILE_LOADABLE_CLASSES.get(family.transformer)
    if loadable is None:  # only diffusers' names are known
        return tensors
    converted: Mapping[str, Tensor] = loadable["checkpoint_mapping_fn"](checkpoint=tensors)
    return {**tensors, **converted}


def _called(name: str, value: Tensor) -> str:
    """Name a tensor as the file does."""
    return ", ".join(sorted(sources([value]))) or name
