"""LoRA files, fused into the transformer before anything is measured."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adatsq_trt.checkpoints.lora_file import Changes, LayerChange, read_changes
from adatsq_trt.checkpoints.weights import read_headers, refuse_pickle
from adatsq_trt.errors import DependencyError, MissingFileError, UserError
from adatsq_trt.models.family import Family
from adatsq_trt.models.stored import LowRankChange, MappedLinear
from adatsq_trt.schedule import EXPERTS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lora:
    """A file of low-rank changes.

    Attributes:
        file: in safetensors.
        scale: factor of the changes.
        expert: which of two transformers it changes, by its name in the pipeline; "" where none is named.
    """

    file: Path
    scale: float
    expert: str = ""

    def __str__(self) -> str:
        """As `parse_lora` reads it again."""
        return f"{self.expert}{'=' if self.expert else ''}{self.file}:{self.scale!r}"


def parse_lora(text: str) -> Lora:
    """FILE, FILE:SCALE, or for a pipeline of two transformers NAME=FILE:SCALE with the name of one of them.

    Raises:
        UserError: no such number, a pickle, or another kind of file.
        MissingFileError: no such file.
        DamagedFileError: it is not complete.
        DependencyError: peft is not installed.
    """
    expert, _, rest = text.partition("=")
    expert, rest = (expert, rest) if expert in EXPERTS and not Path(text).is_file() else ("", text)
    name, colon, number = rest.rpartition(":")
    if not colon or Path(rest).is_file():
        name, number = rest, "1"
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise UserError(f"--lora '{text}': got the scale '{number}', expected a number; write FILE or FILE:SCALE")
    file = Path(name)
    if not file.is_file():
        raise MissingFileError(f"--lora '{text}': '{file}' does not exist; give a .safetensors file")
    refuse_pickle(file)
    read_headers([file])
    if util.find_spec("peft") is None:
        raise DependencyError("--lora needs the library peft; install it with: pip install 'adatsq-trt[lora]'")
    return Lora(file.absolute(), scale, expert)


def fuse(family: Family, transformer: Any, lora: Lora) -> None:
    """Add a LoRA to the transformer's weights: W + scale · alpha / rank · B A.

    Args:
        family: of the transformer.
        transformer: that is changed; of two, those by their names.
        lora: names one of two.

    Raises:
        MismatchError: the file changes what the transformer does not have, or does so in a way that is not followed.
        DamagedFileError: it holds something that is no LoRA.
    """
    if lora.expert:
        transformer = transformer[lora.expert]
    changes = read_changes(family, transformer, lora.file)
    for path, change in changes.layers.items():
        _change_layer(transformer, path, change, lora.scale)
    for name, difference in changes.differences.items():
        path, _, last = name.rpartition(".")
        module = transformer.get_submodule(path)
        if isinstance(module, MappedLinear) and last == "weight":
            module = _in_memory(transformer, path, module)
        _add(getattr(module, last), difference * lora.scale)
    layers = len(changes.layers)
    also = f" and {len(changes.differences)} other tensors" if changes.differences else ""
    where = f" of {lora.expert}" if lora.expert else ""
    log.info("--lora '%s': %d layers%s%s changed, scale %g", lora.file, layers, also, where, lora.scale)
    warn_of_text_encoders(lora.file, changes)


def warn_of_text_encoders(file: Path, changes: Changes) -> None:
    """Say that a file's changes of text encoders are left out, if there are any."""
    if changes.left_out:
        log.warning(
            "--lora '%s': its %d tensors of text encoders are left out, such as '%s'; only the transformer is changed",
            file,
            len(changes.left_out),
            changes.left_out[0],
        )


def _change_layer(transformer: Any, path: str, change: LayerChange, scale: float) -> None:
    """A stored weight stays where it is, and gets the change at every call; with magnitudes it is put in memory."""
    layer = transformer.get_submodule(path)
    if change.bias is not None:
        _add(layer.bias, change.bias * scale)
    if change.magnitude is None and isinstance(layer, MappedLinear):
        layer.changes.append(LowRankChange(change.up, change.down, scale))
        return
    if isinstance(layer, MappedLinear):
        layer = _in_memory(transformer, path, layer)
    _add(layer.weight, change.up @ change.down * scale)  # as a stored weight has it, bit for bit
    if change.magnitude is not None:  # DoRA: arXiv:2402.09353, equation 5, by rows as peft has it
        layer.weight.data.mul_((change.magnitude / layer.weight.norm(dim=1))[:, None])


def _add(parameter: nn.Parameter, difference: Tensor) -> None:
    """Not in place: its memory may be that of a model that somebody else holds."""
    parameter.data = parameter.data + difference


def _in_memory(transformer: Any, path: str, layer: MappedLinear) -> nn.Linear:
    linear = layer.in_memory()
    transformer.set_submodule(path, linear)
    return linear
