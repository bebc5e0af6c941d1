"""Transformers in one file, as authors, ComfyUI and others publish them: the weights of the folder, or a refusal."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adatsq_trt.checkpoints.loading import OpenedPipeline, open_pipeline
from adatsq_trt.errors import UserError
from adatsq_trt.files import read_tensors
from adatsq_trt.models import stored
from adatsq_trt.settings import PipelineSettings
from tests.tiny_checkpoints import HEIGHT, WIDTH

WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"
Tensors = dict[str, Tensor]


def open_file(file: Path, base: Path) -> OpenedPipeline:
    return open_pipeline(
        PipelineSettings(path=str(file), base=str(base), height=HEIGHT, width=WIDTH, prompts=("a red",))
    )


def loaded_weights(opened: OpenedPipeline) -> Tensors:
    width, pooled = opened.source.family.widths(json.loads(opened.source.config.read_text()))
    model = opened.load({"tokens": torch.zeros(2, 32, width), "pooled": torch.zeros(2, pooled)})
    return dict(stored.named_weights(model.adapter.transformer))


@pytest.fixture
def saved(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    return lambda name: request.getfixturevalue(f"saved_{name}")


def authors_z_image(tensors: Tensors, prefix: str = "") -> Tensors:
    """Queries, keys and values in one product; a norm that nothing calls."""
    named = {}
    for name, value in tensors.items():
        name = re.sub(r"all_(x_embedder|final_layer)\.2-1", r"\1", name)
        name = name.replace("to_out.0", "out").replace("norm_q", "q_norm").replace("norm_k", "k_norm")
        if not re.search(r"to_[qkv]\.weight", name):
            named[f"{prefix}{name}"] = value.clone()
        elif "to_q" in name:
            parts = [tensors[name.replace("to_q", f"to_{part}")] for part in "qkv"]
            named[f"{prefix}{name.replace('to_q', 'qkv')}"] = torch.cat(parts)
    return named | {f"{prefix}norm_final.weight": torch.ones(64)}


def with_prefix(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def with_other_parts(tensors: Tensors) -> Tensors:
    """A checkpoint of ComfyUI's."""
    others = ("vae.decoder.conv_in.weight", "text_encoders.t5xxl.transformer.shared.weight")
    return with_prefix("model.diffusion_model.", tensors) | {name: torch.ones(2) for name in others}


READ: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "Z-Image in its authors' names": ("z_image", authors_z_image),
    "Z-Image in its authors' names, ComfyUI": ("z_image", lambda t: authors_z_image(t, "model.diffusion_model.")),
    "Z-Image in diffusers' names": ("z_image", dict),
    "diffusers' names, model.diffusion_model.": ("flux", lambda t: with_prefix("model.diffusion_model.", t)),
    "diffusers' names, transformer.": ("wan", lambda t: with_prefix("transformer.", t)),
    "diffusers' names, diffusion_model.": ("z_image", lambda t: with_prefix("diffusion_model.", t)),
    "a whole checkpoint": ("flux", with_other_parts),
}


@pytest.mark.parametrize("least", [1, 10**9], ids=["stored", "in memory"])
@pytest.mark.parametrize("layout", READ)
def test_layouts_that_are_read(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, least: int
) -> None:
    name, make = READ[layout]
    tensors = read_tensors(saved(name) / WEIGHTS)
    file = tmp_path / "tune.safetensors"
    save_file(make(tensors), file)
    monkeypatch.setattr(stored, "LEAST_NUMBERS", least)
    opened = open_file(file, saved(name))
    assert (opened.file_bytes == 0) == (not layout.startswith("Z-Image in its authors'"))  # else converted in memory
    found = loaded_weights(opened)
    assert set(found) == set(tensors)
    assert [key for key in found if not torch.equal(found[key], tensors[key])] == []


def refusal(file: Path, base: Path) -> str:
    with pytest.raises(UserError) as error:
        open_file(file, base)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert "again" not in str(error.value)  # nothing is wrong with the file
    return str(error.value)


def with_extra(name: str, make: Callable[[Tensors], Tensors] = dict, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: make(tensors) | {name: torch.ones(shape)}


def another_block(tensors: Tensors) -> Tensors:
    return tensors | {n.replace("blocks.0", "blocks.1"): t.clone() for n, t in tensors.items() if "blocks.0" in n}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def fp8(tensors: Tensors) -> Tensors:
    return {name: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for name, value in tensors.items()}


COMFY = "model.diffusion_model."
REFUSED: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "scales beside 16 bits": (
        "z_image",
        with_extra("layers.0.attention.qkv.scale_weight", authors_z_image, 1),
        "holds 'layers.0.attention.qkv.scale_weight': it is quantized already",
    ),
    "scales of activations": (
        "z_image",
        with_extra(f"{COMFY}layers.0.attention.qkv.scale_input", lambda t: authors_z_image(t, COMFY), 1),
        "scale_input': it is quantized already",
    ),
    "ComfyUI's mark": ("wan", with_extra("scaled_fp8", dict, 2), "holds 'scaled_fp8': it is quantized already"),
    "bitsandbytes": (
        "flux",
        with_extra("transformer_blocks.0.attn.to_q.weight.quant_state.bitsandbytes__nf4", dict, 8),
        "bitsandbytes__nf4': it is quantized already",
    ),
    "ComfyUI's newer scales": (
        "flux",
        with_extra("transformer_blocks.0.attn.to_q.weight_scale", dict, 1),
        "weight_scale': it is quantized already",
    ),
    "GPTQ and Nunchaku": (
        "flux",
        with_extra("transformer_blocks.0.attn.to_q.qweight", dict, 4, 4),
        "qweight': it is quantized already",
    ),
    "fp8 without scales": ("flux", fp8, "as F8_E4M3, expected BF16, F16, F32, F64: it is quantized already"),
    "more blocks": (
        "wan",
        another_block,
        "holds 'blocks.1.*', which a model of '.*config.json' does not have; name the",
    ),
    "more blocks, authors' names": (
        "z_image",
        lambda tensors: authors_z_image(
            tensors | {n.replace("layers.0", "layers.1"): t.clone() for n, t in tensors.items()}
        ),
        "holds 'layers.1.*', which a model of '.*config.json' does not have; name the base",
    ),
    "a missing tensor": (
        "flux",
        without("transformer_blocks.0.attn.to_q.bias"),
        "has no tensor 'transformer_blocks.0.attn.to_q.bias', which '.*' expects as .64.; name the base",
    ),
    "image channels of Wan": (
        "wan",
        with_extra("blocks.0.attn2.add_k_proj.weight", dict, 64, 64),
        "holds 'blocks.0.attn2.add_k_proj.weight', which",
    ),
    "another shape": (
        "z_image",
        lambda tensors: authors_z_image(tensors | {"all_x_embedder.2-1.weight": torch.ones(64, 65)}),
        r"holds 'x_embedder.weight' as \[64, 65\], '.*config.json' expects \[64, 64\]; name the base",
    ),
    "a tensor beside the prefix": (
        "flux",
        lambda tensors: with_prefix(COMFY, tensors) | {"control_model.x": torch.ones(1)},
        "holds 'control_model.x' beside the transformer's 'model.diffusion_model....'",
    ),
    "two tensors for one weight": (
        "z_image",
        with_extra("layers.0.attention.to_q.weight", authors_z_image, 64, 64),
        r"holds 'layers.0.attention.(to_q|qkv).weight' beside another tensor for the same weight",
    ),
    "two spellings of a norm": (
        "z_image",
        with_extra("layers.0.attention.norm_q.weight", authors_z_image, 32),
        r"holds 'layers.0.attention.(norm_q|q_norm).weight' beside another tensor for the same weight",
    ),
    "another model": ("flux", with_extra("input_blocks.0.weight", lambda _: {}, 4), "is no FluxTransformer2DModel in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_left_over_is_refused_by_name(saved: Callable[[str], Path], tmp_path: Path, case: str) -> None:
    name, make, message = REFUSED[case]
    save_file(make(read_tensors(saved(name) / WEIGHTS)), tmp_path / "tune.safetensors")
    assert re.search(message, refusal(tmp_path / "tune.safetensors", saved(name)))


def test_a_gguf_file_is_refused(saved_flux: Path, tmp_path: Path) -> None:
    (tmp_path / "flux1-dev-Q4_K_S.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    assert "got a .gguf file, expected" in refusal(tmp_path / "flux1-dev-Q4_K_S.gguf", saved_flux)


# ------------------------------------------------------------------------------- Flux in its authors' names
# Diffusers knows these at Flux's own width only: the files here are headers and holes, which are not read.


def block_shapes(width: int = 3072, head: int = 128) -> dict[str, tuple[int, ...]]:
    """Of a double and of a single block."""
    linear = {"img_attn.proj": (width, width), "img_attn.qkv": (3 * width, width), "img_mlp.0": (4 * width, width)}
    linear |= {"img_mlp.2": (width, 4 * width), "img_mod.lin": (6 * width, width)}
    linear |= {name.replace("img", "txt"): shape for name, shape in linear.items()}
    linear = {f"double_blocks.0.{name}": shape for name, shape in linear.items()}
    linear |= {"single_blocks.0.linear1": (7 * width, width), "single_blocks.0.linear2": (width, 5 * width)}
    linear |= {"single_blocks.0.modulation.lin": (3 * width, width)}
    norms = ("double_blocks.0.img_attn.norm", "double_blocks.0.txt_attn.norm", "single_blocks.0.norm")
    shapes: dict[str, tuple[int, ...]] = {f"{n}.{part}_norm.scale": (head,) for n in norms for part in ("query", "key")}
    return shapes | with_biases(linear)


def with_biases(linear: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    weights: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linear.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in linear.items()}


def flux_shapes(guidance: bool, width: int = 3072) -> dict[str, tuple[int, ...]]:
    linear = {"img_in": (width, 64), "txt_in": (width, 4096), "final_layer.linear": (64, width)}
    linear |= {"final_layer.adaLN_modulation.1": (2 * width, width)}
    inputs = {"time_in": 256, "vector_in": 768} | ({"guidance_in": 256} if guidance else {})
    for name, columns in inputs.items():
        linear |= {f"{name}.in_layer": (width, columns), f"{name}.out_layer": (width, width)}
    return with_biases(linear) | block_shapes()


def write_hollow(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)


@pytest.fixture
def wide_flux(saved_flux: Path, tmp_path: Path) -> Callable[[bool], Path]:
    """A base with one block of either kind, as wide as Flux."""

    def make(guidance: bool) -> Path:
        folder = Path(shutil.copytree(saved_flux, tmp_path / "wide"))
        config = folder / "transformer" / "config.json"
        wide = {"attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096}
        wide |= {"pooled_projection_dim": 768, "axes_dims_rope": [16, 56, 56], "guidance_embeds": guidance}
        config.write_text(json.dumps(json.loads(config.read_text()) | wide))
        return folder

    return make


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("prefix", ["", COMFY])
def test_flux_in_its_authors_names(
    wide_flux: Callable[[bool], Path], tmp_path: Path, guidance: bool, prefix: str
) -> None:
    file = tmp_path / "flux.safetensors"
    write_hollow(file, {f"{prefix}{name}": shape for name, shape in flux_shapes(guidance).items()})
    opened = open_file(file, wide_flux(guidance))
    assert opened.outline.adapter.takes_guidance == guidance


def another_double_block() -> dict[str, tuple[int, ...]]:
    return {n.replace("blocks.0", "blocks.1"): s for n, s in block_shapes().items() if n.startswith("double")}


@pytest.mark.parametrize(
    ("guidance", "change", "message"),
    [
        (True, {}, "holds 'guidance_in.in_layer.bias', which a model of '.*' does not have; name the base"),
        (False, another_double_block(), r"holds 'double_blocks\.1\..*', which a model of '.*' does not have; name"),
        (False, {"img_in.weight": (3072, 384)}, r"holds 'img_in.weight' as \[3072, 384\], .* expects \[3072, 64\]"),
        (False, {"double_blocks.0.img_attn.qkv.scale_weight": (1,)}, "qkv.scale_weight': it is quantized already"),
        (False, {"double_blocks.0.img_attn.extra": (1,)}, "holds 'double_blocks.0.img_attn.extra', which"),
    ],
)
def test_flux_in_its_authors_names_on_a_base_that_does_not_fit(
    wide_flux: Callable[[bool], Path], tmp_path: Path, guidance: bool, change: dict, message: str
) -> None:
    file = tmp_path / "flux.safetensors"
    write_hollow(file, flux_shapes(guidance) | change)
    assert re.search(message, refusal(file, wide_flux(False)))


def test_flux_in_its_authors_names_without_a_tensor(wide_flux: Callable[[bool], Path], tmp_path: Path) -> None:
    file = tmp_path / "flux.safetensors"
    write_hollow(file, {n: s for n, s in flux_shapes(True).items() if n != "double_blocks.0.txt_mod.lin.bias"})
    assert "it has no tensor 'double_blocks.0.txt_mod.lin.bias'" in refusal(file, wide_flux(True))
