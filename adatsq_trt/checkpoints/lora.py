"""LoRA files, fused into the transformer before anything is measured, by diffusers' and peft's own loaders."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from adatsq_trt.checkpoints.kinds import PipelineKind
from adatsq_trt.checkpoints.weights import read_headers, refuse_pickle
from adatsq_trt.errors import DamagedFileError, DependencyError, MismatchError, MissingFileError, UserError
from adatsq_trt.models.stored import LowRankChange, StoredLinear

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lora:
    """A file of low-rank changes.

    Attributes:
        file: in safetensors.
        scale: what the changes are multiplied by.
    """

    file: Path
    scale: float


def parse_lora(text: str) -> Lora:
    """FILE or FILE:SCALE.

    Raises:
        UserError: no such number, a pickle, or another kind of file.
        MissingFileError: no such file.
        DamagedFileError: it is not complete.
        DependencyError: peft is not installed.
    """
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).is_file():
        name, number = text, "1"
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
    return Lora(file.absolute(), scale)


def fuse(kind: PipelineKind, transformer: Any, lora: Lora) -> None:
    """Add a LoRA to the transformer's weights: W + scale B A.

    Raises:
        MismatchError: the file has nothing for this transformer, or matrices of other shapes.
        DamagedFileError: it holds something that is no LoRA.
    """
    # The pipeline's loader understands the dialects of the many trainers.
    loader, name = kind.load_class(kind.pipeline), "lora"
    try:
        tensors, alphas = _read(loader, lora.file)
    except Exception as error:  # what is raised depends on the dialect
        raise DamagedFileError(
            f"--lora '{lora.file}' is not a LoRA that diffusers understands ({_reason(error)}); give another file"
        ) from error
    own = {key for key in tensors if key.startswith("transformer.")}
    others = sorted({key.partition(".")[0] for key in set(tensors) - own})
    if others:
        log.warning("--lora '%s': its changes of %s are left out; only the transformer's are fused", lora.file, others)
    if not own:
        raise MismatchError(
            f"--lora '{lora.file}' changes nothing in a {kind.transformer}; give one that was trained for it"
        )
    modules = dict(transformer.named_modules())
    strange = sorted({key.removeprefix("transformer.").split(".lora")[0] for key in own} - set(modules))
    if strange:
        raise MismatchError(
            f"--lora '{lora.file}' changes '{strange[0]}', which this {kind.transformer} does not have; give one that "
            "was trained for this model"
        )
    try:
        transformer.load_lora_adapter(
            {key: tensors[key] for key in own}, network_alphas=alphas, adapter_name=name, prefix="transformer"
        )
        _change_stored(transformer, name, lora.scale)
        transformer.fuse_lora(lora_scale=lora.scale, adapter_names=[name], safe_fusing=True)
        transformer.unload_lora()
    except Exception as error:
        raise MismatchError(
            f"--lora '{lora.file}' does not fit this {kind.transformer} ({_reason(error)}); give one that was trained "
            "for this model"
        ) from error


def _change_stored(transformer: Any, name: str, scale: float) -> None:
    """Leave stored weights where they are, which peft cannot change, and add what it would add at every call."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        stored = layer.base_layer
        if not isinstance(stored, StoredLinear):
            continue
        if name in layer.lora_variant or layer.lora_bias[name]:  # not a plain product: peft's own way, in memory
            layer.base_layer = stored.in_memory()
            continue
        up, down = (part[name].weight.detach().float() for part in (layer.lora_B, layer.lora_A))
        stored.changes.append(LowRankChange(up, down, layer.scaling[name] * scale))
        layer.merged_adapters.append(name)  # peft leaves it alone then


def _read(loader: Any, file: Path) -> tuple[dict[str, Any], Any]:
    options = {"weight_name": file.name, "use_safetensors": True, "local_files_only": True}
    read = loader.lora_state_dict
    if "return_alphas" in read.__code__.co_varnames:
        tensors, alphas = read(file.parent, return_alphas=True, **options)
        return dict(tensors), alphas
    return dict(read(file.parent, **options)), None


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
