"""diffusers' own Wan with two blocks and random weights."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

from adatsq_trt.image import ImageShape
from adatsq_trt.models.prompts import TextEncoder
from adatsq_trt.models.wan import WanAdapter
from tests.tiny_z_image import PROMPTS, WORDS


def make_tiny_wan(guidance_distilled: bool = False, shift: float = 3.0) -> WanAdapter:
    """Five prompts; videos of three latent frames; the same weights, exact in bfloat16, at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=128,
            num_layers=2,
            rope_max_seq_len=32,
        )
        encoder = TextEncoder(WORDS, PROMPTS, text_tokens=9, width=32)
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.copy_(parameter.bfloat16())
        scheduler, video = FlowMatchEulerDiscreteScheduler(shift=shift), ImageShape(4, channels=1, frames=3)
        return WanAdapter(transformer, encoder, scheduler, video, guidance_distilled)
