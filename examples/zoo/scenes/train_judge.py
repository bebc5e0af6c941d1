"""Train the judge of scenes.

    python -m examples.zoo.scenes.train_judge --output adatsq_trt/zoo/weights/scenes-judge

It learns from digits that no generator has seen, and is measured on scenes of yet others.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from adatsq_trt.files import write_bytes, write_tensors
from adatsq_trt.zoo.scenes.judge import NOTHING, Judge, column_scores
from adatsq_trt.zoo.scenes.prompts import COLOURS, evaluation_prompts
from examples.zoo.scenes.painting import RGB, Digits, Painter, draw_scene, load_split

LOGGER = logging.getLogger(__name__)
ITERATIONS, BATCH, RATE = 1500, 128, 2e-3
HELD_OUT_SCENES = 6000


def distort(images: Tensor) -> Tensor:
    """Turn (10 degrees), scale (8 %), slant and shift (half a pixel) images [B, c, h, w], each in its own way."""
    angle, slant = torch.randn(2, len(images)) * math.radians(5)
    scale = 1 + 0.04 * torch.randn(len(images))
    shift = 0.12 * torch.randn(len(images), 2)
    rows = [
        torch.stack([scale * angle.cos(), slant - angle.sin(), shift[:, 0]], 1),
        torch.stack([angle.sin(), scale * angle.cos(), shift[:, 1]], 1),
    ]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def batch(digits: Digits) -> tuple[Tensor, Tensor, Tensor]:
    """Cells [B, 3, 8, 8] with some noise, one in eleven empty; digits and colours [B]."""
    pick, colour = torch.randint(0, len(digits.labels), (BATCH,)), torch.randint(0, len(COLOURS), (BATCH,))
    empty = torch.rand(BATCH) < 1 / 11
    grey = distort(torch.from_numpy(digits.images)[pick][:, None]) * ~empty[:, None, None, None]
    cells = grey * (0.7 + 0.3 * torch.rand(BATCH, 1, 1, 1)) * torch.from_numpy(RGB)[colour][:, :, None, None]
    noisy = cells + 0.1 * torch.rand(BATCH, 1, 1, 1) * torch.randn_like(cells)
    return noisy.clamp(0, 1), torch.where(empty, NOTHING, torch.from_numpy(digits.labels)[pick]), colour


def train(judge: Judge, iterations: int) -> None:
    """Cross entropy of both classifiers; colours of empty cells do not count."""
    digits = load_split("judge")
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    judge.train()
    for i in range(iterations):
        optimizer.param_groups[0]["lr"] = RATE * min(1, i / 100) * (1 - i / iterations)
        cells, digit, colour = batch(digits)
        digit_logits, colour_logits = judge(cells)
        shown = digit != NOTHING
        loss = functional.cross_entropy(digit_logits, digit, label_smoothing=0.05)
        loss = loss + functional.cross_entropy(colour_logits[shown], colour[shown])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 500 == 0:
            LOGGER.info("iteration %d of %d, loss %.4f", i, iterations, loss.item())
    judge.eval()


def measure(judge: Judge) -> dict[str, float]:
    """How many real scenes of held-out digits the judge finds right, by column."""
    rng, painter = np.random.default_rng(1), Painter(load_split("held out"))
    prompts = evaluation_prompts(HELD_OUT_SCENES)
    images = np.stack([painter.paint(draw_scene(prompt, rng), rng) for prompt in prompts])
    return column_scores(judge, torch.from_numpy(images), prompts)


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description="Train the judge of scenes.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(arguments.seed)
    judge, start = Judge(), time.monotonic()
    train(judge, arguments.iterations)
    record = {"seed": arguments.seed, "iterations": arguments.iterations, "seconds": round(time.monotonic() - start)}
    record_text = json.dumps({**record, "held_out": measure(judge)}, indent=2)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_tensors(arguments.output / "model.safetensors", judge.state_dict())
    write_bytes(arguments.output / "training.json", (record_text + "\n").encode())
    LOGGER.info("%s", record_text)


if __name__ == "__main__":
    main()
