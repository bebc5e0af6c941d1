"""Costs of a run's policies, and its budgets, from the settings and the shapes that calibration saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from adatsq_trt.calibration.transforms.make import TRANSFORMS
from adatsq_trt.config import option_name
from adatsq_trt.costs import ROUNDING, Limits, TransformCosts
from adatsq_trt.errors import BudgetError
from adatsq_trt.files import read_tensors
from adatsq_trt.formats import Format, format_named
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.policy import LayerShape
from adatsq_trt.search.active import Active, rows_of
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
# A bound has to be so far beyond its budgets, or sums in another order would refuse what can be kept.
_SURE = 1e-6
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
    shapes, times = shapes_of(context), context.settings.times
    added = transform_costs(context, shapes, None if times is None else stored_time_model(times))
    return _account(context.settings, shapes, context.active, 0.0 if times is None else context.operations, added)


def require_possible(settings: Settings, adapter: ModelAdapter) -> None:
    """Refuse, before anything runs, budgets in bits and bytes that no policy can keep.

    Milliseconds depend on how many rows a sample sends through the layers, which calibration counts.

    Raises:
        BudgetError: names the cheapest policy there is, or the budgets that cannot be kept together.
    """
    require_bytes(settings, adapter)
    require_bits(settings, adapter)
    if settings.reference is not None:
        return  # the budgets are made for a policy that there is
    settings = settings.model_copy(update={"times": None, "budget_ms": None, "budget_speedup": None})
    shapes = layer_shapes(adapter, dict.fromkeys(adapter.quantizable_layers(), 1))
    _account(settings, shapes, adapter.active(adapter.schedule(settings.asked_steps)), operations=0.0)


def _account(
    settings: Settings,
    shapes: Sequence[LayerShape],
    active: Active,
    operations: float,
    added: TransformCosts | None = None,
) -> Account:
    """Costs and budgets.

    Args:
        settings: of the run.
        shapes: of its layers.
        active: [steps, layers]: which layers run at which step.
        operations: of one step of one sample; they count where milliseconds are known.
        added: costs of the transform.
    """
    formats, steps, ms, rest_ms, model = _formats(settings), settings.steps, None, 0.0, None
    if settings.times is not None:
        model = stored_time_model(settings.times)
        ms, rest_ms = model.table_of(formats, shapes), steps * _rest_ms(operations, model, shapes, active)
    added_ms, added_bytes = (0.0, 0) if added is None else (added.ms or 0.0, added.bytes)
    costs = CostModel.of(formats, shapes, steps, ms, rest_ms + added_ms, added_bytes, active)
    limits = _limits(settings, shapes, costs)
    if model is not None and settings.budget_speedup is not None:
        own = float(active.sum(axis=0) @ model.table_of([SIXTEEN], shapes)[0]) + rest_ms
        limits = limits.model_copy(update={"ms": own / settings.budget_speedup})
    if model is not None and limits.ms is not None:
        _require_ms(settings, shapes, costs, limits.ms, model.source)
    weights = sum(shape.in_features * shape.out_features for shape in shapes)
    source = None if model is None else model.source
    budgets = _budgets(settings, shapes, costs, limits)
    if limits.bytes is not None:
        _require_least(limits.bytes, budgets.cheapest("bytes") + added_bytes, shapes)
    if settings.reference is None and settings.policy is None:  # a given one is built as it is
        _require_together(settings, budgets)
    return Account(costs, budgets, limits, weights, source, added)


def _require_together(settings: Settings, budgets: Budgets) -> None:
    """Refuse budgets of which each can be kept alone, but not with another.

    Raises:
        BudgetError: names them.
    """
    if budgets.least_share() > 1 + _SURE:
        speed = settings.budget_ms if settings.budget_speedup is None else settings.budget_speedup
        asked = {"budget_bits": settings.budget_bits, "budget_size": settings.budget_bytes, "budget_speed": speed}
        given = ", ".join(option_name(name) for name, value in asked.items() if value is not None)
        raise BudgetError(
            f"{given}: no policy of these formats keeps these budgets together, although each can be kept alone; raise "
            "one of them or add a format"
        )


def work(settings: Settings) -> Work:
    """Count the calls of one sample from which an account is made."""
    return Work(call=(settings.transform is not None) + (settings.times is not None))


def _limits(settings: Settings, shapes: Sequence[LayerShape], costs: CostModel) -> Limits:
    """Those of the settings that do not depend on the speed of 16 bits."""
    if settings.reference is None:
        return Limits(bits=settings.budget_bits, bytes=settings.budget_bytes, ms=settings.budget_ms)
    index, allowed = settings.formats.index(settings.reference), allowed_formats(settings, _names(shapes))
    rows = uniform(index, settings.steps, len(shapes), costs.active)
    if allowed is not None:  # layers that may not have it have the cheapest of those that they may have
        first = np.argmax(allowed, axis=0)
        rows = rows_of(np.where(allowed[index], index, first)[None], costs.active)
    own = costs.costs(rows)
    room = max(ROOM, 1 + costs.least_departure(index, settings.steps))
    return Limits.within(own, room)


def _formats(settings: Settings) -> list[Format]:
    return [format_named(name) for name in settings.formats]


def _names(shapes: Sequence[LayerShape]) -> list[str]:
    return [shape.name for shape in shapes]


def _budgets(settings: Settings, shapes: Sequence[LayerShape], costs: CostModel, limits: Limits) -> Budgets:
    """Limits as sums over steps and layers."""
    additive, active = [], costs.active
    if limits.bits is not None:
        bits = format_bits(_formats(settings))[:, None].repeat(len(shapes), axis=1)
        additive.append(Additive("bits", bits, limits.bits * int(active.sum())))
    if limits.activation_bits is not None:
        additive.append(Additive("activation_bits", costs.activation_bits, limits.activation_bits))
    if limits.ms is not None:
        assert costs.ms is not None, "a budget in milliseconds has a card"
        additive.append(Additive("ms", costs.ms, limits.ms - costs.rest_ms))
    most = math.inf if limits.bytes is None else limits.bytes - costs.rest_bytes
    once = chooses_weights(settings)
    storage = replace(costs.storage, limit=most, once=once) if once or math.isfinite(most) else None
    return Budgets(settings.steps, tuple(additive), storage, allowed_formats(settings, _names(shapes)), active)


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


def _rest_ms(operations: float, model: TimeModel, shapes: Sequence[LayerShape], active: Active) -> float:
    """Milliseconds of what is not quantized, in one step."""
    called = [shape for shape, runs in zip(shapes, active[0], strict=True) if runs]
    quantized = sum(2.0 * s.tokens * s.in_features * s.out_features for s in called)
    return model.rest_ms(max(operations - quantized, 0.0))


def _require_ms(settings: Settings, shapes: Sequence[LayerShape], costs: CostModel, most: float, source: str) -> None:
    """Refuse fewer milliseconds than the fastest policy takes.

    Raises:
        BudgetError: says how many these are.
    """
    assert costs.ms is not None
    allowed = allowed_formats(settings, _names(shapes))
    ms = costs.ms if allowed is None else np.where(allowed, costs.ms, np.inf)
    least = float(costs.active.sum(axis=0) @ ms.min(axis=0)) + costs.rest_ms
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
