"""diffusers' own HunyuanVideo-1.5 with two blocks and random weights."""

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from torch.nn import functional
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
)

from adatsq_trt.image import ImageShape
from adatsq_trt.models.hunyuan_video_15 import HunyuanVideo15Adapter
from adatsq_trt.models.prompts import StoredPrompts
from tests.tiny_qwen_image import make_tokenizer

# Tokens of the prompts, and of the empty one; and those of what they have in quotes.
LENGTHS, GLYPHS = (9, 33, 12, 5), (7, 0, 30, 0)
PROMPTS = ("a red three", "seven", "a three and a green seven")
TEXT_WIDTH, GLYPH_WIDTH, GLYPH_TOKENS = 32, 16, 64
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_transformer(layers: int = 2, channels: int = 4) -> HunyuanVideo15Transformer3DModel:
    """As wide as its quantized layers need.

    Args:
        layers: blocks.
        channels: of a cell.
    """
    return HunyuanVideo15Transformer3DModel(
        in_channels=2 * channels + 1,
        out_channels=channels,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=layers,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_WIDTH,
        text_embed_2_dim=GLYPH_WIDTH,
        image_embed_dim=8,
        rope_axes_dim=(8, 12, 12),
        task_type="t2v",
    )


def make_tiny_hunyuan_video(layers: int = 2) -> HunyuanVideo15Adapter:
    """Prompts of `LENGTHS` tokens, three frames of 3 x 4; weights, exact in bfloat16, are the same at every call."""
    generator = torch.Generator().manual_seed(2)

    def rows(lengths: tuple[int, ...], length: int, width: int) -> torch.Tensor:
        own = (torch.randn(count, width, generator=generator).bfloat16() for count in lengths)
        return torch.stack([functional.pad(row.float(), (0, 0, 0, length - len(row))) for row in own])

    texts, glyphs = rows(LENGTHS, max(LENGTHS), TEXT_WIDTH), rows(GLYPHS, GLYPH_TOKENS, GLYPH_WIDTH)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = make_transformer(layers)
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.copy_(parameter.bfloat16())
    encoder, video = (
        StoredPrompts(PROMPTS, texts, glyphs.flatten(1)),
        ImageShape(3, channels=4, patch_size=1, columns=4, frames=3),
    )
    return HunyuanVideo15Adapter(transformer, encoder, FlowMatchEulerDiscreteScheduler(shift=5.0), video)


def make_hunyuan_video_pipeline(layers: int = 1) -> HunyuanVideo15Pipeline:
    """HunyuanVideo-1.5 in small: the text half of a Qwen2.5-VL, a ByT5, and a VAE of 16 pixels to a cell.

    Args:
        layers: blocks of the transformer.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer, letters = _make_chat_tokenizer(), ByT5Tokenizer()
        vae = AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1, scaling_factor=1.03682
        )
        t5 = T5Config(vocab_size=len(letters), d_model=GLYPH_WIDTH, d_kv=8, d_ff=GLYPH_WIDTH, num_heads=2, num_layers=1)
        return HunyuanVideo15Pipeline(
            text_encoder=_make_language_model(tokenizer),
            tokenizer=tokenizer,
            transformer=make_transformer(layers),
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            text_encoder_2=T5EncoderModel(t5),
            tokenizer_2=letters,
            guider=ClassifierFreeGuidance(guidance_scale=4.0),
        )


def _make_language_model(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLTextModel:
    config = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2_5_VLTextModel(config)


def _make_chat_tokenizer() -> Qwen2Tokenizer:
    """One token for each word of what the pipeline says to the model before a prompt."""
    system = HunyuanVideo15Pipeline._get_mllm_prompt_embeds.__defaults__[2]
    tokenizer = make_tokenizer(f"system\n{system}\nuser\nassistant\n")
    tokenizer.add_tokens(" " * 7)  # what is before a prompt has 108 tokens, which the pipeline leaves out
    tokenizer.chat_template = _CHAT
    return tokenizer
