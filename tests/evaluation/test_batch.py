"""The prompts that models are scored with."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from adatsq_trt.calibration.prompt_shares import Use, shared_prompts
from adatsq_trt.evaluation.batch import make_batch
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.zoo.loading import load_model
from adatsq_trt.zoo.scenes.clips import clip_prompts
from adatsq_trt.zoo.scenes.prompts import COLUMNS, evaluation_prompts
from adatsq_trt.zoo.scenes.video_scores import VIDEO_SCORES
from examples.zoo.scenes.painting import load_split, paint_clip


def test_all_columns_are_asked_for_equally() -> None:
    adapter = load_model("scenes-flux-schnell").adapter
    batch = make_batch(adapter, 606)
    assert {batch.columns.count(column) for column in COLUMNS} == {101}
    columns = {str(prompt): prompt.column for prompt in evaluation_prompts(600)}
    assert [columns[adapter.prompts[i]] for i in batch.prompts] == list(batch.columns)
    # Nothing was calibrated or chosen on them, and every one is asked for.
    assert set(batch.prompts) == set(shared_prompts(len(adapter.prompts), Use.SCORING))


def test_black_pictures_show_nothing() -> None:
    batch = make_batch(load_model("scenes-flux-schnell").adapter, 12)
    assert batch.judge is not None
    verdict = batch.judge(torch.zeros(12, 16, 16, 3))
    assert verdict.values.tolist() == [0.0] * 12
    assert verdict.scores == dict.fromkeys(COLUMNS, 0.0)


def test_models_of_clips_are_judged_by_the_scores_of_clips() -> None:
    prompts = clip_prompts()
    adapter = cast(ModelAdapter, SimpleNamespace(prompts=tuple(map(str, prompts))))  # no more of it is looked at
    batch = make_batch(adapter, 6)
    assert batch.judge is not None
    rng, digits = np.random.default_rng(0), load_split("held out")
    asked = [prompts[i] for i in batch.prompts]
    clips = torch.from_numpy(np.stack([paint_clip(prompt, digits, rng) for prompt in asked]))
    verdict = batch.judge(clips)
    assert tuple(verdict.scores) == VIDEO_SCORES
    assert np.mean(verdict.values) == pytest.approx(np.mean(list(verdict.scores.values())))
    assert verdict.scores["overall consistency"] > 0.8


def test_another_world_has_no_judge(untrained_flux: FluxAdapter) -> None:
    batch = make_batch(untrained_flux, 12)
    assert batch.judge is None
    assert batch.prompts == (*range(10), 0, 1)
