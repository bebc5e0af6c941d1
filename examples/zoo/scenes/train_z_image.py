"""Train `scenes-z-image` on the predictions of `scenes-flux-dev`.

    python -m examples.zoo.scenes.train_z_image --work runs/z-image --output adatsq_trt/zoo/weights

Flow matching at the states of the usual mix of noise levels, but the target is the guided velocity of the teacher
instead of noise - x0: it has no variance, and the student needs no second branch (Meng et al. 2023). The text encoder
is the teacher's. Stopped and started again, the training goes on at its last checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from torch import Tensor
from torch.nn import functional

from adatsq_trt.image import ImageShape
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.models.prompts import TextEncoder
from adatsq_trt.models.z_image import ZImageAdapter
from adatsq_trt.zoo.loading import load_model
from adatsq_trt.zoo.scenes.judge import column_scores, load_judge
from adatsq_trt.zoo.scenes.prompts import evaluation_prompts
from adatsq_trt.zoo.scenes.world import IMAGE_SIZE
from examples.zoo.sampling import sample
from examples.zoo.scenes.train_flux import GUIDANCE, PROMPTS, SCENES, SHIFT, velocity
from examples.zoo.scenes.training import (
    PATCH_SIZE,
    SceneSet,
    Trainer,
    finish,
    make_scenes,
    noisy_batch,
    parse_arguments,
)

NAME, STEPS, BATCH, ITERATIONS, RATE = "scenes-z-image", 10, 32, 2400, 1e-3
# Z-Image cuts its latents in patches of 2 x 2, so a place of the latent is half of the teacher's patch wide.
PIXELS = PATCH_SIZE // 2


def make_adapter(encoder: TextEncoder) -> ZImageAdapter:
    """An untrained model.

    The width is the smallest at which every layer has a multiple of 64 inputs, the group of the paper's formats.
    """
    transformer = ZImageTransformer2DModel(
        in_channels=3 * PIXELS**2,
        dim=192,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=6,
        n_kv_heads=6,
        cap_feat_dim=encoder.width,
        axes_dims=[8, 12, 12],
        axes_lens=[64, 16, 16],
    )
    image = ImageShape(IMAGE_SIZE // PIXELS, 3, PIXELS)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return ZImageAdapter(transformer, encoder, scheduler, image, guidance_distilled=True)


def to_planes(tokens: Tensor) -> Tensor:
    """Flux's tokens [B, 16, 48] → Z-Image's planes [B, 12, 8, 8] of the same pixels."""
    side = IMAGE_SIZE // PATCH_SIZE
    images = functional.pixel_shuffle(tokens.mT.unflatten(-1, (side, side)), PATCH_SIZE)
    return functional.pixel_unshuffle(images, PIXELS)


def distillation_loss(student: ZImageAdapter, teacher: FluxAdapter, scenes: SceneSet) -> Tensor:
    """Fit v(x[sigma]) to the teacher's velocity at the guidance scale of its defaults."""
    batch = noisy_batch(scenes, BATCH)
    assert isinstance(student.encoder, TextEncoder)
    with torch.no_grad():
        target = velocity(teacher, batch.latent, batch.words, batch.sigma, torch.full((BATCH,), GUIDANCE))
        condition = student.condition(*student.encoder(batch.words))
    prediction = student.trace_module()(to_planes(batch.latent), condition["encoder_hidden_states"], batch.sigma)
    return (prediction - to_planes(target)).square().mean()  # type: ignore[no-any-return]


def train(work: Path, iterations: int) -> ZImageAdapter:
    """The whole training."""
    teacher = load_model("scenes-flux-dev").adapter
    assert isinstance(teacher, FluxAdapter)
    assert isinstance(teacher.encoder, TextEncoder)
    student, scenes = make_adapter(teacher.encoder), make_scenes(SCENES, 0, teacher.encoder)
    trainer = Trainer(student, RATE, work / f"{NAME}.safetensors")
    trainer.run(lambda: distillation_loss(student, teacher, scenes), iterations)
    return student


def measure(adapter: ZImageAdapter) -> dict[str, float]:
    """The judge's scores in the six columns, over `PROMPTS` samples."""
    prompts = evaluation_prompts(PROMPTS)
    numbers = [adapter.prompts.index(str(prompt)) for prompt in prompts]
    return column_scores(load_judge(), sample(adapter, numbers, STEPS, 1.0, seed=1), prompts)


def main() -> None:
    """Train, save, measure."""
    arguments = parse_arguments(NAME, ITERATIONS)
    adapter = train(arguments.work, arguments.iterations)
    finish(adapter, NAME, STEPS, 1.0, measure, arguments)


if __name__ == "__main__":
    main()
