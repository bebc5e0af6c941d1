"""diffusers' own Stable Diffusion 3.5 with two blocks and random weights."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from adatsq_trt.image import ImageShape
from adatsq_trt.models.prompts import TextEncoder
from adatsq_trt.models.stable_diffusion_3 import StableDiffusion3Adapter
from tests.tiny_checkpoints import LATENT_CHANNELS, make_vae
from tests.tiny_pipeline import tokenizers
from tests.tiny_z_image import PROMPTS, WORDS

WIDTH = 32


def make_transformer(channels: int = 4) -> SD3Transformer2DModel:
    """As Medium: normed queries and keys, a second attention in the first block; images of up to 12 x 12 tokens."""
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def make_tiny_stable_diffusion_3() -> StableDiffusion3Adapter:
    """Five prompts beside images of 3 x 4 tokens; weights, exact in bfloat16, are the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = make_transformer()
        encoder = TextEncoder(WORDS, PROMPTS, text_tokens=9, width=WIDTH)
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.copy_(parameter.bfloat16())
    scheduler, image = FlowMatchEulerDiscreteScheduler(shift=3.0), ImageShape(6, 4, patch_size=1, columns=8)
    return StableDiffusion3Adapter(transformer, encoder, scheduler, image)


def make_stable_diffusion_3_pipeline() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 in small, with two CLIPs and a T5."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip_tokenizer, t5_tokenizer = tokenizers()
        t5 = T5Config(vocab_size=len(t5_tokenizer), d_model=WIDTH, d_kv=16, d_ff=WIDTH, num_heads=2, num_layers=1)
        return StableDiffusion3Pipeline(
            make_transformer(LATENT_CHANNELS),
            FlowMatchEulerDiscreteScheduler(shift=3.0),
            make_vae(),
            _make_clip(clip_tokenizer),
            clip_tokenizer,
            _make_clip(clip_tokenizer),
            clip_tokenizer,
            T5EncoderModel(t5),
            t5_tokenizer,
        )


def _make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """One of two that are together as wide as T5."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH // 2,
        projection_dim=WIDTH // 2,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config)
