"""The prompts that a model is scored with, and the judge of its pictures or clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatsq_trt.calibration.prompt_shares import Use, shared_prompts
from adatsq_trt.evaluation.scores import column_means, columns_of
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.zoo.scenes.clips import ClipPrompt, clip_prompts
from adatsq_trt.zoo.scenes.judge import load_judge, shows_prompt
from adatsq_trt.zoo.scenes.prompts import COLUMNS, Prompt, evaluation_prompts
from adatsq_trt.zoo.scenes.video_scores import clip_scores

# The zoo's models can be asked for these; a larger batch asks for them again, with other seeds.
_DISTINCT = 600
NO_COLUMN = "all"


@dataclass(frozen=True)
class Verdict:
    """Scores that the judge gives a batch.

    Attributes:
        values: of every sample, float64 [samples]; the mean score is the mean of their columns' means.
        scores: column → mean.
    """

    values: NDArray[np.float64]
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Batch:
    """Prompts that a model is scored with, and their judge.

    Attributes:
        prompts: indices into the adapter's prompts.
        columns: each sample's column: within these the bootstrap draws.
        judge: gives the verdict on decoded latents; None where there is no judge for these prompts.
    """

    prompts: tuple[int, ...]
    columns: tuple[str, ...]
    judge: Callable[[Tensor], Verdict] | None


def make_batch(adapter: ModelAdapter, count: int) -> Batch:
    """The prompts of the model's world in turn; of an unknown world its own prompts, without a judge.

    None of them was calibrated on, nor was a policy chosen on it, where the model has enough prompts.
    """
    known = {prompt: i for i, prompt in enumerate(adapter.prompts)}
    scored = shared_prompts(len(known), Use.SCORING)
    scenes, clips = evaluation_prompts(_DISTINCT), clip_prompts()
    if all(str(prompt) in known for prompt in scenes):
        asked = _in_turn([prompt for prompt in dict.fromkeys(scenes) if known[str(prompt)] in scored], count)
        columns = tuple(str(prompt.column) for prompt in asked)
        return Batch(tuple(known[str(p)] for p in asked), columns, partial(_judge_scenes, asked))
    if all(str(prompt) in known for prompt in clips):
        apart = [clip for clip in clips if known[str(clip)] in scored]
        moving = [apart[i % len(apart)] for i in range(count)]
        return Batch(tuple(known[str(p)] for p in moving), (NO_COLUMN,) * count, partial(_judge_clips, moving))
    return Batch(tuple(scored[i % len(scored)] for i in range(count)), (NO_COLUMN,) * count, None)


def _in_turn(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """One of each column in turn, as often as it takes."""
    columns = {column: cycle([p for p in prompts if p.column == column]) for column in COLUMNS}
    return [next(prompt) for prompt in islice(cycle(columns.values()), count)]


@torch.no_grad()
def _judge_scenes(asked: Sequence[Prompt], images: Tensor) -> Verdict:
    """One for each picture [samples, 16, 16, 3] that shows what it was asked to show, else zero."""
    values = np.array(shows_prompt(load_judge(), images, asked), dtype=np.float64)
    return Verdict(values, column_means(values, columns_of([str(prompt.column) for prompt in asked])))


@torch.no_grad()
def _judge_clips(asked: Sequence[ClipPrompt], clips: Tensor) -> Verdict:
    """The mean of the scores of every clip [samples, frames, 16, 16, 3]."""
    scores = {name: value.double().numpy() for name, value in clip_scores(load_judge(), clips, asked).items()}
    return Verdict(np.stack(list(scores.values())).mean(axis=0), {n: float(v.mean()) for n, v in scores.items()})
