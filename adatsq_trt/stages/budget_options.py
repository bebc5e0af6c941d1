"""From the budgets that the user asked for, or did not, to the settings of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adatsq_trt.config import BuildConfig
from adatsq_trt.errors import UserError
from adatsq_trt.formats import PLUGIN_LAYOUT, Format, Target, default_budget
from adatsq_trt.policy import LayerShape
from adatsq_trt.search.costs import CARDS, TARGET_CARDS, time_model
from adatsq_trt.stages.budget import SIXTEEN, sixteen_bit_bytes

# The format that users of a target would choose without a search: defaults give a little more than it needs.
REFERENCES = {"sm80": "int4wo", "sm86": "int4wo", "sm89": "fp8", "sm120": "nvfp4", "cpu": "w8a8s"}
PLUGIN_REFERENCE = "w4a8"
# Most assignments in layouts where each is an engine.
FEW = 4
_ENGINES = ("embedded", "shared")


def budget_settings(
    config: BuildConfig, targets: Sequence[Target], layout: str, format_set: str, formats: Sequence[Format]
) -> dict[str, Any]:
    """Settings of the budgets; a size beside 16 bits is left to `size_settings`, which knows the model.

    Raises:
        UserError: a size or speed of no known unit, a speed of no card, an unknown card, or a format whose time there
            nobody knows.
    """
    size, speed = config.size, config.speed
    times = _times(config, targets, formats)
    if speed is not None and times is None:
        raise UserError(
            f"--budget-speed {config.budget_speed}: on which card? pass --gpu with one of {', '.join(CARDS)} (a "
            "roofline of its published rates) or with a file that 'adatsq-trt benchmark' wrote (measured)"
        )
    settings: dict[str, Any] = {"times": times, "max_assignments": _most_assignments(config, targets, layout)}
    if speed is not None:
        settings["budget_speedup" if speed.relative else "budget_ms"] = speed.value
    asked = (config.budget_bits, size, speed, config.policy)
    if any(one is not None for one in asked):
        return settings | {"budget_bits": config.budget_bits}
    if not targets:
        return settings | {"budget_bits": default_budget(format_set)}
    return settings | {"budget_bits": None, "reference": reference(targets, layout, formats)}


def size_settings(config: BuildConfig, shapes: Sequence[LayerShape]) -> dict[str, Any]:
    """The budget in bytes, of a model whose layers are known."""
    size = config.size
    if size is None:
        return {}
    return {"budget_bytes": size.value * sixteen_bit_bytes(shapes) if size.relative else size.value}


def reference(targets: Sequence[Target], layout: str, formats: Sequence[Format]) -> str:
    """The format that a policy has to be about as small and as fast as.

    Args:
        targets: the first that has such a format among the candidates decides.
        layout: of the plans; the plugin's kernels have a format of their own.
        formats: candidates, cheapest first: the cheapest where no target's is among them.
    """
    names = [fmt.name for fmt in formats]
    wanted = [PLUGIN_REFERENCE] if layout == PLUGIN_LAYOUT else [REFERENCES.get(target.name) for target in targets]
    return next((name for name in wanted if name in names), names[0])


def _times(config: BuildConfig, targets: Sequence[Target], formats: Sequence[Format]) -> str | None:
    """Where milliseconds come from: what the user names, else a card of the first GPU among the targets."""
    if config.gpu is not None:
        model, times = time_model(config.gpu)
        model.require([*formats, SIXTEEN] if config.speed is not None and config.speed.relative else formats)
        return times
    card = next((TARGET_CARDS[target.name] for target in targets if target.name in TARGET_CARDS), None)
    if card is None:
        return None
    model, times = time_model(card)
    if config.speed is not None:
        model.require(formats)
    return times if model.knows(formats) else None


def _most_assignments(config: BuildConfig, targets: Sequence[Target], layout: str) -> int | None:
    if config.max_assignments is not None or config.policy is not None:
        return config.max_assignments
    return FEW if targets and not config.simulate and layout in _ENGINES else None
