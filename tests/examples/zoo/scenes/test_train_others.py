"""The trainings of scenes-z-image and scenes-wan: the latents are right, the losses fall, what is saved loads."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from adatsq_trt import zoo
from adatsq_trt.models.flux import FluxAdapter, pack
from adatsq_trt.models.prompts import TextEncoder
from adatsq_trt.zoo.loading import load_model
from adatsq_trt.zoo.scenes.clips import clip_prompts
from examples.zoo.scenes import train_wan, train_z_image
from examples.zoo.scenes.training import Trainer, make_scenes


@pytest.fixture(scope="module")
def teacher() -> FluxAdapter:
    adapter = load_model("scenes-flux-dev").adapter
    assert isinstance(adapter, FluxAdapter)
    return adapter


def text(adapter) -> TextEncoder:
    assert isinstance(adapter.encoder, TextEncoder)
    return adapter.encoder


def test_planes_show_what_the_teachers_tokens_show(teacher: FluxAdapter) -> None:
    images = torch.rand(3, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    planes = train_z_image.to_planes(pack(images, 4))
    student = train_z_image.make_adapter(text(teacher))
    assert planes.shape[1:] == student.latent_shape
    torch.testing.assert_close(student.decode(planes), images)


def test_latents_of_clips_decode_to_the_clips() -> None:
    clips = torch.rand(2, 8, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    adapter, latents = train_wan.make_adapter(), train_wan.to_latents(clips)
    assert latents.shape[1:] == adapter.latent_shape
    torch.testing.assert_close(adapter.decode(latents), clips)


@pytest.mark.parametrize("name", ["z-image", "wan"])
def test_a_few_iterations_learn_and_leave_the_teachers_words_alone(
    teacher: FluxAdapter, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_wan, "BATCH", 8)  # the loss halves with any
    torch.manual_seed(0)
    words = text(teacher).words.weight.clone()
    if name == "wan":
        student, clips = train_wan.make_adapter(), train_wan.make_clips(32, 0, text(train_wan.make_adapter()))

        def loss() -> torch.Tensor:
            return train_wan.flow_matching_loss(student, clips)
    else:
        student, scenes = train_z_image.make_adapter(text(teacher)), make_scenes(32, 0, text(teacher))

        def loss() -> torch.Tensor:
            return train_z_image.distillation_loss(student, teacher, scenes)

    first = loss().item()
    trainer = Trainer(student, 1e-3, tmp_path / "checkpoint.safetensors")
    seen = []
    trainer.run(lambda: seen.append(loss()) or seen[-1], 12)
    assert sum(value.item() for value in seen[-3:]) / 3 < 0.9 * first
    assert torch.equal(text(teacher).words.weight, words)


@pytest.mark.parametrize(("module", "count"), [(train_z_image, "PROMPTS"), (train_wan, "CLIPS")])
def test_the_command_trains_saves_measures_and_goes_on(
    module: ModuleType, count: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two iterations: the commands of the model cards, from the command line to a model that loads."""
    sizes = {"BATCH": 2, "STEPS": 2, count: 12}
    if module is train_z_image:
        sizes["SCENES"] = 8
    for name, value in sizes.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(train_wan, "clip_prompts", lambda: clip_prompts()[:12])
    output = tmp_path / "zoo"
    arguments = ["train", "--work", str(tmp_path / "work"), "--output", str(output), "--iterations"]
    for iterations in ("1", "2"):
        monkeypatch.setattr(sys, "argv", [*arguments, iterations])
        module.main()
    record = json.loads((output / module.NAME / "training.json").read_text())
    assert record["iterations"] == 2
    assert 0 <= record["scores"]["mean"] <= 1
    monkeypatch.setattr(zoo, "ZOO_FOLDER", output)
    model = load_model(module.NAME)
    assert model.default_steps == 2
    assert model.adapter.architecture in ("ZImageTransformer2DModel", "WanTransformer3DModel")
    assert all(linear.in_features % 64 == 0 for linear in model.adapter.quantizable_layers().values())
    assert sum(file.stat().st_size for file in (output / module.NAME).rglob("*.safetensors")) <= 6_000_000
