"""Choices that a pipeline with two transformers takes, and those that it does not: said before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adatsq_trt.config import BuildConfig
from adatsq_trt.errors import UserError

if TYPE_CHECKING:
    from adatsq_trt.zoo.loading import LoadedModel

_LAYOUTS = ("embedded", "shared")


def require_for_experts(config: BuildConfig, model: LoadedModel, *, shapes: bool) -> None:
    """Refuse what is not done for two transformers, and what only these take.

    Args:
        config: choices of the build.
        model: its outline.
        shapes: whether several sizes are asked for.

    Raises:
        UserError: names the option.
    """
    from adatsq_trt.models.experts import ExpertsAdapter

    if not isinstance(model.adapter, ExpertsAdapter):
        if config.guidance_2 is not None:
            raise UserError(
                f"--guidance-2 {config.guidance_2:g}: model '{model.name}' has one transformer; leave it out, and pass "
                "--guidance"
            )
        return
    if config.guidance_2 is not None and not model.adapter.takes_guidance:
        raise UserError(
            f"--guidance-2 {config.guidance_2:g}: --guidance 1 is no guidance, for either transformer; pass another "
            "--guidance, or leave both out"
        )
    refused = {
        "--shapes": shapes,
        f"--transform {config.transform}": config.transform is not None,
        "--refine": config.refine,
        f"--lora-slots {config.lora_slots}": config.lora_slots is not None,
        f"--beam {config.beam}": config.beam > 0,
        "--max-assignments 1": config.max_assignments == 1,
        "--hessian paper": config.hessian == "paper",
        f"--layout {config.layout}": config.layout not in (None, *_LAYOUTS),
    }
    for option, asked in refused.items():
        if asked:
            raise UserError(f"{option}: not with a pipeline of two transformers, which '{model.name}' is; leave it out")
