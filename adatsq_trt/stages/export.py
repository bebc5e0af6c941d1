"""Stage `export`: one trace, a graph per distinct assignment and variant, and what a bundle needs beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Lock

import onnx_ir as ir
import torch
from torch import Tensor

from adatsq_trt.base_type import BaseName
from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.engines.exported import EXPORTED_NAME, SCALES_PREFIX, Exported, array_hash
from adatsq_trt.engines.manifest import ScheduleRecord, size_name
from adatsq_trt.execution.device import CPU, to_device
from adatsq_trt.export import Template, export_graphs, export_plugin_graphs, trace
from adatsq_trt.export.plugin_graphs import GRAPHS as PLUGIN_GRAPHS
from adatsq_trt.files import read_tensors, write_json_model, write_tensors
from adatsq_trt.formats import PLUGIN_LAYOUT
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.capture import captured_outputs
from adatsq_trt.models.format_store import SCALES_NAME
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.policy import Policy
from adatsq_trt.stages import calibrate, quantize, refine, search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.meter import release_memory
from adatsq_trt.stages.run_directory import Json, Stage
from adatsq_trt.stages.shapes import written
from adatsq_trt.stages.work import Work

NAME = "export"
GRAPHS, PROMPTS, REFERENCE = "onnx", "prompts.safetensors", "check/reference.safetensors"
POSITIONS = "positions.safetensors"
OUTPUT_NAME = "velocity"
CHECK_SAMPLES = 2
PROMPTS_AT_ONCE = 8
# Noise that is sixteen times what float32 sums differ by, and how often it is drawn.
# One flip in a sensitive place, which two draws of five show, may be most of what there is: twelve rarely miss it.
NOISE, NOISE_DRAWS = 2.0**-16, 12
_TRACING = Lock()  # the exporter patches PyTorch for the whole process while it traces
# A part of the stage's key: exports that hold less are made again.
_REFERENCE_CONTENT = f"steps, layers, loop, spread of {NOISE_DRAWS}, full precision, exported"


def variants(context: Context) -> tuple[str, ...]:
    """Graphs for TensorRT only where a plan will be built from them."""
    gpu = any(target.compute_capability is not None for target in context.targets)
    return ("target", "cpu") if gpu and not context.settings.simulate else ("cpu",)


def stage(context: Context) -> Stage:
    """The stage for these settings."""
    files = [
        search.stage(context).folder / search.POLICY,
        quantize.stage(context).folder,
        calibrate.stage(context).folder / calibrate.TRAJECTORY,
    ]
    if context.settings.refine:
        files.append(refine.stage(context).folder)
    inputs = context.inputs(("weights_sha256", "model_sha256", "formats", "steps", "guidance"))
    own: dict[str, Json] = {
        "variants": variants(context),
        "reference": _REFERENCE_CONTENT,
    }
    if context.settings.layout == PLUGIN_LAYOUT:
        own["layout"] = PLUGIN_LAYOUT
    if context.settings.lora_slots is not None:
        own["lora_slots"] = context.settings.lora_slots
    if context.settings.shapes:
        own["sizes"] = [list(size) for size in context.sizes]
    return context.run.stage(NAME, {**inputs, **own}, files)


def run(context: Context) -> Stage:
    """Export, unless that is done."""
    this = stage(context)
    if this.done:
        return this
    policy = Policy.load(search.stage(context).folder / search.POLICY)
    policy.require(context.settings.weights_sha256, context.settings.steps, context.layers)
    with this.run() as folder:
        _graphs(context, policy, folder)
        with context.on_device():
            _reference(context, policy, folder)
        arrays = {PROMPTS: _prompts(context)}
        if context.sizes:
            arrays[POSITIONS] = _positions(context)
        for name, tensors in arrays.items():
            write_tensors(this.unit(name), tensors)
        scales = read_tensors(quantize.stage(context).folder / SCALES_NAME)
        write_tensors(this.unit(SCALES_NAME), scales)
        write_json_model(this.unit(EXPORTED_NAME), _exported(context, policy, arrays))
    return this


def work(context: Context) -> Work:
    """Count what there is to do, with as many assignments as there may be."""
    assignments, steps = search.most_assignments(context.settings), context.settings.steps
    # In full precision and fake-quantized at every step; then the loop; both again with noise.
    return Work(
        trace=_parts(context),
        graph=_graph_count(context, assignments),
        pair=steps + 2 * steps + NOISE_DRAWS * 2 * steps,
    )


def _parts(context: Context) -> int:
    """Number of models that are traced: experts."""
    return len(set(context.schedule.experts)) or 1


def _graph_count(context: Context, assignments: int) -> int:
    if context.settings.layout == PLUGIN_LAYOUT:
        return PLUGIN_GRAPHS
    return _parts(context) + (assignments + _parts(context)) * len(variants(context))


def _exported(context: Context, policy: Policy, arrays: Mapping[str, Mapping[str, Tensor]]) -> Exported:
    """Record what the bundle has to say of its loop."""
    steps = context.settings.asked_steps
    return Exported(
        policy=policy,
        guidance=context.calibration.guidance,
        guidance_2=context.calibration.guidance_2,
        rescaled_guidance=context.adapter.rescaled_guidance,
        schedule=ScheduleRecord.of(context.schedule),
        shapes={size_name(size): ScheduleRecord.of(own.schedule(steps)) for size, own in context.sizes.items()},
        prompt_texts=context.adapter.prompts,
        arrays={file: {n: array_hash(t.numpy()) for n, t in tensors.items()} for file, tensors in arrays.items()},
    )


def _graphs(context: Context, policy: Policy, folder: Path) -> None:
    base, store = context.settings.base_type, refine.load(context)
    names, in_plugin = variants(context), context.settings.layout == PLUGIN_LAYOUT
    count = _parts(context) + _graph_count(context, len(policy.assignments))
    with context.progress("export", count) as advance:
        assert context.model.rounding.dtype is getattr(torch, base), "the model is rounded when it is loaded"
        blocks, graphs = context.adapter.blocks(), folder / GRAPHS
        templates = _templates(context, base, advance)
        if in_plugin:
            traced = next(templates).model
            export_plugin_graphs(traced, policy, store.weights, graphs, base, blocks, advance, store.transforms)
        else:
            export_graphs(
                templates,
                policy,
                store.weights,
                graphs,
                base,
                blocks,
                names,
                lambda _done, _all: advance(),
                store.transforms,
                context.settings.lora_slots,
            )


def _templates(context: Context, base: BaseName, advance: Callable[[], None]) -> Iterator[Template]:
    """Trace the model; of two experts each, at its first step."""
    samples, schedule = context.calibration.part(slice(0, CHECK_SAMPLES)), context.schedule
    for expert in dict.fromkeys(schedule.experts or ("",)):
        step = schedule.experts.index(expert) if expert else 0
        adapter, time, guidance = samples.adapter_at(step), schedule.model_time(step), samples.guidance_at(step)
        inputs = adapter.guided_inputs(samples.noise(), time, samples.conditioning, guidance)
        traced = _trace(adapter, inputs, base, any_size=bool(context.sizes), part=expert)
        release_memory()  # the exporter's own graph refers to the weights too
        advance()
        yield Template(traced, expert)


def _trace(
    adapter: ModelAdapter, inputs: Mapping[str, Tensor], base: BaseName, any_size: bool, part: str = ""
) -> ir.Model:
    """The model's graph, for the size of the inputs or for any."""
    common = (inputs, OUTPUT_NAME, getattr(torch, base), adapter.float32_inputs)
    with adapter.as_stored(), _TRACING:
        if not any_size:
            return trace(adapter.trace_module(), *common, part=part)
        opened = adapter.any_size()
        return trace(opened.module, *common, opened.positions, opened.axes)


def _positions(context: Context) -> dict[str, Tensor]:
    """Collect the position inputs of graphs for several sizes: "<size>.<graph input>"."""
    return {
        f"{written(size)}.{name}": value
        for size, adapter in context.sizes.items()
        for name, value in adapter.any_size().positions.items()
    }


@torch.no_grad()
def _reference(context: Context, policy: Policy, folder: Path) -> None:
    """Write the reference of `check`: the fake-quantized PyTorch model at every step and through the whole loop."""
    samples = context.calibration.part(slice(0, CHECK_SAMPLES))
    latents = read_tensors(calibrate.stage(context).folder / calibrate.TRAJECTORY)["latents"][:, :CHECK_SAMPLES]
    there = latents.to(context.device)
    layered = {bucket.first for bucket in policy.buckets}
    tensors: dict[str, Tensor] = {
        "loop.prompts": torch.tensor(samples.prompts),
        "loop.seeds": torch.tensor(samples.seeds),
        "loop.full_precision": latents,
    }
    for step in range(policy.steps):
        own = _one_step(context, samples, there[step], step, with_layers=False)
        tensors[f"step_{step:03d}.full_precision"] = own[f"step_{step:03d}.output"].to(CPU)
    store = refine.load(context)
    tensors |= to_device({f"{SCALES_PREFIX}{name}": table for name, table in store.scales.items()}, CPU)
    with context.simulated(store).installed() as model:
        for step in range(policy.steps):
            model.assign(policy.formats_at(step), step)
            tensors |= to_device(_one_step(context, samples, there[step], step, with_layers=step in layered), CPU)
        tensors["loop.quantized"] = _loop(model, samples, policy)
        spread = [_with_input_noise(context, model, policy, samples, there, seed) for seed in range(NOISE_DRAWS)]
    outputs = torch.stack([tensors[f"step_{step:03d}.output"] for step in range(policy.steps)])
    tensors["spread.outputs"] = _largest_error([draw[0] for draw in spread], outputs)
    tensors["spread.loop"] = _largest_error([draw[1][1:] for draw in spread], tensors["loop.quantized"][1:])
    linears = context.adapter.quantizable_layers()
    tensors["in_features"] = torch.tensor([linears[name].in_features for name in context.layers])
    write_tensors(folder / REFERENCE, tensors)


def _loop(model: SimulatedModel, samples: Samples, policy: Policy) -> Tensor:
    return trajectory(samples, lambda step: model.assign(policy.formats_at(step), step)).to(CPU)


def _with_input_noise(
    context: Context, model: SimulatedModel, policy: Policy, samples: Samples, latents: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Outputs of all steps [steps, ...] and latents of the loop [steps + 1, ...] under noise at every layer's input."""
    outputs = []
    with model.input_noise(NOISE, seed):
        for step in range(policy.steps):
            model.assign(policy.formats_at(step), step)
            tensors = _one_step(context, samples, latents[step], step, with_layers=False)
            outputs.append(tensors[f"step_{step:03d}.output"])
        return torch.stack(outputs).to(CPU), _loop(model, samples, policy)


def _largest_error(draws: list[Tensor], expected: Tensor) -> Tensor:
    """Largest relative error of each step among the draws, float32 [steps]."""
    size = expected.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.stack([(draw - expected).flatten(1).norm(dim=1) / size for draw in draws]).amax(dim=0)


def _one_step(context: Context, samples: Samples, latent: Tensor, step: int, with_layers: bool) -> dict[str, Tensor]:
    """Inputs and output of a step; on demand every layer's output, for the first sample of each guidance branch."""
    time, guidance, adapter = context.schedule.model_time(step), samples.guidance_at(step), samples.adapter_at(step)
    inputs = adapter.guided_inputs(latent, time, samples.conditioning, guidance)
    tensors = {f"input.{name}": value.clone() for name, value in inputs.items()}
    layers = {name: context.adapter.transformer.get_submodule(name) for name in context.layers}
    with captured_outputs(layers if with_layers else {}) as outputs:
        tensors["output"] = adapter.predict(inputs)
    tensors |= {f"layer.{name}": output[:: len(samples.seeds)].clone() for name, output in outputs.items()}
    return {f"step_{step:03d}.{name}": value for name, value in tensors.items()}


@torch.no_grad()
def layer_reference(context: Context, policy: Policy, step: int) -> dict[str, Tensor]:
    """Outputs of all layers of the fake-quantized model at any step, by module path, as `_reference` stores them."""
    samples = context.calibration.part(slice(0, CHECK_SAMPLES))
    latents = read_tensors(calibrate.stage(context).folder / calibrate.TRAJECTORY)["latents"][step, :CHECK_SAMPLES]
    with context.simulated(refine.load(context)).installed() as model:
        model.assign(policy.formats_at(step), step)
        tensors = _one_step(context, samples, latents, step, with_layers=True)
    return {name: tensors[f"step_{step:03d}.layer.{name}"] for name in policy.formats_at(step)}


@torch.no_grad()
def _prompts(context: Context) -> dict[str, Tensor]:
    """Conditioning of every prompt of the model, and of the unguided branch, whose images are the prompts' own."""
    adapter, count = context.adapter, len(context.adapter.prompts)
    tensors: dict[str, Tensor] = {}

    def store(name: str, part: range, total: int, rows: Tensor) -> None:
        tensors.setdefault(name, rows.new_empty(total, *rows.shape[1:]))[part] = rows

    for start in range(0, count, PROMPTS_AT_ONCE):  # only few at a time also have rows for the unguided branch
        part = range(start, min(start + PROMPTS_AT_ONCE, count))
        encoded = adapter.encode(part)
        for name, rows in encoded.conditional.items():
            store(f"conditional.{name}", part, count, rows)
        own = range(start, min(part.stop, adapter.negatives))
        for name, rows in (encoded.unconditional or {}).items():
            if own and name not in adapter.image_inputs:
                store(f"unconditional.{name}", own, adapter.negatives, rows[: len(own)])
    return tensors


def used_formats(policy: Policy) -> tuple[str, ...]:
    """Names of the formats that a policy uses, sorted."""
    return tuple(sorted(policy.formats))
