"""`shapes-flux`: a small Flux that nothing was tuned on, of other widths than `digits-flux` and on other data.

Ten kinds of shapes of 8 x 8 pixels, drawn by formulas at random places, sizes and contrasts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn

from adatsq_trt.image import ImageShape
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.models.prompts import ClassEncoder
from examples.zoo import train_digits_flux as digits

NAME = "shapes-flux"
WIDTH, IMAGES, ITERATIONS = 40, 4000, 1000


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [N, 8, 8, 1] in [0, 1] and their kinds [N]."""
    kinds = torch.arange(count) % digits.CLASSES
    place, extra = (
        torch.rand(2, count, 1, 1, generator=generator) * 4 + 1.5,
        torch.rand(count, 1, 1, generator=generator),
    )
    size, contrast = 0.7 + 0.8 * extra, 0.5 + 0.5 * torch.rand(count, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    down, right = y - place[0], x - place[1]
    radius = (down.square() + right.square()).sqrt()
    distances = [
        down.abs(),  # a bar that lies
        right.abs(),  # one that stands
        (down - right).abs() / 1.4,  # one that falls
        (down + right).abs() / 1.4,  # one that rises
        radius,  # a disc
        (radius - 2).abs(),  # a ring
        torch.maximum(down.abs(), right.abs()),  # a square
        torch.minimum(down.abs(), right.abs()),  # a cross
        (torch.maximum(down.abs(), right.abs()) - 2).abs(),  # a frame
        torch.minimum(radius, ((y - 7 + place[0]).square() + (x - 7 + place[1]).square()).sqrt()),  # two discs
    ]
    chosen = torch.stack([distance.expand(count, 8, 8) for distance in distances])[kinds, torch.arange(count)]
    return (contrast * torch.sigmoid(4 * (size - chosen)))[..., None], kinds


def make_adapter() -> FluxAdapter:
    """Untrained."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=24,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 8, 8),
    )
    encoder = ClassEncoder(nn.Embedding(digits.CLASSES + 1, WIDTH))
    return FluxAdapter(transformer, encoder, FlowMatchEulerDiscreteScheduler(), ImageShape(4, channels=1))


def train_once(folder: Path) -> None:
    """Train it, unless it is there."""
    if (folder / "model_index.json").is_file():
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    adapter = make_adapter()
    images, kinds = draw(IMAGES, torch.Generator().manual_seed(0))
    digits.train(adapter, images, kinds, ITERATIONS)
    digits.save(adapter, folder)
