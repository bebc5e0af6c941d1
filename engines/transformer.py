"""A bundle in the place of a diffusers pipeline's transformer.

    pipe.transformer = AdatsqTransformer.from_bundle("runs/demo")
    pipe(prompt, num_inference_steps=20, …)

    pipe.transformer, pipe.transformer_2 = AdatsqTransformer.experts_from_bundle("runs/wan-2.2")

The pipeline stays as it is: it keeps its scheduler, its guidance and its loop. How it calls its transformer is in the
bundle's manifest (`adatsq_trt.transformer_call`), so this serves every architecture whose adapter says it. It draws
what the bundle's own loop draws with the scheduler that the bundle was built with. `from_bundle(..., scheduler=
pipe.scheduler)` refuses another one, and `pipe.scheduler = pipe.transformer.scheduler` gives it the bundle's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin, __version__
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from adatsq_trt.engines.bundle import Manifest, ShapeRecord
from adatsq_trt.engines.manifest import size_name
from adatsq_trt.engines.runtime import TIME_INPUT, Bundle
from adatsq_trt.engines.step_clock import StepClock
from adatsq_trt.errors import MismatchError
from adatsq_trt.transformer_call import RETURN_DICT, TransformerCall


class AdatsqTransformer(nn.Module):
    """Stands in for a transformer; the step, and with it the formats, follow from the timestep.

    Attributes:
        bundle: the bundle that computes.
        call: how the pipeline calls it.
        expert: the one of two transformers that it stands in for; "" where the pipeline has one.
    """

    def __init__(self, bundle: Bundle, call: TransformerCall, expert: str = "", clock: StepClock | None = None) -> None:
        """Wrap a bundle; see `from_bundle`. Two experts share a clock."""
        super().__init__()
        self.bundle, self.call, self.expert = bundle, call, expert
        self._clock = clock or StepClock()
        self._config = FrozenDict(call.settings)
        # A generation passes the same positions and texts at every step: they are read once.
        self._positions, self._masks, self._zeros = (WeakIdKeyDictionary() for _ in range(3))

    @property
    def config(self) -> FrozenDict:
        """The settings of the transformer that pipelines look at, each before its loop."""
        self._clock.finish()
        return self._config

    @classmethod
    def from_bundle(cls, bundle: Bundle | Path | str, scheduler: SchedulerMixin | None = None) -> AdatsqTransformer:
        """Wrap a bundle that is open, or open one, or the one of a run directory.

        Args:
            bundle: it, or where it is.
            scheduler: the pipeline's, to be compared with the one that the bundle was built with; a pipeline whose
                scheduler has the same timesteps and other steps is not noticed otherwise.

        Raises:
            UserError: as `Bundle.open`, or a bundle that does not say how a pipeline calls its transformer.
            MismatchError: another scheduler, another value of one of its options, or of another diffusers; a bundle of
                two transformers.
        """
        one, *others = cls.experts_from_bundle(bundle, scheduler)
        if others:
            raise MismatchError(
                f"bundle '{one.bundle.files.folder}' holds two transformers: pipe.transformer, pipe.transformer_2 = "
                "AdatsqTransformer.experts_from_bundle(...)"
            )
        return one

    @classmethod
    def experts_from_bundle(
        cls, bundle: Bundle | Path | str, scheduler: SchedulerMixin | None = None
    ) -> tuple[AdatsqTransformer, ...]:
        """Wrap each transformer of a bundle, in the order in which a loop calls them; arguments as of `from_bundle`.

        Each refuses a call at a step of the other's: the pipeline's `boundary_ratio` is another one than the bundle's.

        Raises:
            UserError: as `from_bundle`.
            MismatchError: as `from_bundle`.
        """
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        if scheduler is not None:
            require_scheduler(bundle.manifest, scheduler)
            _require_version(bundle.manifest)
        if bundle.manifest.call is None:
            raise MismatchError(
                f"bundle '{bundle.files.folder}' holds a {bundle.manifest.architecture} and does not say how a "
                "pipeline calls it: its adapter has no pipeline_call, or an earlier version built it; build it again, "
                "or run this one with Bundle.denoise"
            )
        clock = StepClock()
        return tuple(cls(bundle, bundle.manifest.call, expert, clock) for expert in bundle.files.experts)

    def __getattr__(self, name: str) -> Any:
        """Settings are attributes too, as of diffusers' models."""
        if name in self.__dict__.get("_config", {}):
            return self.config[name]
        return super().__getattr__(name)

    @property
    def dtype(self) -> torch.dtype:
        """Type of inputs and outputs; others are converted."""
        return self.bundle.dtype

    @property
    def device(self) -> torch.device:
        """Where the pipeline's tensors should be; those that are elsewhere are copied."""
        return self.bundle.device

    @property
    def scheduler(self) -> SchedulerMixin:
        """A scheduler with which the pipeline takes the steps of the bundle's own loop."""
        return self.bundle.schedule.scheduler()

    @contextmanager
    def cache_context(self, name: str, **about: Any) -> Iterator[None]:
        """Enter a guidance branch that a pipeline announces; both branches of a step have the same formats."""
        self._clock.enter(name, about.get("step_index"), about.get("num_inference_steps"))
        try:
            yield
        finally:
            self._clock.enter(None)

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """End a run of the loop; pipelines call it at their end.

        Raises:
            MismatchError: as `StepClock.finish`.
        """
        self._clock.finish()

    def forward(self, *positional: Any, **named: Any) -> Transformer2DModelOutput | tuple[Tensor | list[Tensor]]:
        """Predicted velocity, with the arguments and the result of the transformer's own `forward`.

        All rows are at one step. An argument that the bundle does not follow may only have its default.

        Raises:
            UserError: a time that is none of the bundle's steps; other arguments, positions, names or shapes.
        """
        given, call = self._bind(positional, named), self.call
        inputs = {name: self._input(name, given) for name in call.inputs}
        noise, end = call.time_range
        time = (given[call.time].detach().float() - end) / (noise - end)
        velocity = self._velocity(inputs, time, self._shape_at(given))
        sample: Any = -velocity if call.negated else velocity
        if call.unit_axis is not None:
            sample = sample.unsqueeze(1 + call.unit_axis)
        if call.listed:
            sample = list(sample)
        return Transformer2DModelOutput(sample=sample) if given.get(RETURN_DICT, True) else (sample,)

    def _bind(self, positional: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name; what is not followed has its default."""
        call, names = self.call, list(self.call.arguments)
        given = {**dict(zip(names, positional, strict=False)), **named}
        for name, value in given.items():
            if name not in call.followed and not _says_nothing(value, call.arguments.get(name)):
                raise MismatchError(f"argument '{name}' of the transformer: a bundle takes none; leave it out")
        missing = [name for name in call.required if given.get(name) is None]
        if missing or len(given) < len(positional) + len(named):
            raise MismatchError(
                f"the transformer got {len(positional)} arguments and {sorted(named)}, expected each of "
                f"{', '.join(call.required)} once; use it in the pipeline of a {self.bundle.manifest.architecture}"
            )
        return given

    def _input(self, name: str, given: Mapping[str, Any]) -> Tensor:
        """An input of the graph, made of the arguments."""
        call = self.call
        argument = call.inputs[name]
        value: Any = self._part(name, given[argument]) if argument in call.joined else given[argument]
        if argument in call.zeros_behind:
            value = self._before_zeros(argument, value)
        latents: Any = given[call.inputs[self.bundle.latent_input]]
        if call.listed:
            return self._rows(name, value)
        if name in call.ones_behind:
            return self._weights(name, value, len(latents[0]))
        if name in call.masks:
            return self._masked(name, value, given.get(call.masks[name]))
        # Such as a mask of booleans, which the graph takes as numbers.
        number: Tensor = value if value.is_floating_point() else value.type_as(latents)
        return number

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """An input's part of an argument in which several follow each other, such as the latents and an image's."""
        argument = self.call.inputs[name]
        axis, names = self.call.joined[argument], [n for n, a in self.call.inputs.items() if a == argument]
        sizes = {
            signature.name: int(signature.shape[axis]) for signature in self.bundle.inputs if signature.name in names
        }
        if whole.ndim <= axis or whole.shape[axis] != sum(sizes.values()):
            manifest = self.bundle.manifest
            pipeline = "pipeline" if manifest.image_call is None else manifest.image_call.pipeline
            wanted, size = " and ".join(f"{sizes[name]} of {name}" for name in names), size_name(manifest.pixels or ())
            raise MismatchError(
                f"{argument}: got {list(whole.shape)}, the bundle was exported for {wanted} along axis {axis}; give "
                f"the {pipeline} an image of {size} pixels, the picture's own size"
            )
        parts: Sequence[Tensor] = whole.split([sizes[name] for name in names], axis)
        return parts[names.index(name)]

    def _before_zeros(self, argument: str, whole: Tensor) -> Tensor:
        """An argument without the channels that are zero throughout."""
        count = self.call.zeros_behind[argument]
        if whole.ndim < 2 or whole.shape[1] <= count or whole[:, -count:].any():
            raise MismatchError(
                f"{argument}: got {list(whole.shape)}, expected {count} channels of zeros at the end: the bundle was "
                "exported for a text without an image"
            )
        return whole[:, :-count]

    def _rows(self, name: str, rows: Sequence[Tensor]) -> Tensor:
        """A batch of what comes row by row, [rows, ...]; short conditions end in zeros."""
        if name == self.bundle.latent_input:
            latents, axis = torch.stack(list(rows)), self.call.unit_axis
            return latents if axis is None else latents.squeeze(1 + axis)
        length = self._length(name, max(map(len, rows)))
        return torch.stack([functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])

    def _masked(self, name: str, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """A batch of texts [rows, T, width] at the graph's length: zeros where a mask [rows, T] has none."""
        own = tokens if mask is None else tokens.masked_fill(~mask.bool()[..., None], 0)
        if tokens not in self._masks or self._masks[tokens][0] is not mask:
            longest = tokens.shape[1] if mask is None else int(mask.bool().sum(1).max())
            length = self._length(name, longest)
            self._require_ends(name, own, mask)
            self._masks[tokens] = (mask, length)
        length = self._masks[tokens][1]
        own = own[:, :length]
        return functional.pad(own, (0, 0, 0, length - own.shape[1]))

    def _weights(self, name: str, weights: Tensor, latents: int) -> Tensor:
        """A text's part [rows, T] of weights that are ones for the tokens of the latents behind it."""
        length = self._tokens(name)
        if weights not in self._masks:
            behind = weights[:, length:]
            if not weights.is_floating_point() or behind.shape[1] != latents or not bool((behind == 1).all()):
                raise MismatchError(
                    f"{self.call.inputs[name]}: got {weights.dtype} of {list(weights.shape)}, the bundle was exported "
                    f"for floating-point numbers of {length} tokens of a text with ones for the {latents} of a picture "
                    f"behind them; call the pipeline with max_sequence_length={length}, and with its own masks: "
                    "booleans hide tokens, numbers are added"
                )
            self._masks[weights] = (None, length)
        return weights[:, :length]

    def _tokens(self, name: str) -> int:
        """Tokens of an input of the graph."""
        return next(int(signature.shape[1]) for signature in self.bundle.inputs if signature.name == name)

    def _length(self, name: str, longest: int) -> int:
        """Tokens of an input of the graph, which are enough."""
        length = self._tokens(name)
        if longest > length:
            shorter = (
                "" if self.bundle.manifest.image_texts else f", or max_sequence_length={length} where it takes one"
            )
            raise MismatchError(
                f"{self.call.inputs[name]}: got {longest} tokens, the bundle was exported for {length}; call the "
                f"pipeline with a shorter prompt{shorter}"
            )
        return length

    def _require_ends(self, name: str, tokens: Tensor, mask: Tensor | None) -> None:
        """Refuse texts whose end the graph would see elsewhere than their mask does: for it, zeros follow a text."""
        there = (tokens.abs().amax(-1) > 0).cpu()
        seen = torch.ones_like(there) if mask is None else mask.bool().cpu()
        places = torch.arange(1, there.shape[1] + 1)
        ends, counts = (torch.where(where, places, 0).amax(1) for where in (there, seen))
        for row, (end, count, tokens_seen) in enumerate(zip(ends, counts, seen.sum(1), strict=True)):
            if not end == count == tokens_seen:
                mask_argument, argument = self.call.masks[name], self.call.inputs[name]
                raise MismatchError(
                    f"{mask_argument}: row {row} has {int(tokens_seen)} tokens, the last in place {int(count)}, and "
                    f"{argument} has zeros from place {int(end) + 1} on; expected a mask that leaves out nothing but "
                    "zeros after a text's own tokens"
                )

    def _shape_at(self, given: Mapping[str, Any]) -> ShapeRecord | None:
        """The size that positions belong to, where there are any: several may have the same number of tokens."""
        call = self.call
        for name in call.zeros:
            if given.get(name) is not None and self._has_numbers(given[name]):
                raise MismatchError(f"{name}: got other numbers than zero; the bundle was exported for zeros")
        for name in call.counted:
            if given.get(name) is not None and not _counts(self._read(given[name]), call.position_axes):
                raise MismatchError(
                    f"{name}: got positions that do not count a text's tokens from zero; leave them out"
                )
        for name, numbers in call.numbers.items():
            self._require_numbers(name, given[name], numbers)
        if call.grids is not None:
            return self._shape_of_grids(given[call.grids])
        if call.sides:
            return self._shape_of_sides(tuple(int(given[name]) for name in call.sides))
        if call.positions is None:
            return None
        positions = self._read(given[call.positions])
        for shape in self._shapes:
            rows, columns = torch.meshgrid(*map(torch.arange, shape.image.shape.grid), indexing="ij")
            wanted = functional.pad(torch.stack([rows, columns], dim=-1).reshape(-1, 2), (1, call.position_axes - 3))
            if self._has_image_tokens:  # behind the picture's own, at 1 in the place of zero
                wanted = torch.cat([wanted, wanted + torch.eye(1, call.position_axes, dtype=torch.long)])
            if _all_equal(positions, wanted):
                return shape
        beside = not self._has_image_tokens and bool(positions[..., 0].any())
        some, without = (", some of another image", ", and without an image") if beside else ("", "")
        raise MismatchError(
            f"{call.positions}: got {positions.shape[-2]} image tokens{some}, the bundle was exported for "
            f"{self._grids}; call the pipeline with that height and width{self._names}{without}"
        )

    @property
    def _has_image_tokens(self) -> bool:
        """Whether an image has tokens of its own."""
        return self.call.joined.get(self.call.inputs[self.bundle.latent_input]) == 1

    def _shape_of_grids(self, rows: Sequence[Any]) -> ShapeRecord:
        """The size of rows that list grids of tokens (frames, rows, columns): one each, and all of the same."""
        given = [[tuple(map(int, grid)) for grid in ([row] if isinstance(row, tuple) else row)] for row in rows]
        count = 2 if self._has_image_tokens else 1
        for shape in self._shapes:
            if given and all(row == [(1, *shape.image.shape.grid)] * count for row in given):
                return shape
        images = "a picture and one image, each" if count > 1 else "one image"
        raise MismatchError(
            f"{self.call.grids}: got {given}, the bundle was exported for {images} of {self._grids} tokens in each "
            f"row; call the pipeline with that height and width{self._names}"
        )

    def _require_numbers(self, name: str, given: Any, numbers: Sequence[float]) -> None:
        """Refuse other numbers than those that the graph's constants were computed with."""
        values = torch.as_tensor(given, dtype=torch.float64)
        if values.shape != (len(numbers),) or not torch.allclose(values, values.new_tensor(numbers), rtol=1e-6, atol=0):
            raise MismatchError(
                f"{name}: got {values.tolist()}, the bundle was exported for {list(numbers)}; call the pipeline with "
                "what decides it, such as frame_rate, as it is unless given"
            )

    def _shape_of_sides(self, sides: tuple[int, ...]) -> ShapeRecord:
        """The size of latents that have so many frames, rows and columns of tokens."""
        known = {(shape.image.shape.frames or 1, *shape.image.shape.grid): shape for shape in self._shapes}
        if sides in known:
            return known[sides]
        names, wanted = ", ".join(self.call.sides), " and ".join(map(str, known))
        raise MismatchError(
            f"{names}: got {sides}, the bundle was exported for {wanted}; call the pipeline with that size{self._names}"
        )

    @property
    def _grids(self) -> str:
        """Rows and columns of tokens of each size, as messages name them."""
        return " and ".join("{} x {}".format(*shape.image.shape.grid) for shape in self._shapes)

    def _read(self, positions: Tensor) -> Tensor:
        """The same on the processor, int64."""
        if positions not in self._positions:
            self._positions[positions] = positions.cpu().long()
        read: Tensor = self._positions[positions]
        return read

    def _has_numbers(self, value: Tensor) -> bool:
        """Whether not all is zero."""
        if value not in self._zeros:
            self._zeros[value] = not bool(value.any())
        return not self._zeros[value]

    def _velocity(self, inputs: Mapping[str, Tensor], model_time: Tensor, shape: ShapeRecord | None = None) -> Tensor:
        """The bundle's prediction, of the latents' type.

        Args:
            inputs: the graph's inputs but for the time.
            model_time: [rows], timestep / 1000; one step for all rows.
            shape: the size, where the latents do not tell it.

        Raises:
            UserError: a time that is none of the bundle's steps; other names or shapes.
        """
        latents = inputs[self.bundle.latent_input]
        shape = self._shape(latents) if shape is None else shape
        size = shape.size if self.bundle.sizes else None
        schedule = self.bundle.files.schedule(size)
        step = self._clock.step(model_time, schedule)
        if schedule.expert(step) != self.expert:
            raise MismatchError(
                f"step {step}: the pipeline calls its {self.expert}, the bundle computes {schedule.expert(step)} then; "
                "give the pipeline the boundary_ratio that the bundle was built with, and each of the two its place"
            )
        # The step's own time: the pipeline's is the same but for the rounding on its way.
        time = latents.new_full((len(latents),), schedule.model_time(step), dtype=torch.float32)
        velocity = self.bundle.predict(step, {**inputs, TIME_INPUT: time}, size=size)
        return self._clock.checked(velocity.to(latents))

    @property
    def _shapes(self) -> tuple[ShapeRecord, ...]:
        """All sizes of the bundle."""
        return self.bundle.manifest.shapes or (self.bundle.manifest.shape(),)

    def _shape(self, latents: Tensor) -> ShapeRecord:
        """The size that latents have."""
        for shape in self._shapes:
            if shape.latent_shape == tuple(latents.shape[1:]):
                return shape
        wanted = " and ".join(str(list(shape.latent_shape)) for shape in self._shapes)
        raise MismatchError(
            f"latents: got {list(latents.shape[1:])}, the bundle was exported for {wanted}; call the pipeline with "
            f"that size{self._names}"
        )

    @property
    def _names(self) -> str:
        """Sizes of the bundle in pixels, for the end of a message; empty where it has only one."""
        return f": {', '.join(shape.name for shape in self.bundle.manifest.shapes)}" if self.bundle.sizes else ""


def require_scheduler(manifest: Manifest, scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that takes other steps than the bundle's loop.

    Args:
        manifest: of the bundle.
        scheduler: of a pipeline.

    Raises:
        MismatchError: says what of it is another, and both values.
    """
    own = dict(manifest.schedule.scheduler_config)
    name, got = own.pop("_class_name", None), type(scheduler).__name__
    advice = "give the pipeline the bundle's, pipe.transformer.scheduler, or build the bundle with this one"
    if got != name:
        raise MismatchError(f"the pipeline's scheduler is a {got}, the bundle's a {name}; {advice}")
    for option, value in own.items():
        other = scheduler.config.get(option)
        # In the manifest a tuple is a list.
        if other != value and json.loads(json.dumps(other, default=str)) != value:
            raise MismatchError(f"the pipeline's {name} has {option} = {other!r}, the bundle's {value!r}; {advice}")


def _require_version(manifest: Manifest) -> None:
    """Refuse another diffusers than the one that the bundle's steps are of."""
    built = manifest.versions.get("diffusers", __version__)
    if built != __version__:
        raise MismatchError(
            f"this is diffusers {__version__}, the bundle was built with {built}, whose schedulers may take other "
            f"steps; install diffusers=={built}, or build the bundle again"
        )


def _all_equal(positions: Tensor, wanted: Tensor) -> bool:
    """Whether positions [tokens, axes], or those of every row of a batch, are these."""
    return positions.shape[-2:] == wanted.shape and bool((positions == wanted).all())


def _counts(positions: Tensor, axes: int) -> bool:
    """Whether positions count the tokens of a text in their last number, and have zeros before it."""
    places = torch.arange(positions.shape[-2])[:, None]
    return _all_equal(positions, functional.pad(places, (axes - 1, 0)))


def _says_nothing(value: Any, default: JsonValue) -> bool:
    """Whether an argument is as if it had been left out."""
    return value is None or (isinstance(value, bool | int | float | str | dict | list) and value in (default, {}, []))
