"""Unmodified pipelines of Z-Image, Wan and Qwen-Image on the double of a GPU, guided: one call per step, and two."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.transformer import AdatsqTransformer
from tests.doubles.host_device import HostDevice, OnDevice, Transfers
from tests.doubles.tensorrt_on_onnxruntime import CompilerDouble, Library, PlanBook
from tests.engines.bundled_pipelines import KINDS, LENGTH, make_bundled
from tests.engines.gpu_runtime.conftest import add_plans
from tests.tiny_bundle import GUIDANCE
from tests.tiny_checkpoints import HEIGHT, WIDTH

SEEDS, PROMPTS = [1, 2], [0, 1]
CALLS = {"z-image": 1, "wan": 2, "wan-unipc": 2, "wan-heun": 2, "qwen-image": 2}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_read_back_between_steps(
    name: str, library: Library, device: HostDevice, book: PlanBook, tmp_path: Path
) -> None:
    pipe, files = make_bundled(name, tmp_path / "run" / "bundle", ("target", "cpu"))
    add_plans(files, book, compiler=CompilerDouble())  # tests/export/test_architectures.py has the real one
    crossed: list[tuple[int, int]] = []

    def note(*_: Any) -> dict[str, Any]:
        crossed.append((transfers.to_device, transfers.to_host))
        return {}

    with Bundle.open(files.folder) as bundle, OnDevice(), Transfers() as transfers:
        pipe.transformer = AdatsqTransformer.from_bundle(bundle)
        pipe.scheduler = pipe.transformer.scheduler
        pipe.text_encoder = pipe.vae = None  # the pipeline would look for its device there
        condition = bundle.conditioning(PROMPTS)
        halves = [
            torch.from_numpy(half["encoder_hidden_states"]).to(device.device)
            for half in (condition.conditional, condition.unconditional)
        ]
        listed = [list(half) if name == "z-image" else half for half in halves]
        noise = bundle.noise(SEEDS)
        latents = pipe(
            prompt_embeds=listed[0],
            negative_prompt_embeds=listed[1],
            latents=torch.from_numpy(noise).to(device.device),
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=bundle.schedule.pipeline_steps,
            max_sequence_length=LENGTH,
            output_type="latent",
            return_dict=False,
            callback_on_step_end=note,
            **KINDS[name][-1],
        )[0]
        read_at_the_end = transfers.to_host - crossed[-1][1]
        assert len(library.log.runs) == CALLS[name] * bundle.policy.steps
        wanted = bundle.denoise(noise, condition, guidance=GUIDANCE)
    got = latents.content.float().numpy()
    # The pipelines guide in the graph's 16 bits.
    assert np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted - noise)
    to_device, to_host = (set(np.diff(way).tolist()) for way in zip(*crossed, strict=True))
    # Wan's pipeline reads a step's sigma, where it is on the device, Heun's method compares it with numbers too; and
    # diffusers' UniPC makes its coefficients on the processor, more in the steps of second order.
    assert to_host == {"wan": {4}, "wan-heun": {6}}.get(name, {0})
    assert to_device == ({20, 24} if name == "wan-unipc" else {0})
    assert read_at_the_end == 1, "whether all timesteps were the bundle's"
