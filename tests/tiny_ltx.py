"""diffusers' own LTX-Video with two blocks and random weights."""

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from transformers import T5Config, T5EncoderModel

from adatsq_trt.image import ImageShape
from adatsq_trt.models.ltx import LTXAdapter
from adatsq_trt.models.prompts import StoredPrompts
from tests.tiny_checkpoints import T5_WIDTH
from tests.tiny_pipeline import tokenizers

# Of a video in pixels; a token is 32 x 32 pixels, and of all frames but the first eight at a time.
HEIGHT, WIDTH, FRAMES = 96, 64, 9
LENGTHS = (9, 17, 12, 1)
TEXT_TOKENS = 17
PROMPTS = ("a red three", "seven", "a three and a green seven")
CHANNELS = 16


def make_transformer(layers: int = 2, channels: int = CHANNELS) -> LTXVideoTransformer3DModel:
    """As wide as its quantized layers need; as in LTX-Video, a width that is no multiple of 6 pads the rotations."""
    return LTXVideoTransformer3DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        num_layers=layers,
        caption_channels=T5_WIDTH,
    )


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """As LTX-Video's own pipeline has it."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )


def make_tiny_ltx(layers: int = 2) -> LTXAdapter:
    """Prompts of `LENGTHS` tokens beside videos of 2 x 3 x 2; the same weights, exact in bfloat16, at every call."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(len(LENGTHS), TEXT_TOKENS, T5_WIDTH, generator=generator).bfloat16().float()
    masks = torch.stack([(torch.arange(TEXT_TOKENS) < length).float() for length in LENGTHS])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = make_transformer(layers)
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.copy_(parameter.bfloat16())
    video = ImageShape(3, CHANNELS, patch_size=1, columns=2, frames=2)
    return LTXAdapter(transformer, StoredPrompts(PROMPTS, tokens, masks), make_scheduler(), video)


def make_vae(timestep_conditioning: bool = False) -> AutoencoderKLLTXVideo:
    """Of 32 pixels and 8 frames to a cell; its latents have a mean and a deviation of their own."""
    vae = AutoencoderKLLTXVideo(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        timestep_conditioning=timestep_conditioning,
        scaling_factor=0.8,
    )
    vae.latents_mean.normal_(std=0.1)
    vae.latents_std.uniform_(0.5, 2.0)
    return vae


def make_ltx_pipeline(timestep_conditioning: bool = False) -> LTXPipeline:
    """LTX-Video in small, with a T5."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, tokenizer = tokenizers()
        tokenizer.model_max_length = 128
        t5 = T5Config(vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=16, d_ff=T5_WIDTH, num_heads=2, num_layers=1)
        vae = make_vae(timestep_conditioning)
        return LTXPipeline(make_scheduler(), vae, T5EncoderModel(t5), tokenizer, make_transformer(layers=1))
