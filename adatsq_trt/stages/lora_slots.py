"""Branches for LoRAs at run time: which builds have them, and what a bundle's manifest says of them."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from adatsq_trt.config import BuildConfig
from adatsq_trt.engines.manifest import LoraSlots
from adatsq_trt.errors import UserError
from adatsq_trt.formats import PLUGIN_LAYOUT
from adatsq_trt.models.families import family_of_transformer
from adatsq_trt.models.family import Family
from adatsq_trt.report.numbers import size

if TYPE_CHECKING:
    from adatsq_trt.checkpoints.loading import OpenedPipeline
    from adatsq_trt.stages.context import Context
    from adatsq_trt.stages.models import OpenedModel

log = logging.getLogger(__name__)


def require_slots(config: BuildConfig, opened: OpenedModel, *, shapes: bool) -> None:
    """Refuse slots where they are not done, and say what they weigh.

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
    linears = model.adapter.quantizable_layers().values()
    count = sum(2 * rank * (linear.in_features + linear.out_features) for linear in linears)
    log.info(
        "--lora-slots %d: branches of %s beside %d layers, which budgets do not count", rank, size(count), len(linears)
    )


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


def _family(pipeline: OpenedPipeline | None, architecture: str) -> Family | None:
    return family_of_transformer(architecture) if pipeline is None else pipeline.source.family
