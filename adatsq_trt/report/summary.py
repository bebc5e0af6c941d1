"""`summary.json`: the figures of a run that scripts and people compare."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from adatsq_trt.base_type import BaseName
from adatsq_trt.costs import Costs, Limits


class StageFigures(BaseModel):
    """What a stage cost: wall-clock seconds over all attempts, peak resident bytes of the process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float
    peak_bytes: int


class StaticErrors(BaseModel):
    """Held-out latent MSE of the best policies that do not see the time step, or the layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer_only: float | None
    time_only: float | None


class Unlimited(BaseModel):
    """The policy that would have been chosen without a limit on assignments: what the limit costs.

    Attributes:
        assignments: distinct assignments.
        mean_bits: as in the summary.
        error: held-out latent MSE.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    assignments: int
    mean_bits: float
    error: float


class PolicyFigures(BaseModel):
    """One policy of the table at the end of a build.

    Attributes:
        name: "chosen", "best layer-only", "uniform nvfp4" and so on.
        kind: where it comes from.
        assignments: distinct ones.
        mean_bits: mean of nominal bits.
        costs: resident bytes, activation bits and milliseconds.
        resident_bits: resident bytes as bits per quantized weight.
        error: held-out latent MSE.
        standard_error: of that mean.
        within_limits: whether it keeps the budgets and the limit on assignments.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    assignments: int
    mean_bits: float
    costs: Costs
    resident_bits: float
    error: float
    standard_error: float
    within_limits: bool


class Summary(BaseModel):
    """The figures of a run.

    Attributes:
        schema_version: of this file.
        settings_sha256: of settings.json when the run was built: with another, other stages may have replaced these.
        model: name of the model.
        targets: what the bundle was built for.
        formats: candidate formats.
        simulate: whether plans were left out.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        limits: what was asked for, or what the reference format leaves.
        reference: format whose bytes and time the limits are a little more than; None where limits were asked for.
        max_assignments: most distinct assignments that were allowed; None for any number.
        policies: the chosen policy, and what else was measured on held-out samples.
        ms: per sample; None where nobody knows.
        ms_source: where milliseconds come from: a roofline or measured times.
        buckets: runs of steps with one assignment.
        assignments: distinct assignments.
        unlimited: the policy that a limit on assignments kept from being chosen; None without a limit.
        base_type: the model's declared type: its weights were rounded to it before anything was measured.
        rounding_error: what that cost: latent MSE against the checkpoint's own numbers on a few calibration samples,
            both in full precision; 0 where the type holds them exactly.
        mean_bits: unweighted mean over (step, layer) of (nominal weight bits + nominal activation bits) / 2.
        mean_weight_bits: with scales, weighted by parameters.
        mean_activation_bits: with dynamic scales, weighted by multiply-accumulates.
        final_error: latent MSE against full precision on the held-out seeds.
        final_standard_error: of that mean, from the spread over the samples; errors are heavy-tailed.
        chosen_kind: where the chosen policy comes from.
        uniform_errors: format → the same for that format everywhere.
        static_errors: the same for the best static policies of the budget.
        held_out_samples: how many pictures these errors are means over.
        held_out_seeds: first and last seed.
        denoiser_calls: of beam search and selection.
        resident_weight_bytes: quantized weights, each distinct weight format of a layer once, scales included.
        engines: plans of the bundle on each target; graphs of the processor where there are none.
        onnx_bytes: of all graphs without the weight file.
        weight_bytes: of the weight file.
        engine_bytes: of all plans.
        stages: name → cost.
        versions: library → version.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[3] = 3
    settings_sha256: str
    model: str
    targets: tuple[str, ...]
    formats: tuple[str, ...]
    simulate: bool
    steps: int
    guidance: float
    limits: Limits
    reference: str | None = None
    max_assignments: int | None = None
    policies: Annotated[tuple[PolicyFigures, ...], Field(min_length=1)]
    ms: float | None = None
    ms_source: str | None = None
    buckets: int
    assignments: int
    unlimited: Unlimited | None = None
    base_type: BaseName | None = None
    rounding_error: float | None = None
    mean_bits: float
    mean_weight_bits: float
    mean_activation_bits: float
    final_error: float
    final_standard_error: float
    chosen_kind: str
    uniform_errors: dict[str, float]
    static_errors: StaticErrors
    held_out_samples: int
    held_out_seeds: tuple[int, int]
    denoiser_calls: int
    resident_weight_bytes: int
    engines: int
    onnx_bytes: int
    weight_bytes: int
    engine_bytes: int
    stages: Annotated[dict[str, StageFigures], Field(min_length=1)]
    versions: dict[str, str]
