"""Records of a bundle's manifest, as text, without any of the files that they speak of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, model_validator

from adatsq_trt.errors import MismatchError
from adatsq_trt.fields import Count, ModulePath, Name
from adatsq_trt.formats import PLUGIN_LAYOUT
from adatsq_trt.graph_index import lora_inputs
from adatsq_trt.image import ImageShape
from adatsq_trt.image_call import ImageCall
from adatsq_trt.schedule import EXPERTS, Schedule, Spacing
from adatsq_trt.solver import Update
from adatsq_trt.text_call import TextCall
from adatsq_trt.transformer_call import TransformerCall

# Of one sample: a latent is allocated before any other part of the bundle confirms its shape.
MAX_LATENT_ELEMENTS = 1 << 26

Layout = Literal["embedded", "shared", "switch", "plugin"]
# Of a plan without weights: it is unpacked in memory.
MAX_UNPACKED_BYTES = 1 << 30


LatentShape = Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)]
Hardware = Literal["none", "same_compute_capability", "ampere_plus"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlanFile(_Record):
    """One compiled engine.

    Attributes:
        target: name of the target that it was compiled for.
        assignment: index into the policy's assignments; None for an engine that holds all of them.
        path: relative to the bundle, with forward slashes.
        bytes: size of the file.
        unpacked_bytes: size of the plan that the file holds compressed; None for a file that is the plan.
        max_rows: most rows (samples times guidance branches) that it accepts.
        profile_rows: most rows of each of its optimization profiles; empty stands for the one profile. They ascend,
            or follow the manifest's `shapes` and of each its `batches`; in layout `plugin` for each assignment anew.
    """

    target: Name
    assignment: int | None
    path: str
    bytes: int
    unpacked_bytes: Annotated[int, Field(ge=0, le=MAX_UNPACKED_BYTES)] | None = None
    max_rows: Count
    profile_rows: tuple[Count, ...] = ()

    def profile(self, rows: int, of: range | None = None) -> int:
        """Index of an optimization profile: of those with room for so many rows the one that is tuned for the least.

        Args:
            rows: of a call.
            of: the profiles of its size; all of them in a bundle of one size.
        """
        most = self.profile_rows or (self.max_rows,)
        own = range(len(most)) if of is None else of
        return next((i for i in own if rows <= most[i]), own[-1])

    def rows_at(self, of: range | None = None) -> int:
        """Most rows of a call, at the size that has these profiles."""
        return self.max_rows if of is None else max((self.profile_rows or (self.max_rows,))[i] for i in of)


class UpdateRecord(_Record):
    """An `Update` as text: the coefficients of a step."""

    latent: FiniteFloat
    velocity: FiniteFloat
    clean: tuple[FiniteFloat, ...] = ()


class ScheduleRecord(_Record):
    """A `Schedule` as text.

    Attributes:
        sigmas: steps + 1.
        timesteps: steps.
        scheduler_config: of the diffusers scheduler, with its class.
        updates: of every step; none for Euler's method.
        experts: part of the pipeline that each step calls; none for a pipeline with one transformer.
        spacing: list that the scheduler was given; None where it was given a number of steps.
    """

    sigmas: tuple[FiniteFloat, ...]
    timesteps: tuple[FiniteFloat, ...]
    scheduler_config: dict[str, JsonValue]
    updates: tuple[UpdateRecord, ...] = ()
    experts: tuple[str, ...] = ()
    spacing: Spacing | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleRecord:
        if self.spacing is not None and len(self.spacing.values) != len(self.timesteps):
            raise ValueError(f"{len(self.spacing.values)} {self.spacing.argument} given, {len(self.timesteps)} steps")
        if len(self.experts) not in (0, len(self.timesteps)):
            raise ValueError(f"{len(self.experts)} experts, {len(self.timesteps)} timesteps")
        if not {*self.experts} <= {*EXPERTS}:
            raise ValueError(f"experts {sorted({*self.experts})}, expected some of {', '.join(EXPERTS)}")
        if len(self.updates) not in (0, len(self.timesteps)):
            raise ValueError(f"{len(self.updates)} updates, {len(self.timesteps)} timesteps")
        for step, update in enumerate(self.updates):
            if len(update.clean) > step:
                raise ValueError(f"step {step} combines {len(update.clean)} predictions of earlier steps")
        return self

    @classmethod
    def of(cls, schedule: Schedule) -> ScheduleRecord:
        """The record of a schedule."""
        updates = () if schedule.is_euler else tuple(UpdateRecord(**asdict(update)) for update in schedule.updates)
        return cls(
            sigmas=schedule.sigmas,
            timesteps=schedule.timesteps,
            scheduler_config=schedule.scheduler_config,
            updates=updates,
            experts=schedule.experts,
            spacing=schedule.spacing,
        )

    def read(self) -> Schedule:
        """Make the schedule that this records."""
        updates = tuple(Update(own.latent, own.velocity, own.clean) for own in self.updates)
        config = dict(self.scheduler_config)
        return Schedule(self.sigmas, self.timesteps, config, updates, self.experts, self.spacing)


class ImageSpec(_Record):
    """An `ImageShape` as text.

    Attributes:
        patches: from top to bottom.
        channels: of the image, or of the VAE's latent.
        patch_size: height and width of a patch in pixels, or in cells of the VAE's latent.
        columns: patches from left to right; as many as from top to bottom unless given.
        frames: of a video, or of its latent; None for an image.
        vae: whether the patches make up the latent of the VAE that the bundle carries.
    """

    patches: Count
    channels: Count
    patch_size: Count = 2
    columns: Count | None = None
    frames: Count | None = None
    vae: bool = False

    @property
    def shape(self) -> ImageShape:
        """The same as an `ImageShape`, which decodes latents."""
        return ImageShape(**self.model_dump())

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents → images or videos in [0, 1], or what the VAE decodes, as `ImageShape.decode`."""
        return self.shape.decode(latents)


class ShapeRecord(_Record):
    """One of the sizes of a bundle that has several.

    Attributes:
        size: height and width, or frames, height and width, in pixels.
        batches: samples of its optimization profiles, ascending.
        latent_shape: shape of one sample's latent.
        image: how a latent becomes an image.
        schedule: of the denoising loop; models that shift their sigmas do so by size.
    """

    size: Annotated[tuple[Count, ...], Field(min_length=2, max_length=3)]
    batches: Annotated[tuple[Count, ...], Field(min_length=1)]
    latent_shape: LatentShape
    image: ImageSpec
    schedule: ScheduleRecord

    @property
    def name(self) -> str:
        """The size as it is written: HEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH."""
        return size_name(self.size)

    @model_validator(mode="after")
    def _consistent(self) -> ShapeRecord:
        _require_image(self.latent_shape, self.image)
        return self


def size_name(size: Sequence[int]) -> str:
    """Height and width, or frames, height and width: HEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH."""
    return "x".join(map(str, size))


def _require_image(latent_shape: tuple[int, ...], image: ImageSpec) -> None:
    elements, pixels = prod(latent_shape), image.shape.elements
    if elements > MAX_LATENT_ELEMENTS:
        raise ValueError(f"a latent of {elements} elements, the most is {MAX_LATENT_ELEMENTS}")
    if elements != pixels:
        raise ValueError(f"a latent has {elements} elements, its image {pixels}")


class LoraSlots(_Record):
    """Branches of the graphs that take LoRAs at run time.

    Attributes:
        rank: of every branch; the ranks of LoRAs that are loaded together add up to no more.
        layers: module path → inputs and outputs of the layer.
        pipeline: diffusers' class of the pipeline, whose loader knows the names in a file.
        transformer: configuration of the transformer, which says which layers it has.
    """

    rank: Count
    layers: Annotated[dict[ModulePath, tuple[Count, Count]], Field(min_length=1)]
    pipeline: Name
    transformer: dict[str, JsonValue]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Graph input → its shape, of all graphs."""
        shapes = dict[str, tuple[int, int]]()
        for layer, (inputs, outputs) in self.layers.items():
            down, up = lora_inputs(layer)
            shapes |= {down: (inputs, self.rank), up: (self.rank, outputs)}
        return shapes


class Compatibility(_Record):
    """GPUs and versions that plans run on beside those that they were compiled for; enterprise TensorRT only.

    Attributes:
        hardware: "none": the same kind of GPU; "same_compute_capability": others of its number; "ampere_plus": all
            since sm80.
        versions: later versions of TensorRT with the same first number, and its lean runtime.
    """

    hardware: Hardware = "none"
    versions: bool = False


class Manifest(_Record):
    """Description of a bundle and of its parts.

    Attributes:
        model: name of the model that it was made from.
        architecture: diffusers class name.
        backend: compiler of the plans.
        layout: how plans and weights are arranged: "embedded" is a self-contained plan for each assignment, "shared"
            plans without weights over one store, "switch" one plan that switches assignments, "plugin" one graph
            of plugin nodes with the plan of it, or with the commands that compile it.
        targets: names of the targets that it was built for.
        base_type: 16-bit type of what is not quantized in the target graphs.
        formats: formats that the policy uses.
        schedule: sigmas and timesteps of the denoising loop.
        guidance: scale of guidance: weight of the branch with the prompt, or an input of models trained with it.
        guidance_2: scale at the steps of the second of two experts; None for the same.
        rescaled_guidance: guidance keeps the norm of every token's conditional prediction (`solver.guide`).
        latent_shape: shape of one sample's latent.
        image: how a latent becomes an image.
        pixels: height and width, or frames, height and width, of what is drawn; None in earlier bundles.
        shapes: of a bundle of several sizes: each of them, its own first; empty for a bundle of one size.
        prompts: how many prompts are stored.
        prompt_texts: their texts.
        call: how a pipeline calls the transformer that the bundle stands in for; None in bundles that run by themselves
            only, and in earlier ones.
        text: how the pipeline's text encoders make the model's condition; None where no files of them are known.
        image_call: what an image beside the prompt decides; None for a model of text alone.
        lora_slots: of a bundle that takes LoRAs at run time; None for others.
        compatibility: of the plans.
        plans: compiled engines; none when the policy is only simulated.
        versions: library → version.
        files: path relative to the bundle → sha256 of every other file.
    """

    schema_version: Literal[2] = 2
    model: Name
    architecture: Name
    backend: Name
    layout: Layout = "embedded"
    targets: tuple[Name, ...]
    base_type: Literal["bfloat16", "float16", "float32"]
    formats: tuple[Name, ...]
    schedule: ScheduleRecord
    guidance: FiniteFloat
    guidance_2: FiniteFloat | None = None
    rescaled_guidance: bool = False
    latent_shape: LatentShape
    image: ImageSpec
    pixels: Annotated[tuple[Count, ...], Field(min_length=2, max_length=3)] | None = None
    shapes: tuple[ShapeRecord, ...] = ()
    prompts: Count
    prompt_texts: tuple[str, ...] = ()
    call: TransformerCall | None = None
    text: TextCall | None = None
    image_call: ImageCall | None = None
    lora_slots: LoraSlots | None = None
    compatibility: Compatibility = Compatibility()
    plans: tuple[PlanFile, ...]
    versions: dict[Name, Name]
    files: dict[str, str] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        _require_image(self.latent_shape, self.image)
        if self.guidance_2 is not None and not self.schedule.experts:
            raise ValueError("guidance_2 is of a second transformer, and no step has one")
        if self.shapes:
            own = self.shapes[0]
            if (own.latent_shape, own.image, own.schedule) != (self.latent_shape, self.image, self.schedule):
                raise ValueError("the first of 'shapes' differs from the bundle's own size")
            profiles = sum(len(shape.batches) for shape in self.shapes)
            for plan in self.plans:
                # In layout `plugin` every assignment has all of them; how many there are, the policy says.
                rows = len(plan.profile_rows) % profiles if self.layout == PLUGIN_LAYOUT else len(plan.profile_rows)
                if not plan.profile_rows or rows not in (0, profiles):
                    raise ValueError(f"plan '{plan.path}' has {len(plan.profile_rows)} profiles, 'shapes' {profiles}")
        return self

    def shape(self, size: Sequence[int] | None = None) -> ShapeRecord:
        """Look up the record of a size.

        Args:
            size: height and width, or frames, height and width, in pixels; None for the size that the policy was
                searched at.

        Raises:
            MismatchError: the bundle does not have that size; says which it has.
        """
        if size is None:
            return self.shapes[0] if self.shapes else self._only_shape
        found = next((shape for shape in self.shapes if shape.size == tuple(size)), None)
        if found is None:
            name, there = size_name(size), ", ".join(shape.name for shape in self.shapes)
            raise MismatchError(
                f"size {name}: the bundle has {there or 'one size only, which needs no name'}; choose among these, or "
                f"build a bundle with {name} among its --shapes"
            )
        return found

    @property
    def second_guidance(self) -> float:
        """Scale at the steps of the second of two experts."""
        return self.guidance if self.guidance_2 is None else self.guidance_2

    @property
    def _only_shape(self) -> ShapeRecord:
        """Of a bundle of one size; in pixels of the image, or of the VAE's latent."""
        image, side = self.image, self.image.patch_size
        size = (*([image.frames] if image.frames else []), *(side * n for n in image.shape.grid))
        return ShapeRecord(size=size, batches=(1,), latent_shape=self.latent_shape, image=image, schedule=self.schedule)

    @property
    def image_inputs(self) -> tuple[str, ...]:
        """Graph inputs that an image decides."""
        return () if self.image_call is None else self.image_call.inputs

    @property
    def image_texts(self) -> tuple[str, ...]:
        """Graph inputs that a text encoder makes of a prompt and its image."""
        return () if self.image_call is None else self.image_call.texts

    def profiles_of(self, shape: ShapeRecord, assignment: int = 0) -> range | None:
        """Indices of a size's optimization profiles in every plan.

        Args:
            shape: one of the bundle's.
            assignment: where profiles select it, as in layout `plugin`; of no account elsewhere.

        Returns:
            None where all profiles are for any call.
        """
        selects = self.layout == PLUGIN_LAYOUT
        if not self.shapes:
            return range(assignment, assignment + 1) if selects else None
        counts = [len(other.batches) for other in self.shapes]
        first = sum(counts[: self.shapes.index(shape)]) + (assignment * sum(counts) if selects else 0)
        return range(first, first + len(shape.batches))
