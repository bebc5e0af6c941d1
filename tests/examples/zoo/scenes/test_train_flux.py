"""The training of the Flux models on scenes: each loss has its minimum where it should, a stopped training goes on."""

import json
import sys
from pathlib import Path

import pytest
import torch

from adatsq_trt import zoo
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.models.prompts import TextEncoder
from adatsq_trt.zoo.loading import load_model
from examples.zoo.scenes import train_flux, training
from examples.zoo.scenes.training import SceneSet, make_scenes


@pytest.fixture
def dev() -> FluxAdapter:
    return untrained(0, guidance_embeds=True)


@pytest.fixture(scope="module")
def scenes() -> SceneSet:
    return make_scenes(64, 0, text(untrained(0, guidance_embeds=False)))


def untrained(seed: int, guidance_embeds: bool) -> FluxAdapter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return train_flux.make_adapter(guidance_embeds)


def text(adapter: FluxAdapter) -> TextEncoder:
    assert isinstance(adapter.encoder, TextEncoder)
    return adapter.encoder


def weights(adapter: FluxAdapter) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in adapter.transformer.parameters()])


@torch.no_grad()
def test_folding_the_guidance_embedding_changes_nothing(dev: FluxAdapter, scenes: SceneSet) -> None:
    schnell = train_flux.without_guidance_embedding(dev)
    latent, words, sigma = torch.randn(4, 16, 48), scenes.words[:4], torch.rand(4)
    expected = train_flux.velocity(dev, latent, words, sigma, torch.full((4,), train_flux.GUIDANCE))
    torch.testing.assert_close(train_flux.velocity(schnell, latent, words, sigma, None), expected)
    other = train_flux.velocity(dev, latent, words, sigma, torch.full((4,), 1.0))
    assert (other - expected).abs().max() > 1e-3


@torch.no_grad()
def test_guidance_loss_vanishes_for_what_guides_by_itself(
    dev: FluxAdapter, scenes: SceneSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that ignores its prompt guides nowhere, so it is its own student."""
    blind = SceneSet(scenes.latents, torch.zeros_like(scenes.words))
    monkeypatch.setattr(train_flux, "LARGEST_GUIDANCE", 1.0)
    assert train_flux.guidance_loss(dev, dev, blind) < 1e-10
    assert train_flux.guidance_loss(untrained(1, guidance_embeds=True), dev, blind) > 1e-4


@torch.no_grad()
def test_few_step_loss_measures_against_the_straight_line(dev: FluxAdapter, scenes: SceneSet) -> None:
    """Trajectories that the student itself makes in four steps are straight lines to it."""
    student, words = train_flux.without_guidance_embedding(dev), scenes.words
    schedule = student.schedule(train_flux.SCHNELL_STEPS)
    latents = [torch.randn(len(words), 16, 48)]
    for step in range(train_flux.SCHNELL_STEPS):
        sigma = torch.full((len(words),), schedule.model_time(step))
        latents.append(
            schedule.advance(latents[-1], train_flux.velocity(student, latents[-1], words, sigma, None), step)
        )
    assert train_flux.few_step_loss(student, torch.stack(latents), words) < 1e-8
    assert train_flux.few_step_loss(student, train_flux.teacher_trajectories(dev, words), words) > 1e-8


def test_teacher_trajectories_end_where_the_loop_does(dev: FluxAdapter, scenes: SceneSet) -> None:
    latents = train_flux.teacher_trajectories(dev, scenes.words)
    assert latents.shape == (train_flux.SCHNELL_STEPS + 1, 64, 16, 48)
    schedule, latent = dev.schedule(train_flux.TEACHER_STEPS), latents[0]
    for step in range(train_flux.TEACHER_STEPS):
        sigma, scale = torch.full((64,), schedule.model_time(step)), torch.full((64,), train_flux.GUIDANCE)
        with torch.no_grad():
            latent = schedule.advance(latent, train_flux.velocity(dev, latent, scenes.words, sigma, scale), step)
    torch.testing.assert_close(latent, latents[-1])


class KilledError(Exception):
    pass


def test_a_killed_training_ends_with_the_same_weights(
    scenes: SceneSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_CHECKPOINTS", -1)

    def run(file: Path, calls: int) -> torch.Tensor:
        adapter, left = untrained(0, guidance_embeds=True), iter(range(calls))

        def loss() -> torch.Tensor:
            if next(left, None) is None:
                raise KilledError
            return train_flux.flow_matching_loss(adapter, scenes)

        training.Trainer(adapter, 1e-3, file).run(loss, 4)
        return weights(adapter)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = run(tmp_path / "whole.safetensors", 4)
        torch.manual_seed(0)
        with pytest.raises(KilledError):
            run(tmp_path / "killed.safetensors", 2)
        torch.manual_seed(5)
        assert torch.equal(run(tmp_path / "killed.safetensors", 2), whole)
    assert not torch.equal(whole, weights(untrained(0, guidance_embeds=True)))


def test_what_is_trained_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SCENES", 64), ("TRAJECTORIES", 64), ("PROMPTS", 6), ("DEV_STEPS", 2)):
        monkeypatch.setattr(train_flux, name, value)
    arguments = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "zoo"), "--iterations", "1", "1", "1"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    monkeypatch.setattr(zoo, "ZOO_FOLDER", tmp_path / "zoo")
    with torch.random.fork_rng():
        train_flux.main()
    dev, schnell = load_model("scenes-flux-dev"), load_model("scenes-flux-schnell")
    assert (dev.default_steps, dev.default_guidance, schnell.default_steps) == (2, train_flux.GUIDANCE, 4)
    assert dev.adapter.takes_guidance
    assert not schnell.adapter.takes_guidance
    record = json.loads((tmp_path / "zoo" / "scenes-flux-dev" / "training.json").read_text())
    assert 0 <= record["scores"]["mean"] <= 1
