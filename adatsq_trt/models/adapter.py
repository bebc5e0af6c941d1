"""Interface between the method and an architecture: small, and filled by one adapter per architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adatsq_trt.errors import MismatchError
from adatsq_trt.image import ImageShape
from adatsq_trt.models.stored import stored_layers
from adatsq_trt.schedule import Schedule, Steps
from adatsq_trt.solver import guide
from adatsq_trt.transformer_call import TransformerCall

OUTSIDE = "outside"  # of all blocks


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of a batch of samples, as the graph's input tensors.

    Attributes:
        conditional: graph input name → [batch, ...] float32.
        unconditional: the same names for the unguided branch, or None when the model needs no guidance.
    """

    conditional: Mapping[str, Tensor]
    unconditional: Mapping[str, Tensor] | None

    def __getitem__(self, samples: slice) -> Conditioning:
        """The conditioning of some of the samples."""
        return self._each(lambda value: value[samples])

    def to(self, device: torch.device) -> Conditioning:
        """The same on a device."""
        return self._each(lambda value: value.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        def all_of(branch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: change(value) for name, value in branch.items()}

        unconditional = None if self.unconditional is None else all_of(self.unconditional)
        return Conditioning(all_of(self.conditional), unconditional)


@dataclass(frozen=True)
class AnySize:
    """Trace for several sizes: its module, and the positions and axes that a trace for one size lacks.

    Attributes:
        module: as `ModelAdapter.trace_module`, with the positions before the other arguments.
        positions: input name → float32, of the adapter's own size; the same for all rows of a batch.
        axes: input name → its axes, but for the batch, that differ between sizes → what the exporter knows them by.
    """

    module: nn.Module
    positions: Mapping[str, Tensor]
    axes: Mapping[str, Mapping[int, Any]]


def open_axes(**lengths: int) -> list[Any]:
    """An axis of any length for each name, given the length in an example.

    Raises:
        MismatchError: a length of 1, which the exporter takes for a constant.
    """
    for name, length in lengths.items():
        if length < 2:
            raise MismatchError(
                f"a size of one in {name}: with several sizes each has at least two; choose other --shapes"
            )
    return [torch.export.Dim(name) for name in lengths]


class ModelAdapter(ABC):
    """A diffusion transformer with its layers, inputs, guidance and trace.

    Attributes:
        transformer: the diffusers module, in evaluation mode, float32 but where `placed` says otherwise.
        architecture: the diffusers class name.
        latent_shape: shape of one sample's latent, without the batch: (tokens, channels), (channels, rows, columns) or
            (channels, frames, rows, columns).
        image: shape of the image or video that it decodes to.
        excluded: module paths that are not quantizable although they might be.
        float32_inputs: inputs of the trace module that stay float32 in target graphs, because 16 bits are too few.
        rescaled_guidance: guidance keeps the norm of every token's conditional prediction (`solver.guide`).
        image_inputs: inputs of the trace module that an image decides, the same in both branches of guidance.
        negatives: conditions of the unguided branch: one, or one for each prompt, where it depends on the image too.
    """

    architecture: str
    transformer: nn.Module
    latent_shape: tuple[int, ...]
    image: ImageShape
    float32_inputs: tuple[str, ...] = ()
    rescaled_guidance: bool = False
    image_inputs: tuple[str, ...] = ()
    negatives: int = 1
    excluded: frozenset[str] = frozenset()

    @property
    @abstractmethod
    def prompts(self) -> tuple[str, ...]:
        """All that can be asked for; elsewhere a prompt is its index in here."""

    @property
    @abstractmethod
    def takes_guidance(self) -> bool:
        """Whether a guidance scale changes anything."""

    @abstractmethod
    def quantizable_layers(self) -> dict[str, nn.Linear]:
        """Linear layers that a policy may quantize, by module path, in the order of execution."""

    def of_expert(self, expert: str) -> ModelAdapter:
        """The part of the model that some steps call, by its name in `Schedule.experts`; itself where there is one."""
        return self

    def active(self, schedule: Schedule) -> NDArray[np.bool_]:
        """[steps, layers]: which quantizable layers run at which step; all of them in a model of one transformer."""
        return np.ones((schedule.steps, len(self.quantizable_layers())), dtype=bool)

    @abstractmethod
    def blocks(self) -> tuple[str, ...]:
        """Module paths of the transformer's blocks, in the order of execution; a call of the model calls each once."""

    def layers_by_block(self) -> dict[str, tuple[str, ...]]:
        """Quantizable layers by the block that holds them; those outside of all blocks are under `OUTSIDE`."""
        blocks, groups = self.blocks(), dict[str, list[str]]()
        for layer in self.quantizable_layers():
            block = next((name for name in blocks if layer.startswith(f"{name}.")), OUTSIDE)
            groups.setdefault(block, []).append(layer)
        return {block: tuple(layers) for block, layers in groups.items()}

    @abstractmethod
    def encode(self, prompts: Sequence[int]) -> Conditioning:
        """Conditioning of a batch of prompts, by their indices in `prompts`."""

    @abstractmethod
    def model_inputs(
        self, latent: Tensor, model_time: float, condition: Mapping[str, Tensor], guidance: float
    ) -> dict[str, Tensor]:
        """The graph's inputs, by name, in the order of the trace module's arguments.

        Args:
            latent: [batch, *latent_shape].
            model_time: of all samples.
            condition: one of the branches of a `Conditioning`.
            guidance: only models that were trained with the scale as an input make use of it.
        """

    @abstractmethod
    def schedule(self, steps: Steps) -> Schedule:
        """The denoising schedule for a number of steps, or for a list in its place, which `make_schedule` takes too."""

    @abstractmethod
    def trace_module(self) -> nn.Module:
        """A module of real arithmetic and plain tensors for the exporter: positional inputs, one output."""

    def pipeline_call(self) -> TransformerCall | None:
        """How the pipeline calls the transformer; None for a bundle that runs by itself only."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the transformer's weights are, and its inputs have to be."""
        return next(self.transformer.parameters()).device

    @contextmanager
    def placed(self, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
        """Compute inside the block with copies of the weights; afterwards the model has its own again, untouched.

        Stored layers keep no copies on the processor.

        Args:
            device: of the copies; what `encode` gives stays on the processor.
            dtype: of the weights' copies; buffers keep theirs, since bfloat16 holds no angles.
        """
        own, stored = list(_tensors(self.trace_module())), [x for *_, x in stored_layers(self.trace_module())]
        copies: dict[int, Tensor] = {}  # a tensor may be in several places
        try:
            for module, name, tensor in own:
                if id(tensor) not in copies:
                    copies[id(tensor)] = _copy(tensor, device, dtype)
                setattr(module, name, copies[id(tensor)])
            for layer in stored:
                layer.place(device, dtype)
            yield
        finally:
            for module, name, tensor in own:
                setattr(module, name, tensor)
            for layer in stored:
                layer.place(torch.device("cpu"), torch.float32)

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Inside the block stored layers are plain ones, whose weights stay in the place and type of their files."""
        own = list(stored_layers(self.trace_module()))
        try:
            for parent, name, layer in own:
                setattr(parent, name, layer.plain())
            yield
        finally:
            for parent, name, layer in own:
                setattr(parent, name, layer)

    @property
    def patch_cells(self) -> int:
        """Sides of an image are multiples of so many of its patches."""
        return 1

    def resized(self, image: ImageShape) -> ModelAdapter:
        """The same model, with the same weights in memory, for images of another size.

        Raises:
            MismatchError: this model cannot have several sizes.
        """
        raise MismatchError(f"a graph of {self.architecture} has one size; leave --shapes out")

    def any_size(self) -> AnySize:
        """Return the parts of a trace for several sizes, with this size as its example.

        Raises:
            MismatchError: this model cannot have several sizes, or not this one.
        """
        raise MismatchError(f"a graph of {self.architecture} has one size; leave --shapes out")

    def decode(self, latent: Tensor) -> Tensor:
        """Latents [batch, *latent_shape] → images in [0, 1], as `ImageShape.decode`."""
        return torch.from_numpy(self.image.decode(latent.detach().numpy()))

    def guided_inputs(
        self, latent: Tensor, model_time: float, conditioning: Conditioning, guidance: float
    ) -> dict[str, Tensor]:
        """Both branches of classifier-free guidance in one batch: conditional first, then unconditional.

        One call serves both, so they share one assignment and one set of activation scales.
        """
        inputs = self.model_inputs(latent, model_time, conditioning.conditional, guidance)
        if conditioning.unconditional is None:
            return inputs
        other = self.model_inputs(latent, model_time, conditioning.unconditional, guidance)
        return {name: torch.cat([inputs[name], other[name]]) for name in inputs}

    def predict(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The transformer's output for `model_inputs`."""
        return self.trace_module()(*inputs.values())  # type: ignore[no-any-return]

    def velocity(self, latent: Tensor, model_time: float, conditioning: Conditioning, guidance: float) -> Tensor:
        """Guided prediction, shape of the latent (`solver.guide`)."""
        inputs = self.guided_inputs(latent, model_time, conditioning, guidance)
        return self.guide(self.predict(inputs), len(latent), guidance)

    def guide(self, prediction: Tensor, samples: int, guidance: float) -> Tensor:
        """Combine the branches of guidance as this model's pipeline does; arguments as of `solver.guide`."""
        return guide(prediction, samples, guidance, self.rescaled_guidance)


def _tensors(root: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Parameters and buffers with the modules that they belong to."""
    for module in root.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield module, name, tensor


def _copy(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """On a device; weights in a type too."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().to(device, dtype), tensor.requires_grad)
    return tensor.to(device)
