"""diffusers' own Flux with few blocks of either kind and random weights, in the sizes that tests ask for."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn

from adatsq_trt.image import ImageShape
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.models.prompts import ClassEncoder


def make_tiny_flux(width: int, patches: int, head: int = 32, shift: float = 1.0, blocks: int = 1) -> FluxAdapter:
    """Ten classes and the empty one; the same weights at every call.

    Args:
        width: of prompts and pooled prompts.
        patches: in a row of the image.
        head: width of an attention head, of which there are two; an eighth for the text, the rest for both axes.
        shift: of the schedule.
        blocks: of either kind.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=blocks,
            num_single_layers=blocks,
            attention_head_dim=head,
            num_attention_heads=2,
            joint_attention_dim=width,
            pooled_projection_dim=width,
            guidance_embeds=False,
            axes_dims_rope=(head // 4, 3 * head // 8, 3 * head // 8),
        )
        encoder, scheduler = ClassEncoder(nn.Embedding(11, width)), FlowMatchEulerDiscreteScheduler(shift=shift)
        return FluxAdapter(transformer, encoder, scheduler, ImageShape(patches, channels=1))
