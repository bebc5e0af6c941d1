"""Pipelines as users have them: diffusers' and transformers' own classes with random weights, saved by themselves."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from adatsq_trt.files import read_tensors, write_tensors
from tests.tiny_pipeline import tokenizers

# Of a picture in pixels, not square; a token is 16 x 16 pixels.
HEIGHT, WIDTH = 64, 48
T5_WIDTH, CLIP_WIDTH, LATENT_CHANNELS = 32, 48, 16


def make_vae() -> AutoencoderKL:
    """Of 16 channels and 8 pixels to a cell, as Flux and Z-Image have it."""
    return AutoencoderKL(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        layers_per_block=1,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def make_flux_transformer(guidance_embeds: bool = True, image_channels: int = 0) -> FluxTransformer2DModel:
    """One block of either kind; an image may have further channels of a token."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS + image_channels,
        out_channels=4 * LATENT_CHANNELS if image_channels else None,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(8, 12, 12),
    )


def make_flux_pipeline(guidance_embeds: bool = True) -> FluxPipeline:
    """Flux dev in small: a VAE with Flux's 16 channels and factor 8, CLIP and T5, sigmas that depend on the size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip_tokenizer, t5_tokenizer = tokenizers()
        clip = CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=CLIP_WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
        )
        t5 = T5Config(vocab_size=len(t5_tokenizer), d_model=T5_WIDTH, d_kv=16, d_ff=T5_WIDTH, num_heads=2, num_layers=1)
        return FluxPipeline(
            FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            make_vae(),
            CLIPTextModel(clip),
            clip_tokenizer,
            T5EncoderModel(t5),
            t5_tokenizer,
            make_flux_transformer(guidance_embeds),
        )


def make_kontext_pipeline() -> FluxKontextPipeline:
    """Flux Kontext in small."""
    return FluxKontextPipeline(**_flux_parts())


def make_fill_pipeline() -> FluxFillPipeline:
    """Flux Fill in small: a token has 64 channels of noise, 64 of an image and 256 of a mask."""
    parts = _flux_parts()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return FluxFillPipeline(**{**parts, "transformer": make_flux_transformer(image_channels=320)})


def _flux_parts() -> dict[str, Any]:
    return {name: part for name, part in make_flux_pipeline().components.items() if part is not None}


def make_z_image_pipeline(heads: int = 2) -> ZImagePipeline:
    """Z-Image in small, with a Qwen3 and a chat template; six heads make all layers multiples of 64 wide."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip, _ = tokenizers()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=clip.backend_tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
        )
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        language_model = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=T5_WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
        transformer = ZImageTransformer2DModel(
            in_channels=LATENT_CHANNELS,
            dim=32 * heads,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=heads,
            n_kv_heads=heads,
            cap_feat_dim=T5_WIDTH,
            axes_dims=[8, 12, 12],
            axes_lens=[256, 16, 16],
        )
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            torch.nn.init.normal_(token)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return ZImagePipeline(scheduler, make_vae(), Qwen3Model(language_model), tokenizer, transformer)


def make_wan_pipeline() -> WanPipeline:
    """Wan 2.1 in small, with a UMT5 and the scheduler that Wan's pipelines come with."""
    return WanPipeline(**_wan_parts())


def make_wan_image_pipeline(embedded: bool = True) -> WanImageToVideoPipeline:
    """Wan 2.1's image to video in small; without CLIP's embedding of the image it is as Wan 2.2's transformers."""
    image: dict[str, Any] = {"in_channels": 2 * LATENT_CHANNELS + 4}
    if not embedded:
        return WanImageToVideoPipeline(**_wan_parts(**image))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=30,
            patch_size=10,
        )
        encoder = CLIPVisionModel(config).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    parts = _wan_parts(**image, image_dim=32, added_kv_proj_dim=64)
    return WanImageToVideoPipeline(**parts, image_encoder=encoder, image_processor=processor)


def _wan_parts(**transformer_options: Any) -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, tokenizer = tokenizers()
        tokenizer.model_max_length = 512
        umt5 = UMT5Config(
            vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=16, d_ff=T5_WIDTH, num_heads=2, num_layers=1
        )
        vae = AutoencoderKLWan(base_dim=4, z_dim=LATENT_CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        options = {"in_channels": LATENT_CHANNELS, **transformer_options}
        transformer = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            out_channels=LATENT_CHANNELS,
            text_dim=T5_WIDTH,
            freq_dim=32,
            ffn_dim=128,
            num_layers=1,
            rope_max_seq_len=32,
            **options,
        )
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        )
        parts = {"tokenizer": tokenizer, "text_encoder": UMT5EncoderModel(umt5), "vae": vae}
        return {**parts, "scheduler": scheduler, "transformer": transformer}


def save_lora(file: Path, seed: int = 0, width: int = 64, rank: int = 4) -> Path:
    """Low-rank changes of three layers, named as diffusers saves them."""
    generator = torch.Generator().manual_seed(seed)
    layers = (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_out.0",
        "single_transformer_blocks.0.attn.to_k",
    )
    tensors = {}
    for layer in layers:
        for part, shape in (("A", (rank, width)), ("B", (width, rank))):
            tensors[f"transformer.{layer}.lora_{part}.weight"] = torch.randn(shape, generator=generator) * 0.1
    write_tensors(file, tensors)
    return file


def shard(folder: Path, count: int = 3) -> list[Path]:
    """Spread a component's weights over several files with an index, as large models are saved."""
    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors, parts = read_tensors(whole), []
    for index in range(count):
        file = folder / f"diffusion_pytorch_model-{index + 1:05d}-of-{count:05d}.safetensors"
        write_tensors(file, {name: tensors[name] for name in sorted(tensors)[index::count]})
        parts.append(file)
    where = {name: parts[i % count].name for i, name in enumerate(sorted(tensors))}
    size = sum(value.nbytes for value in tensors.values())
    index_file = folder / f"{whole.name}.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}))
    del tensors
    whole.unlink()
    return parts
