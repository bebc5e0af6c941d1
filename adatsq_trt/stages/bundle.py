"""Stage `bundle`: plans for every target and assignment, and the manifest that makes the folder a bundle."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from importlib import metadata
from pathlib import Path, PurePosixPath

from adatsq_trt import __version__
from adatsq_trt.checkpoints.weights import find_weights
from adatsq_trt.engines.backends.base import BatchRange, Profile
from adatsq_trt.engines.backends.network import NetworkCompiler
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.engines.backends.tensorrt import TensorRTBackend, TensorRTOptions
from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.bundle import (
    PLUGIN_LIBRARY,
    POLICY_NAME,
    VAE_FOLDER,
    ImageSpec,
    Manifest,
    PlanFile,
    ShapeRecord,
    write_manifest,
)
from adatsq_trt.engines.manifest import Compatibility, ScheduleRecord
from adatsq_trt.engines.plugin_commands import plugin_profiles, write_commands
from adatsq_trt.errors import MissingFileError
from adatsq_trt.files import atomic_path, read_json_model
from adatsq_trt.formats import PLUGIN_LAYOUT, Target
from adatsq_trt.graph_index import INDEX_NAME, GraphFile, GraphIndex
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.policy import Policy
from adatsq_trt.settings import Settings
from adatsq_trt.stages import export, search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.lora_slots import slots_record
from adatsq_trt.stages.run_directory import Stage
from adatsq_trt.stages.work import Work
from adatsq_trt.text_call import TextCall

NAME = "bundle"
# Models with more weights are compiled one graph at a time: a compiler holds several times their size.
_LARGE_BYTES = 1 << 30
_BACKEND_SETTINGS = ("backend", "hardware_compatibility", "version_compatible", "weight_streaming")
TIMING_CACHE = "timing-cache"
_LIBRARIES = ("torch", "diffusers", "onnx", "onnx-ir", "onnxruntime-gpu", "tensorrt-rtx", "polygraphy")


def stage(context: Context) -> Stage:
    """The stage for these settings."""
    inputs = context.inputs(("model", "targets", "simulate", "layout", "steps", "guidance"))
    if context.settings.batch != Settings.model_fields["batch"].default:
        inputs |= context.inputs(("batch",))
    if context.settings.shapes:
        inputs |= context.inputs(("shapes",))
    if context.settings.backend != "rtx":
        inputs |= context.inputs(_BACKEND_SETTINGS)
    versions = dict(library_versions())
    if (call := context.adapter.pipeline_call()) is not None:
        inputs["call"] = call.model_dump(mode="json")
    if (text := _text_call(context)) is not None:
        inputs["text"] = text.model_dump(mode="json")
    files = [export.stage(context).folder, search.stage(context).folder / search.POLICY, *_vae_files(context)]
    if context.settings.plugins is not None:
        files.append(Path(context.settings.plugins))
    return context.run.stage(NAME, {**inputs, "versions": versions}, files)


def library_versions() -> dict[str, str]:
    """List the versions of the package and of the libraries that a bundle is made with."""
    return {"adatsq-trt": __version__, **{name: metadata.version(name) for name in _LIBRARIES if _installed(name)}}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def run(context: Context) -> Stage:
    """Build from what was exported, unless that is done; needs the model's outline only."""
    this = stage(context)
    if this.done:
        return this
    with this.run() as folder:
        for name in sorted(context.run.record(export.NAME).outputs):
            _copy(context.run.path / name, folder / PurePosixPath(name).relative_to(export.NAME))
        policy_file = search.stage(context).folder / search.POLICY
        _copy(policy_file, folder / POLICY_NAME)
        for file in _vae_files(context):
            _copy(file, folder / VAE_FOLDER / file.name)
        index = read_json_model(folder / export.GRAPHS / INDEX_NAME, GraphIndex)
        write_manifest(folder, _manifest(context, index, Policy.load(policy_file), _plans(context, folder, index)))
    return this


def work(context: Context) -> Work:
    """Count what there is to do, with as many assignments as there may be."""
    settings, targets = context.settings, _plan_targets(context)
    if not targets or (settings.layout == PLUGIN_LAYOUT and settings.plugins is None):
        return Work()
    return Work(plan=len(targets) * _plans_of_a_target(settings, search.most_assignments(settings)))


def _plan_targets(context: Context) -> list[Target]:
    """Targets that plans are compiled for."""
    if context.settings.simulate:
        return []
    return [target for target in context.targets if target.compute_capability is not None]


def _plans_of_a_target(settings: Settings, graphs: int) -> int:
    """How many there are where policies have so many graphs."""
    return 1 if settings.layout in ("switch", PLUGIN_LAYOUT) else graphs


def _vae_files(context: Context) -> list[Path]:
    """Configuration and weights of the VAE, which the bundle carries; none for a model that draws pixels."""
    folder = context.model.vae
    return [] if folder is None else [folder / "config.json", *find_weights(folder).all_files]


def _copy(source: Path, destination: Path) -> None:
    """The same bytes in the bundle. No hard link: onnx refuses external data that has a second name."""
    if not source.is_file():
        raise MissingFileError(f"'{source}' is gone; run the same command again, which makes it anew")
    with atomic_path(destination) as temporary:
        shutil.copyfile(source, temporary)


def _plans(context: Context, folder: Path, index: GraphIndex) -> tuple[PlanFile, ...]:
    targets = _plan_targets(context)
    if not targets:
        return ()
    layout = context.settings.layout
    batch = _profiles(context, index.find("target", None))
    if layout == PLUGIN_LAYOUT:
        graph, assignments = index.find("target", None), len(Policy.load(folder / POLICY_NAME).assignments)
        write_commands(folder, graph, assignments, batch)
        if context.settings.plugins is None:
            return ()
        _copy(Path(context.settings.plugins), folder / PLUGIN_LIBRARY)
        batch = plugin_profiles(graph, assignments, batch)
    graphs = sum(g.variant == "target" and g.assignment is not None for g in index.graphs)
    compiler = _compiler(context)
    plans = len(targets) * _plans_of_a_target(context.settings, graphs)
    # Kernels are measured on the one GPU, so only one compiler of enterprise TensorRT works at a time.
    alone = index.weight_bytes > _LARGE_BYTES or compiler.name == TensorRTBackend.name
    jobs = 1 if alone else os.cpu_count() or 1
    with context.progress(f"build: {compiler.title}", plans) as advance:
        return build_plans(folder, index, targets, batch, lambda _done, _all: advance(), compiler, layout, jobs)


def _profiles(context: Context, graph: GraphFile) -> BatchRange:
    """The optimization profiles that were asked for, with a row for each branch of guidance."""
    branches = 2 if context.calibration.conditioning.unconditional is not None else 1
    if not context.sizes:
        *smaller, most = (samples * branches for samples in context.settings.batch)
        return BatchRange(1, most, most, tuple(smaller))
    profiles = []
    for samples, *size in context.settings.shapes:
        adapter = context.sizes[tuple(size)]
        shapes = {name: tuple(value.shape) for name, value in adapter.any_size().positions.items()}
        grows = next(s.name for s in graph.inputs if any(isinstance(n, str) for n in s.shape[1:]))
        shapes[grows] = (0, *adapter.latent_shape)
        profiles.append(Profile(1, samples * branches, samples * branches, tuple(shapes.items())))
    return BatchRange.of_sizes(profiles)


def _compiler(context: Context) -> NetworkCompiler:
    """The backend, with its options."""
    settings = context.settings
    if settings.backend == "rtx":
        return RtxBackend()
    return TensorRTBackend(
        TensorRTOptions(
            _compatibility(settings),
            settings.weight_streaming,
            context.run.path / TIMING_CACHE,
            None if settings.plugins is None else Path(settings.plugins),
        )
    )


def _compatibility(settings: Settings) -> Compatibility:
    return Compatibility(hardware=settings.hardware_compatibility, versions=settings.version_compatible)


def _manifest(context: Context, index: GraphIndex, policy: Policy, plans: tuple[PlanFile, ...]) -> Manifest:
    adapter, versions = context.adapter, library_versions()
    if plans and context.settings.backend == TensorRTBackend.name:
        versions[TensorRTBackend.name] = _compiler(context).version()
    return Manifest(
        model=context.model.name,
        architecture=adapter.architecture,
        backend=context.settings.backend if plans else "onnxruntime",
        layout=context.settings.layout,
        targets=context.settings.targets,
        base_type=index.base_type,
        formats=export.used_formats(policy),
        schedule=ScheduleRecord.of(context.schedule),
        guidance=context.settings.guidance,
        guidance_2=context.settings.guidance_2,
        rescaled_guidance=adapter.rescaled_guidance,
        latent_shape=adapter.latent_shape,
        image=ImageSpec(**asdict(adapter.image)),
        pixels=context.model.scale.size(adapter.image),
        shapes=tuple(_shape(context, size, adapter) for size, adapter in context.sizes.items()),
        prompts=len(adapter.prompts),
        prompt_texts=adapter.prompts,
        call=adapter.pipeline_call(),
        text=_text_call(context),
        image_call=None if context.pipeline is None else context.pipeline.image_call,
        lora_slots=slots_record(context),
        compatibility=_compatibility(context.settings),
        plans=plans,
        versions=versions,
    )


def _text_call(context: Context) -> TextCall | None:
    return None if context.pipeline is None else context.pipeline.text_call


def _shape(context: Context, size: tuple[int, ...], adapter: ModelAdapter) -> ShapeRecord:
    """One of several sizes; some models have other sigmas at each."""
    return ShapeRecord(
        size=size,
        batches=tuple(samples for samples, *own in context.settings.shapes if tuple(own) == size),
        latent_shape=adapter.latent_shape,
        image=ImageSpec(**asdict(adapter.image)),
        schedule=ScheduleRecord.of(adapter.schedule(context.settings.asked_steps)),
    )
