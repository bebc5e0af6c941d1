"""The world of clips, and scores that tell right clips from wrong ones."""

import numpy as np
import pytest
import torch
from torch import Tensor

from adatsq_trt.zoo.scenes.clips import CLIP_WORDS, FRAMES, LONGEST_CLIP, ClipPrompt, clip_prompts
from adatsq_trt.zoo.scenes.judge import Judge, load_judge
from adatsq_trt.zoo.scenes.prompts import Thing
from adatsq_trt.zoo.scenes.video_scores import VIDEO_SCORES, clip_scores, mean_scores, track
from examples.zoo.scenes.painting import load_split, paint_clip

PROMPTS = clip_prompts()


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """One of every prompt, with digits that neither models nor the judge have seen."""
    rng, digits = np.random.default_rng(0), load_split("held out")
    return torch.from_numpy(np.stack([paint_clip(prompt, digits, rng) for prompt in PROMPTS]))


def test_prompts_are_sentences_of_the_vocabulary() -> None:
    assert len(set(map(str, PROMPTS))) == 240
    assert "a red 3 moving left" in map(str, PROMPTS)
    assert all(set(str(prompt).split()) <= set(CLIP_WORDS) for prompt in PROMPTS)
    assert max(len(str(prompt).split()) for prompt in PROMPTS) == LONGEST_CLIP


@pytest.mark.parametrize(
    ("direction", "way"), [("left", (0, -7)), ("right", (0, 7)), ("up", (-7, 0)), ("down", (7, 0))]
)
def test_the_digit_moves_a_pixel_a_frame(direction: str, way: tuple[int, int]) -> None:
    prompt, rng = ClipPrompt(Thing(3, "red"), direction), np.random.default_rng(0)
    for _ in range(20):
        clip = torch.from_numpy(paint_clip(prompt, load_split("generator"), rng))
        assert clip.shape == (FRAMES, 16, 16, 3)
        assert not clip[..., 1:].any()
        rolled = clip[0].roll(way, (0, 1))
        assert torch.equal(rolled, clip[-1])
    corners = track(clip[None]).corners[0]
    assert (corners[-1] - corners[0]).tolist() == list(way)


def test_the_scores_read_held_out_clips(judge: Judge, clips: Tensor) -> None:
    """The judge's own accuracy: at least 97 % of real clips are read as what their prompts say."""
    scores = mean_scores(clip_scores(judge, clips, PROMPTS))
    assert tuple(scores) == (*VIDEO_SCORES, "mean")
    assert scores["overall consistency"] > 0.97
    assert scores["dynamic degree"] == 1
    assert scores["imaging quality"] > 0.9
    assert min(scores[f"{name} consistency"] for name in ("subject", "background")) > 0.999
    assert scores["motion smoothness"] > 0.999


def flicker(clips: Tensor) -> Tensor:
    """Every other frame has another digit."""
    mixed = clips.clone()
    mixed[:, 1::2] = clips.roll(1, 0)[:, 1::2]
    return mixed


SPOILED = {
    "subject consistency": flicker,
    "background consistency": lambda clips: (
        clips + torch.rand(clips.shape, generator=torch.Generator().manual_seed(0))
    ).clamp(max=1),
    "motion smoothness": lambda clips: clips[:, [0, 4, 1, 5, 2, 6, 3, 7]],
    "dynamic degree": lambda clips: clips[:, :1].expand(-1, FRAMES, -1, -1, -1),
    "imaging quality": lambda clips: clips.roll(3, 2).maximum(clips),
    "overall consistency": lambda clips: clips.flip(1),
}


@pytest.mark.parametrize("name", SPOILED)
def test_each_score_falls_for_what_it_is_about(judge: Judge, clips: Tensor, name: str) -> None:
    some, prompts = clips[:60], PROMPTS[:60]
    before, after = (clip_scores(judge, c, prompts)[name].mean() for c in (some, SPOILED[name](some)))
    assert after < before - 0.1


def test_something_else_in_the_picture_is_wrong(judge: Judge, clips: Tensor) -> None:
    two = clips.maximum(clips.roll(7, 0))
    assert clip_scores(judge, two, PROMPTS)["overall consistency"].mean() < 0.1


def test_a_clip_of_nothing_scores_low_and_is_no_error(judge: Judge) -> None:
    scores = clip_scores(judge, torch.zeros(2, FRAMES, 16, 16, 3), PROMPTS[:2])
    assert scores["overall consistency"].tolist() == scores["dynamic degree"].tolist() == [0, 0]
    assert all(torch.isfinite(value).all() for value in scores.values())
