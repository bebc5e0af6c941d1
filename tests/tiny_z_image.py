"""diffusers' own Z-Image with one block of each kind and random weights."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

from adatsq_trt.image import ImageShape
from adatsq_trt.models.prompts import PromptEncoder, StoredPrompts, TextEncoder
from adatsq_trt.models.z_image import ZImageAdapter

WORDS = ("", "a", "red", "three", "and", "green", "seven")
PROMPTS = ("a red three", "seven", "a three and a green seven", "green", "a seven and a red three and a three")


# Tokens of the prompts, and of the empty one; a caption is filled up to a multiple of 32.
LENGTHS = (9, 33, 64, 12, 32, 5)


def make_tiny_z_image(guidance_distilled: bool = False, shift: float = 3.0) -> ZImageAdapter:
    """Five prompts of up to nine words; the same weights, exact in bfloat16, at every call.

    The width is the smallest at which every layer has a multiple of 64 inputs.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = TextEncoder(WORDS, PROMPTS, text_tokens=9, width=32)
    return _make(encoder, guidance_distilled, shift)


def make_z_image_of_several_lengths() -> ZImageAdapter:
    """The same with encodings of `LENGTHS` tokens, exact in bfloat16."""
    generator, tokens = torch.Generator().manual_seed(2), torch.zeros(len(LENGTHS), max(LENGTHS), 32)
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[:length] = torch.randn(length, 32, generator=generator).bfloat16()
    return _make(StoredPrompts(PROMPTS, tokens, torch.zeros(len(LENGTHS), 0)), False, 3.0)


def _make(encoder: PromptEncoder, guidance_distilled: bool, shift: float) -> ZImageAdapter:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=192,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=6,
            n_kv_heads=6,
            cap_feat_dim=32,
            axes_dims=[8, 12, 12],
            axes_lens=[128 if encoder.text_tokens > 32 else 64, 16, 16],
        )
        with torch.no_grad():
            transformer.x_pad_token.normal_()
            transformer.cap_pad_token.normal_()
            for parameter in transformer.parameters():
                parameter.copy_(parameter.bfloat16())
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        return ZImageAdapter(transformer, encoder, scheduler, ImageShape(8, channels=1), guidance_distilled)
