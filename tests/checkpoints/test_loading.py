"""Checkpoints of every shape become the model that diffusers runs, and damaged ones a sentence."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, LTXPipeline, QwenImagePipeline, WanPipeline, ZImagePipeline

from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.checkpoints.loading import OpenedPipeline, open_pipeline
from adatsq_trt.checkpoints.prompts import encode_prompts
from adatsq_trt.checkpoints.source import find_source
from adatsq_trt.engines.vae import Vae
from adatsq_trt.errors import UserError
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.models import stored
from adatsq_trt.settings import PipelineSettings
from adatsq_trt.zoo.loading import LoadedModel
from tests import tiny_ltx
from tests.tiny_checkpoints import HEIGHT, LATENT_CHANNELS, WIDTH, save_lora, shard

PROMPTS = ("a red", "three green and seven", "a")
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


def settings(path: Path | str, **changes: object) -> PipelineSettings:
    return PipelineSettings(path=str(path), height=HEIGHT, width=WIDTH, prompts=PROMPTS).model_copy(update=changes)


def load(opened: OpenedPipeline) -> LoadedModel:
    return opened.load(encode_prompts(opened.source, opened.settings.prompts, lambda: None))


@pytest.fixture(scope="module")
def loaded(saved_flux: Path) -> LoadedModel:
    return load(open_pipeline(settings(saved_flux)))


@pytest.fixture(scope="module")
def pipe(saved_flux: Path) -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(saved_flux, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_loop_ends_in_the_pipelines_latents(loaded: LoadedModel, pipe: FluxPipeline) -> None:
    """Packing, position ids, guidance, dynamic shift and embeddings all at once, on a picture that is not square."""
    adapter, steps, guidance = loaded.adapter, 3, 2.5
    samples = Samples(adapter, adapter.schedule(steps), guidance, prompts=(1, 0), seeds=(4, 5))
    expected = pipe(
        [PROMPTS[1], PROMPTS[0]],
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=samples.noise(),
        output_type="latent",
    ).images
    assert samples.noise().shape == (2, HEIGHT // 16 * WIDTH // 16, 64)
    torch.testing.assert_close(trajectory(samples)[-1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_the_loop_ends_in_z_images_latents(saved_z_image: Path, guidance: float) -> None:
    """A scale of 1 is no guidance: the branch with the empty prompt is spared. The pipeline counts from 0."""
    opened = open_pipeline(settings(saved_z_image, guided=guidance != 1.0))
    adapter, steps = load(opened).adapter, 3
    samples = Samples(adapter, adapter.schedule(steps), guidance, prompts=(1, 0), seeds=(4, 5))
    assert (samples.conditioning.unconditional is None) == (guidance == 1.0)
    pipe = ZImagePipeline.from_pretrained(saved_z_image, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        [PROMPTS[1], PROMPTS[0]],
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=steps,
        guidance_scale=guidance - 1,
        latents=samples.noise(),
        output_type="latent",
    ).images
    assert expected.shape == (2, 16, HEIGHT // 8, WIDTH // 8)
    torch.testing.assert_close(trajectory(samples)[-1], expected, atol=1e-4, rtol=1e-3)


def test_the_loop_ends_in_wans_latents(saved_wan: Path) -> None:
    """With its own scheduler, UniPC."""
    adapter, steps, guidance = load(open_pipeline(settings(saved_wan, frames=5))).adapter, 3, 4.0
    samples = Samples(adapter, adapter.schedule(steps), guidance, prompts=(1, 0), seeds=(4, 5))
    pipe = WanPipeline.from_pretrained(saved_wan, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        [PROMPTS[1], PROMPTS[0]],
        height=HEIGHT,
        width=WIDTH,
        num_frames=5,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=samples.noise(),
        output_type="latent",
    ).frames
    assert expected.shape == (2, 16, 2, HEIGHT // 8, WIDTH // 8)
    torch.testing.assert_close(trajectory(samples)[-1], expected, atol=1e-4, rtol=1e-3)


def test_dynamic_shift_follows_the_size(saved_flux: Path, loaded: LoadedModel) -> None:
    large = open_pipeline(settings(saved_flux, height=1024, width=1024)).outline
    assert large.adapter.schedule(4).sigmas[1] > loaded.adapter.schedule(4).sigmas[1]


def test_defaults_are_those_of_the_pipeline(saved_flux: Path) -> None:
    opened = open_pipeline(settings(saved_flux, height=None, width=None))
    assert (opened.settings.height, opened.settings.width) == (1024, 1024)
    assert (opened.outline.default_steps, opened.outline.default_guidance) == (28, 3.5)
    assert opened.outline.adapter.takes_guidance
    assert opened.outline.name == "tiny-flux"


def test_the_outline_has_the_layers_but_no_weights(saved_flux: Path, loaded: LoadedModel) -> None:
    outline = open_pipeline(settings(saved_flux)).outline
    assert all(parameter.is_meta for parameter in outline.adapter.transformer.parameters())
    assert list(outline.adapter.quantizable_layers()) == list(loaded.adapter.quantizable_layers())
    assert (outline.weights_sha256, outline.model_sha256) == (loaded.weights_sha256, loaded.model_sha256)


# ------------------------------------------------------------------------------------- shapes of checkpoints


def same_weights(a: LoadedModel, b: LoadedModel) -> bool:
    first, second = a.adapter.transformer.state_dict(), b.adapter.transformer.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_transformer_alone_takes_the_rest_from_its_base(saved_flux: Path, loaded: LoadedModel) -> None:
    alone = load(open_pipeline(settings(saved_flux / "transformer", base=str(saved_flux))))
    assert same_weights(alone, loaded)
    assert alone.name == "transformer"


def test_a_single_file_takes_the_rest_from_its_base(saved_flux: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    file = Path(shutil.copy(saved_flux / WEIGHTS, tmp_path / "my tune.safetensors"))
    single = load(open_pipeline(settings(file, base=str(saved_flux))))
    assert same_weights(single, loaded)
    assert single.name == "my-tune"


WAN_NAMES = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    (r"^scale_shift_table", "head.modulation"),
    ("scale_shift_table", "modulation"),
    ("proj_out", "head.head"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("norm2", "norm3"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    (r"to_out\.0", "o"),
    (r"to_([qkv])", r"\1"),
)


def authors_name(name: str) -> str:
    """What Wan's authors call a weight."""
    for ours, theirs in WAN_NAMES:
        name = re.sub(ours, theirs, name)
    return f"model.diffusion_model.{name}"


def test_a_single_file_in_its_authors_layout_is_the_folders_model(
    saved_wan: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In bfloat16, with tables of angles that need more, and layers that are smaller than what is left in files."""
    folder = Path(shutil.copytree(saved_wan, tmp_path / "tiny-wan"))
    tensors = {name: value.bfloat16() for name, value in read_tensors(folder / WEIGHTS).items()}
    write_tensors(folder / WEIGHTS, tensors)
    file = tmp_path / "tuned.safetensors"
    write_tensors(file, {authors_name(name): value for name, value in tensors.items()})
    monkeypatch.setattr(stored, "LEAST_NUMBERS", 4096)
    found = [load(open_pipeline(settings(path, base=base))) for path, base in ((folder, None), (file, str(folder)))]
    modules = [dict(stored.named_weights(model.adapter.trace_module())) for model in found]
    buffers = [dict(model.adapter.trace_module().named_buffers()) for model in found]
    for whole, single in (modules, buffers):
        assert set(whole) == set(single)
        assert [name for name in whole if not torch.equal(whole[name], single[name])] == []
    kinds = {type(module) for module in found[1].adapter.transformer.modules()}
    assert {torch.nn.Linear, stored.MappedLinear} <= kinds


def test_shards_are_one_model(own_flux: Path, loaded: LoadedModel) -> None:
    shard(own_flux / "transformer")
    sharded = load(open_pipeline(settings(own_flux)))
    assert same_weights(sharded, loaded)
    assert sharded.weights_sha256 != loaded.weights_sha256


def rename_to_variant(folder: Path, variant: str = "fp16") -> None:
    """As the hub's repositories have it; a shard's variant stands before its number, in the index too."""
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        name = re.sub(r"^(\w+)(.*)\.safetensors$", rf"\1.{variant}\2.safetensors", file.name)
        name = re.sub(r"\.index\.json$", f".index.{variant}.json", name)
        text = file.read_text().replace("model-", f"model.{variant}-") if file.suffix == ".json" else None
        file = file.rename(folder / name)
        if text is not None:
            file.write_text(text)


@pytest.mark.parametrize("sharded", [False, True])
def test_variants_of_weights_are_the_same_model(
    own_flux: Path, saved_flux: Path, loaded: LoadedModel, sharded: bool
) -> None:
    if sharded:
        shard(own_flux / "transformer")
    for part in ("transformer", "text_encoder_2", "vae"):  # not every part has one
        rename_to_variant(own_flux / part)
    assert same_weights(load(open_pipeline(settings(own_flux))), loaded)
    found, expected = (
        encode_prompts(find_source(str(f), None), PROMPTS[:1], lambda: None) for f in (own_flux, saved_flux)
    )
    assert torch.equal(found["tokens"], expected["tokens"])
    latent = torch.zeros(1, 4, 3, LATENT_CHANNELS).numpy()
    assert Vae(own_flux / "vae").decode(latent).shape == (1, 32, 24, 3)


def test_a_vae_of_videos_decodes_a_picture_as_its_pipeline_does(saved_qwen_image: Path) -> None:
    pipe = QwenImagePipeline.from_pretrained(saved_qwen_image, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    model = load(open_pipeline(settings(saved_qwen_image)))
    noise = torch.randn(1, *model.adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    latents, images = (
        pipe(
            list(PROMPTS[:1]),
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=1,
            latents=noise,
            true_cfg_scale=1.0,
            output_type=kind,
        ).images
        for kind in ("latent", "np")
    )
    got = Vae(saved_qwen_image / "vae").decode(model.adapter.image.decode(latents.numpy()))
    np.testing.assert_allclose(got, images, atol=1e-5)


@pytest.mark.parametrize("conditioned", [False, True])
def test_ltx_videos_vae_decodes_as_its_pipeline_does(tmp_path: Path, conditioned: bool) -> None:
    """With a mean and deviations among its weights; one that is told a time is told that no noise is left."""
    tiny_ltx.make_ltx_pipeline(timestep_conditioning=conditioned).save_pretrained(tmp_path)
    pipe = LTXPipeline.from_pretrained(tmp_path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": tiny_ltx.HEIGHT, "width": tiny_ltx.WIDTH}
    image = open_pipeline(settings(tmp_path, **size, frames=tiny_ltx.FRAMES)).outline.adapter.image
    noise = torch.randn(1, image.elements // image.channels, image.channels, generator=torch.Generator().manual_seed(0))
    request = {"num_inference_steps": 2, "latents": noise, "num_frames": tiny_ltx.FRAMES, "guidance_scale": 1.0, **size}
    latents, videos = (pipe(PROMPTS[0], output_type=kind, **request).frames for kind in ("latent", "np"))
    got = Vae(tmp_path / "vae").decode(image.decode(latents.numpy()))
    assert got.shape == (1, tiny_ltx.FRAMES, tiny_ltx.HEIGHT, tiny_ltx.WIDTH, 3)
    np.testing.assert_allclose(got, videos, atol=1e-5)
    assert np.std(got) > 1e-3


def test_two_variants_of_weights_are_refused(own_flux: Path) -> None:
    file = own_flux / WEIGHTS
    shutil.copy(file, file.with_suffix(".bf16.safetensors"))
    file.rename(file.with_suffix(".fp16.safetensors"))
    assert "has weights in 2 variants (bf16, fp16), expected" in refusal(lambda: open_pipeline(settings(own_flux)))


def test_other_prompts_or_sizes_are_another_model(saved_flux: Path, loaded: LoadedModel) -> None:
    for changes in ({"prompts": PROMPTS[:2]}, {"height": 32}):
        other = open_pipeline(settings(saved_flux, **changes)).outline
        assert other.weights_sha256 == loaded.weights_sha256
        assert other.model_sha256 != loaded.model_sha256


# ------------------------------------------------------------------------------------------------------ LoRA


def test_a_lora_is_fused_as_the_pipeline_does(saved_flux: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    file = save_lora(tmp_path / "style.safetensors")
    tuned = load(open_pipeline(settings(saved_flux, loras=(f"{file}:0.5",))))
    tensors, before = read_tensors(file), loaded.adapter.transformer.state_dict()
    changed = {
        name: value for name, value in tuned.adapter.transformer.state_dict().items() if not value.equal(before[name])
    }
    layers = sorted({name.split(".lora_")[0].removeprefix("transformer.") for name in tensors})
    assert sorted(changed) == [f"{layer}.weight" for layer in layers]
    for layer in layers:
        up, down = (tensors[f"transformer.{layer}.lora_{part}.weight"] for part in "BA")
        torch.testing.assert_close(changed[f"{layer}.weight"], before[f"{layer}.weight"] + 0.5 * up @ down)
    assert tuned.weights_sha256 != loaded.weights_sha256
    again = open_pipeline(settings(saved_flux, loras=(f"{file}:1",))).outline
    assert again.weights_sha256 != tuned.weights_sha256


def test_two_loras_add_up(saved_flux: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    files = [save_lora(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    both = load(open_pipeline(settings(saved_flux, loras=tuple(map(str, files)))))
    layer = "transformer_blocks.0.attn.to_q"
    expected = loaded.adapter.transformer.state_dict()[f"{layer}.weight"].clone()
    for file in files:
        tensors = read_tensors(file)
        expected += tensors[f"transformer.{layer}.lora_B.weight"] @ tensors[f"transformer.{layer}.lora_A.weight"]
    torch.testing.assert_close(both.adapter.transformer.state_dict()[f"{layer}.weight"], expected)


def to_bfloat16(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.bfloat16() for name, value in tensors.items()}


def to_dora(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With a magnitude for each row of the weight."""
    ups = {name: value for name, value in tensors.items() if "lora_B" in name}
    sizes = {name.replace("lora_B.weight", "lora_magnitude_vector"): value.norm(dim=1) for name, value in ups.items()}
    return tensors | sizes


@pytest.mark.parametrize("change", [lambda tensors: tensors, to_bfloat16, to_dora])
def test_a_lora_changes_weights_that_stay_on_disk(
    saved_flux: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: Callable
) -> None:
    """As in memory, bit for bit: scales, several files and the type of the files' matrices included."""
    files = [save_lora(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    write_tensors(files[0], change(read_tensors(files[0])))
    found = []
    for least in (10**9, 1):
        monkeypatch.setattr(stored, "LEAST_NUMBERS", least)
        tuned = load(open_pipeline(settings(saved_flux, loras=(f"{files[0]}:0.3", str(files[1])))))
        found.append(dict(stored.named_weights(tuned.adapter.transformer)))
    assert any(isinstance(module, stored.MappedLinear) for module in tuned.adapter.transformer.modules())
    assert set(found[0]) == set(found[1])
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


# ------------------------------------------------------------------------------------------------ bad input


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(opening: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        opening()
    message = str(error.value)
    assert "\n" not in message
    assert error.value.exit_code == 2
    return message


def another_pipeline(folder: Path) -> None:
    edit_json(folder / "model_index.json", _class_name="StableDiffusionPipeline", unet=["diffusers", "UNet2D"])


def own_code(folder: Path) -> None:
    edit_json(folder / "model_index.json", text_encoder=["my_encoder", "MyEncoder"])


def another_transformer(folder: Path) -> None:
    edit_json(folder / "model_index.json", transformer=["diffusers", "SD3Transformer2DModel"])


def another_scheduler(folder: Path) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")


def quantized(folder: Path) -> None:
    edit_json(folder / "transformer" / "config.json", quantization_config={"quant_method": "bitsandbytes"})


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename((folder / WEIGHTS).with_suffix(".bin"))


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def missing_shard(folder: Path) -> None:
    shard(folder / "transformer")[1].unlink()


def truncated_shard(folder: Path) -> None:
    file = shard(folder / "transformer")[0]
    file.write_bytes(file.read_bytes()[:-5])


def swapped_shards(folder: Path) -> None:
    first, second = shard(folder / "transformer")[:2]
    shutil.copy(first, second)


def misplaced_tensors(folder: Path) -> None:
    first, second = shard(folder / "transformer")[:2]
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def wrong_shape(folder: Path) -> None:
    edit_json(folder / "transformer" / "config.json", joint_attention_dim=40)


def missing_tensor(folder: Path) -> None:
    edit_json(folder / "transformer" / "config.json", num_layers=2)


def extra_tensor(folder: Path) -> None:
    edit_json(folder / "transformer" / "config.json", num_single_layers=0)


def senseless_config(folder: Path) -> None:
    edit_json(folder / "transformer" / "config.json", num_attention_heads="two")


def no_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            another_pipeline,
            r"is a StableDiffusionPipeline with a FluxTransformer2DModel, which has no adapter; supported",
        ),
        (another_transformer, "got the transformer SD3Transformer2DModel, expected FluxTransformer2DModel"),
        (own_code, "part 'text_encoder' is made by 'my_encoder', which would be code from the checkpoint"),
        (another_scheduler, "got the scheduler DDIMScheduler, expected FlowMatchEulerDiscreteScheduler"),
        (quantized, r"is of a model that is quantized already \(bitsandbytes\)"),
        (pickled, r"diffusion_pytorch_model.bin' is a pickle, .* save it again with diffusers' save_pretrained"),
        (no_weights, "has no weights: expected diffusion_pytorch_model.safetensors"),
        (missing_shard, r"00002-of-00003.safetensors' is missing: .* lists 3 shards, 1 of them are not there"),
        (truncated_shard, "00001-of-00003.safetensors' is not a complete safetensors file"),
        (
            swapped_shards,
            "00002-of-00003.safetensors' holds '.*', as does 'diffusion_pytorch_model-00001-of-00003",
        ),
        (
            misplaced_tensors,
            "00001-of-00003.safetensors' does not hold '.*', which 'diffusion_pytorch_model.safetensors.i",
        ),
        (wrong_shape, r"holds 'context_embedder.weight' as \[64, 32\], '.*config.json' expects \[64, 40\]"),
        (
            missing_tensor,
            r"has no tensor 'transformer_blocks.1.norm1.linear.weight', which '.*' expects as \[384, 64\]",
        ),
        (extra_tensor, "holds 'single_transformer_blocks.0.attn.norm_k.weight', which a model of '.*' does not have"),
        (senseless_config, "config.json' does not describe a model"),
        (no_vae, "vae"),
    ],
)
def test_a_checkpoint_that_cannot_work_is_one_sentence(own_flux: Path, spoil: Callable, message: str) -> None:
    spoil(own_flux)
    assert re.search(message, refusal(lambda: open_pipeline(settings(own_flux)).outline))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 40}, "--height 40: expected a multiple of 16 pixels"),
        ({"width": 8}, "pass --width 16"),
        ({"frames": 5}, "--frames 5: 'tiny-flux' draws pictures; leave --frames out"),
    ],
)
def test_sizes_that_do_not_fit(saved_flux: Path, size: dict[str, int], message: str) -> None:
    assert message in refusal(lambda: open_pipeline(settings(saved_flux, **size)))


def test_lengths_of_videos_that_do_not_fit(saved_wan: Path) -> None:
    message = refusal(lambda: open_pipeline(settings(saved_wan, frames=8)))
    assert "--frames 8: expected 1 more than a multiple of 4 for 'tiny-wan'; pass --frames 9" in message


def test_a_second_transformer_goes_with_a_boundary(saved_wan: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_wan, tmp_path / "wan"))
    edit_json(folder / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
    message = refusal(lambda: open_pipeline(settings(folder)))
    assert "boundary_ratio is None and there is a WanTransformer3DModel as its second transformer" in message
    edit_json(folder / "model_index.json", transformer_2=["diffusers", "FluxTransformer2DModel"], boundary_ratio=0.9)
    message = refusal(lambda: open_pipeline(settings(folder)))
    assert "has a FluxTransformer2DModel as its second transformer, expected a WanTransformer3DModel" in message


def test_a_second_transformer_where_the_pipeline_has_one(saved_flux: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_flux, tmp_path / "flux"))
    edit_json(folder / "model_index.json", transformer_2=["diffusers", "FluxTransformer2DModel"], boundary_ratio=0.9)
    message = refusal(lambda: open_pipeline(settings(folder)))
    assert "has a FluxTransformer2DModel as its second transformer, expected one that denoises all steps" in message


def test_two_transformers_of_other_widths_are_refused(saved_wan: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_wan, tmp_path / "wan"))
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    edit_json(folder / "transformer_2" / "config.json", ffn_dim=64)
    edit_json(folder / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.9)
    message = refusal(lambda: open_pipeline(settings(folder)))
    assert "ffn_dim is 128 in 'transformer' and 64 in 'transformer_2'" in message


def test_a_pipeline_of_two_transformers_is_no_base(saved_wan: Path, tmp_path: Path) -> None:
    """One of them with another's weights would be a model that nobody asked for."""
    folder = Path(shutil.copytree(saved_wan, tmp_path / "wan"))
    edit_json(folder / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.9)
    message = refusal(lambda: open_pipeline(settings(saved_wan / "transformer", base=str(folder))))
    assert "has two transformers, and" in message


def test_what_a_base_is_needed_for(saved_flux: Path, tmp_path: Path) -> None:
    transformer, file = saved_flux / "transformer", saved_flux / WEIGHTS
    assert "a transformer alone has no text encoders; pass --base" in refusal(
        lambda: open_pipeline(settings(transformer))
    )
    assert "a single file holds the transformer alone; pass --base" in refusal(lambda: open_pipeline(settings(file)))
    assert "is a whole pipeline already; leave --base out" in refusal(
        lambda: open_pipeline(settings(saved_flux, base=str(saved_flux)))
    )
    assert "has no model_index.json; name" in refusal(lambda: open_pipeline(settings(file, base=str(transformer))))
    pickle = tmp_path / "tune.ckpt"
    pickle.write_bytes(b"\x80")
    assert "is a pickle" in refusal(lambda: open_pipeline(settings(pickle, base=str(saved_flux))))
    (tmp_path / "empty").mkdir()
    assert "has neither model_index.json nor config.json" in refusal(
        lambda: open_pipeline(settings(tmp_path / "empty"))
    )


def test_a_single_file_of_another_model(saved_flux: Path, own_flux: Path, tmp_path: Path) -> None:
    edit_json(own_flux / "transformer" / "config.json", num_layers=2)
    file = Path(shutil.copy(saved_flux / WEIGHTS, tmp_path / "tune.safetensors"))
    message = refusal(lambda: open_pipeline(settings(file, base=str(own_flux))))
    assert "has no tensor 'transformer_blocks.1." in message


def test_hub_ids_are_refused_offline() -> None:
    message = refusal(lambda: open_pipeline(settings("black-forest-labs/FLUX.1-none")))
    assert "could not be downloaded (HF_HUB_OFFLINE is set); run 'hf download black-forest-labs/FLUX.1-none'" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(own_flux: Path, value: float) -> None:
    tensors = read_tensors(own_flux / WEIGHTS)
    tensors["single_transformer_blocks.0.proj_mlp.weight"][3, 1:3] = value
    write_tensors(own_flux / WEIGHTS, tensors)
    message = refusal(lambda: load(open_pipeline(settings(own_flux))))
    assert "weight 'single_transformer_blocks.0.proj_mlp.weight' has 2 of 16384 numbers that are NaN" in message


def test_weights_that_are_quantized_already_are_named(own_flux: Path) -> None:
    file, name = own_flux / WEIGHTS, "transformer_blocks.0.attn.to_q.weight"
    tensors = read_tensors(file)
    write_tensors(file, tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    message = refusal(lambda: open_pipeline(settings(own_flux)))
    assert f"holds '{name}' as F8_E4M3, expected BF16, F16, F32, F64: it is quantized already" in message


def test_encoders_that_are_not_finite_are_refused(own_flux: Path) -> None:
    file = own_flux / "text_encoder_2" / "model.safetensors"
    tensors = read_tensors(file)
    write_tensors(file, {name: value * float("nan") for name, value in tensors.items()})
    assert "the encoding of the prompt 'a red' has NaN or infinite numbers" in refusal(
        lambda: load(open_pipeline(settings(own_flux)))
    )


def test_a_file_that_is_not_what_the_hub_published(own_flux: Path) -> None:
    metadata = own_flux / ".cache" / "huggingface" / "download" / f"{WEIGHTS}.metadata"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"0123abc\n{'0' * 64}\n1700000000.0\n")
    message = refusal(lambda: open_pipeline(settings(own_flux)).outline)
    assert re.search(r"was altered or is incomplete: got sha256 [0-9a-f]{64}, the hub published 0{64}", message)


def test_a_blob_that_is_not_what_its_name_says(own_flux: Path, tmp_path: Path) -> None:
    """The hub's cache: a snapshot is links to files named by their hash."""
    blob = tmp_path / "blobs" / ("1" * 64)
    blob.parent.mkdir()
    shutil.move(own_flux / WEIGHTS, blob)
    (own_flux / WEIGHTS).symlink_to(blob)
    assert f"the hub published {'1' * 64}" in refusal(lambda: open_pipeline(settings(own_flux)).outline)


def lora_of_another_model(file: Path) -> Path:
    save_lora(file)
    write_tensors(file, {n.replace("blocks.0", "blocks.7"): t for n, t in read_tensors(file).items()})
    return file


def lora_of_another_width(file: Path) -> Path:
    return save_lora(file, width=32)


def not_a_lora(file: Path) -> Path:
    write_tensors(file, {"transformer.x": torch.zeros(1)})
    return file


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lora_of_another_model,
            "changes '(single_)?transformer_blocks.7.*', which this FluxTransformer2DModel does not",
        ),
        (lora_of_another_width, "does not fit this FluxTransformer2DModel"),
        (not_a_lora, "LoRA|changes"),
    ],
)
def test_a_lora_that_does_not_fit(saved_flux: Path, tmp_path: Path, make: Callable, message: str) -> None:
    file = make(tmp_path / "bad.safetensors")
    opened = open_pipeline(settings(saved_flux, loras=(str(file),)))
    assert re.search(message, refusal(lambda: load(opened)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{file}:much", "got the scale 'much', expected a number"),
        ("{file}:nan", "got the scale 'nan', expected a number"),
        ("nowhere.safetensors", "'nowhere.safetensors' does not exist"),
        ("{folder}/x.bin", "is a pickle"),
    ],
)
def test_arguments_of_lora(saved_flux: Path, tmp_path: Path, text: str, message: str) -> None:
    file = save_lora(tmp_path / "x.safetensors")
    shutil.copy(file, tmp_path / "x.bin")
    given = text.format(file=file, folder=tmp_path)
    assert message in refusal(lambda: open_pipeline(settings(saved_flux, loras=(given,))))
