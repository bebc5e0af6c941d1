"""Pictures of a bundle beside those of full precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np

from adatsq_trt.engines.runtime import Bundle, Conditioning, Size


def draw_both(
    bundle: Bundle,
    noise: np.ndarray,
    conditioning: Conditioning,
    size: Size | None,
    progress: Callable[[str, int], AbstractContextManager[Callable[[], None]]],
) -> dict[str, np.ndarray]:
    """Draw the same samples as the policy has it and in full precision, each with the bundle's LoRAs.

    Args:
        bundle: open; nothing of it runs yet.
        noise: first latents, [samples, *latent_shape].
        conditioning: of every sample.
        size: in pixels, one of the bundle's; None for its own.
        progress: makes, of a title and a number of steps, a block that is told of each step.

    Returns:
        "quantized" and "full precision": float32 [samples, (frames,) height, width, channels] in [0, 1].
    """
    sheets = {}
    for name, quantized in (("quantized", True), ("full precision", False)):
        # One after the other: what draws the first gives its memory back.
        again = Bundle(bundle.files, bundle.choice.name, bundle.offload)
        with again as panel, progress(f"generate: {name}", bundle.policy.steps) as advance:
            for lora in bundle.loras:
                panel.add_lora(lora)
            latents = panel.denoise(noise, conditioning, callback=lambda _: advance(), quantized=quantized, size=size)
            sheets[name] = panel.decode(latents, size)
    return sheets
