"""LoRAs at run time: which builds have slots for them, what a manifest says of these, and how a file fills them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from adatsq_trt.checkpoints.lora import Lora, parse_lora, warn_of_text_encoders
from adatsq_trt.checkpoints.lora_file import Changes, read_changes
from adatsq_trt.config import BuildConfig
from adatsq_trt.engines.lora_slots import SlotLora
from adatsq_trt.engines.manifest import LoraSlots
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.errors import DamagedFileError, MismatchError, UserError
from adatsq_trt.formats import PLUGIN_LAYOUT
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.families import family_of_pipeline, family_of_transformer
from adatsq_trt.models.family import Family
from adatsq_trt.report.numbers import size

if TYPE_CHECKING:
    from adatsq_trt.checkpoints.loading import OpenedPipeline
    from adatsq_trt.stages.context import Context
    from adatsq_trt.stages.models import OpenedModel

log = logging.getLogger(__name__)
_SHOWN_KEYS = 3


@dataclass(frozen=True)
class LoadedLora:
    """A file whose changes are in a bundle's slots.

    Attributes:
        file: of the LoRA.
        scale: factor of its changes.
        layers: module paths that it changes.
        keys: tensors of the file that are applied.
        dropped: tensors of the file that are not, since no slot takes them; none unless that was allowed.
    """

    file: Path
    scale: float
    layers: tuple[str, ...]
    keys: tuple[str, ...]
    dropped: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """As it is told."""
        count = len(self.keys) + len(self.dropped)
        beside = f", not {_listed(self.dropped)}" if self.dropped else ""
        layers = f"{len(self.layers)} layers, scale {self.scale:g}"
        return f"LoRA '{self.file}': {len(self.keys)} of {count} keys applied to {layers}{beside}"


def require_slots(config: BuildConfig, opened: OpenedModel, *, shapes: bool) -> None:
    """Refuse slots where they are not done.

    Args:
        config: choices of the build.
        opened: the model.
        shapes: whether several sizes are asked for.

    Raises:
        UserError: names what does not go together.
    """
    rank = config.lora_slots
    if rank is None:
        return
    model = opened.outline
    refused = {f"--layout {PLUGIN_LAYOUT}": config.layout == PLUGIN_LAYOUT, "--shapes": shapes}
    for option, asked in refused.items():
        if asked:
            raise UserError(f"--lora-slots {rank}: not with {option}; leave one of them out")
    if _family(opened.pipeline, model.adapter.architecture) is None:
        raise UserError(
            f"--lora-slots {rank}: no family knows how LoRA files name the layers of a {model.adapter.architecture}; "
            "register one (docs/adapters.md), or leave it out"
        )


def weight_sentence(rank: int, adapter: ModelAdapter) -> str:
    """Say what slots of a rank weigh."""
    linears = adapter.quantizable_layers().values()
    count = sum(2 * rank * (linear.in_features + linear.out_features) for linear in linears)
    return f"LoRA slots: {size(count)} of 16-bit matrices beside {len(linears)} layers, which budgets do not count"


def slots_record(context: Context) -> LoraSlots | None:
    """Describe the slots of a run; None where it has none."""
    adapter, rank = context.adapter, context.settings.lora_slots
    if rank is None:
        return None
    family = _family(context.pipeline, adapter.architecture)
    assert family is not None, "refused before anything ran"
    config: Any = adapter.transformer.config
    return LoraSlots(
        rank=rank,
        layers={name: (own.in_features, own.out_features) for name, own in adapter.quantizable_layers().items()},
        pipeline=family.pipeline,
        transformer=json.loads(json.dumps({name: value for name, value in config.items() if name[0] != "_"})),
    )


def load_lora(bundle: Bundle, lora: Lora, partial: bool = False) -> LoadedLora:
    """Put a LoRA into the slots of a bundle, beside those that are there.

    Args:
        bundle: open.
        lora: of its one transformer.
        partial: apply what has a slot, and drop the rest.

    Raises:
        MismatchError: no slots, or not of this rank; a file of another model, one that matches in part, or one that
            does what no slot does.
        DamagedFileError: it holds something that is no LoRA, or numbers that are not finite.
    """
    slots, file = bundle.lora_slots, lora.file
    family = family_of_pipeline(slots.pipeline)
    if family is None:
        raise MismatchError(
            f"bundle '{bundle.files.folder}' was built from a {slots.pipeline}, which is not known here; register its "
            "family (docs/adapters.md)"
        )
    if lora.expert:
        raise UserError(f"--lora '{lora}': the bundle has one transformer; write {file}:{lora.scale:g} without a name")
    changes = read_changes(family, family.make_outline(slots.transformer), file, partial=True)
    dropped = _without_slot(changes, slots)
    layers = [path for path in changes.layers if path in slots.layers]
    if not layers or (dropped and not partial):
        count = len({*dropped, *(key for keys in changes.keys.values() for key in keys)})
        advice = "pass --lora-partial (partial=True) for the others, or fuse it when the bundle is built, with --lora"
        raise MismatchError(
            f"--lora '{file}': {len(dropped)} of its {count} keys change what has no slot in the bundle, such as "
            f"{_listed(dropped)}; {advice if layers else 'give a LoRA of its attention or feed-forward layers'}"
        )
    dtype = getattr(torch, bundle.manifest.base_type)
    matrices = {path: _matrices(file, path, changes, lora.scale, dtype) for path in layers}
    bundle.add_lora(SlotLora(str(file), matrices))
    warn_of_text_encoders(file, changes)
    keys = dict.fromkeys(key for path in layers for key in changes.keys[path] if key not in dropped)
    loaded = LoadedLora(file, lora.scale, tuple(layers), tuple(keys), dropped)
    log.info("%s", loaded.sentence)
    return loaded


def load_loras(bundle: Bundle, texts: Sequence[str], partial: bool) -> None:
    """Put LoRAs into the slots of a bundle as options of a command name them, FILE or FILE:SCALE.

    Raises:
        UserError: partial ones without any.
        MismatchError: as `load_lora`.
        DamagedFileError: likewise.
    """
    if partial and not texts:
        raise UserError("--lora-partial: there is no --lora that it could be for; leave it out")
    for text in texts:
        load_lora(bundle, parse_lora(text), partial)


def _without_slot(changes: Changes, slots: LoraSlots) -> tuple[str, ...]:
    """Tensors of a file that no slot takes: of other layers, and biases."""
    keys = list(changes.unmatched)
    for path, change in changes.layers.items():
        if path not in slots.layers:
            keys += changes.keys[path]
        elif change.bias is not None:
            keys += [key for key in changes.keys[path] if key.endswith(".bias")]
    return tuple(dict.fromkeys(keys))


def _matrices(
    file: Path, path: str, changes: Changes, scale: float, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Down [K, r] and up [r, N] of a layer, rounded to the type that graphs have them in."""
    change = changes.layers[path]
    if change.magnitude is not None:
        raise MismatchError(
            f"--lora '{file}': '{path}' has magnitudes (DoRA), which change the layer's own weight; fuse it when the "
            "bundle is built, with --lora"
        )

    def rounded(matrix: Tensor) -> np.ndarray:
        values = matrix.mT.to(dtype).float()
        if not values.isfinite().all():
            raise DamagedFileError(
                f"--lora '{file}': '{path}' has numbers that are NaN, infinite or too large for {dtype}; give a whole "
                "file, or a smaller scale"
            )
        return values.contiguous().numpy()

    return rounded(change.down), rounded(change.up * scale)


def _listed(keys: Sequence[str]) -> str:
    """The first of some keys."""
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return ", ".join(f"'{key}'" for key in keys[:_SHOWN_KEYS]) + more


def _family(pipeline: OpenedPipeline | None, architecture: str) -> Family | None:
    return family_of_transformer(architecture) if pipeline is None else pipeline.source.family
