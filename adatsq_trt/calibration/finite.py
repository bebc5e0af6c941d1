"""Where numbers stop being finite: which layer of which step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.errors import UserError


def require_finite_trajectory(samples: Samples, latents: Tensor) -> None:
    """Refuse a full-precision trajectory with NaN or infinite numbers, from which every later figure would have them.

    Args:
        samples: whose trajectory it is.
        latents: float32 [steps + 1, samples, *latent_shape].

    Raises:
        UserError: names the step, the layer whose output is the first that is not finite, and the prompt.
    """
    bad = ~latents.isfinite().flatten(2).all(dim=2)
    if not bool(bad.any()):
        return
    following = int(bad.any(dim=1).nonzero()[0])
    step, sample = max(following - 1, 0), int(bad[following].nonzero()[0])
    with _watched(samples.adapter.transformer) as found:
        latent = latents[step, sample : sample + 1].to(samples.adapter.device)
        samples.part(slice(sample, sample + 1)).step(latent, step)
    layer = f"layer '{found[0]}' gives" if found else "the model's output has"
    prompt = samples.adapter.prompts[samples.prompts[sample]]
    raise UserError(
        f"step {step}: in full precision {layer} NaN or infinite activations for the prompt '{prompt}'; the checkpoint "
        "is damaged or not meant for this size or guidance; check it with diffusers, or leave the prompt out"
    )


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Names of the innermost modules with outputs that are not finite, in the order of execution."""
    found: list[str] = []

    def watch(name: str, module: nn.Module):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, _inputs: tuple[object, ...], output: object) -> None:
            if isinstance(output, torch.Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in model.named_modules() if not list(module.children())]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
