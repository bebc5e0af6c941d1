"""Context that all stages share: the run directory, the settings, the model and the batches of samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from adatsq_trt.calibration.prompt_shares import Use, apart, shared_prompts
from adatsq_trt.calibration.trajectory import Samples, seeded_samples
from adatsq_trt.checkpoints.loading import OpenedPipeline
from adatsq_trt.execution import Executor, InProcess
from adatsq_trt.execution.device import CPU, CUDA, OnDevice, free_bytes, raise_on_oom
from adatsq_trt.formats import Format, Target, format_named, target_named
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.policy import LayerShape
from adatsq_trt.progress import Reporter
from adatsq_trt.schedule import Schedule
from adatsq_trt.settings import Settings
from adatsq_trt.stages.meter import machine_bytes, resident_bytes
from adatsq_trt.stages.run_directory import Json, RunDirectory
from adatsq_trt.zoo.loading import LoadedModel

# Seeds of the batches never meet: each has a million of its own per --seed.
_SEEDS_PER_RUN = 10_000_000
_SEEDS_PER_BATCH = 1_000_000
_SELECTION_SEEDS, _HELD_OUT_SEEDS, _EVALUATION_SEEDS = 1_000_000, 2_000_000, 3_000_000
_COMPARISON_SEEDS, _FURTHER_SEEDS = 4_000_000, 5_000_000
# Share of the limit that is left alone, since what a call needs is told from shapes.
_KEPT = 0.03


@dataclass(frozen=True)
class Memory:
    """Limit on this process's resident memory, and the needs that are known beforehand.

    Attributes:
        limit_bytes: most of it.
        call_bytes: needed by a call of the model beside its weights.
        backward_bytes: activations that a backward pass through the whole model at once keeps.
        projection_bytes: kept by it for each projection beside that.
        block_bytes: kept by one that goes block by block, with one projection.
        needs: stage → the least that it can have resident, of the stages that are to run.
    """

    limit_bytes: int = field(default_factory=machine_bytes)
    call_bytes: int = 0
    backward_bytes: int = 0
    projection_bytes: int = 0
    block_bytes: int = 0
    needs: Mapping[str, int] = field(default_factory=dict)

    def backward_bytes_of(self, projections: int) -> int:
        """Estimate the bytes that a backward pass through the whole model at once keeps with some projections."""
        return self.backward_bytes + projections * self.projection_bytes

    @property
    def room_bytes(self) -> int:
        """Bytes of the limit that are left now for data kept between calls of the model."""
        return max(int(self.limit_bytes * (1 - _KEPT)) - self.call_bytes - resident_bytes(), 0)


@dataclass(frozen=True)
class Context:
    """A run.

    Attributes:
        run: run directory, opened for writing.
        settings: resolved.
        model: loaded; large layers of a checkpoint may be on disk.
        memory: limit and needs. Decides which data are kept and which are read or computed again, never a result.
        executor: who computes units of work.
        progress: who is told how it goes on.
        pipeline: the checkpoint that the model comes from, while its prompts may have to be encoded.
    """

    run: RunDirectory
    settings: Settings
    model: LoadedModel
    memory: Memory = field(default_factory=Memory)
    executor: Executor = field(default_factory=InProcess)
    progress: Reporter = field(default_factory=Reporter)
    pipeline: OpenedPipeline | None = None

    @property
    def device(self) -> torch.device:
        """Where units of work are computed."""
        return self.executor.device if isinstance(self.executor, OnDevice) else torch.device(CPU)

    @contextmanager
    def on_device(self, dtype: torch.dtype = torch.float32) -> Iterator[None]:
        """Have the model where units of work are computed, with weights of this type, until the block ends."""
        if self.device.type == CPU and dtype is torch.float32:
            yield
            return
        try:
            with raise_on_oom(self.device), self.adapter.placed(self.device, dtype):
                yield
        finally:
            if self.device.type == CUDA:
                torch.cuda.empty_cache()  # a compiler may need it

    @property
    def room_bytes(self) -> int:
        """Bytes left for sums, where they are kept and where they are computed."""
        room = self.memory.room_bytes
        return min(room, free_bytes(self.device)) if self.device.type == CUDA else room

    def by_block(self, projections: int, dtype: torch.dtype = torch.float32) -> bool:
        """Whether a backward pass of this type goes block by block, where the model is: the whole would not fit."""
        needed = self.memory.backward_bytes_of(projections) * dtype.itemsize // 4
        return needed > (free_bytes(self.device) if self.device.type == CUDA else self.memory.room_bytes)

    def simulated(self, store: CandidateWeights) -> SimulatedModel:
        """The fake-quantized model, which holds as many dequantized weights as memory does.

        On a GPU, where memory is scarce, it holds none.
        """
        room = self.memory.room_bytes if self.adapter.device.type == CPU else 0
        return SimulatedModel(self.adapter, store, room)

    @property
    def adapter(self) -> ModelAdapter:
        """The model."""
        return self.model.adapter

    @cached_property
    def schedule(self) -> Schedule:
        """The denoising steps."""
        return self.adapter.schedule(self.settings.asked_steps)

    @cached_property
    def sizes(self) -> dict[tuple[int, ...], ModelAdapter]:
        """Where there are several: size in pixels → the model at that size, its own first."""
        own, image = self.model.scale.size(self.adapter.image), self.adapter.image
        return {
            size: self.adapter if size == own else self.adapter.resized(self.model.scale.resized(image, size))
            for _, *sides in self.settings.shapes
            for size in [tuple(sides)]
        }

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Quantizable layers."""
        return tuple(self.adapter.quantizable_layers())

    @cached_property
    def active(self) -> NDArray[np.bool_]:
        """[steps, layers]: which layers run at which step."""
        return self.adapter.active(self.schedule)

    @cached_property
    @torch.no_grad()
    def operations(self) -> float:
        """Additions and multiplications of matrix products and attention in one step of one sample."""
        one = self.calibration.part(slice(0, 1))
        with FlopCounterMode(display=False) as counter:
            one.velocity(one.noise().to(self.adapter.device), 0)
        return float(counter.get_total_flops())

    @property
    def formats(self) -> tuple[Format, ...]:
        """Candidate formats, cheapest first."""
        return tuple(format_named(name) for name in self.settings.formats)

    @property
    def targets(self) -> tuple[Target, ...]:
        """Targets that the bundle is built for."""
        return tuple(target_named(name) for name in self.settings.targets)

    @cached_property
    def calibration(self) -> Samples:
        """The batch that everything is measured on."""
        return self._samples(self.settings.calibration_samples, 0, Use.CALIBRATION)

    @cached_property
    def selection(self) -> Samples:
        """The batch that decides between finished policies."""
        return self._samples(self.settings.selection_samples, _SELECTION_SEEDS, Use.SELECTION)

    def further_selection(self, number: int) -> Samples:
        """As many samples more of that kind, for policies that these do not tell apart: batch 0, 1 or 2."""
        offset = _FURTHER_SEEDS + number * _SEEDS_PER_BATCH
        return self._samples(self.settings.selection_samples, offset, Use.SELECTION)

    @cached_property
    def comparison(self) -> Samples:
        """The batch that the chosen policy is compared with simpler ones on."""
        return self._samples(self.settings.selection_samples, _COMPARISON_SEEDS, Use.SCORING)

    @cached_property
    def held_out(self) -> Samples:
        """The batch that reported errors are measured on; nothing is chosen by it."""
        return self._samples(self.settings.held_out_samples, _HELD_OUT_SEEDS, Use.SCORING)

    def evaluation(self, prompts: Sequence[int]) -> Samples:
        """A batch with given prompts, to score methods on; nothing is chosen by it either."""
        first = self.settings.seed * _SEEDS_PER_RUN + _EVALUATION_SEEDS
        seeds = tuple(range(first, first + len(prompts)))
        settings = self.settings
        return Samples(self.adapter, self.schedule, settings.guidance, tuple(prompts), seeds, settings.guidance_2)

    def _samples(self, count: int, offset: int, use: Use) -> Samples:
        settings, adapter = self.settings, self.adapter
        first, prompts = settings.seed * _SEEDS_PER_RUN + offset, shared_prompts(len(adapter.prompts), use)
        scales = settings.guidance, settings.guidance_2
        return seeded_samples(adapter, self.schedule, scales[0], count, first, prompts, scales[1])

    def inputs(self, names: Sequence[str]) -> dict[str, Json]:
        """Some of the settings, for a stage's key; the weights are those of a file in the declared type.

        Stages that draw samples have other prompts than they once had, where prompts are apart.
        """
        values = self.settings.model_dump(mode="json") | {"base": self.settings.base_type, "prompts": "apart"}
        own = ["base"] if "weights_sha256" in names else []
        own += ["guidance_2"] if "guidance" in names and self.settings.guidance_2 is not None else []
        own += [name for name in ("sigmas", "timesteps") if "steps" in names and values[name]]
        own += ["prompts"] if "calibration_samples" in names and apart(len(self.adapter.prompts)) else []
        return {name: values[name] for name in (*names, *own)}


def layer_shapes(adapter: ModelAdapter, inputs: dict[str, int]) -> tuple[LayerShape, ...]:
    """Shapes of the quantizable layers.

    Args:
        adapter: the model.
        inputs: module path → rows that one sample sends through the layer.
    """
    return tuple(
        LayerShape(name, linear.in_features, linear.out_features, inputs[name])
        for name, linear in adapter.quantizable_layers().items()
    )
