"""Train `digits-flux`: a class-conditional Flux on scikit-learn's 8x8 digits.

    python -m examples.zoo.train_digits_flux --output adatsq_trt/zoo/weights/digits-flux

Flow matching on 1,500 images, the other 297 kept for the judge's accuracy. The same seed gives the same weights on the
same kind of machine: one thread adds in one order.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor, nn

from adatsq_trt.image import ImageShape
from adatsq_trt.models.flux import FluxAdapter, pack
from adatsq_trt.models.prompts import ClassEncoder
from examples.zoo.sampling import sample

LOGGER = logging.getLogger(__name__)
TRAIN_IMAGES = 1500
CLASSES, WIDTH, IMAGE_SIZE = 10, 32, 8
# Few iterations and weight decay: a longer training copies its images, and the picture jumps from one copy to the next
# under the smallest error (docs/decisions/0013).
ITERATIONS, BATCH, RATE, WEIGHT_DECAY, DROP_CLASS, AVERAGE = 1500, 128, 2e-3, 0.1, 0.1, 0.998


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 images [N, 8, 8, 1] in [0, 1] and their labels [N]."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 1), torch.tensor(labels)


def make_adapter() -> FluxAdapter:
    """An untrained digits-flux."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    encoder = ClassEncoder(nn.Embedding(CLASSES + 1, WIDTH))
    return FluxAdapter(transformer, encoder, FlowMatchEulerDiscreteScheduler(), ImageShape(IMAGE_SIZE // 2, channels=1))


def batches(latents: Tensor, labels: Tensor, iterations: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per iteration: clean latents, noise, labels (some dropped), sigmas (logit-normal, as Stable Diffusion 3)."""
    for _ in range(iterations):
        pick = torch.randint(0, len(latents), (BATCH,))
        label = torch.where(torch.rand(BATCH) < DROP_CLASS, CLASSES, labels[pick])
        yield latents[pick], torch.randn(BATCH, *latents.shape[1:]), label, torch.sigmoid(torch.randn(BATCH))


def train(adapter: FluxAdapter, images: Tensor, labels: Tensor, iterations: int) -> None:
    """Flow matching: fit v(x[sigma]) to noise - x0, keep an exponential average of the weights."""
    latents, modules = pack(images), nn.ModuleList([adapter.transformer, adapter.encoder])
    parameters = list(modules.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, weight_decay=WEIGHT_DECAY)
    modules.train()
    start = time.monotonic()
    for i, (x0, noise, label, sigma) in enumerate(batches(latents, labels, iterations)):
        optimizer.param_groups[0]["lr"] = RATE * min(1, i / 100) * (1 - i / iterations)
        mix = sigma[:, None, None]
        tokens, pooled = adapter.encoder.encode([None if c == CLASSES else c for c in label.tolist()])
        prediction = adapter.trace_module()((1 - mix) * x0 + mix * noise, tokens, pooled, sigma)
        loss = (prediction - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - AVERAGE)
        if i % 500 == 0:
            LOGGER.info("iteration %d of %d, loss %.4f, %.0f s", i, iterations, loss.item(), time.monotonic() - start)
    modules.eval()
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean.bfloat16())


def distance_to(images: Tensor, others: Tensor) -> float:
    """Median over images [N, ...] of the distance to the nearest of the others [M, ...], Euclidean over pixels."""
    return float(torch.cdist(images.flatten(1), others.flatten(1)).amin(dim=1).median())


def measure(adapter: FluxAdapter) -> dict[str, float]:
    """The judge's accuracy, how often it reads samples as the digit asked for, and how far samples are from copies."""
    images, labels = digits()
    flat = images.flatten(1).numpy() * 2 - 1
    judge = SVC(gamma=0.02, C=10).fit(flat[:TRAIN_IMAGES], labels[:TRAIN_IMAGES])
    asked = [i % CLASSES for i in range(300)]
    quality = {"judge_on_held_out_digits": float(judge.score(flat[TRAIN_IMAGES:], labels[TRAIN_IMAGES:]))}
    for steps in (4, 20, 50):
        drawn = sample(adapter, asked, steps, 2.0, seed=1)
        quality[f"read_as_asked_{steps}_steps"] = float(judge.score(drawn.flatten(1).numpy() * 2 - 1, asked))
        quality[f"distance_to_training_images_{steps}_steps"] = distance_to(drawn, images[:TRAIN_IMAGES])
    quality["distance_of_held_out_digits"] = distance_to(images[TRAIN_IMAGES:], images[:TRAIN_IMAGES])
    return quality


def save(adapter: FluxAdapter, folder: Path) -> None:
    """Diffusers' folder layout, bfloat16 safetensors (the weights are exact in bfloat16)."""
    adapter.transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    adapter.scheduler.save_pretrained(folder / "scheduler")
    (folder / "class_embedding").mkdir(parents=True, exist_ok=True)
    table = adapter.encoder.state_dict()["embedding.weight"].bfloat16()
    save_file({"weight": table}, folder / "class_embedding" / "model.safetensors")
    index = {
        "_class_name": "ClassConditionalFluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "class_embedding": ["torch.nn", "Embedding"],
        "image_size": IMAGE_SIZE,
        "default_steps": 20,
        "default_guidance": 2.0,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description="Train digits-flux.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    adapter, start = make_adapter(), time.monotonic()
    images, labels = digits()
    train(adapter, images[:TRAIN_IMAGES], labels[:TRAIN_IMAGES], arguments.iterations)
    seconds = time.monotonic() - start
    quality = measure(adapter)
    save(adapter, arguments.output)
    record = {"seed": arguments.seed, "iterations": arguments.iterations, "seconds": round(seconds), **quality}
    (arguments.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    LOGGER.info("%s", json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
