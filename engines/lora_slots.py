"""LoRAs in the slots of a bundle: together they fill the branches beside its layers, whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adatsq_trt.engines.manifest import LoraSlots
from adatsq_trt.errors import MismatchError
from adatsq_trt.graph_index import lora_inputs


@dataclass(frozen=True)
class SlotLora:
    """A LoRA as slots take it: y + (x · down) · up.

    Attributes:
        name: of its file, for messages.
        layers: module path → down [K, r] and up [r, N], float32 numbers that the graphs' base type holds; up with its
            scale and alpha / rank multiplied in.
    """

    name: str
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]]


def fill_slots(slots: LoraSlots, loras: Sequence[SlotLora]) -> dict[str, np.ndarray]:
    """Put LoRAs side by side; the rest of a slot is zero.

    Args:
        slots: of the bundle.
        loras: of layers that have slots; the last is the one that messages name.

    Returns:
        Graph input → float32, for every slot.

    Raises:
        MismatchError: their ranks add up to more than a slot has.
    """
    matrices = {name: np.zeros(shape, np.float32) for name, shape in slots.shapes.items()}
    for layer in slots.layers:
        parts = [lora.layers[layer] for lora in loras if layer in lora.layers]
        ranks = [len(up) for _, up in parts]
        if sum(ranks) > slots.rank:
            together = "" if len(ranks) == 1 else f" together with {sum(ranks[:-1])} of those that are loaded"
            raise MismatchError(
                f"LoRA '{loras[-1].name}': got rank {ranks[-1]} in layer '{layer}'{together}, the bundle's slots have "
                f"rank {slots.rank}; unload others, or build a bundle with --lora-slots {sum(ranks)}"
            )
        down, up = (matrices[name] for name in lora_inputs(layer))
        first = 0
        for rank, (narrow, wide) in zip(ranks, parts, strict=True):
            down[:, first : first + rank], up[first : first + rank] = narrow, wide
            first += rank
    return matrices
