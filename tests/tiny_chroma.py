"""diffusers' own Chroma with few blocks of either kind and random weights."""

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel

from adatsq_trt.image import ImageShape
from adatsq_trt.models.chroma import ChromaAdapter
from adatsq_trt.models.prompts import StoredPrompts
from tests.tiny_checkpoints import LATENT_CHANNELS, T5_WIDTH, make_vae
from tests.tiny_pipeline import tokenizers

# Tokens of the prompts and of the empty one that are their own; all have as many as the longest.
LENGTHS = (9, 17, 12, 1)
TEXT_TOKENS = 17
PROMPTS = ("a red three", "seven", "a three and a green seven")


def make_transformer(blocks: int = 1, channels: int = LATENT_CHANNELS) -> ChromaTransformer2DModel:
    """As wide as its quantized layers need.

    Args:
        blocks: of either kind.
        channels: of a cell; a token is four of them.
    """
    return ChromaTransformer2DModel(
        patch_size=1,
        in_channels=4 * channels,
        num_layers=blocks,
        num_single_layers=blocks,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        axes_dims_rope=(8, 12, 12),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=2,
    )


def mask_of(length: int) -> torch.Tensor:
    """The pipeline's: of a text's own tokens, and of the first that fills it up."""
    return (torch.arange(TEXT_TOKENS) <= length).float()


def make_tiny_chroma(blocks: int = 1) -> ChromaAdapter:
    """Prompts of `LENGTHS` tokens beside images of 3 x 4; weights, exact in bfloat16, are the same at every call."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(len(LENGTHS), TEXT_TOKENS, T5_WIDTH, generator=generator).bfloat16().float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = make_transformer(blocks, channels=4)
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.copy_(parameter.bfloat16())
    encoder = StoredPrompts(PROMPTS, tokens, torch.stack([mask_of(length) for length in LENGTHS]))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return ChromaAdapter(transformer, encoder, scheduler, ImageShape(3, channels=4, columns=4))


def make_chroma_pipeline() -> ChromaPipeline:
    """Chroma in small: a T5 and Flux's VAE, and sigmas that depend on the size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, tokenizer = tokenizers()
        t5 = T5Config(vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=16, d_ff=T5_WIDTH, num_heads=2, num_layers=1)
        return ChromaPipeline(
            FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            make_vae(),
            T5EncoderModel(t5),
            tokenizer,
            make_transformer(),
        )
