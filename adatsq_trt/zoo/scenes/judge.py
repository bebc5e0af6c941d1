"""The judge: reads a picture of a scene cell by cell and compares it with the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from adatsq_trt.files import read_tensors
from adatsq_trt.zoo import ZOO_FOLDER
from adatsq_trt.zoo.scenes.prompts import COLOURS, COLUMNS, DIGITS, Prompt, Thing
from adatsq_trt.zoo.scenes.world import CELL_SIZE, CELLS, IMAGE_SIZE, Scene, satisfies

WEIGHTS = ZOO_FOLDER / "scenes-judge" / "model.safetensors"
NOTHING = DIGITS  # the detector's class beside the ten digits


class Judge(nn.Module):
    """Two classifiers of an 8x8 cell: which digit, if any, by its grey picture; which colour, by its mean."""

    def __init__(self, width: int = 32) -> None:
        """Make an untrained judge; `width` is that of the first convolution."""
        super().__init__()
        self.digit = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()),
            *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(2 * width * (CELL_SIZE // 2) ** 2, DIGITS + 1)),
        )
        self.colour = nn.Linear(3, len(COLOURS))

    def forward(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Cells [N, 3, 8, 8] in [0, 1] → logits of the digits and nothing [N, 11], of the colours [N, 7]."""
        mean = cells.mean((2, 3))
        hue = mean / mean.amax(1, keepdim=True).clamp(min=1e-6)
        return self.digit(cells.amax(1, keepdim=True)), self.colour(hue)

    def features(self, cells: Tensor) -> Tensor:
        """Cells [N, 3, 8, 8] in [0, 1] → what the classifier of digits decides by, [N, 1024]."""
        features: Tensor = self.digit[:-2](cells.amax(1, keepdim=True))
        return features

    @torch.no_grad()
    def read(self, images: Tensor) -> list[Scene]:
        """Read the scenes that images [B, 16, 16, 3] in [0, 1] show."""
        digits, colours = (logits.argmax(1).reshape(-1, CELLS).tolist() for logits in self(cut_cells(images)))
        return [
            tuple(None if d == NOTHING else Thing(d, COLOURS[c]) for d, c in zip(*cells, strict=True))
            for cells in zip(digits, colours, strict=True)
        ]


def cut_cells(images: Tensor) -> Tensor:
    """Images [B, 16, 16, 3] → their cells [4 B, 3, 8, 8], row by row."""
    side = IMAGE_SIZE // CELL_SIZE
    grid = images.reshape(-1, side, CELL_SIZE, side, CELL_SIZE, 3)
    return grid.permute(0, 1, 3, 5, 2, 4).reshape(-1, 3, CELL_SIZE, CELL_SIZE)


def load_judge(file: Path = WEIGHTS) -> Judge:
    """The judge that ships with the package, float32.

    Raises:
        MissingFileError: its file is not there.
        DamagedFileError: its file is truncated or altered.
    """
    judge = Judge()
    judge.load_state_dict(read_tensors(file, "install the package again"))
    return judge.eval()


def shows_prompt(judge: Judge, images: Tensor, prompts: Sequence[Prompt]) -> list[bool]:
    """Whether each of the images [B, 16, 16, 3] in [0, 1] shows what its prompt says, nothing else."""
    return [satisfies(scene, prompt) for scene, prompt in zip(judge.read(images), prompts, strict=True)]


def column_scores(judge: Judge, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Share of the pictures of each column that show what their prompts say, nothing else, and the columns' mean.

    Args:
        judge: the judge.
        images: [B, 16, 16, 3] in [0, 1].
        prompts: one for each image; every column occurs.
    """
    right: dict[str, list[bool]] = {column: [] for column in COLUMNS}
    for shown, prompt in zip(shows_prompt(judge, images, prompts), prompts, strict=True):
        right[str(prompt.column)].append(shown)
    scores = {column: sum(values) / len(values) for column, values in right.items()}
    return {**scores, "mean": sum(scores.values()) / len(scores)}
