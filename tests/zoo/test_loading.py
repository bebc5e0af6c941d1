"""The model that ships: its layers, its size, its quality, and what happens when a file is damaged."""

import shutil
from pathlib import Path

import pytest
import torch
from sklearn.svm import SVC

from adatsq_trt import zoo
from adatsq_trt.calibration.trajectory import seeded_samples, trajectory
from adatsq_trt.errors import DamagedFileError, MissingFileError, UnknownNameError
from adatsq_trt.files import sha256
from adatsq_trt.zoo.loading import TRANSFORMER_WEIGHTS, LoadedModel, find_model, load_model
from adatsq_trt.zoo.train_digits_flux import TRAIN_IMAGES, digits


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
    files = [file for file in digits_flux.folder.rglob("*.safetensors")]
    assert sum(file.stat().st_size for file in files) <= 2_000_000
    assert digits_flux.weights_sha256 == sha256(digits_flux.folder / TRANSFORMER_WEIGHTS)


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
    samples = seeded_samples(adapter, adapter.schedule(10), 2.0, 40, 0, adapter.classes)
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


@pytest.mark.parametrize("name", ["model_index.json", "class_embedding/model.safetensors"])
def test_other_truncated_files_are_named(own_zoo: Path, name: str) -> None:
    file = own_zoo / name
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DamagedFileError, match=Path(name).name.replace(".", r"\.")):
        load_model("digits-flux")


@pytest.mark.parametrize("name", [str(TRANSFORMER_WEIGHTS), "class_embedding/model.safetensors"])
def test_missing_files_are_named(own_zoo: Path, name: str) -> None:
    (own_zoo / name).unlink()
    with pytest.raises(MissingFileError, match=Path(name).name.replace(".", r"\.")):
        load_model("digits-flux")
