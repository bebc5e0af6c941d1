"""docs/adapters.md: its code is short, right, and goes from calibration to graphs."""

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime as ort
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from adatsq_trt.files import read_json_model, read_tensors
from adatsq_trt.graph_index import INDEX_NAME, GraphIndex
from adatsq_trt.image import ImageShape, PixelScale
from adatsq_trt.models.architectures import ADAPTERS
from adatsq_trt.models.prompted import PromptedAdapter
from adatsq_trt.models.prompts import TextEncoder
from adatsq_trt.policy import Policy
from adatsq_trt.settings import Settings
from adatsq_trt.stages import export, search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.graph import run_stages
from adatsq_trt.stages.run_directory import RunDirectory
from adatsq_trt.zoo.loading import LoadedModel
from tests.tiny_z_image import PROMPTS, WORDS

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
STEPS, GUIDANCE = 2, 2.0


@pytest.fixture(scope="module")
def code() -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return block


@pytest.fixture(scope="module")
def adapter(code: str) -> PromptedAdapter:
    module = ModuleType("adapter_of_the_guide")
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=64,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
        )
        for parameter in transformer.parameters():
            parameter.data = parameter.data.bfloat16().float()
        encoder = TextEncoder(WORDS, PROMPTS, text_tokens=9, width=32)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        made = module.SD3Adapter(
            transformer.requires_grad_(False), encoder.requires_grad_(False), scheduler, ImageShape(8, channels=1)
        )
    assert isinstance(made, PromptedAdapter)
    return made


def test_it_is_short_and_about_another_architecture(code: str) -> None:
    assert len(code.splitlines()) < 80
    assert "SD3Transformer2DModel" not in ADAPTERS


@torch.no_grad()
def test_it_computes_what_diffusers_computes(adapter: PromptedAdapter) -> None:
    latent = torch.randn(2, *adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = adapter.model_inputs(latent, 0.25, adapter.encode([0, 1]).conditional, GUIDANCE)
    wanted = adapter.transformer(**{**inputs, "timestep": torch.full((2,), 250.0)}, return_dict=False)[0]
    assert torch.equal(adapter.predict(inputs), wanted)


@pytest.fixture(scope="module")
def context(adapter: PromptedAdapter, tmp_path_factory: pytest.TempPathFactory):
    settings = Settings(
        model="sd3",
        weights_sha256="0" * 64,
        model_sha256="0" * 64,
        format_set="cpu",
        formats=("w8a8s", "fp32"),
        targets=("cpu",),
        simulate=False,
        steps=STEPS,
        guidance=GUIDANCE,
        budget_bits=16.0,
        calibration_samples=2,
        selection_samples=2,
        held_out_samples=2,
        beam=2,
        candidates=2,
    )
    model = LoadedModel("sd3", adapter, "0" * 64, "0" * 64, STEPS, GUIDANCE, PixelScale(2))
    with RunDirectory.open(tmp_path_factory.mktemp("run") / "sd3") as run:
        yield Context(run, settings, model)


def test_every_stage_up_to_the_graphs_runs(context: Context) -> None:
    """The policy's graphs in ONNX Runtime give what the fake-quantized PyTorch model gave at every step."""
    folder = run_stages(context, export.NAME).folder
    policy = Policy.load(search.stage(context).folder / search.POLICY)
    assert {name for row in policy.assignments for name in row} == {"w8a8s", "fp32"}
    index = read_json_model(folder / export.GRAPHS / INDEX_NAME, GraphIndex)
    reference, scales = read_tensors(folder / export.REFERENCE), read_tensors(folder / "activation_scales.safetensors")
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    for step in range(STEPS):
        graph = index.find("cpu", policy.step_assignments[step])
        prefix = f"step_{step:03d}.input."
        feed = {name.removeprefix(prefix): v.numpy() for name, v in reference.items() if name.startswith(prefix)}
        for layer, signature in graph.scale_inputs.items():
            feed[signature.name] = scales["w8a8s"][step, policy.layers.index(layer)].numpy()
        session = ort.InferenceSession(
            str(folder / export.GRAPHS / graph.path), options, providers=["CPUExecutionProvider"]
        )
        got, wanted = session.run(None, feed)[0], reference[f"step_{step:03d}.output"].numpy()
        assert np.quantile(np.abs(got - wanted), 0.5) < 2e-5 * wanted.std()
