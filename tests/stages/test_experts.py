"""Wan 2.2 from the pipeline to a bundle and back: two transformers, one policy, one bundle."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import WanPipeline

import adatsq_trt
from adatsq_trt.checkpoints.loading import open_pipeline
from adatsq_trt.checkpoints.lora import parse_lora
from adatsq_trt.checkpoints.objects import open_object
from adatsq_trt.engines.accuracy import check
from adatsq_trt.engines.backends import onnxruntime, selection
from adatsq_trt.engines.backends.onnxruntime import ExpertSteps
from adatsq_trt.engines.bundle import BundleFiles, PlanFile, write_manifest
from adatsq_trt.engines.inspection import inspect_bundle
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.transformer import AdatsqTransformer
from adatsq_trt.engines.triton_server.batching import Generation, StepBatcher
from adatsq_trt.engines.triton_server.page import page_text
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from adatsq_trt.engines.triton_server.requests import Request, read_request
from adatsq_trt.errors import DamagedFileError, MismatchError, UserError
from adatsq_trt.files import write_tensors
from adatsq_trt.report.page import write_report
from adatsq_trt.settings import PipelineSettings
from adatsq_trt.stages.images import require_servable
from adatsq_trt.stages.report import gather
from adatsq_trt.stages.run_directory import RunDirectory
from adatsq_trt.step_policy import export_policy
from tests.tiny_checkpoints import HEIGHT, WIDTH, make_wan_pipeline
from tests.tiny_wan_experts import (
    BOUNDARY_RATIO,
    FRAMES,
    PROMPTS,
    SCALES,
    SMALL,
    STEPS,
    distance,
    make_wan_experts_pipeline,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Bundle]]:
    """Built once, from the folder of a saved pipeline."""
    folder = tmp_path_factory.mktemp("experts")
    make_wan_experts_pipeline().save_pretrained(folder / "pipeline")
    with adatsq_trt.build(folder / "pipeline", output=folder / "run", **SMALL, **SCALES) as bundle:
        yield folder, bundle


def draw(pipe: WanPipeline, noise: np.ndarray, **options: Any) -> np.ndarray:
    """The latents that the pipeline ends with; guidance differs between the experts unless told."""
    asked = {"guidance_scale": 4.0, "guidance_scale_2": 2.5, "num_inference_steps": STEPS, **options}
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
    latents = torch.from_numpy(noise)
    result = pipe([PROMPTS[1], PROMPTS[0]], latents=latents, output_type="latent", return_dict=False, **size, **asked)
    return np.asarray(result[0].numpy())


def test_a_bundle_of_two_experts_draws_what_the_pipeline_draws(built: tuple[Path, Bundle]) -> None:
    """In full precision with both experts, guided with a scale each, by the scheduler that Wan comes with."""
    _, bundle = built
    pipe, noise = make_wan_experts_pipeline(), bundle.noise([4, 5])
    conditioning, wanted = bundle.conditioning([1, 0]), draw(pipe, bundle.noise([4, 5]))
    assert distance(bundle.denoise(noise, conditioning, quantized=False), wanted) < 1e-4
    # With the experts exchanged, one scale for both, or another boundary it would not be that.
    exchanged = make_wan_experts_pipeline()
    exchanged.transformer, exchanged.transformer_2 = exchanged.transformer_2, exchanged.transformer
    elsewhere = make_wan_experts_pipeline(boundary_ratio=0.95)
    others = draw(exchanged, noise), draw(pipe, noise, guidance_scale_2=None), draw(elsewhere, noise)
    assert min(distance(other, wanted) for other in others) > 1e-3
    # As in the pipeline, the second scale is that of the first where only this is given.
    single = bundle.denoise(noise, conditioning, guidance=4.0, quantized=False)
    assert distance(single, others[1]) < 1e-4
    assert distance(bundle.denoise(noise, conditioning), wanted) < 1e-2


def test_both_stand_ins_draw_in_the_unmodified_pipeline(built: tuple[Path, Bundle]) -> None:
    _, bundle = built
    pipe, noise = make_wan_experts_pipeline(), bundle.noise([4, 5])
    pipe.transformer, pipe.transformer_2 = AdatsqTransformer.experts_from_bundle(bundle, pipe.scheduler)
    full, quantized = draw(make_wan_experts_pipeline(), noise), bundle.denoise(noise, bundle.conditioning([1, 0]))
    # What differs in its last bits may be rounded to neighbouring points of int8; one of the other expert's calls would
    # be a hundred times as far.
    assert distance(draw(pipe, noise), quantized) < 2 * distance(quantized, full)
    assert bundle.transformers()[1].expert == "transformer_2"
    for alone in (bundle.transformer, lambda: AdatsqTransformer.from_bundle(bundle)):
        with pytest.raises(MismatchError, match=r"holds two transformers: pipe\.transformer, pipe\.transformer_2 ="):
            alone()
    pipe.register_to_config(boundary_ratio=0.95)
    with pytest.raises(MismatchError, match="step 1: the pipeline calls its transformer_2, the bundle computes"):
        draw(pipe, noise)
    pipe.register_to_config(boundary_ratio=BOUNDARY_RATIO)
    pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer
    with pytest.raises(MismatchError, match="step 0: the pipeline calls its transformer_2"):
        draw(pipe, noise)


def test_an_assignment_names_the_layers_of_its_expert(built: tuple[Path, Bundle]) -> None:
    _, bundle = built
    schedule, policy = bundle.schedule, bundle.policy
    assert schedule.experts == ("transformer",) * 2 + ("transformer_2",) * 3
    for step, expert in enumerate(schedule.experts):
        layers = policy.formats_at(step)
        assert len(layers) == len(policy.layers) // 2
        assert all(layer.startswith(f"{expert}.") for layer in layers)
    assert len(policy.assignments) <= 4  # plans, which the default limits
    with pytest.raises(MismatchError, match="the policy is of two transformers"):
        export_policy(policy)


def test_a_bundle_of_two_experts_passes_its_check_and_is_shown(built: tuple[Path, Bundle], tmp_path: Path) -> None:
    folder, bundle = built
    report = check(bundle.files, tmp_path)
    assert report.passed, report
    assert {row.step for row in report.rows if row.variant == "reference"} == set(range(STEPS))
    shown = inspect_bundle(bundle.files)
    assert set(shown.bits) == {"transformer.blocks.0", "transformer_2.blocks.0"}
    write_report(gather(RunDirectory.existing(folder / "run")), tmp_path / "report.html", tmp_path / "figures")
    assert "transformer_2.blocks.0.attn1.to_q" in (tmp_path / "report.html").read_text()


def test_experts_that_were_exchanged_in_the_bundle_are_caught(built: tuple[Path, Bundle], tmp_path: Path) -> None:
    """Every constant of one expert's graphs is the other's, under its own name."""
    copytree(built[0] / "run" / "bundle", tmp_path / "bundle")
    files = BundleFiles.open(tmp_path / "bundle")
    graphs = [graph for graph in files.index.graphs if graph.variant == "reference"]
    models = {g.expert: onnx.load(files.graph_path(g), load_external_data=False) for g in graphs}
    for one, other in zip(*(model.graph.initializer for model in models.values()), strict=True):
        assert one.name.removeprefix("transformer.") == other.name.removeprefix("transformer_2.")
        kept = onnx.TensorProto.FromString(one.SerializeToString())
        one.CopyFrom(other)
        other.CopyFrom(kept)
        one.name, other.name = other.name, one.name
    for graph in graphs:
        files.graph_path(graph).write_bytes(models[graph.expert].SerializeToString())
    write_manifest(files.folder, files.manifest)
    report = check(BundleFiles.open(tmp_path / "bundle"), tmp_path / "check")
    assert not report.passed
    wrong = [row.step for row in report.rows if row.variant == "reference" and not row.passed]
    assert wrong == list(range(STEPS))
    assert [row.subject for row in report.exact if not row.passed] == ["constants of the reference graphs"]


def test_a_manifest_whose_steps_are_of_the_other_expert_is_refused(built: tuple[Path, Bundle], tmp_path: Path) -> None:
    copytree(built[0] / "run" / "bundle", tmp_path / "bundle")
    manifest = BundleFiles.open(tmp_path / "bundle").manifest
    experts = ("transformer",) * 3 + ("transformer_2",) * 2
    schedule = manifest.schedule.model_copy(update={"experts": experts})
    write_manifest(tmp_path / "bundle", manifest.model_copy(update={"schedule": schedule}))
    with pytest.raises(DamagedFileError, match="step 2 is of 'transformer', and its assignment of another transformer"):
        BundleFiles.open(tmp_path / "bundle")


def test_a_policy_with_formats_for_layers_that_do_not_run_is_refused(
    built: tuple[Path, Bundle], tmp_path: Path
) -> None:
    """Before anything does."""
    folder, bundle = built
    policy = bundle.policy
    full = tuple(tuple(name or "w8a32" for name in row) for row in policy.assignments)
    wrong = policy.model_copy(update={"assignments": full})
    with pytest.raises(MismatchError, match=r"--policy, step 0, layer 'transformer_2\..*': expected null"):
        adatsq_trt.search_policy(folder / "pipeline", output=tmp_path / "run", **SMALL, **SCALES, policy=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": "smooth"}, "--transform smooth: not with a pipeline of two transformers"),
        ({"refine": True}, "--refine: not with"),
        ({"lora_slots": 4}, "--lora-slots 4: not with"),
        ({"beam": 2}, "--beam 2: not with"),
        ({"hessian": "paper"}, "--hessian paper: not with"),
        ({"max_assignments": 1}, "--max-assignments 1: not with"),
        ({"target": "sm120", "layout": "switch"}, "--layout switch: not with"),
        ({"shapes": "1x5x64x48,1x5x48x64", "height": None, "width": None, "frames": None}, "--shapes: not with"),
        ({"guidance": 1.0}, "--guidance-2 2.5: --guidance 1 is no guidance"),
    ],
)
def test_what_is_not_done_for_two_experts_is_refused(
    built: tuple[Path, Bundle], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    asked = {**SMALL, **SCALES, **options}
    with pytest.raises(UserError, match=message):
        adatsq_trt.build(built[0] / "pipeline", output=tmp_path / "run", **asked)


def test_on_a_gpu_full_precision_runs_beside_the_plans(
    built: tuple[Path, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime with CUDA has no sessions of two transformers: passed over by itself, and no hindrance to plans."""
    files = built[1].files
    monkeypatch.setattr(selection, "gpu_is_here", lambda: True)
    monkeypatch.setattr(selection, "require_cuda", lambda: None)
    chosen = selection.choose(files.manifest)
    assert chosen.name == "onnxruntime"
    assert "two transformers run on the processor" in chosen.sentence
    plan = PlanFile.model_construct(path="plans/a.plan")
    with closing(selection.make_runner(files, selection.BackendChoice("rtx", (plan,)), quantized=False)) as runner:
        assert isinstance(runner, ExpertSteps)


def alive_sessions(patch: pytest.MonkeyPatch) -> tuple[list[int], list[weakref.ref[Any]]]:
    """How many of ONNX Runtime's sessions are alive whenever one is to be made, and all that were made."""
    before, made, load = list[int](), list[weakref.ref[Any]](), onnxruntime.load_session

    def counted(path: Path) -> Any:
        before.append(sum(session() is not None for session in made))
        session = load(path)
        made.append(weakref.ref(session))
        return session

    patch.setattr(onnxruntime, "load_session", counted)
    return before, made


def test_with_offloading_one_expert_is_loaded_at_a_time(
    built: tuple[Path, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, both = built
    noise, conditioning = both.noise([4, 5]), both.conditioning([1, 0])
    wanted = {quantized: both.denoise(noise, conditioning, quantized=quantized) for quantized in (True, False)}
    before, made = alive_sessions(monkeypatch)
    for quantized, latents in wanted.items():
        before.clear()
        with adatsq_trt.load(folder / "run", offload="expert") as bundle:
            for _ in range(2):  # the second time the first expert is loaded again
                assert np.array_equal(bundle.denoise(noise, conditioning, quantized=quantized), latents)
            assert before == [0] * 4
            assert [session() is not None for session in made[-4:]] == [False] * 3 + [True]
        assert not any(session() for session in made)
    before.clear()
    with adatsq_trt.load(folder / "run") as bundle:
        bundle.denoise(noise, conditioning)
        assert before == [0, 1]


def test_with_offloading_both_stand_ins_draw_the_same(
    built: tuple[Path, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, both = built
    noise, pipe, drawn = both.noise([4, 5]), make_wan_experts_pipeline(), []
    before, _ = alive_sessions(monkeypatch)
    for offload in ("none", "expert"):
        before.clear()
        with adatsq_trt.load(folder / "run", offload=offload) as bundle:
            pipe.transformer, pipe.transformer_2 = bundle.transformers()
            drawn.append(draw(pipe, noise))
    assert before == [0, 0]
    assert np.array_equal(*drawn)


def test_an_expert_that_cannot_be_loaded_is_tried_again(
    built: tuple[Path, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, both = built
    noise, conditioning = both.noise([4]), both.conditioning([0])
    load = onnxruntime.load_session

    def refused(path: Path) -> Any:
        raise DamagedFileError(f"'{path}': no memory")

    with adatsq_trt.load(folder / "run", offload="expert") as bundle:
        monkeypatch.setattr(onnxruntime, "load_session", refused)
        with pytest.raises(DamagedFileError, match="no memory"):
            bundle.denoise(noise, conditioning)
        monkeypatch.setattr(onnxruntime, "load_session", load)
        assert np.array_equal(bundle.denoise(noise, conditioning), both.denoise(noise, conditioning))


def save_wan_lora(file: Path, seed: int) -> Path:
    """Of one layer, as diffusers names it."""
    generator, layer = torch.Generator().manual_seed(seed), "transformer.blocks.0.attn1.to_q"
    shapes = {"A": (4, 64), "B": (64, 4)}
    parts = {f"{layer}.lora_{part}.weight": torch.randn(shape, generator=generator) for part, shape in shapes.items()}
    write_tensors(file, parts)
    return file


def test_each_expert_has_loras_of_its_own_as_in_the_pipeline(built: tuple[Path, Bundle], tmp_path: Path) -> None:
    files = [save_wan_lora(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    names = (f"transformer={files[0]}:0.5", f"transformer_2={files[1]}")
    given = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES, "prompts": PROMPTS}
    opened = open_pipeline(PipelineSettings(path=str(built[0] / "pipeline"), loras=names, **given))
    layers = opened.load(opened.encode(lambda: None)).adapter.quantizable_layers()
    pipe = make_wan_experts_pipeline()
    pipe.load_lora_weights(str(files[0]), adapter_name="first")
    pipe.load_lora_weights(str(files[1]), adapter_name="second", load_into_transformer_2=True)
    pipe.fuse_lora(["transformer"], lora_scale=0.5, adapter_names=["first"])
    pipe.fuse_lora(["transformer_2"], adapter_names=["second"])
    one = torch.eye(64)
    for name in ("transformer", "transformer_2"):
        expected = getattr(pipe, name).blocks[0].attn1.to_q(one)
        unchanged = getattr(make_wan_experts_pipeline(), name).blocks[0].attn1.to_q(one)
        found = layers[f"{name}.blocks.0.attn1.to_q"](one)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert (found - unchanged).abs().max() > 0.1
    # What a run records is read again as what it was; another expert is another model.
    assert tuple(map(str, map(parse_lora, opened.settings.loras))) == opened.settings.loras
    exchanged = (f"transformer_2={files[0]}:0.5", f"transformer={files[1]}")
    others = open_pipeline(PipelineSettings(path=str(built[0] / "pipeline"), loras=exchanged, **given))
    assert others.weights_sha256 != opened.weights_sha256


def test_a_lora_says_which_of_two_transformers_it_changes(built: tuple[Path, Bundle], tmp_path: Path) -> None:
    file = save_wan_lora(tmp_path / "style.safetensors", 1)
    message = "has two transformers, and the file does not say which .*; write transformer=.* or transformer_2=.*style"
    with pytest.raises(UserError, match=message):
        adatsq_trt.build(built[0] / "pipeline", output=tmp_path / "run", lora=str(file), **SMALL)
    make_wan_pipeline().save_pretrained(tmp_path / "one")
    with pytest.raises(UserError, match=r"has one transformer; write .*style\.safetensors:1 without a name"):
        adatsq_trt.build(tmp_path / "one", output=tmp_path / "run", lora=f"transformer={file}", **SMALL)


def test_a_second_scale_of_guidance_needs_a_second_transformer() -> None:
    with pytest.raises(UserError, match="--guidance-2 2: model 'digits-flux' has one transformer"):
        adatsq_trt.build("digits-flux", target="cpu", guidance_2=2.0)


def served(bundle: Bundle, requests: Sequence[Request]) -> list[np.ndarray]:
    """The latents of requests that meet in a server, each a step behind the one before it."""
    batcher, running = StepBatcher(bundle, max_samples=8), list[Generation]()
    waiting = [request.generation for request in requests]
    while waiting or any(generation.step < STEPS for generation in running):
        running += [waiting.pop(0)] if waiting else []
        batcher.advance(batcher.choose([generation for generation in running if generation.step < STEPS]))
    return [generation.latents for generation in running]


def test_requests_for_two_experts_get_what_the_bundle_draws(built: tuple[Path, Bundle]) -> None:
    """Quantized and in full precision, whose steps share a call within an expert alone, at several scales."""
    _, bundle = built
    asked: list[tuple[dict[str, float], bool]] = [
        ({}, True),
        ({"guidance": 3.0}, True),
        ({"guidance_2": 1.5}, True),
        ({}, False),
        ({"guidance": 3.0, "guidance_2": 2.0}, False),
        ({}, False),
    ]
    drawn = served(bundle, [ask(bundle, seed, quantized, **scales) for seed, (scales, quantized) in enumerate(asked)])
    for seed, ((scales, quantized), latents) in enumerate(zip(asked, drawn, strict=True)):
        guidance = scales.get("guidance", None if not scales else SCALES["guidance"])
        expected = bundle.denoise(
            bundle.noise([seed]),
            bundle.conditioning([1]),
            guidance=guidance,
            guidance_2=scales.get("guidance_2"),
            quantized=quantized,
        )
        np.testing.assert_array_equal(latents, expected)
    plain, other, second = (
        distance(drawn[0], bundle.denoise(bundle.noise([0]), bundle.conditioning([1]), **scales))
        for scales, _ in asked[:3]
    )
    assert plain == 0
    assert min(other, second) > 1e-4


def ask(bundle: Bundle, seed: int, quantized: bool, **scales: float) -> Request:
    """As a client does."""
    tensors = {"seed": np.array([seed]), "prompt": np.array([1]), "quantized": np.array([quantized])}
    return read_request(tensors | {n: np.array([v], np.float32) for n, v in scales.items()}, "", bundle, 8)


def test_two_experts_are_deployed_with_both_scales(built: tuple[Path, Bundle], tmp_path: Path) -> None:
    _, bundle = built
    with pytest.raises(UserError, match=r"guidance_2: got 1000, expected 0 to 100; .* the bundle's own, 2.5"):
        ask(bundle, 0, True, guidance_2=1000)
    write_repository([Deployment("wan", bundle.files, pipeline=built[0] / "pipeline")], tmp_path / "models")
    config = (tmp_path / "models" / "wan" / "config.pbtxt").read_text()
    assert "of the second transformer; guidance where that is given, else 2.5" in config
    assert '<input name="guidance_2" type="number" step="any" value="2.5" required>' in page_text(bundle.files, "wan")
    require_servable(built[0] / "pipeline")


def test_a_pipeline_in_memory_is_the_one_that_was_saved(built: tuple[Path, Bundle]) -> None:
    """Layers, steps of each expert and weights; and what its pipeline treats otherwise is refused."""
    sizes: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "frames": FRAMES, "prompts": PROMPTS}
    pipe, saved = make_wan_experts_pipeline(), open_pipeline(PipelineSettings(path=str(built[0] / "pipeline"), **sizes))
    in_memory = open_object(pipe, PipelineSettings(path="", **sizes))
    own, other = (opened.load(opened.encode(lambda: None)).adapter for opened in (in_memory, saved))
    assert list(own.quantizable_layers()) == list(other.quantizable_layers())
    assert own.schedule(STEPS).experts == other.schedule(STEPS).experts
    for one, two in zip(own.transformer.parameters(), other.transformer.parameters(), strict=True):
        assert torch.equal(one, two)
    pipe.register_to_config(expand_timesteps=True)
    with pytest.raises(MismatchError, match="the pipeline's expand_timesteps is True, expected False"):
        open_object(pipe, PipelineSettings(path="", **sizes))
    pipe.register_to_config(expand_timesteps=False, boundary_ratio=None)
    with pytest.raises(MismatchError, match="boundary_ratio is None and its transformer_2 a WanTransformer3DModel"):
        open_object(pipe, PipelineSettings(path="", **sizes))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["embedded", "shared"])
def test_plans_are_of_one_expert_each(built: tuple[Path, Bundle], tmp_path: Path, layout: str) -> None:
    """Compiled for a GPU; every piece of the target graphs is compared with that of the cpu graphs."""
    options = {**SMALL, **SCALES, "target": "sm120", "layout": layout, "backend": "rtx"}
    with adatsq_trt.build(built[0] / "pipeline", output=tmp_path / "run", **options) as bundle:
        plans = {plan.assignment for plan in bundle.manifest.plans}
        assert plans == set(range(len(bundle.policy.assignments)))
        report = check(bundle.files, tmp_path / "check")
        assert report.passed
        pieces = {(row.step, row.block) for row in report.rows if row.variant == "target"}
        for step, expert in enumerate(bundle.schedule.experts):
            own = {block for at, block in pieces if at == step and block is not None}
            assert all(block.startswith(expert + ".") for block in own if "blocks" in block)
        sizes = inspect_bundle(bundle.files).sizes
        assert sizes is not None
        assert [layout.layout for layout in sizes.layouts] == ["embedded", "shared"]
