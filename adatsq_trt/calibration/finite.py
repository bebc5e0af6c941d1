"""Where numbers stop being finite: which layer of which step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.errors import UnsupportedFormatError, UserError
from adatsq_trt.formats import Format
from adatsq_trt.quantizers import QuantizedWeight, plain_type


def require_finite_trajectory(samples: Samples, latents: Tensor) -> None:
    """Refuse a full-precision trajectory with NaN or infinite numbers, from which every later figure would have them.

    Args:
        samples: the batch that went along the trajectory.
        latents: float32 [steps + 1, samples, *latent_shape].

    Raises:
        UserError: names the step, the layer whose output is the first that is not finite, and the prompt.
    """
    bad = ~latents.isfinite().flatten(2).all(dim=2)
    if not bool(bad.any()):
        return
    following = int(bad.any(dim=1).nonzero()[0])
    step, sample = max(following - 1, 0), int(bad[following].nonzero()[0])
    modules = samples.adapter.transformer.named_modules()
    with watched((name, module) for name, module in modules if not list(module.children())) as found:
        latent = latents[step, sample : sample + 1].to(samples.adapter.device)
        samples.part(slice(sample, sample + 1)).velocity(latent, step)
    layer = f"layer '{found[0]}' gives" if found else "the model's output has"
    prompt = samples.adapter.prompts[samples.prompts[sample]]
    raise UserError(
        f"step {step}: in full precision {layer} NaN or infinite activations for the prompt '{prompt}'; the checkpoint "
        "is damaged or not meant for this size or guidance; check it with diffusers, or leave the prompt out"
    )


def require_range(formats: Sequence[Format], layers: Sequence[str], largest: Tensor) -> None:
    """Refuse a plain 16-bit format that some layer's input overflows.

    Args:
        formats: the candidates.
        layers: module paths.
        largest: magnitude of their inputs, float32 [steps, layers].

    Raises:
        UnsupportedFormatError: names the layer, the step and the format.
    """
    for fmt in formats:
        if not fmt.activation.is_float:
            continue
        over = ~largest.to(plain_type(fmt.activation)).isfinite()
        if bool(over.any()):
            step, index = (int(i) for i in over.nonzero()[0])
            raise UnsupportedFormatError(
                f"layer '{layers[index]}': its inputs reach {float(largest[step, index]):.4g} at step {step}, which "
                f"format '{fmt.name}' cannot hold: its largest number is "
                f"{torch.finfo(plain_type(fmt.activation)).max:.5g}; leave it out of --formats, or take bf16"
            )


def require_finite_weight(layer: str, fmt: Format, weight: QuantizedWeight) -> None:
    """Refuse a plain format that a layer's weights overflow.

    Raises:
        UnsupportedFormatError: names the layer and the format.
    """
    if fmt.weight.is_float and not bool(weight.codes.isfinite().all()):
        raise UnsupportedFormatError(
            f"layer '{layer}': format '{fmt.name}' cannot hold its weights: its largest number is "
            f"{torch.finfo(plain_type(fmt.weight)).max:.5g}; leave it out of --formats, or take bf16"
        )


@contextmanager
def watched(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[list[str]]:
    """Names of those modules that gave outputs that are not finite, in the order of execution."""
    found: list[str] = []

    def watch(name: str, module: nn.Module):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, _inputs: tuple[object, ...], output: object) -> None:
            if isinstance(output, torch.Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
