"""A LoRA that a finished bundle loads: the picture of the fused one, and nothing of it once it is unloaded."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

import adatsq_trt
from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.engines.accuracy import check
from adatsq_trt.engines.backends.onnxruntime import OnnxRuntimeSteps
from adatsq_trt.errors import DamagedFileError, MismatchError, MissingFileError, UserError
from adatsq_trt.results import Bundle
from adatsq_trt.stages import refine
from adatsq_trt.stages.lora_slots import load_loras
from adatsq_trt.stages.models import open_run
from tests.checkpoints.test_lora import randomize
from tests.lora_dialects import AB, FLUX_QKV, READ, kohya_flux, merge, named
from tests.tiny_checkpoints import HEIGHT, WIDTH, make_flux_pipeline
from tests.tiny_wan_experts import distance

RANK, SCALE, STEPS, PROMPTS = 4, 0.6, 2, ("a red three", "seven and a green three")
SMALL: dict[str, Any] = {
    **{"target": "cpu", "steps": STEPS, "prompts": PROMPTS, "height": HEIGHT, "width": WIDTH, "formats": "w8a32"},
    **{"calibration_samples": 2, "selection_samples": 2, "held_out_samples": 2, "lora_slots": RANK},
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Bundle]]:
    """Flux with 8 bits for weights only: activations that cross a tie would hide what is looked for."""
    folder = tmp_path_factory.mktemp("slots")
    make_pipeline().save_pretrained(folder / "pipeline")
    with adatsq_trt.build(folder / "pipeline", output=folder / "run", **SMALL) as bundle:
        yield folder, bundle


@pytest.fixture
def bundle(built: tuple[Path, Bundle]) -> Iterator[Bundle]:
    """With empty slots."""
    yield built[1]
    built[1].unload_lora()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As diffusers' own training scripts save it, with its alpha in the header; of layers of every kind."""
    transformer, folder = make_flux_pipeline().transformer, tmp_path_factory.mktemp("lora")
    layers = ["to_q", "to_k", "add_k_proj", "to_out.0", "ff.net.0.proj", "ff_context.net.2", "proj_mlp"]
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=10, target_modules=layers))
    randomize(transformer)
    metadata = {**transformer.peft_config["default"].to_dict()}
    matrices = get_peft_model_state_dict(transformer)
    FluxPipeline.save_lora_weights(folder, matrices, transformer_lora_adapter_metadata=metadata)
    return folder / "pytorch_lora_weights.safetensors"


def make_pipeline() -> FluxPipeline:
    pipe = make_flux_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.text_encoder.eval()
    pipe.text_encoder_2.eval()
    return pipe


def draw(pipe: DiffusionPipeline, noise: np.ndarray) -> np.ndarray:
    """The latents that a pipeline ends with."""
    size = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS}
    latents = torch.from_numpy(noise)
    return np.asarray(pipe(list(PROMPTS), latents=latents, output_type="latent", **size).images)


def own(bundle: Bundle, **options: Any) -> np.ndarray:
    return np.asarray(bundle.denoise(bundle.noise([4, 5]), bundle.conditioning([0, 1]), **options))


class Beside(nn.Module):
    """A quantized layer and what a LoRA adds to the layer, of the same input."""

    def __init__(self, layer: nn.Module, change: Tensor) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.change.mT


@torch.no_grad()
def in_pytorch(run: Path, changes: Mapping[str, Tensor]) -> np.ndarray:
    """The loop of the run's fake-quantized model with these changes of weights beside it, in full precision."""
    context = open_run(run)
    samples = Samples(context.adapter, context.schedule, context.settings.guidance, (0, 1), (4, 5))
    policy = adatsq_trt.Policy.load(run / "policy.json")
    with context.simulated(refine.load(context)).installed() as model:
        for layer, change in changes.items():
            transformer = context.adapter.transformer
            transformer.set_submodule(layer, Beside(transformer.get_submodule(layer), change))
        latents = trajectory(samples, lambda step: model.assign(policy.formats_at(step), step))
    return np.asarray(latents[-1])


def changes_of(file: Path, scale: float) -> dict[str, Tensor]:
    """What diffusers adds to weights when it fuses a file."""
    pipe, before = make_pipeline(), make_pipeline().transformer.state_dict()
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    pipe.fuse_lora(lora_scale=scale, components=["transformer"])
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    return {n.removesuffix(".weight"): after[n] - before[n] for n in after if (after[n] - before[n]).any()}


def test_a_lora_that_is_loaded_gives_the_picture_of_the_fused_one(built, bundle: Bundle, trained: Path) -> None:
    """In full precision the pipeline's own; quantized that of PyTorch's quantized model with the LoRA beside it."""
    pipe, noise = make_pipeline(), bundle.noise([4, 5])
    plain, quantized = own(bundle, quantized=False), own(bundle)
    assert distance(plain, draw(pipe, noise)) < 1e-4
    loaded = bundle.load_lora(trained, SCALE)
    changes = changes_of(trained, SCALE)
    assert (sorted(loaded.layers), loaded.dropped) == (sorted(changes), ())
    assert len(loaded.keys) == 2 * len(changes) == 18
    pipe.load_lora_weights(trained.parent, weight_name=trained.name)
    pipe.fuse_lora(lora_scale=SCALE, components=["transformer"])
    assert distance(own(bundle, quantized=False), draw(pipe, noise)) < 1e-4
    expected, got = in_pytorch(built[0] / "run", changes), own(bundle)
    assert distance(got, expected) < 1e-5
    assert distance(quantized, in_pytorch(built[0] / "run", {})) < 1e-5
    assert distance(got, quantized) > 5e-3, "it shows in the picture"
    # In the unmodified pipeline it is the same bundle.
    beside = make_pipeline()
    beside.transformer = bundle.transformer()
    assert distance(draw(beside, noise), got) < 1e-5
    bundle.unload_lora()
    np.testing.assert_array_equal(own(bundle), quantized)
    np.testing.assert_array_equal(own(bundle, quantized=False), plain)


def test_loras_of_no_effect_change_no_bit(bundle: Bundle, trained: Path, tmp_path: Path) -> None:
    before = own(bundle)
    bundle.load_lora(trained, 0.0)
    np.testing.assert_array_equal(own(bundle), before)
    bundle.unload_lora()
    tensors = named(f"transformer.{FLUX_QKV[0]}", FLUX_QKV[0], **AB)[0]
    save_file({k: v * ("lora_A" in k) for k, v in tensors.items()}, tmp_path / "untrained.safetensors")
    bundle.load_lora(tmp_path / "untrained.safetensors")
    np.testing.assert_array_equal(own(bundle), before)


def test_several_add_up_to_the_rank_of_the_slots(bundle: Bundle, tmp_path: Path) -> None:
    """Side by side they are one LoRA of the sum of their ranks."""
    layer, files = FLUX_QKV[0], [tmp_path / f"{name}.safetensors" for name in ("a", "b", "both")]
    halves = [named(f"transformer.{layer}", layer, rank=rank, **AB)[0] for rank in (1, 3)]
    down, up = (f"transformer.{layer}.lora_{part}.weight" for part in "AB")
    both = {down: torch.cat([half[down] for half in halves]), up: torch.cat([half[up] for half in halves], dim=1)}
    for file, tensors in zip(files, (*halves, both), strict=True):
        save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    bundle.load_lora(files[2])
    expected = own(bundle)
    bundle.unload_lora()
    first = bundle.load_lora(files[0])
    alone = own(bundle)
    assert first.sentence == f"LoRA '{files[0]}': 2 of 2 keys applied to 1 layers, scale 1"
    bundle.load_lora(files[1])
    np.testing.assert_allclose(own(bundle), expected, atol=1e-5)
    message = rf"got rank 1 in layer '{layer}' together with 4 of those that are loaded, .* have rank 4; .*slots 5"
    with pytest.raises(MismatchError, match=message):
        bundle.load_lora(files[0])
    np.testing.assert_allclose(own(bundle), expected, atol=1e-5)
    assert distance(alone, expected) > 1e-4


def test_a_rank_above_that_of_the_slots(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "large.safetensors"
    save_file(named(f"transformer.{FLUX_QKV[0]}", FLUX_QKV[0], rank=RANK + 1, **AB)[0], file)
    with pytest.raises(MismatchError, match=r"got rank 5 in layer '.*to_q', the bundle's slots have rank 4; .*slots 5"):
        bundle.load_lora(file)


def test_a_file_that_matches_in_part(bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a layer without a slot, and of a block that the transformer does not have."""
    later, outside = FLUX_QKV[0].replace(".0.", ".7.", 1), "x_embedder"
    tensors, _ = merge(*(named(f"transformer.{path}", path, **AB) for path in (FLUX_QKV[0], later, outside)))
    save_file(tensors, tmp_path / "part.safetensors")
    message = r"4 of its 6 keys change what has no slot in the bundle, such as 'transformer\.(.*7.*)', .*--lora-partial"
    with pytest.raises(MismatchError, match=message):
        bundle.load_lora(tmp_path / "part.safetensors")
    loaded = bundle.load_lora(tmp_path / "part.safetensors", partial=True)
    assert loaded.layers == (FLUX_QKV[0],)
    assert sorted(loaded.dropped) == sorted(key for key in tensors if FLUX_QKV[0] not in key)
    assert "2 of 6 keys applied to 1 layers" in loaded.sentence
    strange = {key: value for key, value in tensors.items() if FLUX_QKV[0] not in key}
    save_file(strange, tmp_path / "strange.safetensors")
    with pytest.raises(MismatchError, match=r"no slot in the bundle|changes nothing in a FluxTransformer2DModel"):
        bundle.load_lora(tmp_path / "strange.safetensors", partial=True)


def test_a_dialect_of_fused_layers_with_a_text_encoder(bundle: Bundle, tmp_path: Path, caplog) -> None:
    """One product for q, k and v; what changes text encoders is left out, as where it is fused."""
    tensors, deltas = kohya_flux()
    save_file(tensors, tmp_path / "kohya.safetensors")
    loaded = bundle.load_lora(tmp_path / "kohya.safetensors")
    assert sorted(loaded.layers) == sorted(name.removesuffix(".weight") for name in deltas)
    assert sorted(loaded.keys) == sorted(key for key in tensors if not key.startswith("lora_te"))
    assert "2 tensors of text encoders are left out" in caplog.text


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_magnitude_vector": torch.ones(64)}, r"has magnitudes \(DoRA\), .* fuse it when the bundle is built"),
        ({"lora_B.bias": torch.ones(64)}, r"1 of its 3 keys change what has no slot in the bundle, such as '.*B\.bias"),
        ({"lora_B.weight": torch.full((64, 4), torch.nan)}, "numbers that are NaN, infinite or too large"),
    ],
)
def test_what_no_slot_does(bundle: Bundle, tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    plain, _ = named(f"transformer.{FLUX_QKV[0]}", FLUX_QKV[0], **AB)
    save_file(plain | {f"transformer.{FLUX_QKV[0]}.{n}": v for n, v in tensors.items()}, tmp_path / "odd.safetensors")
    before = own(bundle)
    with pytest.raises((MismatchError, DamagedFileError), match=message):
        bundle.load_lora(tmp_path / "odd.safetensors")
    np.testing.assert_array_equal(own(bundle), before)


def test_other_files_and_bundles(bundle: Bundle, built, trained: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(MissingFileError, match=r"none\.safetensors' does not exist"):
        bundle.load_lora(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="got the scale 'inf', expected a number"):
        bundle.load_lora(trained, float("inf"))
    save_file(READ["ComfyUI, Z-Image"][1]()[0], tmp_path / "z.safetensors")
    with pytest.raises(DamagedFileError, match="is not a LoRA that diffusers understands"):
        bundle.load_lora(tmp_path / "z.safetensors", partial=True)
    plain = bundle.manifest.model_copy(update={"lora_slots": None})
    monkeypatch.setattr(Bundle, "manifest", plain)
    with pytest.raises(MismatchError, match="has no slots for LoRAs; build it again with --lora-slots RANK, or fuse"):
        bundle.load_lora(trained)
    monkeypatch.undo()


def test_the_check_passes(bundle: Bundle, tmp_path: Path) -> None:
    assert check(bundle.files, tmp_path).passed


def test_partial_loras_without_any_are_refused(bundle: Bundle) -> None:
    with pytest.raises(UserError, match="--lora-partial: there is no --lora"):
        load_loras(bundle, (), True)


def test_where_a_lora_cannot_be_taken_the_former_ones_are_in_use(
    bundle: Bundle, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a GPU has no room: neither a runner that is there nor one that is made later goes on without them."""
    before = own(bundle)

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    for fails_when_made in (False, True):
        with monkeypatch.context() as patch:
            if fails_when_made:
                bundle.load_lora(trained, SCALE)
                bundle._runners.clear()
            patch.setattr(OnnxRuntimeSteps, "set_loras", fail)
            with pytest.raises(MemoryError):
                own(bundle) if fails_when_made else bundle.load_lora(trained, SCALE)
        changed = distance(own(bundle), before)
        assert changed > 5e-3 if fails_when_made else changed == 0
