"""diffusers' own FLUX.2 with one block of either kind and random weights."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from adatsq_trt.image import ImageShape
from adatsq_trt.models.flux_2 import Flux2Adapter
from adatsq_trt.models.prompts import TextEncoder
from tests.tiny_pipeline import tokenizers
from tests.tiny_z_image import PROMPTS, WORDS

CHANNELS = 16  # of the VAE's latent; a token has four cells
TEXT_WIDTH = 16  # of a text encoder, of which three layers are side by side


def make_transformer(
    channels: int = CHANNELS, width: int = 3 * TEXT_WIDTH, guidance_embeds: bool = True
) -> Flux2Transformer2DModel:
    """Every quantizable layer has a multiple of 64 inputs.

    Args:
        channels: of a cell.
        width: of a text token.
        guidance_embeds: whether the scale of guidance is an input.
    """
    return Flux2Transformer2DModel(
        in_channels=4 * channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=width,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=guidance_embeds,
    )


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """As FLUX.2's pipelines have it: the pipeline says how far the sigmas are shifted."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def make_tiny_flux_2(guidance_embeds: bool = True) -> Flux2Adapter:
    """Prompts of nine tokens beside images of 3 x 4; weights, exact in bfloat16, are the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = make_transformer(channels=1, width=32, guidance_embeds=guidance_embeds)
        encoder = TextEncoder(WORDS, PROMPTS, text_tokens=9, width=32)
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.copy_(parameter.bfloat16())
    image = ImageShape(3, channels=1, columns=4)
    return Flux2Adapter(transformer, encoder, make_scheduler(), image, guidance_distilled=guidance_embeds)


def make_flux_2_pipeline() -> Flux2Pipeline:
    """FLUX.2 dev in small, with a Mistral3 and its eyes, but no processor of images: that one needs torchvision."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Texts of messages are in lists beside images.
        tokenizer = _make_tokenizer("{% for part in message['content'] %}{{ part['text'] }} {% endfor %}")
        text = {"model_type": "mistral", "head_dim": 8, **_language(tokenizer, layers=30)}
        vision = {**_WIDTHS, "model_type": "pixtral", "num_hidden_layers": 1, "head_dim": 8, "image_size": 28}
        encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
        return Flux2Pipeline(make_scheduler(), _make_vae(), encoder, tokenizer, make_transformer())


def make_klein_pipeline(is_distilled: bool = False) -> Flux2KleinPipeline:
    """FLUX.2 klein in small, with a Qwen3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = _make_tokenizer("{{ message['content'] }}")
        encoder = Qwen3ForCausalLM(Qwen3Config(head_dim=8, **_language(tokenizer, layers=27)))
        transformer = make_transformer(guidance_embeds=False)
        return Flux2KleinPipeline(make_scheduler(), _make_vae(), encoder, tokenizer, transformer, is_distilled)


make_distilled_klein_pipeline = partial(make_klein_pipeline, is_distilled=True)


def tokens_of_klein(pipe: Flux2KleinPipeline, latents: Tensor) -> Tensor:
    """What the loop ends with, [B, tokens, channels], of what klein's pipeline returns: planes in the VAE's numbers."""
    statistics = pipe.vae.bn
    mean, variance = (x.view(1, -1, 1, 1) for x in (statistics.running_mean, statistics.running_var))
    planes = (pipe._patchify_latents(latents) - mean) / (variance + statistics.eps).sqrt()
    tokens: Tensor = pipe._pack_latents(planes)
    return tokens


_WIDTHS = {"hidden_size": TEXT_WIDTH, "intermediate_size": TEXT_WIDTH, "num_attention_heads": 2}


def _language(tokenizer: PreTrainedTokenizerFast, layers: int) -> dict[str, Any]:
    """As many layers as the pipeline reads from."""
    return {**_WIDTHS, "vocab_size": len(tokenizer), "num_hidden_layers": layers, "num_key_value_heads": 1}


def _make_tokenizer(content: str) -> PreTrainedTokenizerFast:
    """One token for each word, and a chat template that writes the content of each message as this one does."""
    clip, _ = tokenizers()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=clip.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = f"{{% for message in messages %}}{content}{{% endfor %}}"
    return tokenizer


def _make_vae() -> AutoencoderKLFlux2:
    """Of 8 pixels to a cell, with statistics of its latents that are not those of unit normal ones."""
    vae = AutoencoderKLFlux2(
        latent_channels=CHANNELS,
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae
