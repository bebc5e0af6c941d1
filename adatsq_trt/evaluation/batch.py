"""The prompts that a model is scored with, and the judge of its pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.zoo.scenes.judge import load_judge, shows_prompt
from adatsq_trt.zoo.scenes.prompts import Prompt, evaluation_prompts

# The zoo's models can be asked for these; a larger batch asks for them again, with other seeds.
_DISTINCT = 600
NO_COLUMN = "all"


@dataclass(frozen=True)
class Batch:
    """What a model is asked for.

    Attributes:
        prompts: indices into the adapter's prompts.
        columns: each sample's column.
        judged: whether there is a judge for these prompts.
    """

    prompts: tuple[int, ...]
    columns: tuple[str, ...]
    judged: bool

    def right(self, images: Tensor) -> NDArray[np.float64]:
        """One for each of the images [samples, 16, 16, 3] that shows what it was asked to show, else zero."""
        asked = _asked(len(self.prompts))
        with torch.no_grad():
            return np.array(shows_prompt(load_judge(), images, asked), dtype=np.float64)


def make_batch(adapter: ModelAdapter, count: int) -> Batch:
    """The world's prompts in turn; for a model of another world its own prompts, without a judge."""
    asked, known = _asked(count), {prompt: i for i, prompt in enumerate(adapter.prompts)}
    if not all(str(prompt) in known for prompt in asked):
        return Batch(tuple(i % len(known) for i in range(count)), (NO_COLUMN,) * count, judged=False)
    return Batch(tuple(known[str(p)] for p in asked), tuple(str(p.column) for p in asked), judged=True)


def _asked(count: int) -> list[Prompt]:
    distinct = evaluation_prompts(_DISTINCT)
    return [distinct[i % _DISTINCT] for i in range(count)]
