"""Run a bundle: the denoising loop, with the formats that the policy gives to each step.

    with Bundle.open("runs/demo") as bundle:
        latents = bundle.denoise(bundle.noise([1, 2, 3]), bundle.conditioning([0, 1, 2]))
        images = bundle.decode(latents)

Formats are chosen once per step: both branches of guidance go through one call. Latents and conditioning are NumPy's
arrays or PyTorch's tensors, on any device; results are of the kind that the latents were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from adatsq_trt.engines.backends.base import StepRunner, closed_error
from adatsq_trt.engines.backends.selection import BackendName, Offload, choose, make_runner, require_offload
from adatsq_trt.engines.bundle import CONDITIONAL, UNCONDITIONAL, VAE_FOLDER, BundleFiles, Manifest, require_prompts
from adatsq_trt.engines.generation import TIME_INPUT as TIME_INPUT
from adatsq_trt.engines.generation import Array, Arrays, DenoisingRequest, array_inputs, as_array, like, require_inputs
from adatsq_trt.engines.generation import Conditioning as Conditioning
from adatsq_trt.engines.lora_slots import SlotLora, fill_slots
from adatsq_trt.engines.manifest import LoraSlots
from adatsq_trt.engines.vae import Vae
from adatsq_trt.errors import DamagedFileError, MismatchError, UserError
from adatsq_trt.formats import Format
from adatsq_trt.graph_index import TensorSignature
from adatsq_trt.policy import Policy
from adatsq_trt.schedule import Schedule, initial_noise

if TYPE_CHECKING:
    import torch

Size = tuple[int, ...]


class StepResult:
    """Progress of the loop, as a callback is told after each step.

    Attributes:
        step: index of the step that is done.
        steps: length of the loop.
        bucket: index of the step's bucket in `policy.buckets`.
    """

    def __init__(self, step: int, steps: int, bucket: int, latents: Callable[[], Array]) -> None:
        """Tell of a step.

        Args:
            step: its index.
            steps: length of the loop.
            bucket: of the step.
            latents: gives the latents after it.
        """
        self.step, self.steps, self.bucket, self._latents = step, steps, bucket, latents

    @property
    def latents(self) -> Array:
        """After the step, [samples, *latent_shape]; asking for them on a GPU waits until the step is done."""
        return self._latents()


class Bundle:
    """A bundle that is ready to run; a context manager that gives the memory back at the end.

    Attributes:
        files: its files and records, every file verified.
        choice: backend that runs it, and why nothing faster does.
        offload: what is given back while the loop does not need it.
        loras: in its slots.
    """

    def __init__(self, files: BundleFiles, backend: BackendName = "auto", offload: Offload = "none") -> None:
        """Wrap verified files; see `open`, which is the usual way."""
        require_offload(files, offload)
        self.files, self.offload = files, offload
        self.choice = choose(files.manifest, backend)
        self._resources = ExitStack()
        self._runners: dict[bool, StepRunner] = {}
        self._vae: Vae | None = None
        self.loras: tuple[SlotLora, ...] = ()
        self._closed = False

    @classmethod
    def open(cls, path: Path | str, backend: BackendName = "auto", offload: Offload = "none") -> Self:
        """Open a bundle, or the bundle of a run directory. Sessions and engines are made when they are first needed.

        Args:
            path: of the bundle.
            backend: "rtx" and "tensorrt" run the plans on a GPU that they were built for, "cuda" the cpu graphs on any
                GPU with ONNX Runtime, "onnxruntime" the same on the processor. "auto" is the first of these that works
                here.
            offload: "expert", of a bundle of two transformers: each is loaded when its first step comes, once the other
                is given back. Results are the same; every change of transformer costs the time of loading one.

        Raises:
            MissingFileError: there is no bundle, or one of its files is gone.
            DamagedFileError: a file is not what the manifest says, or lies outside the bundle.
            DependencyError: plans without their library or a GPU.
            MismatchError: no plans for this GPU and this version of the library.
            UserError: offloading of a bundle of one transformer.
        """
        return cls(BundleFiles.open(Path(path)), backend, offload)

    def __enter__(self) -> Self:
        """Take the bundle."""
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give its memory back."""
        self.close()

    def close(self) -> None:
        """Give the memory back; what the files say can still be asked, but nothing runs any more."""
        self._closed = True
        self._runners.clear()
        self._vae = None
        self._resources.close()

    def _require_open(self) -> None:
        if self._closed:
            raise closed_error(self.files)

    # ------------------------------------------------------------------------------------------- what it holds

    @property
    def manifest(self) -> Manifest:
        """Description of the bundle and of its parts."""
        return self.files.manifest

    @property
    def policy(self) -> Policy:
        """Which assignment each step uses."""
        return self.files.policy

    @property
    def schedule(self) -> Schedule:
        """The steps that the bundle was made for, at its own size."""
        return self.files.schedule()

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Of a bundle of several sizes, in pixels, its own first: height and width, or frames, height and width."""
        return tuple(shape.size for shape in self.manifest.shapes)

    @property
    def inputs(self) -> tuple[TensorSignature, ...]:
        """The denoiser's inputs at the bundle's own size; a string stands for the number of rows."""
        return self.files.row_inputs()

    def formats(self, step: int) -> dict[str, Format]:
        """Layer → format at a step."""
        return self.policy.formats_at(step)

    def bucket(self, step: int) -> int:
        """Index of a step's bucket in `policy.buckets`."""
        return next(i for i, bucket in enumerate(self.policy.buckets) if bucket.first <= step <= bucket.last)

    def noise(self, seeds: Sequence[int], size: Size | None = None) -> np.ndarray:
        """First latents, float32 [len(seeds), *latent_shape]: one stream of unit normal numbers per seed.

        Raises:
            MismatchError: a size that the bundle does not have.
        """
        return initial_noise(seeds, self.manifest.shape(size).latent_shape)

    def conditioning(
        self, prompts: Sequence[int], images: Arrays | None = None, unguided: Arrays | None = None
    ) -> Conditioning:
        """The conditioning of prompts that the bundle holds, one for every sample.

        Args:
            prompts: their numbers.
            images: of a model that takes an image beside the prompt: graph input → [1, ...] for all samples, or a row
                for each; the image that the bundle holds with each prompt unless given. With them the texts that are
                encoded with the image (`image_texts` of the manifest), where there are any.
            unguided: the same texts of the unguided branch.

        Raises:
            UserError: a prompt that the bundle does not hold, inputs that no image decides, or an image without the
                texts that see it.
            DamagedFileError: the stored prompts are not named as they should be.
        """
        require_prompts(self.files, prompts)
        conditional = _starting(self.files.prompts, CONDITIONAL)
        if not conditional:
            raise DamagedFileError(
                f"the prompts of bundle '{self.files.folder}' are {sorted(self.files.prompts)}, expected names that "
                f"start with '{CONDITIONAL}'; run 'adatsq-trt build engine' again"
            )
        texts, unconditional = self.manifest.image_texts, _starting(self.files.prompts, UNCONDITIONAL)
        self._require_images(images or {}, unguided or {}, bool(unconditional))

        def rows(value: Array) -> np.ndarray:
            array = as_array(value)
            return np.repeat(array, len(prompts), axis=0) if len(array) == 1 else array

        own = {name: value[list(prompts)] for name, value in conditional.items()}
        own |= {name: rows(value) for name, value in (images or {}).items()}
        other = {name: value[list(prompts)] if name in texts else rows(value) for name, value in unconditional.items()}
        other |= {name: rows(value) for name, value in (unguided or {}).items()}
        shown = {name: own[name] for name in self.manifest.image_inputs if name in own}
        return Conditioning(own, other | shown if other else None)

    def _require_images(self, images: Arrays, unguided: Arrays, guided: bool) -> None:
        """Refuse inputs that no image decides, and an image without the texts that are encoded with it."""
        inputs, texts = self.manifest.image_inputs, self.manifest.image_texts
        strange = sorted(images.keys() - {*inputs, *texts})
        if strange:
            wanted = ", ".join((*inputs, *texts)) or "none: the model takes text alone"
            raise UserError(f"images: got '{strange[0]}', expected the bundle's inputs of an image, {wanted}")
        read = texts if images else ()  # an image without its texts would go with those of another
        for name, given, expected in (
            ("images", images, (*inputs, *read) if read else tuple(images)),
            ("unguided", unguided, read if guided else ()),
        ):
            if given.keys() != set(expected):
                raise UserError(
                    f"{name}: got {', '.join(given) or 'nothing'}, expected {', '.join(expected) or 'nothing'}, as a "
                    "text that is encoded with an image is given with it, for both branches of guidance"
                )

    def decode(self, latents: np.ndarray, size: Size | None = None) -> np.ndarray:
        """Latents of a size → images, float32 [samples, (frames,) height, width, channels] in [0, 1].

        Raises:
            MismatchError: a size that the bundle does not have.
            DamagedFileError: the bundle's VAE cannot be loaded.
            DependencyError: it needs diffusers, which is not installed.
            UserError: the bundle is closed.
        """
        self._require_open()
        images = self.manifest.shape(size).image.decode(latents)
        if not self.manifest.image.vae:
            return images
        if self._vae is None:
            self._vae = Vae(self.files.folder / VAE_FOLDER)
        return self._vae.decode(images)

    # ---------------------------------------------------------------------------------------------- running it

    @property
    def device(self) -> torch.device:
        """Where velocities and latents are computed."""
        import torch

        return torch.device("cpu" if self.choice.name == "onnxruntime" else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the denoiser takes its inputs; others are converted."""
        import torch

        return getattr(torch, self.manifest.base_type) if self.choice.plans else torch.float32

    @property
    def lora_slots(self) -> LoraSlots:
        """The slots that take LoRAs at run time.

        Raises:
            MismatchError: the bundle has none.
        """
        if self.manifest.lora_slots is None:
            slots = "" if self.schedule.experts else "--lora-slots RANK, or fuse the LoRA with "
            raise MismatchError(
                f"bundle '{self.files.folder}' has no slots for LoRAs; build it again with {slots}--lora"
            )
        return self.manifest.lora_slots

    def add_lora(self, lora: SlotLora) -> None:
        """Put a LoRA beside those that are loaded, quantized or not, from the next call on; weights stay as they are.

        Raises:
            MismatchError: no slots, or the ranks add up to more than they have; nothing has changed then.
            UserError: the bundle is closed.
        """
        self._set_loras((*self.loras, lora))

    def unload_lora(self) -> None:
        """Take all LoRAs out again: what the bundle computes then has the bits that it had before.

        Raises:
            MismatchError: no slots.
            UserError: the bundle is closed.
        """
        self._set_loras(())

    def _set_loras(self, loras: tuple[SlotLora, ...]) -> None:
        self._require_open()
        matrices = fill_slots(self.lora_slots, loras)
        runners, self._runners = self._runners, {}
        try:
            for runner in runners.values():
                runner.set_loras(matrices)
        except BaseException:  # all are made again, with what was loaded before
            for runner in runners.values():
                runner.close()
            raise
        self._runners, self.loras = runners, loras

    def predict(self, step: int, inputs: Arrays, quantized: bool = True, size: Size | None = None) -> Any:
        """One call of the denoiser, with the formats and activation scales of a step.

        Args:
            step: index in the loop.
            inputs: every input by name, [rows, ...], float32 arrays or tensors; all rows are at this step.
            quantized: follow the policy; otherwise full precision.
            size: in pixels, one of `sizes`; the bundle's own unless given.

        Returns:
            The predicted velocity, float32 [rows, *latent_shape]: of the latents' kind, as `denoise` gives it.

        Raises:
            UserError: a step or size that the bundle does not have; inputs of other names or shapes; the bundle is
                closed. Nothing is loaded then.
        """
        if not 0 <= step < self.policy.steps:
            raise UserError(f"step {step}: the bundle's policy has steps 0 to {self.policy.steps - 1}")
        shape = self.manifest.shape(size)
        require_inputs(self.files.row_inputs(size), inputs, self.most_rows(size))
        velocity = self.runner(quantized).run(step, inputs, shape.size if self.sizes else None)
        return like(inputs[self.latent_input], velocity)

    def denoise(
        self,
        latents: Array,
        conditioning: Conditioning,
        steps: int | None = None,
        callback: Callable[[StepResult], None] | None = None,
        guidance: float | None = None,
        quantized: bool = True,
        size: Size | None = None,
        guidance_2: float | None = None,
    ) -> Any:
        """The denoising loop, with the scheduler's step as the schedule has it.

        Args:
            latents: initial noise, [samples, *latent_shape]: a float32 array, or a tensor on any device.
            conditioning: of every sample.
            steps: must be the policy's number of steps, if given.
            callback: told of every finished step; an exception that it raises ends the loop.
            guidance: scale of guidance; the bundle's own unless given.
            quantized: follow the policy; otherwise full precision.
            size: in pixels, one of `sizes`; the bundle's own unless given.
            guidance_2: scale at the steps of the second of two experts; as of `request`.

        Returns:
            float32 [samples, *latent_shape]: an array for an array, a tensor on the latents' device for a tensor.

        Raises:
            UserError: another number of steps or size; latents or conditioning of other names or shapes; the bundle is
                closed, before or in the middle of the loop.
        """
        self.require_steps(steps)
        request = self.request(latents, conditioning, guidance, size, guidance_2)
        runner = self.runner(quantized)
        loop = runner.loop(request)
        with runner.working():
            reached: Array = latents
            for step, reached in enumerate(loop.run()):
                if callback is not None:
                    told = partial(like, latents, reached)
                    callback(StepResult(step, request.schedule.steps, self.bucket(step), told))
            result = like(latents, reached)
            runner.synchronize()
        return result

    def request(
        self,
        latents: Array,
        conditioning: Conditioning,
        guidance: float | None = None,
        size: Size | None = None,
        guidance_2: float | None = None,
    ) -> DenoisingRequest:
        """A run of the loop, once all its shapes are those of the graphs; arguments as of `denoise`.

        Of two experts the second has the scale of the first unless it is given too, as in their pipeline; where neither
        is, both have the bundle's.

        Raises:
            UserError: latents or conditioning of other names or shapes; a second scale for a bundle of one transformer.
        """
        if guidance_2 is not None and not self.manifest.schedule.experts:
            raise UserError("guidance_2: the bundle has one transformer; leave it out, and give guidance")
        request = self._make_request(latents, conditioning, guidance, size, guidance_2)
        signatures, most = self.files.row_inputs(size), self.most_rows(size)
        for samples in (conditioning.conditional, conditioning.unconditional):
            if samples is not None:
                filled = {name: np.zeros(len(latents), np.float32) for name in request.row_values(0)}
                given = {request.latent_input: latents, **samples, **filled}
                require_inputs(signatures, given, most, request.conditioning.branches)
        return request

    def _make_request(
        self,
        latents: Array,
        conditioning: Conditioning,
        guidance: float | None,
        size: Size | None,
        guidance_2: float | None = None,
    ) -> DenoisingRequest:
        own = self.manifest.guidance_2 if guidance is None else None
        return DenoisingRequest(
            latents=latents,
            conditioning=conditioning,
            guidance=self.manifest.guidance if guidance is None else guidance,
            schedule=self.files.schedule(size),
            latent_input=self.latent_input,
            inputs=tuple(signature.name for signature in self.inputs),
            size=self.manifest.shape(size).size if self.sizes else None,
            rescaled_guidance=self.manifest.rescaled_guidance,
            guidance_2=own if guidance_2 is None else guidance_2,
        )

    def most_rows(self, size: Size | None = None) -> int | None:
        """The most rows of a call at a size; None for any number."""
        profiles = self.manifest.profiles_of(self.manifest.shape(size))
        return min((plan.rows_at(profiles) for plan in self.choice.plans), default=None)

    @property
    def latent_input(self) -> str:
        """Name of the input that takes the latents: the one of the latents' shape that no image decides.

        Raises:
            DamagedFileError: there is not exactly one.
        """
        shape, images = self.manifest.latent_shape, self.manifest.image_inputs
        names = [s.name for s in self.inputs if s.shape[1:] == shape and s.name not in images]
        if len(names) != 1:
            raise DamagedFileError(
                f"bundle '{self.files.folder}': {len(names)} inputs have the latents' shape {list(shape)}, expected "
                "one; run 'adatsq-trt build engine' again"
            )
        return names[0]

    def require_steps(self, steps: int | None) -> None:
        """Refuse another number of steps than the policy's; None stands for the policy's own.

        Raises:
            MismatchError: says how many there are.
        """
        if steps not in (None, self.policy.steps):
            raise MismatchError(
                f"steps: got {steps}, the bundle's policy is for {self.policy.steps}; leave steps out, or build a "
                f"bundle with --steps {steps}"
            )

    def step_inputs(
        self,
        step: int,
        latents: np.ndarray,
        conditioning: Conditioning,
        guidance: float,
        size: Size | None = None,
    ) -> dict[str, np.ndarray]:
        """Make the inputs of `predict` at a step: both branches of guidance in one batch, conditional rows first.

        Args:
            step: index in the loop.
            latents: float32 [samples, *latent_shape].
            conditioning: of every sample.
            guidance: scale, for models that take it as an input.
            size: in pixels, one of `sizes`; the bundle's own unless given.
        """
        return array_inputs(self._make_request(latents, conditioning, guidance, size), step)

    def runner(self, quantized: bool = True) -> StepRunner:
        """Return the runner of the steps, made when it is first asked for.

        Args:
            quantized: follow the policy; otherwise full precision.

        Raises:
            UserError: a library refuses a plan or a graph; the bundle is closed.
        """
        self._require_open()
        if quantized not in self._runners:
            with ExitStack() as made:  # one that cannot take the LoRAs is not kept
                runner = made.enter_context(make_runner(self.files, self.choice, quantized, self.offload))
                if self.loras:
                    runner.set_loras(fill_slots(self.lora_slots, self.loras))
                self._resources.push(made.pop_all())
            self._runners[quantized] = runner
        return self._runners[quantized]


def _starting(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
