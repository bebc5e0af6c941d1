"""Load a model of the zoo: a folder in diffusers' layout with a class embedding beside the transformer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn

from adatsq_trt.files import read_json_model, read_tensors, sha256
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.zoo import ZooIndex, find_model

TRANSFORMER_WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class LoadedModel:
    """A model and what a run needs to know of it.

    Attributes:
        name: what the user called it.
        folder: where it lies.
        adapter: the model.
        weights_sha256: hash of the transformer's weight file.
        default_steps: denoising steps when none are asked for.
        default_guidance: guidance scale when none is asked for.
    """

    name: str
    folder: Path
    adapter: FluxAdapter
    weights_sha256: str
    default_steps: int
    default_guidance: float


def load_model(name: str) -> LoadedModel:
    """Load a zoo model in float32.

    Raises:
        UnknownNameError: no such model.
        DamagedFileError: one of its files is truncated or altered.
    """
    folder = find_model(name)
    index = read_json_model(folder / "model_index.json", ZooIndex)
    read_tensors(folder / TRANSFORMER_WEIGHTS)  # says clearly when the file is truncated
    table = read_tensors(folder / "class_embedding" / "model.safetensors")["weight"].float()
    transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    adapter = FluxAdapter(transformer, nn.Embedding.from_pretrained(table), scheduler, index.image_size)
    adapter.transformer.requires_grad_(False)
    return LoadedModel(
        name, folder, adapter, sha256(folder / TRANSFORMER_WEIGHTS), index.default_steps, index.default_guidance
    )
