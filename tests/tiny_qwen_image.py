"""diffusers' own Qwen-Image with two blocks and random weights."""

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from adatsq_trt.image import ImageShape
from adatsq_trt.models.prompts import StoredPrompts
from adatsq_trt.models.qwen_image import QwenImageAdapter
from tests.tiny_pipeline import WORDS

# Tokens of the prompts, and of the empty one.
LENGTHS = (9, 33, 12, 5)
MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
PROMPTS = ("a red three", "seven", "a three and a green seven")


def make_transformer(layers: int = 2, channels: int = 4, width: int = 32) -> QwenImageTransformer2DModel:
    """As wide as its quantized layers need.

    Args:
        layers: blocks.
        channels: of a cell; a token is four of them.
        width: of a text token.
    """
    return QwenImageTransformer2DModel(
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=width,
        axes_dims_rope=(8, 12, 12),
    )


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """As Qwen-Image's own pipeline has it."""
    return FlowMatchEulerDiscreteScheduler(
        shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )


def make_tiny_qwen_image(layers: int = 2) -> QwenImageAdapter:
    """Prompts of `LENGTHS` tokens beside images of 3 x 4; weights, exact in bfloat16, are the same at every call."""
    generator, tokens = torch.Generator().manual_seed(2), torch.zeros(len(LENGTHS), max(LENGTHS), 32)
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[:length] = torch.randn(length, 32, generator=generator).bfloat16()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = make_transformer(layers)
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.copy_(parameter.bfloat16())
    scheduler = make_scheduler()
    encoder = StoredPrompts(PROMPTS, tokens, torch.zeros(len(LENGTHS), 0))
    return QwenImageAdapter(transformer, encoder, scheduler, ImageShape(3, channels=4, columns=4))


def make_qwen_image_pipeline(layers: int = 1, channels: int = 16) -> QwenImagePipeline:
    """Qwen-Image in small: a Qwen2.5-VL with its eyes, a VAE of videos, and the scheduler that the pipeline comes with.

    Args:
        layers: blocks of the transformer.
        channels: of the VAE's latent.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = make_tokenizer(QwenImagePipeline(None, None, None, None, None).prompt_template_encode)
        vae = AutoencoderKLQwenImage(base_dim=4, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        transformer = make_transformer(layers, channels)
        return QwenImagePipeline(make_scheduler(), vae, make_language_model(tokenizer), tokenizer, transformer)


def make_language_model(tokenizer: Qwen2Tokenizer, width: int = 32) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL with its eyes, whose marks of an image are the tokenizer's."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "depth": 1,
        "hidden_size": width,
        "intermediate_size": width,
        "num_heads": 2,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }
    marks = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (("image", "image_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks))


def make_tokenizer(template: str) -> Qwen2Tokenizer:
    """One token for each word of the pipeline's own template and of `WORDS`, one for each byte of others.

    So the template has as many tokens as those of which the pipeline leaves out what comes before the prompt.

    Args:
        template: of the pipeline.
    """
    pieces = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str(f"{template} {' '.join(WORDS)}")
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    merges: dict[tuple[str, str], None] = {}
    # Words after a space first: their merges begin with it, so that none applies within a word.
    for piece in sorted(dict.fromkeys(piece for piece, _ in pieces), key=lambda piece: not piece.startswith("\u0120")):
        for end in range(1, len(piece)):
            merges[piece[:end], piece[end]] = None
            vocabulary.setdefault(piece[: end + 1], len(vocabulary))
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=list(merges), extra_special_tokens=list(MARKS))
    return tokenizer
