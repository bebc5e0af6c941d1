"""The budgets of a search, from the settings and the shapes that calibration saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from adatsq_trt.errors import BudgetError
from adatsq_trt.files import read_tensors
from adatsq_trt.formats import format_named
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.policy import LayerShape, Policy
from adatsq_trt.search.budgets import Additive, Budgets, Storage
from adatsq_trt.search.costs import TimeModel, stored_time_model
from adatsq_trt.search.denoising import format_bits
from adatsq_trt.settings import Settings
from adatsq_trt.stages import calibrate
from adatsq_trt.stages.context import Context, layer_shapes


@dataclass(frozen=True)
class SampleTimes:
    """Milliseconds of one sample.

    Attributes:
        model: where they come from.
        shapes: of the layers.
        rest_ms: of everything that is not quantized, in one step.
    """

    model: TimeModel
    shapes: tuple[LayerShape, ...]
    rest_ms: float

    def policy_ms(self, policy: Policy) -> float:
        """Of a whole policy."""
        steps = (policy.formats_at(step) for step in range(policy.steps))
        layers = sum(self.model.layer_ms(row[shape.name], shape) for row in steps for shape in self.shapes)
        return layers + policy.steps * self.rest_ms


def penalty(settings: Settings) -> bool:
    """Whether there is another budget than that in bits."""
    return settings.budget_bytes is not None or settings.budget_ms is not None


def chooses_weights(settings: Settings) -> bool:
    """Whether every layer is to be given one weight format of several for all steps."""
    grids = {format_named(name).weight for name in settings.formats}
    return settings.weights == "once" and len(grids) > 1


def constrained(settings: Settings) -> bool:
    """Whether policies have to keep more than a budget in bits."""
    return penalty(settings) or chooses_weights(settings) or bool(settings.formats_for)


def allowed_formats(settings: Settings, layers: Sequence[str]) -> NDArray[np.bool_] | None:
    """[formats, layers]: what each layer may be given; None where nothing was ruled out."""
    if not settings.formats_for:
        return None
    rows = [
        [name in settings.formats_for.get(layer, settings.formats) for layer in layers] for name in settings.formats
    ]
    return np.array(rows)


def shapes_of(context: Context) -> tuple[LayerShape, ...]:
    """Shapes of the quantizable layers; calibration has counted their rows."""
    counted = read_tensors(calibrate.stage(context).folder / calibrate.STATISTICS)["tokens"]
    return layer_shapes(context.adapter, dict(zip(context.layers, (int(n) for n in counted), strict=True)))


def sample_times(context: Context) -> SampleTimes | None:
    """Where milliseconds come from, or None when nobody asked for them."""
    if context.settings.times is None:
        return None
    model, shapes = stored_time_model(context.settings.times), shapes_of(context)
    quantized = sum(2.0 * s.tokens * s.in_features * s.out_features for s in shapes)
    return SampleTimes(model, shapes, model.rest_ms(max(_operations(context) - quantized, 0.0)))


@torch.no_grad()
def _operations(context: Context) -> float:
    """Additions and multiplications of matrix products and attention in one step of one sample."""
    one = context.calibration.part(slice(0, 1))
    with FlopCounterMode(display=False) as counter:
        one.step(one.noise(), 0)
    return float(counter.get_total_flops())


def budgets(context: Context) -> Budgets:
    """All budgets of the settings.

    Raises:
        BudgetError: one that no policy can meet; names the cheapest.
        UnsupportedFormatError: a format that takes nobody knows how long.
    """
    settings, formats, steps = context.settings, context.formats, context.settings.steps
    layers, additive = len(context.layers), []
    allowed = allowed_formats(settings, context.layers)
    if settings.budget_bits is not None:
        cost = format_bits(formats)[:, None].repeat(layers, axis=1)
        additive.append(Additive("bits", cost, settings.budget_bits * steps * layers))
    times = sample_times(context)
    if times is not None:
        assert settings.budget_ms is not None
        rest = steps * times.rest_ms
        found = Budgets(steps, (Additive("ms", times.model.table_of(formats, times.shapes), 0.0),), allowed=allowed)
        least = found.cheapest("ms") + rest
        if settings.budget_ms < least:
            raise BudgetError(
                f"--budget-ms {settings.budget_ms:g}: the fastest policy of these formats takes {least:.4g} ms "
                f"({times.model.source}), {rest:.4g} of them for what is not quantized; raise the budget, add a format "
                "or take fewer steps"
            )
        additive.append(Additive("ms", found.additive[0].cost, settings.budget_ms - rest))
    storage, once = None, chooses_weights(settings)
    if settings.budget_bytes is not None or once:
        most = math.inf if settings.budget_bytes is None else settings.budget_bytes
        storage = Storage.of(formats, shapes_of(context), most, once=once)
    return Budgets(steps, tuple(additive), storage, allowed)


def require_bits(settings: Settings, layers: Sequence[str]) -> None:
    """Refuse, before anything runs, fewer bits than the cheapest policy has.

    Raises:
        BudgetError: says how many these are.
    """
    if settings.budget_bits is None:
        return
    cheapest, allowed = format_named(settings.formats[0]), allowed_formats(settings, layers)
    bits = format_bits([format_named(name) for name in settings.formats])[:, None]
    least = cheapest.bits if allowed is None else float(np.where(allowed, bits, np.inf).min(axis=0).mean())
    if not settings.budget_bits >= least - 1e-9:
        what = (
            f"{cheapest.name} everywhere"
            if allowed is None
            else "that with the cheapest format that each layer may have"
        )
        raise BudgetError(
            f"--budget-bits {settings.budget_bits:g}: no policy of these formats is that small; the cheapest is {what} "
            f"with a mean of {least:g} bits; raise the budget or add a format"
        )


def require_bytes(settings: Settings, adapter: ModelAdapter) -> None:
    """Refuse, before anything runs, fewer bytes than the smallest weights have.

    Raises:
        BudgetError: says how many these are.
    """
    if settings.budget_bytes is None:
        return
    shapes = layer_shapes(adapter, dict.fromkeys(adapter.quantizable_layers(), 1))
    formats = [format_named(name) for name in settings.formats]
    allowed = allowed_formats(settings, [shape.name for shape in shapes])
    storage = Storage.of(formats, shapes, settings.budget_bytes)
    least = Budgets(settings.steps, (), storage, allowed).cheapest("bytes")
    if settings.budget_bytes < least:
        raise BudgetError(
            f"--budget-bytes {settings.budget_bytes:.0f}: the smallest weights of these formats have {least:.0f} "
            "bytes; raise the budget or add a format"
        )
