"""Train `scenes-wan`: a Wan that draws clips of a moving digit.

    python -m examples.zoo.scenes.train_wan --device cuda --work runs/wan --output adatsq_trt/zoo/weights

Flow matching with the prompt dropped in a tenth of the batch, so that guidance has a branch without it. Stopped and
started again, the training goes on at its last checkpoint. On a GPU random numbers are others than on a processor.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor
from torch.nn import functional

from adatsq_trt.image import ImageShape
from adatsq_trt.models.prompts import TextEncoder
from adatsq_trt.models.wan import WanAdapter
from adatsq_trt.zoo.scenes.clips import CLIP_WORDS, FRAMES, LONGEST_CLIP, clip_prompts
from adatsq_trt.zoo.scenes.judge import load_judge
from adatsq_trt.zoo.scenes.video_scores import clip_scores, mean_scores
from adatsq_trt.zoo.scenes.world import IMAGE_SIZE
from examples.zoo.sampling import sample
from examples.zoo.scenes.painting import load_split, paint_clip
from examples.zoo.scenes.training import Arguments, SceneSet, Trainer, finish, noisy_batch, parse_arguments

NAME, STEPS, GUIDANCE, SHIFT = "scenes-wan", 25, 3.0, 3.0
WIDTH, PIXELS, BATCH, DROP_PROMPT = 64, 2, 128, 0.1
CLIPS, ITERATIONS, RATE = 32_768, 14_400, 2e-3


def make_adapter() -> WanAdapter:
    """An untrained model: 128 tokens of a frame's 4 x 4 pixels."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=3 * PIXELS**2,
        out_channels=3 * PIXELS**2,
        text_dim=WIDTH,
        freq_dim=WIDTH,
        ffn_dim=256,
        num_layers=3,
        rope_max_seq_len=16,
    )
    encoder = TextEncoder(CLIP_WORDS, list(map(str, clip_prompts())), LONGEST_CLIP, WIDTH)
    video = ImageShape(IMAGE_SIZE // PIXELS, 3, PIXELS, frames=FRAMES)
    return WanAdapter(transformer, encoder, FlowMatchEulerDiscreteScheduler(shift=SHIFT), video)


def to_latents(clips: Tensor) -> Tensor:
    """Clips [B, F, 16, 16, 3] in [0, 1] → latents [B, 12, F, 8, 8] in [-1, 1]: the inverse of `WanAdapter.decode`."""
    planes = functional.pixel_unshuffle(clips.movedim(-1, 2) * 2 - 1, PIXELS)
    return planes.transpose(1, 2).contiguous()


def make_clips(count: int, seed: int, encoder: TextEncoder) -> SceneSet:
    """Draw clips of all prompts in turn with the generator's digits."""
    rng, digits, prompts = np.random.default_rng(seed), load_split("generator"), clip_prompts()
    chosen = [prompts[i % len(prompts)] for i in range(count)]
    clips = torch.from_numpy(np.stack([paint_clip(prompt, digits, rng) for prompt in chosen]))
    return SceneSet(to_latents(clips), encoder.word_indices(list(map(str, chosen))))


def flow_matching_loss(adapter: WanAdapter, clips: SceneSet) -> Tensor:
    """Fit v(x[sigma]) to noise - x0."""
    batch = noisy_batch(clips, BATCH)
    assert isinstance(adapter.encoder, TextEncoder)
    words = torch.where(torch.rand(BATCH, 1, device=batch.words.device) < DROP_PROMPT, 0, batch.words)
    condition = adapter.condition(*adapter.encoder(words))
    prediction = adapter.trace_module()(batch.latent, condition["encoder_hidden_states"], batch.sigma)
    return (prediction - batch.velocity).square().mean()  # type: ignore[no-any-return]


def train(arguments: Arguments) -> WanAdapter:
    """The whole training."""
    adapter = make_adapter()
    assert isinstance(adapter.encoder, TextEncoder)
    clips = make_clips(CLIPS, 0, adapter.encoder).to(arguments.device)
    adapter.trace_module().to(arguments.device)
    adapter.encoder.to(arguments.device)
    trainer = Trainer(adapter, RATE, arguments.work / f"{NAME}.safetensors")
    trainer.run(lambda: flow_matching_loss(adapter, clips), arguments.iterations)
    adapter.trace_module().cpu()
    adapter.encoder.cpu()
    return adapter


def measure(adapter: WanAdapter) -> dict[str, float]:
    """Means of the scores over one clip of every prompt."""
    prompts = clip_prompts()
    clips = sample(adapter, range(len(prompts)), STEPS, GUIDANCE, seed=1)
    return mean_scores(clip_scores(load_judge(), clips, prompts))


def main() -> None:
    """Train, save, measure."""
    arguments = parse_arguments(NAME, ITERATIONS, devices=True)
    adapter = train(arguments)
    finish(adapter, NAME, STEPS, GUIDANCE, measure, arguments)


if __name__ == "__main__":
    main()
