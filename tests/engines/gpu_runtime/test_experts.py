"""Plans of two transformers on the double of a GPU, in the bundle's own loop and in the unmodified pipeline."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adatsq_trt
from adatsq_trt.engines.backends.base import BatchRange
from adatsq_trt.engines.backends.plan_steps import PlanSteps
from adatsq_trt.engines.bundle import BundleFiles, PlanFile
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.transformer import AdatsqTransformer
from tests.doubles.host_device import HostDevice, OnDevice, Transfers
from tests.doubles.tensorrt_on_onnxruntime import Library, PlanBook
from tests.tiny_checkpoints import HEIGHT, WIDTH
from tests.tiny_wan_experts import make_wan_experts_pipeline

SAMPLES, STEPS, FRAMES = 2, 5, 5
OPTIONS: dict[str, Any] = {
    **{"target": "sm120", "steps": STEPS, "height": HEIGHT, "width": WIDTH, "frames": FRAMES, "batch": SAMPLES},
    **{"guidance": 4.0, "guidance_2": 2.5, "prompts": ("a red", "three green and seven")},
    **{"calibration_samples": 2, "selection_samples": 2, "held_out_samples": 2},
}


def note_engines(patch: pytest.MonkeyPatch) -> list[str]:
    """Experts in the order in which their engines are made; none is made while another expert's engine is alive."""
    made: list[tuple[str, weakref.ref[Any]]] = []
    order: list[str] = []
    deserialize = PlanSteps._deserialize

    def noted(self: PlanSteps, plan: PlanFile) -> Any:
        expert = bundle_expert(self, plan)
        assert {name for name, engine in made if engine() is not None} <= {expert}
        engine = deserialize(self, plan)
        made.append((expert, weakref.ref(engine)))
        if order[-1:] != [expert]:
            order.append(expert)
        return engine

    patch.setattr(PlanSteps, "_deserialize", noted)
    return order


def bundle_expert(steps: PlanSteps, plan: PlanFile) -> str:
    assert plan.assignment is not None
    return steps._files.expert(steps._files.policy.step_assignments.index(plan.assignment))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["embedded", "shared"])
def test_each_step_runs_a_plan_of_its_own_expert(
    layout: str, library: Library, device: HostDevice, book: PlanBook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = make_wan_experts_pipeline()
    folder = adatsq_trt.build(pipe, output=tmp_path / "run", layout=layout, **OPTIONS).path
    files = BundleFiles.open(folder)
    rows = 2 * SAMPLES
    book.enter(files, files.manifest.plans, BatchRange(1, rows, rows).profiles)
    crossed: list[tuple[int, int]] = []

    def note(*_: Any) -> dict[str, Any]:
        crossed.append((transfers.to_device, transfers.to_host))
        return {}

    with Bundle.open(folder, "onnxruntime") as bundle:
        noise, conditioning = bundle.noise([1, 2]), bundle.conditioning([0, 1])
        wanted, full = bundle.denoise(noise, conditioning), bundle.denoise(noise, conditioning, quantized=False)
    with Bundle.open(folder, "rtx") as bundle, OnDevice(), Transfers() as transfers:
        own, both_bytes = bundle.denoise(noise, conditioning), device.used_bytes()
        pipe.transformer, pipe.transformer_2 = AdatsqTransformer.experts_from_bundle(bundle, pipe.scheduler)
        pipe.text_encoder = pipe.vae = None  # the pipeline would look for its device there
        halves = (conditioning.conditional, conditioning.unconditional)
        given = [torch.from_numpy(half["encoder_hidden_states"]).to(device.device) for half in halves if half]
        drawn = pipe(
            prompt_embeds=given[0],
            negative_prompt_embeds=given[1],
            latents=torch.from_numpy(noise).to(device.device),
            **{"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": STEPS},
            **{"guidance_scale": 4.0, "guidance_scale_2": 2.5, "output_type": "latent", "return_dict": False},
            callback_on_step_end=note,
        )[0].content.numpy()
    deserialized = note_engines(monkeypatch)
    with Bundle.open(folder, "rtx", "expert") as bundle, OnDevice():
        for _ in range(2):  # the second time the first expert is loaded again
            assert np.array_equal(bundle.denoise(noise, conditioning), own)
            if layout == "shared":  # whose weights are in memory that the double knows
                assert device.used_bytes() < 0.7 * both_bytes
    assert deserialized == ["transformer", "transformer_2"] * 2
    # The pipeline itself asks at each step whether the timestep is below its boundary, which is one byte.
    read = np.diff([to_host for _, to_host in crossed])
    assert (read == 1).all(), read
    # bfloat16 at the borders of plans; what a mix-up of experts or scales does is ten times as much.
    size = np.linalg.norm(wanted)
    assert np.linalg.norm(own - wanted) < 0.02 * size
    assert np.linalg.norm(drawn - own) < 0.02 * size
    assert np.linalg.norm(own - full) > 0
