"""The methods that are compared: what each does to weights and inputs, and with which formats.

All of them quantize the same layers, with weight scales for groups of 64 and activation scales for each token, and are
calibrated on the same trajectories.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from adatsq_trt.errors import UnknownNameError, UserError


class Weights(Enum):
    """How weights are rounded."""

    NEAREST = "round to nearest"
    GPTQ = "GPTQ"
    FISHER = "GPTQ with Fisher-weighted Hessians"


class Peer(Enum):
    """Methods that modelopt implements."""

    SMOOTHQUANT = "smoothquant"
    SVDQUANT = "svdquant"


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: as on the command line and in results.
        weights: how they are rounded; None where modelopt does it, and for full precision.
        transform: name of the transform of weights and inputs before rounding.
        searched: bits → set of candidate formats; empty for the same format everywhere.
        peer: modelopt's method, for those that run there.
        beam: paths kept per column by the search.
        kind: one of the policies that the search found.
    """

    name: str
    weights: Weights | None = None
    transform: str | None = None
    searched: Mapping[str, str] | None = None
    peer: Peer | None = None
    beam: int = 4
    kind: Literal["chosen", "layer_only", "time_only"] = "chosen"


FULL_PRECISION, FULL_BITS = "fp16", "16/16"
_PAIRS = {"4/4": "paper-pairs", "3/3": "paper-pairs"}
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(FULL_PRECISION),
        Method("rtn", Weights.NEAREST),
        Method("smoothquant", peer=Peer.SMOOTHQUANT),
        Method("svdquant", peer=Peer.SVDQUANT),
        Method("quarot", Weights.GPTQ, "hadamard"),
        Method("viditq", Weights.NEAREST, "balance"),
        # At 3.0 the paper's own formats leave only w3a3, so a 2-bit weight grid joins them.
        Method("adatsq", Weights.FISHER, searched={"4/4": "paper", "3/3": "paper-low"}),
        Method("adatsq-fine", Weights.FISHER, searched=_PAIRS),
        Method("adatsq-best", Weights.FISHER, "balance-low-rank", searched=_PAIRS),
    )
}
# Parts of the method by themselves, and published methods in this project's own form.
ABLATIONS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("gptq", Weights.GPTQ),
        Method("gptq-fisher", Weights.FISHER),
        Method("own-smooth", Weights.NEAREST, "smooth"),
        Method("own-low-rank", Weights.GPTQ, "low-rank"),
        Method("own-balance", Weights.GPTQ, "balance"),
        Method("own-hadamard-low-rank", Weights.GPTQ, "hadamard-low-rank"),
        Method("own-balance-low-rank", Weights.GPTQ, "balance-low-rank"),
        Method("pairs-plain", Weights.GPTQ, searched=_PAIRS),
        Method("fine-beam-1", Weights.FISHER, searched=_PAIRS, beam=1),
        Method("fine-beam-16", Weights.FISHER, searched=_PAIRS, beam=16),
        Method("fine-layer-only", Weights.FISHER, searched=_PAIRS, kind="layer_only"),
        Method("fine-time-only", Weights.FISHER, searched=_PAIRS, kind="time_only"),
        Method("pairs-hadamard", Weights.FISHER, "hadamard", _PAIRS),
        Method("pairs-balance", Weights.FISHER, "balance", _PAIRS),
        Method("pairs-low-rank", Weights.FISHER, "low-rank", _PAIRS),
        Method("best-plain", Weights.GPTQ, "balance-low-rank", _PAIRS),
    )
}
BITS = ("4/4", "3/3")


def method_named(name: str) -> Method:
    """Look a method up, a part of the ablation too.

    Raises:
        UnknownNameError: no such method.
    """
    known = {**METHODS, **ABLATIONS}
    if name not in known:
        raise UnknownNameError("method", name, known)
    return known[name]


def require_bits(bits: str) -> tuple[int, int]:
    """Weight bits and activation bits of a name like 4/4.

    Raises:
        UserError: other bits than those that all methods have formats for.
    """
    if bits not in BITS:
        raise UserError(f"--bits {bits}: expected {' or '.join(BITS)}, or both with a comma between")
    weight, activation = bits.split("/")
    return int(weight), int(activation)
