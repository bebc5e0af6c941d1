"""diffusers' own Qwen-Image-Edit with two blocks and random weights: a megapixel is 16 x 16 of its tokens."""

from importlib import util
from typing import TypeVar

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline, QwenImageEditPlusPipeline
from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor

from tests.tiny_qwen_image import make_language_model, make_scheduler, make_tokenizer, make_transformer

SIDE = 1024
CHANNELS = 16
PipelineT = TypeVar("PipelineT", QwenImageEditPipeline, QwenImageEditPlusPipeline)

if util.find_spec("torchvision") is None:
    # The double: the processor without its part for videos, which no pipeline here asks for anything. It needs
    # torchvision, of which there is no build for PyTorch without CUDA in the registry.
    Qwen2VLProcessor.get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])


def make_edit_pipeline() -> QwenImageEditPipeline:
    """Qwen-Image-Edit in small: a VAE whose cells have 32 pixels along a side, and a processor of few patches."""
    return _make(QwenImageEditPipeline)


def make_edit_plus_pipeline() -> QwenImageEditPlusPipeline:
    """The same parts in the pipeline for several images."""
    return _make(QwenImageEditPlusPipeline)


def _make(kind: type[PipelineT]) -> PipelineT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = make_tokenizer(QwenImageEditPipeline(*[None] * 6).prompt_template_encode)
        images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=84 * 84)
        vae = AutoencoderKLQwenImage(
            base_dim=2, z_dim=CHANNELS, dim_mult=[1] * 6, num_res_blocks=0, temperal_downsample=[False] * 5
        )
        with torch.no_grad():  # so that what is seen of an image is more than the biases
            for name, parameter in vae.encoder.named_parameters():
                parameter.mul_(0.0 if name.endswith("bias") else 2.0)
        return kind(
            make_scheduler(),
            vae.eval(),
            make_language_model(tokenizer).eval(),
            tokenizer,
            Qwen2VLProcessor(images, tokenizer),
            make_transformer(1, CHANNELS),
        )
