"""Costs of a policy for whoever runs it, and limits on them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

# Relative: sums in another order.
ROUNDING = 1e-9


class Costs(BaseModel):
    """Bytes and time of a policy.

    Attributes:
        resident_bytes: of quantized weights, each distinct weight format of a layer once, scales included, and of what
            a transform has beside them.
        activation_bits: mean over steps of bits per activation, dynamic scales included, weighted by
            multiply-accumulates; stands for milliseconds where nobody knows them.
        ms: milliseconds per sample; None where nobody knows them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    resident_bytes: int
    activation_bits: float
    ms: float | None = None

    @property
    def time(self) -> float:
        """Milliseconds, or what stands for them."""
        return self.activation_bits if self.ms is None else self.ms


class TransformCosts(BaseModel):
    """Share of a transform in the bytes and milliseconds of every policy of a run.

    Attributes:
        name: of the transform.
        bytes: of branches, divisors and rotations, in 16 bits.
        ms: per sample; None where nobody knows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    bytes: int
    ms: float | None = None

    @property
    def sentence(self) -> str:
        """As it is told."""
        ms = "" if self.ms is None else f" and {self.ms:.3g} ms per sample"
        return f"transform {self.name}: {self.bytes / 1e6:.3g} MB{ms}, which are in every row"


class Limits(BaseModel):
    """Upper limits on a policy's costs; None for no limit.

    Attributes:
        bits: mean of (weight bits + activation bits) / 2 over (step, layer).
        bytes: resident, of quantized weights.
        activation_bits: as in `Costs`.
        ms: per sample.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: float | None = None
    bytes: float | None = None
    activation_bits: float | None = None
    ms: float | None = None

    @classmethod
    def within(cls, costs: Costs, times: float) -> Limits:
        """So many times the bytes and the time of another policy."""
        if costs.ms is None:
            return cls(bytes=times * costs.resident_bytes, activation_bits=times * costs.activation_bits)
        return cls(bytes=times * costs.resident_bytes, ms=times * costs.ms)

    def kept_by(self, mean_bits: float, costs: Costs) -> bool:
        """Whether a policy costs no more."""
        pairs = (
            (self.bits, mean_bits),
            (self.bytes, costs.resident_bytes - 0.5),  # a rounded number
            (self.activation_bits, costs.activation_bits),
            (self.ms, costs.ms),
        )
        return all(most is None or (own is not None and own <= most * (1 + ROUNDING)) for most, own in pairs)
