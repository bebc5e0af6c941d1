"""Common part of trainings on scenes: the data, the loop with its average of weights, checkpoints, the saved model."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from adatsq_trt.files import read_tensors, write_bytes, write_json_model, write_tensors
from adatsq_trt.models.flux import pack
from adatsq_trt.models.prompted import PromptedAdapter
from adatsq_trt.models.prompts import TextEncoder
from adatsq_trt.zoo import TextEncoderConfig
from examples.zoo.scenes.painting import Painter, draw_prompt, draw_scene, load_split

AdapterT = TypeVar("AdapterT", bound=PromptedAdapter)
LOGGER = logging.getLogger(__name__)
CUDA = "cuda"
SIGMA_MEAN, SIGMA_STD = 0.8, 1.2
PATCH_SIZE, AVERAGE, WARM_UP, COOL_DOWN = 4, 0.999, 0.04, 0.3
_SECONDS_BETWEEN_CHECKPOINTS, _ITERATIONS_BETWEEN_LINES = 120, 100


@dataclass(frozen=True)
class SceneSet:
    """Scenes with the prompts that describe them.

    Attributes:
        latents: float32 [N, *latent_shape].
        words: int64 [N, text tokens].
    """

    latents: Tensor
    words: Tensor

    def to(self, device: torch.device) -> SceneSet:
        """The same on a device."""
        return SceneSet(self.latents.to(device), self.words.to(device))


def make_scenes(count: int, seed: int, encoder: TextEncoder) -> SceneSet:
    """Draw scenes with the generator's digits; the encoder knows the words."""
    rng, painter = np.random.default_rng(seed), Painter(load_split("generator"))
    prompts = [draw_prompt(rng) for _ in range(count)]
    images = np.stack([painter.paint(draw_scene(prompt, rng), rng) for prompt in prompts])
    return SceneSet(pack(torch.from_numpy(images), PATCH_SIZE), encoder.word_indices(list(map(str, prompts))))


@dataclass(frozen=True)
class NoisyBatch:
    """Batch that flow matching learns from.

    Attributes:
        latent: x[sigma] = (1 - sigma) x0 + sigma noise, float32 [B, *latent_shape].
        velocity: noise - x0, the same shape.
        words: int64 [B, text tokens].
        sigma: float32 [B].
    """

    latent: Tensor
    velocity: Tensor
    words: Tensor
    sigma: Tensor


def noisy_batch(scenes: SceneSet, batch: int) -> NoisyBatch:
    """Draw scenes, noise and noise levels; these are logit-normal, as in Stable Diffusion 3.

    Places of things are decided above sigma 0.8, so such levels are drawn more often than usual.
    """
    device = scenes.latents.device
    pick = torch.randint(0, len(scenes.latents), (batch,), device=device)
    x0, noise = scenes.latents[pick], torch.randn(batch, *scenes.latents.shape[1:], device=device)
    sigma = (SIGMA_MEAN + SIGMA_STD * torch.randn(batch, device=device)).sigmoid()
    mix = sigma.reshape(-1, *[1] * (x0.dim() - 1))
    return NoisyBatch((1 - mix) * x0 + mix * noise, noise - x0, scenes.words[pick], sigma)


class Trainer:
    """AdamW with warm-up, a constant rate and a linear cool-down; an exponential average of the weights."""

    def __init__(self, adapter: PromptedAdapter, rate: float, file: Path) -> None:
        """Take up the checkpoint in `file` where there is one; frozen parameters are left as they are."""
        parameters = [*adapter.encoder.parameters(), *adapter.transformer.parameters()]
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
        self._rate, self._file, self._done = rate, file, 0
        self._device = self._parameters[0].device
        self._average = [p.detach().clone() for p in self._parameters]
        if file.is_file():
            self._load()

    def run(self, loss: Callable[[], Tensor], iterations: int) -> None:
        """Minimise a loss that draws its own batch; the weights are the average at the end."""
        saved = start = time.monotonic()
        first = self._done
        for i in range(first, iterations):
            rate = min(1, (i + 1) / (WARM_UP * iterations), (iterations - i) / (COOL_DOWN * iterations))
            self._optimizer.param_groups[0]["lr"] = self._rate * rate
            value = loss()
            self._optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimizer.step()
            decay = min(AVERAGE, (i + 1) / (i + 10))  # the first weights are soon forgotten
            torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - decay)
            self._done = i + 1
            if self._done % _ITERATIONS_BETWEEN_LINES == 0:
                seconds = (time.monotonic() - start) / (self._done - first)
                LOGGER.info("%d of %d, loss %.4f, %.3f s each", self._done, iterations, value.item(), seconds)
            if time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                self._save()
                saved = time.monotonic()
        self._save()
        with torch.no_grad():
            for parameter, mean in zip(self._parameters, self._average, strict=True):
                parameter.copy_(mean)

    def _save(self) -> None:
        tensors = {"iterations": torch.tensor(self._done), "random": torch.get_rng_state()}
        if self._device.type == CUDA:
            tensors["random_gpu"] = torch.cuda.get_rng_state(self._device)
        for i, (parameter, mean) in enumerate(zip(self._parameters, self._average, strict=True)):
            state = self._optimizer.state[parameter]
            tensors |= {f"{i}.{name}": state[name].clone() for name in ("step", "exp_avg", "exp_avg_sq")}
            tensors |= {f"{i}.parameter": parameter.detach().clone(), f"{i}.average": mean.clone()}
        write_tensors(self._file, tensors)

    @torch.no_grad()
    def _load(self) -> None:
        tensors = read_tensors(self._file)
        self._done = int(tensors["iterations"])
        torch.set_rng_state(tensors["random"])
        if self._device.type == CUDA and "random_gpu" in tensors:
            torch.cuda.set_rng_state(tensors["random_gpu"], self._device)
        for i, (parameter, mean) in enumerate(zip(self._parameters, self._average, strict=True)):
            names = ("step", "exp_avg", "exp_avg_sq")
            state = {name: tensors[f"{i}.{name}"] for name in names}
            self._optimizer.state[parameter] = state | {n: state[n].to(parameter.device) for n in names[1:]}
            parameter.copy_(tensors[f"{i}.parameter"])
            mean.copy_(tensors[f"{i}.average"])


@torch.no_grad()
def save_model(adapter: PromptedAdapter, folder: Path, steps: int, guidance: float) -> None:
    """Diffusers' folder layout, bfloat16 safetensors; the adapter's weights become exact in bfloat16.

    Args:
        adapter: with a `TextEncoder`.
        folder: receives the model.
        steps: default number of denoising steps.
        guidance: default guidance scale.
    """
    encoder = adapter.encoder
    assert isinstance(encoder, TextEncoder)
    adapter.transformer.bfloat16().save_pretrained(folder / "transformer")
    adapter.transformer.float()
    adapter.scheduler.save_pretrained(folder / "scheduler")
    write_tensors(folder / "text_encoder" / "model.safetensors", encoder.bfloat16().state_dict())
    encoder.float()
    config = TextEncoderConfig(words=encoder.vocabulary, prompts=encoder.prompts, text_tokens=encoder.text_tokens)
    write_json_model(folder / "text_encoder" / "config.json", config)
    index = {
        "_class_name": f"Scenes{adapter.architecture.partition('Transformer')[0]}Pipeline",
        "transformer": ["diffusers", adapter.architecture],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["adatsq_trt.models.prompts", "TextEncoder"],
        "image_size": adapter.image.patches * adapter.image.patch_size,
        "patch_size": adapter.image.patch_size,
        "guidance_distilled": adapter.guidance_distilled,
        "default_steps": steps,
        "default_guidance": guidance,
        **({} if adapter.image.frames is None else {"frames": adapter.image.frames}),
    }
    write_bytes(folder / "model_index.json", (json.dumps(index, indent=2) + "\n").encode())


@dataclass(frozen=True)
class Arguments:
    """Command-line arguments of a training.

    Attributes:
        work: folder of the checkpoint.
        output: folder of the zoo.
        seed: of weights, batches and noise.
        iterations: in all, those before a checkpoint included.
        device: device that the model learns on.
    """

    work: Path
    output: Path
    seed: int
    iterations: int
    device: torch.device


def parse_arguments(name: str, iterations: int, *, devices: bool = False) -> Arguments:
    """Read the command line of a training of one stage, and set logging and the seed accordingly.

    Args:
        name: of the model.
        iterations: unless the command line says otherwise.
        devices: whether the training knows `--device`.
    """
    parser = argparse.ArgumentParser(description=f"Train {name}.")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="folder of the zoo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=iterations)
    if devices:
        parser.add_argument("--device", choices=("cpu", CUDA))
    parser.set_defaults(device="cpu")
    options = vars(parser.parse_args())
    arguments = Arguments(**{**options, "device": torch.device(options["device"])})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(arguments.seed)
    return arguments


def finish(
    adapter: AdapterT,
    name: str,
    steps: int,
    guidance: float,
    measure: Callable[[AdapterT], dict[str, float]],
    arguments: Arguments,
) -> None:
    """Save a trained model and the record of its training, with its scores as it will be loaded."""
    folder = arguments.output / name
    save_model(adapter, folder, steps, guidance)
    record = {"seed": arguments.seed, "iterations": arguments.iterations, "scores": measure(adapter)}
    write_bytes(folder / "training.json", (json.dumps(record, indent=2) + "\n").encode())
    LOGGER.info("%s: %s", name, json.dumps(record))
