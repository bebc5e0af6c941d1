"""Bring an architecture of your own: an adapter of its transformer, the facts of its pipeline, and one line.

python examples/new_architecture.py
"""

import re
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional

import adatsq_trt

# ------------------------------------------------------------------------------ the architecture, with random weights


class LetterTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Every cell of a latent is a token, steered by the letters of a text."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, in_channels: int = 4, width: int = 64, depth: int = 2, text_dim: int = 32) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(in_channels, width), nn.Linear(1, width)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, 4, width // 4, cross_attention_dim=text_dim, activation_fn="gelu")
            for _ in range(depth)
        )
        self.out = nn.Linear(width, in_channels)

    def forward(self, latents: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        """Velocity of latents [B, C, H, W], for a text [B, T, width of a letter] and times [B] from 1 to 0."""
        tokens = self.embed(latents.flatten(2).mT) + self.time(timestep[:, None])[:, None]
        for block in self.blocks:
            tokens = block(tokens, encoder_hidden_states=text)
        return self.out(tokens).mT.unflatten(2, latents.shape[2:])  # type: ignore[no-any-return]


class LetterPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Pipeline of the parts that belong together; letters need no text encoder."""

    def __init__(self, transformer: ModelMixin, scheduler: Any, vae: ModelMixin) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)


# -------------------------------------------------------------------------------------------------- what is known of it


class LetterAdapter(adatsq_trt.PromptedAdapter):
    """The transformer is its own trace: it takes tensors of fixed shapes and returns the velocity."""

    model_class = LetterTransformer
    text_width = "text_dim"
    quantizable = re.compile(r"blocks\.\d+\.(attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2))")
    block_lists = ("blocks",)
    float32_inputs = ("timestep",)

    def find_latent_shape(self) -> tuple[int, ...]:
        """(channels, rows, columns)."""
        return (self.transformer.config.in_channels, *self.image.grid)

    def make_trace(self) -> nn.Module:
        """The transformer itself."""
        return self.transformer  # type: ignore[no-any-return]

    def condition(self, tokens: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """The letters."""
        return {"text": tokens}

    def model_inputs(self, latent: Tensor, model_time: float, condition: Any, guidance: float) -> dict[str, Tensor]:
        """In the order of `forward`."""
        return {"latents": latent, **condition, "timestep": torch.full((len(latent),), model_time)}

    def schedule(self, steps: Any) -> Any:
        """The scheduler's own."""
        return adatsq_trt.make_schedule(self.scheduler, steps)


class LetterFamily(adatsq_trt.Family):
    """Without text encoders, and with one latent cell to a token."""

    adapter, pipeline = LetterAdapter, "LetterPipeline"
    encoders, text_tokens, token_multiple, patch = (), 32, 32, 1
    canvas = adatsq_trt.Canvas(64, 64)

    def defaults(self, config: Any) -> tuple[int, float]:
        """Steps and guidance."""
        return 4, 2.0

    def encode(self, pipe: Any, prompt: str) -> tuple[Tensor, Tensor]:
        """A row for the beginning, and one for each letter."""
        text = f"@{prompt}"[: self.text_tokens]
        rows = functional.one_hot(torch.tensor([ord(letter) % 32 for letter in text]), 32).float()
        return rows, rows.new_empty(0)


# ------------------------------------------------------------------------------------------------------------ the use


def make_pipeline() -> LetterPipeline:
    """As a trained one would be loaded with `from_pretrained`."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    return LetterPipeline(LetterTransformer().eval(), FlowMatchEulerDiscreteScheduler(shift=3.0), vae)


def main(**options: Any) -> adatsq_trt.Bundle:
    """Build it for this machine's processor."""
    adatsq_trt.register_family(LetterFamily())
    bundle = adatsq_trt.build(make_pipeline(), target="cpu", prompts=("a cat", "two dogs"), **options)
    assert bundle.summary is not None
    print(f"{bundle.summary.mean_bits:.2f} mean bits, latent MSE {bundle.summary.final_error:.1e}")
    return bundle


if __name__ == "__main__":
    main(calibration_samples=8, selection_samples=16, held_out_samples=32)
