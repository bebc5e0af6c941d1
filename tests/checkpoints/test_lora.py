"""LoRA files in the dialects of many trainers: W + scale · alpha / rank · B A, or a refusal that names the tensor."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    ChromaPipeline,
    Flux2KleinPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideo15Pipeline,
    LTXPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
    ZImagePipeline,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from adatsq_trt.checkpoints.lora import Lora, fuse
from adatsq_trt.checkpoints.lora_file import read_changes
from adatsq_trt.errors import UserError
from adatsq_trt.files import read_tensors
from adatsq_trt.models import stored
from adatsq_trt.models.families import families
from adatsq_trt.models.family import Family
from tests.lora_dialects import (
    AB,
    CHROMA,
    FLUX,
    FLUX_2,
    FLUX_2_KLEIN,
    FLUX_QKV,
    HUNYUAN_Q,
    HUNYUAN_VIDEO,
    LTX,
    LTX_Q,
    QWEN_IMAGE,
    QWEN_Q,
    RANK,
    READ,
    SD3_Q,
    SHOWN,
    STABLE_DIFFUSION_3,
    WAN,
    WAN_Q,
    Z_IMAGE,
    Z_QKV,
    Tensors,
    ai_toolkit_z_image,
    comfy_wan,
    fal_flux,
    fused_qkv,
    kohya_flux,
    matrices,
    merge,
    named,
)

PIPELINES = {
    FLUX: FluxPipeline,
    Z_IMAGE: ZImagePipeline,
    WAN: WanPipeline,
    QWEN_IMAGE: QwenImagePipeline,
    STABLE_DIFFUSION_3: StableDiffusion3Pipeline,
    FLUX_2_KLEIN: Flux2KleinPipeline,
    CHROMA: ChromaPipeline,
    LTX: LTXPipeline,
    HUNYUAN_VIDEO: HunyuanVideo15Pipeline,
}
SCALE = 0.7


@pytest.fixture
def saved(request: pytest.FixtureRequest) -> Callable[[Family], Path]:
    """The folder of a tiny pipeline."""
    names = {
        FLUX: "saved_flux",
        Z_IMAGE: "saved_z_image",
        WAN: "saved_wan",
        QWEN_IMAGE: "saved_qwen_image",
        STABLE_DIFFUSION_3: "saved_stable_diffusion_3",
        FLUX_2: "saved_flux_2",
        FLUX_2_KLEIN: "saved_flux_2_klein",
        CHROMA: "saved_chroma",
        LTX: "saved_ltx",
        HUNYUAN_VIDEO: "saved_hunyuan_video",
    }
    shown = {
        "FluxKontextPipeline": "saved_kontext",
        "FluxFillPipeline": "saved_fill",
        "WanImageToVideoPipeline": "saved_wan_image",
        "QwenImageEditPipeline": "saved_edit",
        "QwenImageEditPlusPipeline": "saved_edit_plus",
    }
    return lambda kind: request.getfixturevalue(shown[kind.pipeline] if kind.image_condition else names[kind])


def make_transformer(kind: Family, folder: Path) -> nn.Module:
    transformer = kind.make_empty(json.loads((folder / "transformer" / "config.json").read_text()))
    stored.fill(transformer, read_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    return transformer


def weights(transformer: nn.Module) -> Tensors:
    return {name: value.detach().clone() for name, value in stored.named_weights(transformer)}


def check(transformer: nn.Module, before: Tensors, deltas: Tensors) -> None:
    """Exactly these weights have changed, by as much."""
    after = weights(transformer)
    assert sorted(name for name in after if not torch.equal(after[name], before[name])) == sorted(deltas)
    for name, delta in deltas.items():
        torch.testing.assert_close(after[name], before[name] + delta, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("least", [1, 10**9], ids=["stored", "in memory"])
@pytest.mark.parametrize(
    ("dialect", "kind"),
    [*((name, kind) for name, (kind, _) in READ.items()), *SHOWN],
    ids=lambda part: part if isinstance(part, str) else part.pipeline,
)
def test_dialects_that_are_read(
    saved: Callable[[Family], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dialect: str,
    kind: Family,
    least: int,
) -> None:
    monkeypatch.setattr(stored, "LEAST_NUMBERS", least)
    _, make = READ[dialect]
    tensors, deltas = make()
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    transformer = make_transformer(kind, saved(kind))
    before = weights(transformer)
    with caplog.at_level(logging.INFO, logger="adatsq_trt"):
        fuse(kind, transformer, Lora(file, SCALE))
    check(transformer, before, {name: SCALE * delta for name, delta in deltas.items()})
    layers = sum(name.endswith(".weight") and before[name].ndim == 2 for name in deltas)
    layers -= dialect == "lightx2v, Wan"  # a whole difference of a layer is none of low rank
    assert f"{layers} layers" in caplog.text
    assert ("text encoders are left out" in caplog.text) == any(name.startswith("lora_te") for name in tensors)


@pytest.mark.parametrize("dialect", READ)
def test_every_tensor_is_listed_with_its_layer(saved: Callable[[Family], Path], tmp_path: Path, dialect: str) -> None:
    """What a part of a file changes, and what is no change of a layer."""
    kind, make = READ[dialect]
    tensors, deltas = make()
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    outline = kind.make_outline(json.loads((saved(kind) / "transformer" / "config.json").read_text()))
    changes = read_changes(kind, outline, file, partial=True)
    listed = [key for keys in changes.keys.values() for key in keys]
    assert {*listed, *changes.unmatched, *changes.left_out} == set(tensors)
    assert not set(listed) & set(changes.unmatched)
    assert set(changes.unmatched) == {key for key in tensors if ".diff" in key}
    whole = {name.removesuffix(".weight") for name in deltas if any(key.endswith(".diff") for key in changes.unmatched)}
    assert set(changes.keys) == set(changes.layers)
    assert set(changes.layers) == {name.removesuffix(".weight") for name in deltas} - (whole - {WAN_Q})


@pytest.mark.parametrize(
    "alpha", [torch.tensor(2), torch.tensor([2.0]), torch.tensor(2.0).half(), torch.tensor(2.0).bfloat16()]
)
@pytest.mark.parametrize("kind", families(), ids=lambda kind: kind.pipeline)
def test_alpha_of_any_type(saved: Callable[[Family], Path], tmp_path: Path, kind: Family, alpha: Tensor) -> None:
    paths = {FLUX: FLUX_QKV[0], Z_IMAGE: Z_QKV[0], WAN: WAN_Q, QWEN_IMAGE: QWEN_Q, STABLE_DIFFUSION_3: SD3_Q}
    paths |= {FLUX_2: FLUX_QKV[0], CHROMA: FLUX_QKV[0], LTX: LTX_Q, HUNYUAN_VIDEO: HUNYUAN_Q}
    path = next(path for own, path in paths.items() if own.transformer == kind.transformer)
    for spelling in (AB, {}):
        tensors, deltas = named(f"transformer.{path}", path, 2.0, **spelling)
        save_file(tensors | {f"transformer.{path}.alpha": alpha}, tmp_path / "lora.safetensors")
        transformer = make_transformer(kind, saved(kind))
        before = weights(transformer)
        fuse(kind, transformer, Lora(tmp_path / "lora.safetensors", 1.0))
        check(transformer, before, deltas)


def test_a_pipeline_whose_loras_diffusers_does_not_convert(saved: Callable[[Family], Path], tmp_path: Path) -> None:
    """In the authors' names, as trainers write them."""
    tensors, _ = named("diffusion_model.double_blocks.0.img_attn_qkv", HUNYUAN_Q)
    save_file(tensors, tmp_path / "lora.safetensors")
    transformer = make_transformer(HUNYUAN_VIDEO, saved(HUNYUAN_VIDEO))
    with pytest.raises(
        UserError, match=r"double_blocks.0.img_attn_qkv', which is no name .* has no converter for LoRAs"
    ):
        fuse(HUNYUAN_VIDEO, transformer, Lora(tmp_path / "lora.safetensors", 1.0))


def test_flux_layers_of_the_authors_width(tmp_path: Path) -> None:
    """Of single blocks diffusers knows only Flux's own width; the model itself is not in memory."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    name, widths = "lora_unet_single_blocks_0_linear1", (3072, 3072, 3072, 12288)
    down, up = matrices(name, sum(widths), 3072)
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)},
        tmp_path / "lora.safetensors",
    )
    changes = read_changes(FLUX, transformer, tmp_path / "lora.safetensors").layers
    paths = [f"single_transformer_blocks.0.{path}" for path in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert sorted(changes) == sorted(paths)
    for path, part in zip(paths, up.split(widths), strict=True):
        torch.testing.assert_close(changes[path].up[:64] @ changes[path].down, part[:64] @ down / RANK)


# ---------------------------------------------------------------------------------- files that the libraries save


def randomize(model: nn.Module) -> None:
    """Peft starts with a product of zero."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = torch.randn(value.shape, generator=generator) * 0.1


CONFIGS = {
    "alpha": {"lora_alpha": 16},
    "rslora": {"lora_alpha": 16, "use_rslora": True},
    "patterns": {
        "lora_alpha": 8,
        "rank_pattern": {"to_k": 2},
        "alpha_pattern": {"to_k": 6, "transformer_blocks.0.attn.to_q": 1},
    },
    "bias": {"lora_alpha": 16, "lora_bias": True},
    "dora": {"lora_alpha": 16, "use_dora": True},
}


@pytest.mark.filterwarnings("ignore:.*invalid shape")  # peft takes a bias for half a matrix
@pytest.mark.parametrize("saver", ["save_lora_weights", "save_lora_adapter", "peft"])
@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("least", [1, 10**9], ids=["stored", "in memory"])
def test_files_of_diffusers_trainers_and_of_peft(
    saved: Callable[[Family], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saver: str,
    settings: str,
    least: int,
) -> None:
    """Held against the trained model itself, merged by peft."""
    folder = saved(FLUX)
    config = LoraConfig(r=RANK, target_modules=["to_q", "to_k"], **CONFIGS[settings])
    trained = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    if saver == "peft":
        adapted = get_peft_model(trained, config)
        randomize(adapted)
        adapted.save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        merged = adapted.merge_and_unload()
    else:
        trained.add_adapter(config)
        randomize(trained)
        file = tmp_path / "pytorch_lora_weights.safetensors"
        if saver == "save_lora_adapter":
            trained.save_lora_adapter(tmp_path)
        else:
            from peft.utils import get_peft_model_state_dict

            FluxPipeline.save_lora_weights(
                tmp_path,
                get_peft_model_state_dict(trained),
                transformer_lora_adapter_metadata={**trained.peft_config["default"].to_dict()},
            )
        trained.fuse_lora(lora_scale=SCALE)
        trained.unload_lora()
        merged = trained
    expected = dict(merged.named_parameters())
    monkeypatch.setattr(stored, "LEAST_NUMBERS", least)
    transformer = make_transformer(FLUX, folder)
    before = weights(transformer)
    fuse(FLUX, transformer, Lora(file, 1.0 if saver == "peft" else SCALE))
    after = weights(transformer)
    assert any(not torch.equal(after[name], before[name]) for name in after)
    for name, value in after.items():
        torch.testing.assert_close(value, expected[name].detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "dialect", ["diffusers' names with alpha", "ai-toolkit, Z-Image", "ComfyUI, Wan", "fal's trainer, FLUX.2 klein"]
)
def test_diffusers_fuses_the_same(saved: Callable[[Family], Path], tmp_path: Path, dialect: str) -> None:
    """Files that its own pipelines read as they are meant: one of each architecture."""
    kind, make = READ[dialect]
    tensors, _ = make()
    if kind is FLUX:  # diffusers gives a layer without alpha another's
        tensors, _ = named(f"transformer.{FLUX_QKV[0]}", FLUX_QKV[0], 2.0, **AB)
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    pipe = PIPELINES[kind].from_pretrained(saved(kind))
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    pipe.fuse_lora(lora_scale=SCALE)
    pipe.unload_lora_weights()
    transformer = make_transformer(kind, saved(kind))
    before = weights(transformer)
    fuse(kind, transformer, Lora(file, SCALE))
    expected = {name: value.detach() - before[name] for name, value in pipe.transformer.named_parameters()}
    check(transformer, before, {name: value for name, value in expected.items() if value.any()})


# ---------------------------------------------------------------------------------- what is refused by name


def with_extra(name: str, make: Callable[[], tuple[Tensors, Tensors]], *shape: int) -> Callable[[], Tensors]:
    return lambda: make()[0] | {name: torch.ones(shape)}


def of_products(name: str, *parts: str) -> Callable[[], Tensors]:
    return lambda: {f"{name}.{part}": torch.ones(4, 4) for part in parts}


REFUSED: dict[str, tuple[Family, Callable[[], Tensors], str]] = {
    "the last modulation, FLUX.2": (
        FLUX_2,
        lambda: named("diffusion_model.final_layer.adaLN_modulation.1", "norm_out.linear", **AB)[0],
        "'diffusion_model.final_layer.adaLN_modulation.1' makes a shift and then a scale, which diffusers reads in the",
    ),
    "kohya's DoRA, Flux": (
        FLUX,
        with_extra("lora_unet_double_blocks_0_img_attn_proj.dora_scale", kohya_flux, 64, 1),
        "'lora_unet_double_blocks_0_img_attn_proj.dora_scale': magnitudes of DoRA",
    ),
    "DoRA, Z-Image": (
        Z_IMAGE,
        with_extra("diffusion_model.layers.0.attention.to_q.dora_scale", ai_toolkit_z_image, 64, 1),
        "'diffusion_model.layers.0.attention.to_q.dora_scale': magnitudes of DoRA",
    ),
    "LyCORIS LoKr": (
        Z_IMAGE,
        of_products("diffusion_model.layers.0.attention.to_q", "lokr_w1", "lokr_w2"),
        "lokr_w1': LoKr",
    ),
    "LyCORIS LoHa": (
        FLUX,
        of_products("lora_unet_double_blocks_0_img_attn_proj", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        "hada_w1_a': LoHa",
    ),
    "a Tucker decomposition": (
        FLUX,
        with_extra("lora_unet_double_blocks_0_img_attn_proj.lora_mid.weight", kohya_flux, 4, 4),
        "lora_mid.weight': a Tucker decomposition",
    ),
    "OFT": (FLUX, of_products("lora_unet_double_blocks_0_img_attn_proj", "oft_blocks"), "oft_blocks': OFT"),
    "BFL control": (
        FLUX,
        with_extra("double_blocks.0.img_attn.norm.query_norm.scale", fal_flux, 32),
        "query_norm.scale': norms of a control LoRA",
    ),
    "norms of kohya's Flux": (
        FLUX,
        with_extra("lora_unet_double_blocks_0_img_mod_norm.w_norm", kohya_flux, 64),
        "lora_unet_double_blocks_0_img_mod_norm.w_norm",
    ),
    "a difference of Flux's": (
        FLUX,
        with_extra("lora_unet_double_blocks_0_img_attn_proj.diff_b", kohya_flux, 64),
        "holds 'lora_unet_double_blocks_0_img_attn_proj.diff_b' of \\[64\\], which fits no weight",
    ),
    "a difference of another shape": (
        WAN,
        with_extra("diffusion_model.blocks.0.norm3.diff", comfy_wan, 63),
        "holds 'diffusion_model.blocks.0.norm3.diff' of \\[63\\], which fits no weight",
    ),
    "a position embedding, which diffusers drops": (
        FLUX,
        lambda: kohya_flux()[0] | named("lora_unet_position_embedding", "x")[0],
        "position_embedding",
    ),
    "fused beside split attention, Z-Image": (
        Z_IMAGE,
        lambda: merge(ai_toolkit_z_image(), fused_qkv("diffusion_model.layers.0.attention.qkv", Z_QKV, 2.0))[0],
        "changes 'layers.0.attention.to_q' twice",
    ),
    "a matrix alone": (
        FLUX,
        lambda: {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 64)},
        "'transformer.transformer_blocks.0.attn.to_q' has down but no matrix 'up'",
    ),
    "alpha alone": (
        WAN,
        with_extra("diffusion_model.blocks.0.ffn.0.alpha", comfy_wan),
        "'diffusion_model.blocks.0.ffn.0' has alpha but no matrix 'down'",
    ),
    "peft without its configuration": (
        FLUX,
        lambda: named(f"base_model.model.{FLUX_QKV[0]}", FLUX_QKV[0], **AB)[0],
        "was saved by peft, which keeps its strength in adapter_config.json",
    ),
    "another model's blocks": (
        WAN,
        lambda: named("diffusion_model.blocks.7.self_attn.q", WAN_Q)[0],
        "changes 'blocks.7.attn1.to_q', which this WanTransformer3DModel does not have",
    ),
    "another model's names": (
        FLUX,
        comfy_wan,
        "lora_unet_blocks_0_self_attn_q.lora_down.weight",
    ),
    "one layer under two prefixes, Wan": (
        WAN,
        lambda: comfy_wan()[0] | named("lora_unet_blocks_0_self_attn_q", WAN_Q)[0],
        "holds 'diffusion_model.blocks.0.self_attn.q.lora_down.weight' twice",
    ),
    "one layer with a prefix and without, Flux": (
        FLUX,
        lambda: {
            key: value
            for prefix in ("", "diffusion_model.")
            for key, value in named(f"{prefix}double_blocks.0.img_attn.proj", prefix)[0].items()
        },
        "holds 'diffusion_model.double_blocks.0.img_attn.proj.lora_down.weight' twice",
    ),
    "matrices of integers": (
        FLUX,
        lambda: {key: value.to(torch.int8) for key, value in named(f"transformer.{FLUX_QKV[0]}", "x")[0].items()},
        "torch.int8: it is quantized already",
    ),
    "alpha of zero": (
        FLUX,
        lambda: named(f"transformer.{FLUX_QKV[0]}", "x", 0.0)[0],
        f"alpha of 'transformer.{FLUX_QKV[0]}' is 0",
    ),
    "no rank": (
        FLUX,
        lambda: (
            named(f"transformer.{FLUX_QKV[0]}", "x", rank=0)[0]
            | {f"transformer.{FLUX_QKV[0]}.alpha": torch.tensor(1.0)}
        ),
        r"the matrix 'down' of .* is of \[0, 64\]",
    ),
    "numbers for matrices": (
        FLUX,
        lambda: {f"transformer.{FLUX_QKV[0]}.lora_{part}.weight": torch.tensor(1.0) for part in "AB"},
        r"the matrix 'down' of .* is of \[\]",
    ),
    "text encoders alone": (
        FLUX,
        lambda: named("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "x")[0],
        "changes nothing in a FluxTransformer2DModel",
    ),
}


def refusal(kind: Family, transformer: nn.Module, file: Path) -> str:
    before = weights(transformer)
    with pytest.raises(UserError) as error:
        fuse(kind, transformer, Lora(file, 1.0))
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    check(transformer, before, {})
    return str(error.value)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_lost_is_refused_by_name(saved: Callable[[Family], Path], tmp_path: Path, case: str) -> None:
    kind, make, message = REFUSED[case]
    tensors = make()
    tensors = tensors if isinstance(tensors, dict) else tensors[0]
    save_file(tensors, tmp_path / "lora.safetensors")
    assert re.search(message, refusal(kind, make_transformer(kind, saved(kind)), tmp_path / "lora.safetensors"))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"transformer.r": 4, "transformer.lora_alpha": 8}, "states the strength of .* twice"),
        ({"transformer.r": 4}, "no configuration of peft .*lora_alpha"),
        ({"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"}, "says init_lora_weights: pissa"),
        ({"r": 4, "lora_alpha": 8, "modules_to_save": ["proj_out"]}, r"says modules_to_save: \['proj_out'\]"),
        ({"r": 4, "lora_alpha": 8, "peft_type": "LOHA"}, "says peft_type: LOHA"),
        ([4], "no configuration of peft"),
    ],
)
def test_configurations_that_are_not_followed(
    saved: Callable[[Family], Path], tmp_path: Path, metadata: object, message: str
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(
        named(f"transformer.{FLUX_QKV[0]}", FLUX_QKV[0], 2.0, **AB)[0],
        file,
        {"lora_adapter_metadata": json.dumps(metadata)},
    )
    assert re.search(message, refusal(FLUX, make_transformer(FLUX, saved(FLUX)), file))


def test_a_rank_that_the_configuration_does_not_have(saved: Callable[[Family], Path], tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    tensors, _ = named(f"transformer.{FLUX_QKV[0]}", FLUX_QKV[0], **AB)
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps({"transformer.r": 8, "transformer.lora_alpha": 8})})
    assert "has rank 4, its configuration says 8" in refusal(FLUX, make_transformer(FLUX, saved(FLUX)), file)


@pytest.mark.parametrize(
    ("settings", "parts", "message"),
    [
        ({"use_dora": True}, {}, "has no magnitude, its configuration says use_dora: True"),
        ({}, {"lora_magnitude_vector": torch.ones(64)}, "has a magnitude, its configuration says use_dora: False"),
        ({"lora_bias": True}, {}, "has no bias, its configuration says lora_bias: True"),
        ({}, {"lora_B.bias": torch.ones(64)}, "has a bias, its configuration says lora_bias: False"),
        ({"r": 0}, {}, "no configuration of peft .*greater than 0"),
        ({"lora_alpha": float("nan")}, {}, "no configuration of peft .*finite"),
    ],
)
def test_a_file_that_is_not_what_its_configuration_says(
    saved: Callable[[Family], Path],
    tmp_path: Path,
    settings: dict[str, object],
    parts: Tensors,
    message: str,
) -> None:
    """Peft leaves out what its configuration does not have, and fills up what the file lacks."""
    file, layer = tmp_path / "lora.safetensors", f"transformer.{FLUX_QKV[0]}"
    tensors = named(layer, FLUX_QKV[0], **AB)[0] | {f"{layer}.{name}": value for name, value in parts.items()}
    config = {f"transformer.{key}": value for key, value in ({"r": 4, "lora_alpha": 8} | settings).items()}
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config)})
    assert re.search(message, refusal(FLUX, make_transformer(FLUX, saved(FLUX)), file))
