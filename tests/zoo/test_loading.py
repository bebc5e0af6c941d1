"""The model that ships: its layers, its size, its quality, and what happens when a file is damaged."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from sklearn.svm import SVC

from adatsq_trt import zoo
from adatsq_trt.calibration.trajectory import seeded_samples, trajectory
from adatsq_trt.errors import DamagedFileError, MissingFileError, UnknownNameError
from adatsq_trt.files import sha256, write_tensors
from adatsq_trt.zoo.loading import (
    CLASS_EMBEDDING,
    INDEX,
    SCHEDULER_CONFIG,
    TEXT_ENCODER,
    TEXT_ENCODER_CONFIG,
    TRANSFORMER_CONFIG,
    TRANSFORMER_WEIGHTS,
    LoadedModel,
    find_model,
    load_model,
    model_sha256,
)
from adatsq_trt.zoo.scenes.judge import column_scores, load_judge
from adatsq_trt.zoo.scenes.prompts import evaluation_prompts
from examples.zoo.sampling import sample
from examples.zoo.train_digits_flux import TRAIN_IMAGES, digits


@pytest.fixture(scope="module")
def digits_flux() -> LoadedModel:
    return load_model("digits-flux")


@pytest.fixture
def own_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be damaged."""
    folder = tmp_path / "digits-flux"
    shutil.copytree(find_model("digits-flux"), folder)
    monkeypatch.setattr(zoo, "ZOO_FOLDER", tmp_path)
    return folder


def test_the_zoo_model_has_44_layers_and_small_weights(digits_flux: LoadedModel) -> None:
    assert len(digits_flux.adapter.quantizable_layers()) == 44
    assert (digits_flux.default_steps, digits_flux.default_guidance) == (20, 2.0)
    folder = find_model("digits-flux")
    files = list(folder.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 2_000_000
    assert digits_flux.weights_sha256 == sha256(folder / TRANSFORMER_WEIGHTS)


def test_weights_are_float32_and_exact_in_bfloat16(digits_flux: LoadedModel) -> None:
    for parameter in digits_flux.adapter.transformer.parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
        assert torch.equal(parameter, parameter.bfloat16().float())


def test_samples_show_the_digit_that_was_asked_for(digits_flux: LoadedModel) -> None:
    images, labels = digits()
    flat = images.flatten(1).numpy() * 2 - 1
    judge = SVC(gamma=0.02, C=10).fit(flat[:TRAIN_IMAGES], labels[:TRAIN_IMAGES])
    assert judge.score(flat[TRAIN_IMAGES:], labels[TRAIN_IMAGES:]) > 0.9  # a judge worth asking
    adapter = digits_flux.adapter
    samples = seeded_samples(adapter, adapter.schedule(10), 2.0, 40, 0, range(len(adapter.prompts)))
    drawn = adapter.decode(trajectory(samples)[-1]).flatten(1).numpy() * 2 - 1
    assert judge.score(drawn, samples.prompts) >= 0.95
    # Not one picture per class: two samples of a class differ.
    assert all(abs(drawn[i] - drawn[i + 10]).mean() > 0.05 for i in range(10))


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'digits-flux'"):
        load_model("digit-flux")


@pytest.mark.parametrize("kept", [0, 100, 500_000, -1])
def test_truncated_weights_are_named(own_zoo: Path, kept: int) -> None:
    file = own_zoo / TRANSFORMER_WEIGHTS
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DamagedFileError, match=r"diffusion_pytorch_model\.safetensors' is not a complete"):
        load_model("digits-flux")


@pytest.mark.parametrize("name", [INDEX, TRANSFORMER_CONFIG, SCHEDULER_CONFIG, CLASS_EMBEDDING], ids=str)
@pytest.mark.parametrize("kept", [0, 40, -3])
def test_other_truncated_files_are_named(own_zoo: Path, name: Path, kept: int) -> None:
    file = own_zoo / name
    file.write_bytes(file.read_bytes()[:kept])
    assert str(file) in refusal()


def refusal(name: str = "digits-flux") -> str:
    """What a damaged model is answered with: one sentence that does not speak of stages."""
    with pytest.raises(DamagedFileError) as error:
        load_model(name)
    message = str(error.value)
    assert message.endswith("; install the package again")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (TRANSFORMER_CONFIG, "num_layers", 3),  # a random third block
        (TRANSFORMER_CONFIG, "num_layers", 1),
        (TRANSFORMER_CONFIG, "num_layers", "two"),
        (TRANSFORMER_CONFIG, "num_attention_heads", 8),
        (TRANSFORMER_CONFIG, "axes_dims_rope", [4, 4]),
        (SCHEDULER_CONFIG, "shift", "1"),
        (SCHEDULER_CONFIG, "num_train_timesteps", None),
        (INDEX, "image_size", 7),
        (INDEX, "image_size", -8),
        (INDEX, "default_steps", 0),
        (INDEX, "default_guidance", "much"),
        (INDEX, "transformer", ["diffusers", "LuminaNextDiT2DModel"]),
    ],
)
def test_altered_settings_are_refused(own_zoo: Path, name: Path, key: str, value: object) -> None:
    content = json.loads((own_zoo / name).read_text())
    (own_zoo / name).write_text(json.dumps({**content, key: value}))
    assert str(own_zoo / name) in refusal()


@pytest.mark.parametrize("name", [TRANSFORMER_CONFIG, SCHEDULER_CONFIG, INDEX])
@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff\xfe"])
def test_files_that_hold_something_else_are_refused(own_zoo: Path, name: Path, content: bytes) -> None:
    (own_zoo / name).write_bytes(content)
    assert str(own_zoo / name) in refusal()


@pytest.mark.parametrize(
    ("tensors", "got"),
    [
        ({"table": torch.zeros(11, 32)}, "no tensor 'weight' but ['table']"),
        ({"weight": torch.zeros(11, 31)}, "'weight' of shape (11, 31)"),
        ({"weight": torch.zeros(32)}, "'weight' of shape (32,)"),
    ],
)
def test_a_class_embedding_of_another_kind_is_refused(
    own_zoo: Path, tensors: dict[str, torch.Tensor], got: str
) -> None:
    write_tensors(own_zoo / CLASS_EMBEDDING, tensors)
    assert f"holds {got}, expected 'weight' of shape (classes + 1, 32)" in refusal()


@pytest.mark.parametrize("name", [INDEX, SCHEDULER_CONFIG, TRANSFORMER_CONFIG])
def test_every_configuration_counts_in_the_models_hash(own_zoo: Path, name: Path) -> None:
    before = load_model("digits-flux")
    (own_zoo / name).write_text((own_zoo / name).read_text() + "\n")
    after = load_model("digits-flux")
    assert after.model_sha256 != before.model_sha256
    assert after.weights_sha256 == before.weights_sha256


def test_the_class_embedding_counts_in_the_models_hash(own_zoo: Path) -> None:
    before = model_sha256(own_zoo)
    write_tensors(own_zoo / CLASS_EMBEDDING, {"weight": torch.zeros(11, 32)})
    assert model_sha256(own_zoo) != before


def test_what_is_said_about_the_model_does_not_count(own_zoo: Path, digits_flux: LoadedModel) -> None:
    (own_zoo / "README.md").write_text("better words")
    (own_zoo / "training.json").unlink()
    assert model_sha256(own_zoo) == digits_flux.model_sha256


@pytest.mark.parametrize("name", [TRANSFORMER_WEIGHTS, TRANSFORMER_CONFIG, SCHEDULER_CONFIG, CLASS_EMBEDDING], ids=str)
def test_missing_files_are_named(own_zoo: Path, name: Path) -> None:
    (own_zoo / name).unlink()
    with pytest.raises(MissingFileError, match=Path(name).name.replace(".", r"\.")):
        load_model("digits-flux")


# ---------------------------------------------------------------------------------- models that take sentences


@pytest.fixture
def own_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of scenes-flux-dev that may be damaged."""
    folder = tmp_path / "scenes-flux-dev"
    shutil.copytree(find_model("scenes-flux-dev"), folder)
    monkeypatch.setattr(zoo, "ZOO_FOLDER", tmp_path)
    return folder


def test_dev_is_small_and_takes_sentences_and_a_guidance_scale() -> None:
    model = load_model("scenes-flux-dev")
    assert len(model.adapter.quantizable_layers()) == 34
    assert (model.default_steps, model.adapter.latent_shape) == (50, (16, 48))
    assert model.adapter.takes_guidance
    assert {"a 3", "three 5"} <= set(model.adapter.prompts)
    assert sum(file.stat().st_size for file in find_model("scenes-flux-dev").rglob("*.safetensors")) <= 6_000_000


def test_samples_show_what_the_sentences_say() -> None:
    """On 48 samples of 10 steps; the record has 600 of 50."""
    model, prompts = load_model("scenes-flux-dev"), evaluation_prompts(48)
    numbers = [model.adapter.prompts.index(str(prompt)) for prompt in prompts]
    images = sample(model.adapter, numbers, 10, model.default_guidance, seed=2)
    assert column_scores(load_judge(), images, prompts)["mean"] > 0.8


@pytest.mark.parametrize("name", [TEXT_ENCODER, TEXT_ENCODER_CONFIG], ids=str)
@pytest.mark.parametrize("kept", [0, 40, -3])
def test_a_truncated_text_encoder_is_named(own_scenes: Path, name: Path, kept: int) -> None:
    file = own_scenes / name
    file.write_bytes(file.read_bytes()[:kept])
    assert str(file) in refusal("scenes-flux-dev")


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        (TEXT_ENCODER_CONFIG, "prompts", ["a dog"], "unknown word 'dog'"),
        (TEXT_ENCODER_CONFIG, "words", ["", "a"], "size mismatch|Error"),
        (TEXT_ENCODER_CONFIG, "text_tokens", 7, "size mismatch|Error"),
        (TEXT_ENCODER_CONFIG, "schema_version", 2, "schema"),
        (INDEX, "patch_size", 3, "multiple"),
    ],
)
def test_altered_settings_of_sentences_are_refused(
    own_scenes: Path, name: Path, key: str, value: object, message: str
) -> None:
    content = json.loads((own_scenes / name).read_text())
    (own_scenes / name).write_text(json.dumps({**content, key: value}))
    assert re.search(message, refusal("scenes-flux-dev"))
