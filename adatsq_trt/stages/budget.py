"""Costs of a run's policies, and its budgets, from the settings and the shapes that calibration saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from adatsq_trt.calibration.transforms.make import TRANSFORMS
from adatsq_trt.costs import ROUNDING, Limits, TransformCosts
from adatsq_trt.errors import BudgetError
from adatsq_trt.files import read_tensors
from adatsq_trt.formats import format_named
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.policy import LayerShape
from adatsq_trt.search.active import rows_of
from adatsq_trt.search.budgets import Additive, Budgets, CostModel, Storage
from adatsq_trt.search.costs import TimeModel, stored_time_model
from adatsq_trt.search.denoising import format_bits
from adatsq_trt.search.static import uniform
from adatsq_trt.settings import Settings
from adatsq_trt.stages import calibrate
from adatsq_trt.stages.context import Context, layer_shapes
from adatsq_trt.stages.transform_costs import branch_bytes, transform_costs
from adatsq_trt.stages.work import Work

# Times a reference format's bytes and time that a policy may have where nobody said how much.
ROOM = 1.1
# What speeds and sizes that are given beside 16 bits compare with.
SIXTEEN = format_named("bf16")


@dataclass(frozen=True)
class Account:
    """Costs of policies, and their limits.

    Attributes:
        costs: of policies.
        budgets: as the search counts them: sums over steps and layers of what is quantized.
        limits: as they are told, of whole samples.
        weights: number of quantized weights.
        ms_source: source of the milliseconds; None where they are not known.
        transform: bytes and milliseconds of the run's transform in all of them; None where it has none.
    """

    costs: CostModel
    budgets: Budgets
    limits: Limits
    weights: int
    ms_source: str | None
    transform: TransformCosts | None = None


def penalty(settings: Settings) -> bool:
    """Whether there is another budget than that in bits."""
    others = (settings.budget_bytes, settings.budget_ms, settings.budget_speedup, settings.reference)
    return any(other is not None for other in others)


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


def account(context: Context) -> Account:
    """Costs and budgets of a run whose calibration is done.

    Raises:
        BudgetError: one that no policy can meet; names the cheapest.
        UnsupportedFormatError: a format that takes nobody knows how long.
    """
    settings, formats, shapes = context.settings, context.formats, shapes_of(context)
    steps, ms, rest_ms, model = settings.steps, None, 0.0, None
    if settings.times is not None:
        model = stored_time_model(settings.times)
        ms, rest_ms = model.table_of(formats, shapes), steps * _rest_ms(context, model, shapes)
    added = transform_costs(context, shapes, model)
    added_ms, added_bytes = (0.0, 0) if added is None else (added.ms or 0.0, added.bytes)
    costs = CostModel.of(formats, shapes, steps, ms, rest_ms + added_ms, added_bytes, context.active)
    limits = _limits(context, costs)
    if model is not None and settings.budget_speedup is not None:
        own = float(context.active.sum(axis=0) @ model.table_of([SIXTEEN], shapes)[0]) + rest_ms
        limits = limits.model_copy(update={"ms": own / settings.budget_speedup})
    if model is not None and limits.ms is not None:
        _require_ms(context, costs, limits.ms, model.source)
    weights = sum(shape.in_features * shape.out_features for shape in shapes)
    source = None if model is None else model.source
    budgets = _budgets(costs, limits, context)
    if limits.bytes is not None:
        _require_least(limits.bytes, budgets.cheapest("bytes") + added_bytes, shapes)
    return Account(costs, budgets, limits, weights, source, added)


def work(settings: Settings) -> Work:
    """Count the calls of one sample from which an account is made."""
    return Work(call=(settings.transform is not None) + (settings.times is not None))


def _limits(context: Context, costs: CostModel) -> Limits:
    """Those of the settings that do not depend on the speed of 16 bits."""
    settings = context.settings
    if settings.reference is None:
        return Limits(bits=settings.budget_bits, bytes=settings.budget_bytes, ms=settings.budget_ms)
    index, allowed = settings.formats.index(settings.reference), allowed_formats(settings, context.layers)
    rows = uniform(index, settings.steps, len(context.layers), context.active)
    if allowed is not None:  # layers that may not have it have the cheapest of those that they may have
        first = np.argmax(allowed, axis=0)
        rows = rows_of(np.where(allowed[index], index, first)[None], context.active)
    own = costs.costs(rows)
    room = max(ROOM, 1 + costs.least_departure(index, settings.steps))
    return Limits.within(own, room)


def _budgets(costs: CostModel, limits: Limits, context: Context) -> Budgets:
    """Limits as sums over steps and layers."""
    steps, layers, additive, active = context.settings.steps, len(context.layers), [], context.active
    if limits.bits is not None:
        bits = format_bits(context.formats)[:, None].repeat(layers, axis=1)
        additive.append(Additive("bits", bits, limits.bits * int(active.sum())))
    if limits.activation_bits is not None:
        additive.append(Additive("activation_bits", costs.activation_bits, limits.activation_bits))
    if limits.ms is not None:
        assert costs.ms is not None, "a budget in milliseconds has a card"
        additive.append(Additive("ms", costs.ms, limits.ms - costs.rest_ms))
    most = math.inf if limits.bytes is None else limits.bytes - costs.rest_bytes
    once = chooses_weights(context.settings)
    storage = replace(costs.storage, limit=most, once=once) if once or math.isfinite(most) else None
    return Budgets(steps, tuple(additive), storage, allowed_formats(context.settings, context.layers), active)


def require_bits(settings: Settings, adapter: ModelAdapter) -> None:
    """Refuse, before anything runs, fewer bits than the cheapest policy has.

    Raises:
        BudgetError: says how many these are.
    """
    if settings.budget_bits is None:
        return
    layers = tuple(adapter.quantizable_layers())
    cheapest, allowed = format_named(settings.formats[0]), allowed_formats(settings, layers)
    steps = adapter.active(adapter.schedule(settings.asked_steps)).sum(axis=0)  # at which each layer runs
    bits = format_bits([format_named(name) for name in settings.formats])[:, None]
    by_layer = None if allowed is None else np.where(allowed, bits, np.inf).min(axis=0)
    least = cheapest.bits if by_layer is None else float(np.average(by_layer, weights=steps))
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


def _rest_ms(context: Context, model: TimeModel, shapes: Sequence[LayerShape]) -> float:
    """Milliseconds of what is not quantized, in one step."""
    called = [shape for shape, runs in zip(shapes, context.active[0], strict=True) if runs]
    quantized = sum(2.0 * s.tokens * s.in_features * s.out_features for s in called)
    return model.rest_ms(max(context.operations - quantized, 0.0))


def _require_ms(context: Context, costs: CostModel, most: float, source: str) -> None:
    """Refuse fewer milliseconds than the fastest policy takes.

    Raises:
        BudgetError: says how many these are.
    """
    assert costs.ms is not None
    settings = context.settings
    allowed = allowed_formats(settings, context.layers)
    ms = costs.ms if allowed is None else np.where(allowed, costs.ms, np.inf)
    least = float(context.active.sum(axis=0) @ ms.min(axis=0)) + costs.rest_ms
    if most < least * (1 - 1e-9):
        speedup = settings.budget_speedup
        asked = f"{most:.4g}ms" if speedup is None else f"{speedup:g}x, which is {most:.4g} ms"
        fastest = "" if speedup is None else f", {speedup * most / least:.4g} times as fast as 16 bits"
        raise BudgetError(
            f"--budget-speed {asked}: the fastest policy of these formats takes {least:.4g} ms{fastest} ({source}), "
            f"{costs.rest_ms:.4g} of them for what is not quantized; ask for less speed, add a format or take fewer "
            "steps"
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
    if settings.transform is not None:
        least += branch_bytes(TRANSFORMS[settings.transform], shapes)
    _require_least(settings.budget_bytes, least, shapes)


def _require_least(most: float, least: float, shapes: Sequence[LayerShape]) -> None:
    if most < least * (1 - ROUNDING):
        raise BudgetError(
            f"--budget-size {most:.0f}: the smallest weights of these formats have {least:.0f} bytes, "
            f"{least / sixteen_bit_bytes(shapes):.3g}x those in 16 bits; raise the budget or add a format"
        )


def sixteen_bit_bytes(shapes: Sequence[LayerShape]) -> float:
    """Count the bytes of the quantized weights in 16 bits; biases and everything else stay as they are."""
    return 2.0 * sum(s.in_features * s.out_features for s in shapes)
