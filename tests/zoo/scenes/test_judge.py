"""The judge that ships: how often it is right about real scenes, and that it can say no."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from adatsq_trt.errors import DamagedFileError, MissingFileError
from adatsq_trt.zoo.scenes.judge import WEIGHTS, Judge, column_scores, cut_cells, load_judge
from adatsq_trt.zoo.scenes.prompts import COLUMNS, Prompt, evaluation_prompts
from examples.zoo.scenes import train_judge
from examples.zoo.scenes.painting import Painter, draw_scene, load_split

SAMPLES = 600


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


@pytest.fixture(scope="module")
def real() -> tuple[torch.Tensor, list[Prompt]]:
    rng, painter = np.random.default_rng(2), Painter(load_split("held out"))
    prompts = evaluation_prompts(SAMPLES)
    images = np.stack([painter.paint(draw_scene(prompt, rng), rng) for prompt in prompts])
    return torch.from_numpy(images), prompts


def test_reads_real_held_out_scenes(judge: Judge, real: tuple[torch.Tensor, list[Prompt]]) -> None:
    scores = column_scores(judge, *real)
    assert list(scores) == [*COLUMNS, "mean"]
    assert min(scores.values()) > 0.94  # the record says more, over more scenes
    assert scores["mean"] > 0.97
    record = json.loads((WEIGHTS.parent / "training.json").read_text())
    assert all(record["held_out"][column] > 0.97 for column in COLUMNS)


def test_other_pictures_do_not_pass(judge: Judge, real: tuple[torch.Tensor, list[Prompt]]) -> None:
    images, prompts = real
    # The same column's next picture: only a few happen to show the same.
    assert column_scores(judge, images.roll(len(COLUMNS), 0), prompts)["mean"] < 0.1
    assert column_scores(judge, torch.zeros_like(images), prompts)["mean"] == 0
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    assert column_scores(judge, noise, prompts)["mean"] < 0.05


def test_cells_are_cut_row_by_row() -> None:
    images = torch.zeros(2, 16, 16, 3)
    images[1, 8:, :8, 2] = 1  # below left, blue
    assert cut_cells(images).sum((2, 3)).nonzero().tolist() == [[4 + 2, 2]]


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"judge\.safetensors"):
        load_judge(tmp_path / "judge.safetensors")
    (tmp_path / "judge.safetensors").write_bytes(WEIGHTS.read_bytes()[:1000])
    with pytest.raises(DamagedFileError, match=r"judge\.safetensors"):
        load_judge(tmp_path / "judge.safetensors")


def test_training_learns_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_judge, "HELD_OUT_SCENES", 120)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = Judge()
        before = train_judge.measure(judge.eval())["mean"]
        train_judge.train(judge, 40)
    assert before < 0.1
    assert train_judge.measure(judge)["mean"] > 0.3
