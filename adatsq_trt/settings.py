"""Everything that a build depends on, resolved and stored, so that a run says what it did."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from adatsq_trt.base_type import BaseName, base_type
from adatsq_trt.config import (
    DEFAULT_LAYOUT,
    Backend,
    BuildConfig,
    Clips,
    Hardware,
    HessianForm,
    Layout,
    Precision,
    Weights,
)
from adatsq_trt.schedule import Spacing, Steps

SETTINGS_NAME = "settings.json"
# What the path of a model that was an object in memory begins with; its class follows.
IN_MEMORY = "memory:"


class PipelineSettings(BaseModel):
    """A checkpoint that the user brought, and what it draws.

    Attributes:
        path: absolute path of a pipeline, a transformer or a single file; or the hub id of a pipeline.
        base: path or hub id of the pipeline that a transformer or a single file belongs to.
        loras: FILE:SCALE of every LoRA that is fused into the transformer.
        height: in pixels; None until the pipeline's default is known.
        width: in pixels; None likewise.
        frames: of a video; None likewise, and for pictures.
        guided: guidance takes a second branch.
        prompts: texts that calibration draws and that the bundle can be asked for.
        encodings: absolute path of the file that has them encoded already; None where the text encoders do it.
        negative_prompt: of the second branch of guidance.
        images: absolute path of the folder with the images that go with the prompts; None for those that are made here,
            and for models of text alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    base: str | None = None
    loras: tuple[str, ...] = ()
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    guided: bool = True
    prompts: tuple[str, ...]
    encodings: str | None = None
    negative_prompt: str = ""
    images: str | None = None


class Settings(BaseModel):
    """The resolved settings of `build engine`.

    Attributes:
        schema_version: of this file.
        model: name of the model.
        pipeline: source of the model, if it is none of the zoo.
        weights_sha256: hash of its transformer's weights.
        model_sha256: hash of all its configurations and weights.
        format_set: set or list of formats that the user asked for.
        formats: candidate formats, cheapest first.
        targets: targets that the bundle is built for.
        simulate: no plans; formats need no accelerated path.
        layout: how plans and weights are arranged.
        backend: compiler of the plans.
        hardware_compatibility, version_compatible, weight_streaming: of plans of enterprise TensorRT.
        plugins: absolute path of the plugin's library, around which a plan of layout `plugin` is compiled; None for
            no plan.
        batch: samples in a call that plans are tuned for, ascending; the last is the most that they accept.
        shapes: samples and size in pixels of each optimization profile, in place of `batch`, where there are several
            sizes; the model's own size first, then by number of samples.
        steps: denoising steps.
        sigmas: noise levels of the steps before the scheduler shifts them; none where the scheduler chooses them.
        timesteps: of the steps, likewise.
        guidance: classifier-free guidance scale.
        guidance_2: of the second of two experts; None for the same, and for models of one transformer.
        budget_bits: largest mean of (weight bits + activation bits) / 2 over (step, layer); None for no such limit.
        budget_bytes: most resident bytes of quantized weights, each distinct weight format of a layer once; None
            likewise.
        budget_ms: most milliseconds per sample; None likewise.
        budget_speedup: least speed as a multiple of that of 16 bits everywhere; None likewise.
        reference: format whose bytes and time are the budgets, with a little room, where none was asked for; None where
            one was.
        times: source of the milliseconds: a card's name, or the text of a measured table; None where nobody knows.
        weights: whether a layer has one weight format for all steps. Runs of before there was a choice were free.
        max_assignments: most distinct assignments of the policy; None for any number.
        policy: text of a given policy file, which replaces the search; None to search.
        seed: of calibration prompts, noise and projections.
        calibration_samples: trajectories that Hessians, sensitivities and the beam are measured on.
        projections: random projections per calibration sample.
        selection_samples: fresh trajectories that decide between finished policies.
        held_out_samples: trajectories that the reported errors are measured on; with none the search reports none, and
            leaves out uniform policies above a budget in bits. The command line asks for at least one.
        hessian: form of the Hessian, and so the error that GPTQ minimizes; runs that do not say it have the paper's.
        temperature: tau of the paper's temporal weights.
        damping: of the Hessian, as a part of its mean diagonal.
        transform: transform of weights and inputs before they are rounded; None for none.
        clips: whether the part of each activation's largest magnitude that its scale keeps is searched, or all is kept.
        lora_slots: rank of the branch for LoRAs that every layer gets; None for no branches.
        refine: whether the policy's weights are solved again for the inputs that it rounds.
        excluded: module paths of layers that stay in full precision, in the order of execution.
        formats_for: module path → its candidates, of the layers that may not have all of `formats`.
        beam: paths kept per column.
        candidates: assignments tried per path and step, besides the previous one.
        slack: relative slack of dominance.
        expansions: of the beam that are run per step, those that pruning by predicted errors would keep; None runs all.
        search_precision: of the denoiser calls of the search.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model: str
    pipeline: PipelineSettings | None = None
    weights_sha256: str
    model_sha256: str
    format_set: str
    formats: tuple[str, ...]
    targets: tuple[str, ...]
    simulate: bool
    layout: Layout = DEFAULT_LAYOUT
    backend: Backend = BuildConfig.backend
    hardware_compatibility: Hardware = BuildConfig.hardware_compatibility
    version_compatible: bool = BuildConfig.version_compatible
    weight_streaming: bool = BuildConfig.weight_streaming
    plugins: str | None = None
    batch: tuple[int, ...] = (32,)
    shapes: tuple[tuple[int, ...], ...] = ()
    steps: int
    sigmas: tuple[float, ...] = ()
    timesteps: tuple[float, ...] = ()
    guidance: float
    guidance_2: float | None = None
    budget_bits: float | None
    budget_bytes: float | None = None
    budget_ms: float | None = None
    budget_speedup: float | None = None
    reference: str | None = None
    times: str | None = None
    weights: Weights = "free"
    max_assignments: int | None = None
    policy: str | None = None
    seed: int = BuildConfig.seed
    calibration_samples: int = BuildConfig.calibration_samples
    projections: int = BuildConfig.projections
    selection_samples: int = BuildConfig.selection_samples
    held_out_samples: int = BuildConfig.held_out_samples
    hessian: HessianForm = "paper"
    temperature: float = BuildConfig.temperature
    damping: float = BuildConfig.damping
    transform: str | None = None
    clips: Clips = BuildConfig.clips
    lora_slots: int | None = None
    refine: bool = BuildConfig.refine
    excluded: tuple[str, ...] = ()
    formats_for: dict[str, tuple[str, ...]] = {}
    beam: int = BuildConfig.beam
    candidates: int = BuildConfig.candidates
    slack: float = BuildConfig.slack
    expansions: int | None = None
    search_precision: Precision = BuildConfig.search_precision

    @property
    def asked_steps(self) -> Steps:
        """How a model's schedule is asked for: by their number, or by a list."""
        if self.sigmas:
            return Spacing("sigmas", self.sigmas)
        return Spacing("timesteps", self.timesteps) if self.timesteps else self.steps

    @property
    def base_type(self) -> BaseName:
        """The model's declared type: that of everything that is not quantized."""
        return base_type(self.targets, self.formats, self.simulate)
