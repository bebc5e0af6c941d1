"""The training command, with a handful of iterations."""

import json
import sys
from pathlib import Path

import pytest
import torch

from adatsq_trt import zoo
from adatsq_trt.zoo.loading import TRANSFORMER_WEIGHTS, load_model
from examples.zoo import train_digits_flux

# Quality is measured on so few samples and steps here; the shipped record has 300 samples of up to 50 steps.
QUALITY = {"judge_on_held_out_digits": 0.9}


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
    arguments = ["train", "--output", str(folder), "--iterations", "3", "--seed", str(seed)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(train_digits_flux, "measure", lambda _adapter: QUALITY)
    with torch.random.fork_rng():
        train_digits_flux.main()


def test_what_is_trained_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "mine", monkeypatch)
    monkeypatch.setattr(zoo, "ZOO_FOLDER", tmp_path)
    model = load_model("mine")
    assert len(model.adapter.quantizable_layers()) == 44
    latent = torch.zeros(1, *model.adapter.latent_shape)
    with torch.no_grad():
        velocity = model.adapter.velocity(latent, 0.5, model.adapter.encode([3]), 2.0)
    assert velocity.isfinite().all()
    record = json.loads((tmp_path / "mine" / "training.json").read_text())
    assert (record["seed"], record["iterations"], record["judge_on_held_out_digits"]) == (0, 3, 0.9)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_digits_flux, "BATCH", 16)
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        train(tmp_path / name, monkeypatch, seed)
    one, two, other = ((tmp_path / name / TRANSFORMER_WEIGHTS).read_bytes() for name in ("one", "two", "other"))
    assert one == two
    assert one != other


def test_training_lowers_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_digits_flux, "AVERAGE", 0.0)  # a running average of so few iterations is the start
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = train_digits_flux.make_adapter()
        images, labels = train_digits_flux.digits()
        latents = train_digits_flux.pack(images)

        def loss() -> float:
            torch.manual_seed(1)
            x0, noise, label, sigma = next(train_digits_flux.batches(latents, labels, 1))
            mix = sigma[:, None, None]
            condition = adapter.encode(label.tolist()).conditional
            with torch.no_grad():
                got = adapter.trace_module()((1 - mix) * x0 + mix * noise, *condition.values(), sigma)
            return float((got - (noise - x0)).square().mean())

        before = loss()
        train_digits_flux.train(adapter, images, labels, 15)
        assert loss() < 0.97 * before


def test_samples_are_seeded_pictures() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = train_digits_flux.make_adapter()
    drawn = train_digits_flux.sample(adapter, [0, 1, 2], 2, 2.0, seed=0)
    assert drawn.shape == (3, 8, 8, 1)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert torch.equal(drawn, train_digits_flux.sample(adapter, [0, 1, 2], 2, 2.0, seed=0))
