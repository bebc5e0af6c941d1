"""LoRA files as trainers and tools name them.

Each maker gives a file's tensors, and what scale 1 adds to which weight, computed from alpha, rank and both matrices.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from adatsq_trt.models.families import families
from adatsq_trt.models.family import Family

_BY_NAME = {kind.pipeline: kind for kind in families()}
FLUX, Z_IMAGE, WAN = (_BY_NAME[name] for name in ("FluxPipeline", "ZImagePipeline", "WanPipeline"))
QWEN_IMAGE, STABLE_DIFFUSION_3 = (_BY_NAME[name] for name in ("QwenImagePipeline", "StableDiffusion3Pipeline"))
FLUX_2, FLUX_2_KLEIN = (_BY_NAME[name] for name in ("Flux2Pipeline", "Flux2KleinPipeline"))
CHROMA, LTX = (_BY_NAME[name] for name in ("ChromaPipeline", "LTXPipeline"))
HUNYUAN_VIDEO = _BY_NAME["HunyuanVideo15Pipeline"]
RANK, WIDTH = 4, 64
Tensors = dict[str, Tensor]


def matrices(seed: str, rows: int = WIDTH, columns: int = WIDTH, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """Down [rank, columns] and up [rows, rank], the same for the same name."""
    generator = torch.Generator().manual_seed(sum(seed.encode()))
    return torch.randn(rank, columns, generator=generator) * 0.1, torch.randn(rows, rank, generator=generator) * 0.1


def named(
    name: str, path: str, alpha: float | None = None, rank: int = RANK, **spelling: str
) -> tuple[Tensors, Tensors]:
    """One square layer under a trainer's name."""
    down, up = matrices(path, rank=rank)
    a, b = spelling.get("down", "lora_down.weight"), spelling.get("up", "lora_up.weight")
    tensors = {f"{name}.{a}": down, f"{name}.{b}": up}
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors, {f"{path}.weight": (1 if alpha is None else alpha / rank) * up @ down}


AB = {"down": "lora_A.weight", "up": "lora_B.weight"}


def merge(*parts: tuple[Tensors, Tensors]) -> tuple[Tensors, Tensors]:
    return {k: v for part in parts for k, v in part[0].items()}, {k: v for part in parts for k, v in part[1].items()}


def fused_qkv(name: str, paths: tuple[str, ...], alpha: float, **spelling: str) -> tuple[Tensors, Tensors]:
    """One product for three layers, as the authors' models have them."""
    down, up = matrices(name, rows=3 * WIDTH)
    a, b = spelling.get("down", "lora_down.weight"), spelling.get("up", "lora_up.weight")
    deltas = {f"{path}.weight": alpha / RANK * part @ down for path, part in zip(paths, up.split(WIDTH), strict=True)}
    return {f"{name}.{a}": down, f"{name}.{b}": up, f"{name}.alpha": torch.tensor(alpha)}, deltas


FLUX_QKV = tuple(f"transformer_blocks.0.attn.to_{part}" for part in "qkv")
Z_QKV = tuple(f"layers.0.attention.to_{part}" for part in "qkv")


def diffusers_with_alpha(alpha: float = 2.0) -> tuple[Tensors, Tensors]:
    first, second = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_k"
    # The second has no alpha, so that is its rank: the first one's is not to be taken for it.
    return merge(
        named(f"transformer.{first}", first, alpha, **AB), named(f"transformer.{second}", second, rank=2, **AB)
    )


def kohya_flux() -> tuple[Tensors, Tensors]:
    tensors, deltas = merge(
        fused_qkv("lora_unet_double_blocks_0_img_attn_qkv", FLUX_QKV, 2.0),
        named("lora_unet_double_blocks_0_img_attn_proj", FLUX_QKV[0].replace("to_q", "to_out.0"), 1.0),
    )
    down, up = matrices("text")
    text = {"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": down}
    text["lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"] = up
    return tensors | text, deltas


def kohya_flux_final_layer() -> tuple[Tensors, Tensors]:
    """Of these two diffusers drops alpha, and has no prefix. The halves of the modulation change places."""
    down, up = matrices("final", rows=2 * WIDTH)
    shift, scale = up.chunk(2)
    name = "lora_unet_final_layer_adaLN_modulation_1"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(8.0)}
    deltas = {"norm_out.linear.weight": 2.0 * torch.cat([scale, shift]) @ down}
    return merge((tensors, deltas), named("lora_unet_img_in", "x_embedder", 1.0))


def authors_flux_with_dots() -> tuple[Tensors, Tensors]:
    return fused_qkv("diffusion_model.double_blocks.0.img_attn.qkv", FLUX_QKV, 2.0, **AB)


def fal_flux() -> tuple[Tensors, Tensors]:
    return named("base_model.model.double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0", **AB)


def x_labs_flux() -> tuple[Tensors, Tensors]:
    down, up = matrices("x", rows=3 * WIDTH)
    name = "double_blocks.0.processor.qkv_lora1"
    deltas = {f"{path}.weight": part @ down for path, part in zip(FLUX_QKV, up.split(WIDTH), strict=True)}
    return {f"{name}.down.weight": down, f"{name}.up.weight": up}, deltas


def one_trainer_flux() -> tuple[Tensors, Tensors]:
    path = "transformer_blocks.0.attn.to_add_out"
    down, up = matrices("ff", rows=4 * WIDTH)
    name = "lora_transformer_transformer_blocks_0_ff_net_0_proj"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    deltas = {"transformer_blocks.0.ff.net.0.proj.weight": up @ down / RANK}
    return merge((tensors, deltas), named("lora_transformer_transformer_blocks_0_attn_to_add_out", path, 1.0))


def ai_toolkit_z_image() -> tuple[Tensors, Tensors]:
    return merge(*(named(f"diffusion_model.{path}", path, 1.0, **AB) for path in Z_QKV))


def comfy_z_image() -> tuple[Tensors, Tensors]:
    return merge(
        fused_qkv("diffusion_model.layers.0.attention.qkv", Z_QKV, 2.0, **AB),
        named("diffusion_model.layers.0.attention.out", "layers.0.attention.to_out.0", 2.0, **AB),
        named("diffusion_model.x_embedder", "all_x_embedder.2-1", 2.0, **AB),
    )


def musubi_z_image() -> tuple[Tensors, Tensors]:
    return merge(
        fused_qkv("lora_unet_layers_0_attention_qkv", Z_QKV, 2.0),
        named("lora_unet_context_refiner_0_attention_to_q", "context_refiner.0.attention.to_q", 1.0),
    )


WAN_Q = "blocks.0.attn1.to_q"


def comfy_wan() -> tuple[Tensors, Tensors]:
    return named("diffusion_model.blocks.0.self_attn.q", WAN_Q, 2.0)


def musubi_wan() -> tuple[Tensors, Tensors]:
    """Of two layers; diffusers wants all of a block."""
    return merge(
        named("lora_unet_blocks_0_self_attn_q", WAN_Q, 2.0),
        named("lora_unet_blocks_0_cross_attn_o", "blocks.0.attn2.to_out.0", 1.0),
    )


def diff_synth_wan() -> tuple[Tensors, Tensors]:
    spelling = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
    return named("blocks.0.self_attn.q", WAN_Q, **spelling)


def lightx2v_wan() -> tuple[Tensors, Tensors]:
    """Whole differences of biases, norms and modulations, which alpha has no part in. The norms change places."""
    tensors, deltas = named("diffusion_model.blocks.0.self_attn.q", WAN_Q, 2.0)
    others = {
        ("self_attn.q.diff_b", "attn1.to_q.bias"): (WIDTH,),
        ("self_attn.norm_q.diff", "attn1.norm_q.weight"): (WIDTH,),
        ("norm3.diff", "norm2.weight"): (WIDTH,),
        ("norm3.diff_b", "norm2.bias"): (WIDTH,),
        ("diff_m", "scale_shift_table"): (1, 6, WIDTH),
        ("ffn.2.diff", "ffn.net.2.weight"): (WIDTH, 2 * WIDTH),
    }
    for (theirs, ours), shape in others.items():
        difference = torch.randn(shape, generator=torch.Generator().manual_seed(len(theirs)))
        tensors[f"diffusion_model.blocks.0.{theirs}"], deltas[f"blocks.0.{ours}"] = difference, difference
    return tensors, deltas


QWEN_Q, QWEN_ADDED = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_k_proj"


def musubi_qwen_image() -> tuple[Tensors, Tensors]:
    """In one word each, also what lies outside of the blocks."""
    return merge(
        named("lora_unet_transformer_blocks_0_attn_to_q", QWEN_Q, 2.0),
        named("lora_unet_transformer_blocks_0_attn_add_k_proj", QWEN_ADDED, 1.0),
        named("lora_unet_img_in", "img_in", 1.0),
    )


def ai_toolkit_qwen_image() -> tuple[Tensors, Tensors]:
    return merge(*(named(f"diffusion_model.{path}", path, 1.0, **AB) for path in (QWEN_Q, QWEN_ADDED)))


def lightning_qwen_image() -> tuple[Tensors, Tensors]:
    """Without a prefix, with alpha."""
    return named(QWEN_Q, QWEN_Q, 2.0)


def diff_synth_qwen_image() -> tuple[Tensors, Tensors]:
    return named(QWEN_Q, QWEN_Q, down="lora_A.default.weight", up="lora_B.default.weight")


SD3_Q = "transformer_blocks.0.attn.to_q"


def peft_stable_diffusion_3() -> tuple[Tensors, Tensors]:
    """As diffusers' own training script saves it, with both attentions of a block."""
    second = "transformer_blocks.0.attn2.to_v"
    return merge(named(f"transformer.{SD3_Q}", SD3_Q, **AB), named(f"transformer.{second}", second, **AB))


def one_trainer_stable_diffusion_3() -> tuple[Tensors, Tensors]:
    return named("lora_transformer_transformer_blocks_0_attn_to_q", SD3_Q, 2.0)


FLUX_2_ADDED = tuple(f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv")


def single_flux_2(name: str, **spelling: str) -> tuple[Tensors, Tensors]:
    """Of a single block: attention's three layers and the feed-forward network's value and gate in one."""
    down, up = matrices(name, rows=9 * WIDTH)
    a, b = spelling.get("down", "lora_down.weight"), spelling.get("up", "lora_up.weight")
    deltas = {"single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight": up @ down}
    return {f"{name}.{a}": down, f"{name}.{b}": up}, deltas


def peft_flux_2() -> tuple[Tensors, Tensors]:
    layer = single_flux_2("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", **AB)
    return merge(layer, named(f"transformer.{FLUX_QKV[0]}", FLUX_QKV[0], **AB))


def ai_toolkit_flux_2() -> tuple[Tensors, Tensors]:
    """In the authors' names, with dots."""
    return merge(
        fused_qkv("diffusion_model.double_blocks.0.img_attn.qkv", FLUX_QKV, 2.0, **AB),
        named("diffusion_model.double_blocks.0.txt_attn.proj", "transformer_blocks.0.attn.to_add_out", 1.0, **AB),
        single_flux_2("diffusion_model.single_blocks.0.linear1", **AB),
    )


def kohya_flux_2() -> tuple[Tensors, Tensors]:
    return merge(
        fused_qkv("lora_unet_double_blocks_0_txt_attn_qkv", FLUX_2_ADDED, 2.0),
        single_flux_2("lora_unet_single_blocks_0_linear1"),
    )


def fal_flux_2_klein() -> tuple[Tensors, Tensors]:
    return named("base_model.model.double_blocks.0.img_attn.proj", "transformer_blocks.0.attn.to_out.0", **AB)


LTX_Q = "transformer_blocks.0.attn1.to_q"


def peft_ltx() -> tuple[Tensors, Tensors]:
    """As diffusers saves it, with both attentions of a block."""
    second = "transformer_blocks.0.attn2.to_out.0"
    return merge(named(f"transformer.{LTX_Q}", LTX_Q, **AB), named(f"transformer.{second}", second, **AB))


def comfy_ltx() -> tuple[Tensors, Tensors]:
    """As the authors' own trainer saves it."""
    return merge(
        *(named(f"diffusion_model.{path}", path, 2.0, **AB) for path in (LTX_Q, LTX_Q.replace("attn1", "attn2")))
    )


HUNYUAN_Q = "transformer_blocks.0.attn.to_q"


def peft_hunyuan_video() -> tuple[Tensors, Tensors]:
    """As the transformer's own loader in diffusers reads it; the pipeline has none."""
    added = "transformer_blocks.0.attn.add_k_proj"
    return merge(named(f"transformer.{HUNYUAN_Q}", HUNYUAN_Q, **AB), named(f"transformer.{added}", added, **AB))


READ: dict[str, tuple[Family, Callable[[], tuple[Tensors, Tensors]]]] = {
    "diffusers' names with alpha": (FLUX, diffusers_with_alpha),
    "kohya sd-scripts, Flux": (FLUX, kohya_flux),
    "kohya sd-scripts, Flux's last layer": (FLUX, kohya_flux_final_layer),
    "authors' names with dots (ComfyUI), Flux": (FLUX, authors_flux_with_dots),
    "fal's Kontext trainer": (FLUX, fal_flux),
    "x-flux (XLabs)": (FLUX, x_labs_flux),
    "OneTrainer, Flux": (FLUX, one_trainer_flux),
    "ai-toolkit, Z-Image": (Z_IMAGE, ai_toolkit_z_image),
    "ComfyUI, Z-Image": (Z_IMAGE, comfy_z_image),
    "musubi-tuner, Z-Image": (Z_IMAGE, musubi_z_image),
    "ComfyUI, Wan": (WAN, comfy_wan),
    "musubi-tuner, Wan": (WAN, musubi_wan),
    "DiffSynth-Studio, Wan": (WAN, diff_synth_wan),
    "lightx2v, Wan": (WAN, lightx2v_wan),
    "musubi-tuner, Qwen-Image": (QWEN_IMAGE, musubi_qwen_image),
    "ai-toolkit, Qwen-Image": (QWEN_IMAGE, ai_toolkit_qwen_image),
    "Qwen-Image-Lightning": (QWEN_IMAGE, lightning_qwen_image),
    "DiffSynth-Studio, Qwen-Image": (QWEN_IMAGE, diff_synth_qwen_image),
    "diffusers' names, Stable Diffusion 3.5": (STABLE_DIFFUSION_3, peft_stable_diffusion_3),
    "diffusers' names, HunyuanVideo-1.5": (HUNYUAN_VIDEO, peft_hunyuan_video),
    "OneTrainer, Stable Diffusion 3.5": (STABLE_DIFFUSION_3, one_trainer_stable_diffusion_3),
    "diffusers' names, FLUX.2": (FLUX_2, peft_flux_2),
    "ai-toolkit, FLUX.2": (FLUX_2, ai_toolkit_flux_2),
    "kohya sd-scripts, FLUX.2": (FLUX_2, kohya_flux_2),
    "fal's trainer, FLUX.2 klein": (FLUX_2_KLEIN, fal_flux_2_klein),
    "diffusers' names, Chroma": (CHROMA, diffusers_with_alpha),
    "kohya sd-scripts, Chroma": (CHROMA, kohya_flux),
    "authors' names with dots (ComfyUI), Chroma": (CHROMA, authors_flux_with_dots),
    "OneTrainer, Chroma": (CHROMA, one_trainer_flux),
    "diffusers' names, LTX-Video": (LTX, peft_ltx),
    "ComfyUI, LTX-Video": (LTX, comfy_ltx),
}
# Dialects that are also tested with pipelines which take an image and share a transformer with one of these.
SHOWN: tuple[tuple[str, Family], ...] = tuple(
    (dialect, _BY_NAME[pipeline])
    for dialect, pipeline in (
        ("fal's Kontext trainer", "FluxKontextPipeline"),
        ("kohya sd-scripts, Flux", "FluxFillPipeline"),
        ("musubi-tuner, Wan", "WanImageToVideoPipeline"),
        ("Qwen-Image-Lightning", "QwenImageEditPipeline"),
        ("ai-toolkit, Qwen-Image", "QwenImageEditPlusPipeline"),
    )
)
