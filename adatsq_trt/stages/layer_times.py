"""Times of whole layers as plans on this machine's GPU: the table that `--gpu FILE` reads for a search.

For each shape of a bundle's layers a bundle of one linear layer is made by the exporter and the compiler that made the
bundle itself, with an assignment for each format of the target. So what is timed is what a step's plan has of a layer:
quantized input, product, bias. The weights are random, since no kernel asks for their values.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Literal, cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from adatsq_trt.engines.accuracy.references import Reference
from adatsq_trt.engines.backends.base import BatchRange
from adatsq_trt.engines.backends.device_steps import DeviceSteps, RowBuffers
from adatsq_trt.engines.backends.network import NetworkCompiler
from adatsq_trt.engines.backends.rtx import RtxBackend
from adatsq_trt.engines.backends.selection import BackendChoice, BackendName, choose, make_runner
from adatsq_trt.engines.backends.tensorrt import TensorRTBackend, TensorRTOptions
from adatsq_trt.engines.benchmark import WARM_UP_ROUNDS, machine
from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.bundle import (
    GRAPH_FOLDER,
    PLUGIN_LIBRARY,
    POLICY_NAME,
    SCALES_NAME,
    BundleFiles,
    ImageSpec,
    Manifest,
    ScheduleRecord,
    write_manifest,
)
from adatsq_trt.engines.plugin_commands import plugin_profiles
from adatsq_trt.errors import UserError
from adatsq_trt.export import export_graphs, export_plugin_graphs, trace
from adatsq_trt.files import write_tensors
from adatsq_trt.formats import FORMATS, PLUGIN_LAYOUT, TARGETS, Format
from adatsq_trt.policy import LayerShape, Policy
from adatsq_trt.quantizers import quantize_nearest
from adatsq_trt.timed_kernels import layer_row

_LAYER = "layer"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerTime(_Record):
    """One layer in one format.

    Attributes:
        what: `layer_row` of the format.
        m: rows that one sample sends through it, both guidance branches counted.
        n: outputs.
        k: inputs.
        median_ms, p20_ms, p80_ms: of one call.
    """

    what: str
    m: int
    n: int
    k: int
    median_ms: float
    p20_ms: float
    p80_ms: float


class LayerTimes(_Record):
    """A table that `--gpu FILE` reads.

    Attributes:
        measured: on a device; no other table is written.
        card: name of the GPU and version of its driver.
        target: that the plans were compiled for.
        layout: of the plans.
        libraries: name → version of what ran them.
        timings: of every shape and format.
    """

    schema_version: Literal[1] = 1
    measured: Literal[True] = True
    card: str
    target: str
    layout: str
    libraries: dict[str, str]
    timings: tuple[LayerTime, ...]


@dataclass
class _Case:
    """One layer in one format, as a step of a bundle of one layer."""

    runner: DeviceSteps
    buffers: RowBuffers
    step: int
    shape: LayerShape
    fmt: Format


def measure_layers(
    path: Path,
    backend: BackendName,
    rounds: int,
    on_round: Callable[[], None] | None = None,
) -> LayerTimes:
    """Time every shape of a bundle's layers in every format of its target.

    Args:
        path: of the bundle or its run directory.
        backend: what runs it; "auto" for the best.
        rounds: timed calls of each layer and format, which are interleaved.
        on_round: called after each round, warm-up included.

    Raises:
        UserError: nothing here runs the bundle's plans.
        AdatsqError: the compiler refuses a layer.
    """
    files = BundleFiles.open(path)
    choice = choose(files.manifest, backend)
    if not choice.plans:
        raise UserError(
            f"'{path}': times of layers are those of plans, and the bundle {choice.sentence}; measure it where its "
            "plans run, or name a card with --gpu instead of a table"
        )
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="adatsq-layers-")))
        cases = [
            case
            for index, shape in enumerate(_shapes(files))
            for case in _cases(files, choice, shape, scratch / str(index), stack)
        ]
        times: list[list[float]] = [[] for _ in cases]
        for turn in range(WARM_UP_ROUNDS + rounds):
            for case, own in zip(cases, times, strict=True):
                elapsed_ms = case.runner.timed_step(case.step, case.buffers)
                own += [elapsed_ms] if turn >= WARM_UP_ROUNDS else []
            if on_round is not None:
                on_round()
    here = machine(choice.name)
    assert here.gpu is not None
    return LayerTimes(
        card=here.gpu,
        target=choice.plans[0].target,
        layout=files.manifest.layout,
        libraries=here.versions,
        timings=tuple(_time(case, sorted(own)) for case, own in zip(cases, times, strict=True)),
    )


def _shapes(files: BundleFiles) -> list[LayerShape]:
    """Distinct ones, from what PyTorch computed of every layer for the first sample of each guidance branch."""
    reference, found = Reference(files), dict[tuple[int, int, int], LayerShape]()
    for layer, output in reference.layers(0).items():
        outputs = output.shape[-1]
        shape = LayerShape(layer, reference.in_features(layer), outputs, output.size // outputs)
        found.setdefault((shape.tokens, shape.out_features, shape.in_features), shape)
    return list(found.values())


def _cases(files: BundleFiles, choice: BackendChoice, shape: LayerShape, folder: Path, stack: ExitStack) -> list[_Case]:
    formats = _formats(files, choice.plans[0].target, shape)
    own = _write_bundle(files, choice.plans[0].target, shape, formats, folder)
    runner = cast(DeviceSteps, stack.enter_context(make_runner(own, choose(own.manifest, choice.name))))
    with runner.working():
        buffers = RowBuffers(runner, 1, None)
        for rows in buffers.rows.values():
            rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)))
    return [_Case(runner, buffers, step, shape, fmt) for step, fmt in enumerate(formats)]


def _formats(files: BundleFiles, target: str, shape: LayerShape) -> list[Format]:
    """Formats that the target accelerates and the layer's width admits, with the bundle's 16-bit type."""
    manifest = files.manifest
    other = "fp16" if manifest.base_type == "bfloat16" else "bf16"
    names = TARGETS[target].accelerated(manifest.layout, manifest.backend) - {other}
    return [FORMATS[name] for name in sorted(names) if suits(manifest, FORMATS[name], shape.in_features)]


def suits(manifest: Manifest, fmt: Format, in_features: int) -> bool:
    """Whether a bundle's plans can have a format in a layer with so many inputs."""
    whole = manifest.backend == TensorRTBackend.name or manifest.layout == PLUGIN_LAYOUT
    grids = [grid for grid in (fmt.weight, fmt.activation) if grid.group_size]
    return all(grid.group_of(in_features, whole=whole) is not None for grid in grids)


class _OneLayer(nn.Module):
    """A linear layer with random weights, in a module that the trace takes for the model's wrapper."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.ModuleDict({_LAYER: nn.Linear(shape.in_features, shape.out_features)})

    def forward(self, hidden_states: Tensor) -> Tensor:
        result: Tensor = self.model[_LAYER](hidden_states)
        return result.unsqueeze(1)  # costs nothing; a graph's output may not be a layer's

    @property
    def weight(self) -> Tensor:
        """[N, K]."""
        linear = cast(nn.Linear, self.model[_LAYER])
        return linear.weight.detach()


def _write_bundle(
    files: BundleFiles, target: str, shape: LayerShape, formats: Sequence[Format], folder: Path
) -> BundleFiles:
    """A bundle of one layer, whose steps are formats."""
    manifest, steps = files.manifest, len(formats)
    policy = Policy.from_steps(_LAYER, "0" * 64, [_LAYER], [[fmt.name] for fmt in formats])
    policy.save(folder / POLICY_NAME)
    _export(manifest, shape, policy, folder)
    scales = {fmt.name: torch.full((steps, 1), 1 / 64) for fmt in formats if fmt.scaled_activation}
    write_tensors(folder / SCALES_NAME, scales)
    own = manifest.model_copy(
        update={
            "model": _LAYER,
            "schedule": linear_schedule(steps),
            "latent_shape": (1,),  # nobody decodes what a layer puts out
            "image": ImageSpec(patches=1, channels=1, patch_size=1),
            "shapes": (),
            "prompts": 1,
            "prompt_texts": (),
            "call": None,
            "lora_slots": None,
            "plans": (),
        }
    )
    write_manifest(folder, own)
    opened = BundleFiles.open(folder)
    batch, compiler = BatchRange(1, 1, 1), compiler_of(files)
    if manifest.layout == PLUGIN_LAYOUT:
        batch = plugin_profiles(opened.graph("target", None), steps, batch)
        (folder / PLUGIN_LIBRARY).parent.mkdir(parents=True)
        copyfile(files.file(PLUGIN_LIBRARY), folder / PLUGIN_LIBRARY)
    plans = build_plans(folder, opened.index, [TARGETS[target]], batch, compiler=compiler, layout=manifest.layout)
    write_manifest(folder, own.model_copy(update={"plans": plans}))
    return BundleFiles.open(folder)


def _export(manifest: Manifest, shape: LayerShape, policy: Policy, folder: Path) -> None:
    taken = {shape.tokens, shape.in_features, shape.out_features}
    batch = next(size for size in range(2, 6) if size not in taken)  # told apart from all other sizes
    base = getattr(torch, manifest.base_type)
    module = _OneLayer(shape)
    example = {"hidden_states": torch.zeros(batch, shape.tokens, shape.in_features)}
    traced = trace(module, example, "output", base)
    names = [row[_LAYER] for row in policy.rows]
    weights = {name: {_LAYER: quantize_nearest(module.weight, FORMATS[name])} for name in names}
    if manifest.layout == PLUGIN_LAYOUT:
        export_plugin_graphs(traced, policy, weights, folder / GRAPH_FOLDER, manifest.base_type, ())
    else:
        export_graphs(traced, policy, weights, folder / GRAPH_FOLDER, manifest.base_type, (), ("target", "cpu"))


def linear_schedule(steps: int) -> ScheduleRecord:
    """A schedule for a bundle whose steps are there to be timed one by one."""
    sigmas = tuple(1 - step / steps for step in range(steps + 1))
    return ScheduleRecord(sigmas=sigmas, timesteps=sigmas[:-1], scheduler_config={})


def compiler_of(files: BundleFiles) -> NetworkCompiler:
    """Make the compiler of a bundle's plans."""
    manifest = files.manifest
    if manifest.backend != TensorRTBackend.name:
        return RtxBackend()
    plugins = files.file(PLUGIN_LIBRARY) if manifest.layout == PLUGIN_LAYOUT else None
    return TensorRTBackend(TensorRTOptions(manifest.compatibility, plugins=plugins))


def _time(case: _Case, times: Sequence[float]) -> LayerTime:
    """Of sorted times."""
    shape, last = case.shape, len(times) - 1
    return LayerTime(
        what=layer_row(case.fmt.name),
        m=shape.tokens,
        n=shape.out_features,
        k=shape.in_features,
        median_ms=statistics.median(times),
        p20_ms=times[round(0.2 * last)],
        p80_ms=times[round(0.8 * last)],
    )
