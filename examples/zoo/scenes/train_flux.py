"""Train `scenes-flux-dev`, and distil `scenes-flux-schnell` from it.

    python -m examples.zoo.scenes.train_flux --work runs/scenes --output adatsq_trt/zoo/weights

Three stages. Flow matching with the prompt dropped in a tenth of the batch. Guidance distillation: a copy with the
scale as an input learns what both branches make together. Step distillation: a copy of that learns to cross each
quarter of its trajectories in one step. Stopped and started again, a stage goes on at its last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor

from adatsq_trt.files import read_tensors, write_bytes, write_tensors
from adatsq_trt.image import ImageShape
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.models.prompts import TextEncoder
from adatsq_trt.zoo.scenes.judge import column_scores, load_judge
from adatsq_trt.zoo.scenes.prompts import LONGEST, WORDS, evaluation_prompts
from adatsq_trt.zoo.scenes.world import IMAGE_SIZE
from examples.zoo.sampling import sample
from examples.zoo.scenes.training import PATCH_SIZE, SceneSet, Trainer, make_scenes, noisy_batch, save_model

LOGGER = logging.getLogger(__name__)
WIDTH, BATCH, DROP_PROMPT = 64, 64, 0.1
SCENES, PROMPTS, TRAJECTORIES = 65_536, 600, 2_048
ITERATIONS, RATES = (6900, 260, 500), (1e-3, 5e-4, 5e-4)
GUIDANCE, LARGEST_GUIDANCE = 3.0, 4.0
SHIFT = 3.0
DEV_STEPS, SCHNELL_STEPS, TEACHER_STEPS = 50, 4, 16


def make_adapter(guidance_embeds: bool) -> FluxAdapter:
    """An untrained model."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=3 * PATCH_SIZE**2,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(8, 12, 12),
    )
    prompts = dict.fromkeys(map(str, evaluation_prompts(PROMPTS)))
    encoder, image = (
        TextEncoder(WORDS, list(prompts), LONGEST, WIDTH),
        ImageShape(IMAGE_SIZE // PATCH_SIZE, 3, PATCH_SIZE),
    )
    return FluxAdapter(
        transformer, encoder, FlowMatchEulerDiscreteScheduler(shift=SHIFT), image, guidance_distilled=True
    )


def velocity(adapter: FluxAdapter, latent: Tensor, words: Tensor, sigma: Tensor, guidance: Tensor | None) -> Tensor:
    """Prediction [B, 16, 48] for word indices [B, 8]; gradients reach the text encoder."""
    return adapter.trace_module()(latent, *adapter.encoder(words), sigma, guidance)  # type: ignore[no-any-return]


def flow_matching_loss(adapter: FluxAdapter, scenes: SceneSet) -> Tensor:
    """Fit v(x[sigma]) to noise - x0; a guidance scale of 1 stands for none."""
    batch = noisy_batch(scenes, BATCH)
    words = torch.where(torch.rand(BATCH, 1) < DROP_PROMPT, 0, batch.words)
    return (velocity(adapter, batch.latent, words, batch.sigma, torch.ones(BATCH)) - batch.velocity).square().mean()


def guidance_loss(student: FluxAdapter, teacher: FluxAdapter, scenes: SceneSet) -> Tensor:
    """Fit v(x[sigma], w) to v0 + w (v - v0) of the teacher, w uniform (Meng et al. 2023, section 3.1)."""
    batch = noisy_batch(scenes, BATCH)
    scale = 1 + (LARGEST_GUIDANCE - 1) * torch.rand(BATCH)
    with torch.no_grad():
        both = torch.cat([batch.words, torch.zeros_like(batch.words)])
        guided = velocity(teacher, batch.latent.repeat(2, 1, 1), both, batch.sigma.repeat(2), torch.ones(2 * BATCH))
        conditional, unconditional = guided.chunk(2)
        target = unconditional + scale[:, None, None] * (conditional - unconditional)
    return (velocity(student, batch.latent, batch.words, batch.sigma, scale) - target).square().mean()


@torch.no_grad()
def teacher_trajectories(teacher: FluxAdapter, words: Tensor) -> Tensor:
    """Latents of the teacher at the student's sigmas, [SCHNELL_STEPS + 1, N, 16, 48]."""
    schedule, stride = teacher.schedule(TEACHER_STEPS), TEACHER_STEPS // SCHNELL_STEPS
    latent = torch.randn(len(words), *teacher.latent_shape)
    kept = [latent]
    for step in range(TEACHER_STEPS):
        rows = torch.full((BATCH,), schedule.model_time(step)), torch.full((BATCH,), GUIDANCE)
        parts = [velocity(teacher, *part, *rows) for part in zip(latent.split(BATCH), words.split(BATCH), strict=True)]
        latent = schedule.advance(latent, torch.cat(parts), step)
        if (step + 1) % stride == 0:
            kept.append(latent)
    return torch.stack(kept)


def few_step_loss(student: FluxAdapter, trajectories: Tensor, words: Tensor) -> Tensor:
    """Fit v(x[k], sigma[k]) to the straight line from the teacher's x[k] to its x[k+1]."""
    sigmas = torch.tensor(student.schedule(SCHNELL_STEPS).sigmas)
    k, pick = torch.randint(0, SCHNELL_STEPS, (BATCH,)), torch.randint(0, len(words), (BATCH,))
    start, end = trajectories[k, pick], trajectories[k + 1, pick]
    target = (end - start) / (sigmas[k + 1] - sigmas[k])[:, None, None]
    return (velocity(student, start, words[pick], sigmas[k], None) - target).square().mean()


@torch.no_grad()
def without_guidance_embedding(dev: FluxAdapter) -> FluxAdapter:
    """The same function at the guidance scale `GUIDANCE`, which becomes a part of the timestep embedding's bias."""
    adapter = make_adapter(guidance_embeds=False)
    adapter.encoder.load_state_dict(dev.encoder.state_dict())
    weights, embed = dev.transformer.state_dict(), dev.transformer.time_text_embed
    guided = embed.guidance_embedder(embed.time_proj(torch.tensor([1000 * GUIDANCE])))[0]
    adapter.transformer.load_state_dict({n: w for n, w in weights.items() if ".guidance_embedder." not in n})
    adapter.transformer.time_text_embed.timestep_embedder.linear_2.bias.add_(guided)
    return adapter


def train(work: Path, iterations: tuple[int, int, int]) -> tuple[FluxAdapter, FluxAdapter]:
    """All three stages.

    Returns:
        dev and schnell.
    """
    base = make_adapter(guidance_embeds=True)
    assert isinstance(base.encoder, TextEncoder)
    scenes = make_scenes(SCENES, 0, base.encoder)
    Trainer(base, RATES[0], work / "base.safetensors").run(lambda: flow_matching_loss(base, scenes), iterations[0])
    dev = copy.deepcopy(base)
    Trainer(dev, RATES[1], work / "dev.safetensors").run(lambda: guidance_loss(dev, base, scenes), iterations[1])
    file, words = work / "trajectories.safetensors", scenes.words[:TRAJECTORIES]
    if not file.is_file():
        LOGGER.info("%d trajectories of %d steps", TRAJECTORIES, TEACHER_STEPS)
        write_tensors(file, {"latents": teacher_trajectories(dev, words)})
    latents, schnell = read_tensors(file)["latents"], without_guidance_embedding(dev)
    trainer = Trainer(schnell, RATES[2], work / "schnell.safetensors")
    trainer.run(lambda: few_step_loss(schnell, latents, words), iterations[2])
    return dev, schnell


def measure(adapter: FluxAdapter, steps: int) -> dict[str, float]:
    """The judge's scores in the six columns, over `PROMPTS` samples."""
    prompts = evaluation_prompts(PROMPTS)
    numbers = [adapter.prompts.index(str(prompt)) for prompt in prompts]
    return column_scores(load_judge(), sample(adapter, numbers, steps, GUIDANCE, seed=1), prompts)


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description="Train scenes-flux-dev and scenes-flux-schnell.")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="folder of the zoo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, nargs=3, default=ITERATIONS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(arguments.seed)
    models = train(arguments.work, tuple(arguments.iterations))
    for name, adapter, steps in zip(("dev", "schnell"), models, (DEV_STEPS, SCHNELL_STEPS), strict=True):
        folder = arguments.output / f"scenes-flux-{name}"
        save_model(adapter, folder, steps, GUIDANCE if adapter.takes_guidance else 1.0)
        record = {"seed": arguments.seed, "iterations": arguments.iterations, "scores": measure(adapter, steps)}
        write_bytes(folder / "training.json", (json.dumps(record, indent=2) + "\n").encode())
        LOGGER.info("%s: %s", name, json.dumps(record))


if __name__ == "__main__":
    main()
