"""FLUX.2: diffusers' Flux2Pipeline (dev), Flux2KleinPipeline and their Flux2Transformer2DModel."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from diffusers import Flux2Transformer2DModel
from pydantic import JsonValue
from torch import Tensor, nn

from adatsq_trt.errors import MismatchError
from adatsq_trt.models.adapter import AnySize, open_axes
from adatsq_trt.models.family import Family
from adatsq_trt.models.flux import POSITIONS, FluxAdapter, TabledTimesteps
from adatsq_trt.schedule import TRAIN_TIMESTEPS, Schedule, Spacing, Steps, make_schedule
from adatsq_trt.transformer_call import TransformerCall, forward_arguments

_AXES = 4  # of a position: picture, row, column, place in the text


class Flux2Adapter(FluxAdapter):
    """A FLUX.2 with a closed set of prompts, whose latents are tokens, as its pipelines pack them.

    All places of a text are seen, also those that the pipelines fill it up with.
    """

    model_class = Flux2Transformer2DModel
    text_width, pooled_width = "joint_attention_dim", None
    transformer: Flux2Transformer2DModel
    # Of all blocks the modulation is one. Projections in one matrix have one format: it is split behind its product.
    quantizable = re.compile(
        r"(transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out))"
    )
    float32_inputs = ("timestep", "guidance")

    def make_trace(self) -> nn.Module:
        """The transformer with constant rotations."""
        return Flux2Trace(self.transformer, self.image.grid, self.encoder.text_tokens)

    def any_size(self) -> AnySize:
        """The number of tokens, with their rotations, is left open."""
        (tokens,) = open_axes(tokens=self.latent_shape[0])
        module = Flux2AnySizeTrace(self.transformer, self.image.grid, self.encoder.text_tokens)
        return AnySize(module, {POSITIONS: module.rotations}, {POSITIONS: {1: tokens}, "hidden_states": {1: tokens}})

    def condition(self, tokens: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """Text tokens."""
        return {"encoder_hidden_states": tokens}

    def schedule(self, steps: Steps) -> Schedule:
        """FLUX.2's sigmas for this image size and number of steps.

        Raises:
            MismatchError: a list, where the shift depends on the number of steps.
        """
        tokens = self.latent_shape[0]
        if not isinstance(steps, Spacing):
            mu = dynamic_shift(tokens, steps)
            return make_schedule(self.scheduler, steps, tokens, mu=mu, leaves_flows=self.leaves_flows)
        if self.scheduler.config.get("use_dynamic_shifting"):
            raise MismatchError(
                f"--{steps.argument}: FLUX.2's shift depends on a number of steps, which its pipelines take beside a "
                "list; pass --steps, or save the pipeline with a scheduler of fixed shift (use_dynamic_shifting false)"
            )
        return make_schedule(self.scheduler, steps, tokens, leaves_flows=self.leaves_flows)

    def pipeline_call(self) -> TransformerCall:
        """Positions tell the size; those of the text count its places."""
        config = self.transformer.config
        inputs = ["hidden_states", "encoder_hidden_states", *(["guidance"] if config.guidance_embeds else [])]
        return TransformerCall(
            arguments=forward_arguments(Flux2Transformer2DModel),
            inputs={name: name for name in inputs},
            time="timestep",
            positions="img_ids",
            position_axes=_AXES,
            counted=("txt_ids",),
            settings={"in_channels": config.in_channels, "guidance_embeds": config.guidance_embeds},
        )


class Flux2Trace(nn.Module):
    """Flux2Transformer2DModel with constant rotations; time and scale of guidance stay float32 until embedded."""

    rotations: Tensor
    text_rotations: Tensor

    def __init__(self, transformer: Flux2Transformer2DModel, grid: tuple[int, int], text_tokens: int) -> None:
        """Wrap a transformer for images of `grid` (rows, columns) tokens and prompts of `text_tokens`."""
        super().__init__()
        self.transformer = transformer
        embedding = transformer.time_guidance_embed
        if not isinstance(embedding.time_proj, TabledTimesteps):
            embedding.time_proj = TabledTimesteps(embedding.time_proj)
        one, (rows, columns) = torch.zeros(1), (torch.arange(float(size)) for size in grid)
        places = {
            POSITIONS: torch.cartesian_prod(one, rows, columns, one),
            "text_rotations": torch.cartesian_prod(one, one, one, torch.arange(float(text_tokens))),
        }
        for name, ids in places.items():
            self.register_buffer(name, torch.stack(transformer.pos_embed(ids)), persistent=False)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """Predicted velocity, shape of `hidden_states`; `guidance` is for models with a guidance embedding."""
        return self._predict(self.rotations, hidden_states, encoder_hidden_states, timestep, guidance)

    def _predict(
        self, rotations: Tensor, latent: Tensor, condition: Tensor, timestep: Tensor, guidance: Tensor | None
    ) -> Tensor:
        """The same with cosines and sines of the image's positions, [2, tokens, width of a head]."""
        model = self.transformer
        image, text = model.x_embedder(latent), model.context_embedder(condition)
        embedded = self._embedded(timestep, guidance, image)
        own, of_text = model.double_stream_modulation_img(embedded), model.double_stream_modulation_txt(embedded)
        turns = torch.cat([self.text_rotations, rotations], dim=1).unbind()
        for block in model.transformer_blocks:
            text, image = block(image, text, own, of_text, turns)
        both, of_both = torch.cat([text, image], dim=1), model.single_stream_modulation(embedded)
        for block in model.single_transformer_blocks:
            both = block(both, None, of_both, turns)
        return model.proj_out(model.norm_out(both[:, text.shape[1] :], embedded))  # type: ignore[no-any-return]

    def _embedded(self, timestep: Tensor, guidance: Tensor | None, like: Tensor) -> Tensor:
        """Time and scale of guidance [B] → [B, width], of the type of `like`."""
        embedding = self.transformer.time_guidance_embed

        def waves(value: Tensor) -> Tensor:
            waves: Tensor = embedding.time_proj(value * TRAIN_TIMESTEPS)
            return waves.type_as(like)

        embedded: Tensor = embedding.timestep_embedder(waves(timestep))
        return embedded if guidance is None else embedded + embedding.guidance_embedder(waves(guidance))


class Flux2AnySizeTrace(Flux2Trace):
    """The same for images of any size: their rotations are an input."""

    def forward(  # type: ignore[override]
        self,
        rotations: Tensor,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predicted velocity; `rotations` [2, tokens, width of a head] of the image's positions."""
        return self._predict(rotations, hidden_states, encoder_hidden_states, timestep, guidance)


def dynamic_shift(tokens: int, steps: int) -> float:
    """FLUX.2's mu for a number of image tokens and of steps: measured at 10 and 200 steps, and linear between."""
    few, many = 1.89833333 + 8.73809524e-05 * tokens, 0.45666666 + 0.00016927 * tokens
    return many if tokens > 4300 else many + (many - few) * (steps - 200) / 190


class Flux2Family(Family):
    """Flux2Pipeline: guidance is an input of the transformer."""

    adapter, pipeline = Flux2Adapter, "Flux2Pipeline"
    packed, guided = True, False
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {"patch_size": 1, "guidance_embeds": True}

    def defaults(self, config: Mapping[str, JsonValue]) -> tuple[int, float]:
        """Of the pipeline."""
        return 50, 4.0

    def configured(self, options: Mapping[str, Any]) -> Self:
        """With the library that the processor of the pipeline's prompts needs, where it is one of images too."""
        part = options.get("tokenizer")
        if not part or part[1] != "PixtralProcessor":
            return self
        own = copy.copy(self)
        own.text_library = "torchvision"
        return own

    def lora_key(self, layer: str, part: str) -> str:
        """Names with dots have the one spelling that the converter does not take for kohya's.

        Raises:
            MismatchError: a layer that diffusers reads otherwise than its authors write it.
        """
        if not layer.startswith("diffusion_model."):
            return super().lora_key(layer, part)
        if ".final_layer.adaLN_modulation." in layer:
            raise MismatchError(
                f"--lora: '{layer}' makes a shift and then a scale, which diffusers reads in the other order; leave it "
                "out of the file, or call it as diffusers does, with its halves changed over (norm_out.linear)"
            )
        return f"{layer}.lora_{'A' if part == 'down' else 'B'}.weight"


class Flux2KleinFamily(Flux2Family):
    """Flux2KleinPipeline: two branches, or none where the pipeline says that its transformer is distilled."""

    pipeline, guided = "Flux2KleinPipeline", True
    transformer_options: ClassVar[Mapping[str, JsonValue]] = {"patch_size": 1, "guidance_embeds": False}

    def defaults(self, config: Mapping[str, JsonValue]) -> tuple[int, float]:
        """Of the pipeline, and of distilled transformers."""
        return (50, 4.0) if self.guided else (4, 1.0)

    def configured(self, options: Mapping[str, Any]) -> Self:
        """Without guidance where the pipeline has none."""
        own = copy.copy(self)
        own.guided = not options.get("is_distilled")
        return own
