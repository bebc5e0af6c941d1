"""`summary.json`: the figures of a run that scripts and people compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from adatsq_trt.base_type import BaseName
from adatsq_trt.costs import Costs, Limits, TransformCosts

# Policies that keep so many bits of each weight are full precision.
SIXTEEN_BITS = 16


class StageFigures(BaseModel):
    """Cost of a stage: wall-clock seconds over all attempts, peak resident bytes of the process."""

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
        kind: its origin.
        assignments: distinct ones.
        mean_bits: mean of nominal bits.
        costs: resident bytes, activation bits and milliseconds.
        resident_bits: resident bytes as bits per quantized weight.
        error: held-out latent MSE.
        standard_error: of that mean.
        ratio: error in errors of the chosen policy, on the same samples, with the ends of its 95 % interval; None for
            too few samples.
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
    ratio: tuple[float, float, float] | None = None
    within_limits: bool


class Replaced(BaseModel):
    """A simple policy that is no worse than the search's own in bytes, time and error, and better in one.

    Attributes:
        searched: name of the search's own.
        by: name of the simple one.
        returned: whether the simple one was returned; with free weights it is a warning only.
        ratio: error of the simple one in errors of the other, on samples of their own.
        low: lower end of its paired 95 % interval; None for too few samples.
        high: upper end.
        samples: how many.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    searched: str
    by: str
    returned: bool
    ratio: float
    low: float | None
    high: float | None
    samples: int

    @property
    def sentence(self) -> str:
        """As it is told."""
        interval = "" if self.low is None or self.high is None else f" ({self.low:.2f} to {self.high:.2f})"
        what = "is returned" if self.returned else "would be the better choice: drop --weights free"
        return (
            f"{self.by} {what}: no more bytes, no more time and {self.ratio:.2f}{interval} times the error of "
            f"'{self.searched}', the best that was searched, on {self.samples} fresh samples"
        )


class Summary(BaseModel):
    """The figures of a run.

    Attributes:
        schema_version: of this file.
        settings_sha256: of settings.json when the run was built: with another, other stages may have replaced these.
        model: name of the model.
        targets: targets that the bundle was built for.
        formats: candidate formats.
        simulate: whether plans were left out.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        limits: those that were asked for, or those that the reference format leaves.
        reference: format whose bytes and time the limits are a little more than; None where limits were asked for.
        max_assignments: most distinct assignments that were allowed; None for any number.
        policies: the chosen policy, and others that were measured on held-out samples.
        replaced: a simple policy that the search's own is no better than; None where there is none.
        transform: what the run's transform has in all costs; None where there is none.
        ms: per sample; None where nobody knows.
        ms_source: source of the milliseconds: a roofline or measured times.
        buckets: runs of steps with one assignment.
        assignments: distinct assignments.
        unlimited: the policy that a limit on assignments kept from being chosen; None without a limit.
        base_type: the model's declared type: its weights were rounded to it before anything was measured.
        rounding_error: its cost: latent MSE against the checkpoint's own numbers on a few calibration samples,
            both in full precision; 0 where the type holds them exactly.
        mean_bits: unweighted mean over (step, layer) of (nominal weight bits + nominal activation bits) / 2.
        mean_weight_bits: with scales, weighted by parameters.
        mean_activation_bits: with dynamic scales, weighted by multiply-accumulates.
        final_error: latent MSE against full precision on the held-out seeds.
        final_standard_error: of that mean, from the spread over the samples; errors are heavy-tailed.
        chosen_kind: origin of the chosen policy.
        uniform_errors: format → the same for that format everywhere.
        static_errors: the same for the best static policies of the budget.
        held_out_samples: how many pictures these errors are means over.
        held_out_seeds: first and last seed.
        denoiser_calls: of beam search and selection.
        resident_weight_bytes: quantized weights, each distinct weight format of a layer once, scales included, without
            what a transform has.
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
    guidance_2: float | None = None
    limits: Limits
    reference: str | None = None
    max_assignments: int | None = None
    policies: Annotated[tuple[PolicyFigures, ...], Field(min_length=1)]
    replaced: Replaced | None = None
    transform: TransformCosts | None = None
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

    @property
    def beside_uniform(self) -> str:
        """The chosen policy's bytes, time and error in those of the format of its budgets, or of the cheapest."""
        chosen, *others = self.policies
        names = [f"uniform {name}" for name in (self.reference, *self.formats) if name is not None]
        uniform = next((policy for name in names for policy in others if policy.name == name), None)
        if uniform is None or not uniform.error:
            return f"error: {chosen.error:.2e} on {self.held_out_samples} held-out samples"
        interval = ""
        if uniform.ratio is not None and uniform.ratio[1] > 0:
            interval = f" ({1 / uniform.ratio[2]:.2f} to {1 / uniform.ratio[1]:.2f})"
        parts = [f"{chosen.costs.resident_bytes / uniform.costs.resident_bytes:.2f} times the bytes"]
        unit = "activation bits" if chosen.costs.ms is None else "time"
        parts.append(f"{chosen.costs.time / uniform.costs.time:.2f} times the {unit}")
        return (
            f"beside {uniform.name}: {', '.join(parts)}, {chosen.error / uniform.error:.2f}{interval} times the error"
        )


def looser(policies: Sequence[PolicyFigures]) -> list[str]:
    """Describe what looser budgets would have bought: policies beyond them that err less, by a paired interval.

    Of several with less bytes, less time and less error than another only the first is told; those of 16 bits and more
    need no search.
    """
    chosen, told = policies[0], list[PolicyFigures]()
    beyond = [p for p in policies[1:] if not p.within_limits and p.ratio is not None and p.ratio[2] < 1]
    for policy in sorted(beyond, key=lambda p: (p.costs.resident_bytes, p.costs.time)):
        if policy.resident_bits < SIXTEEN_BITS and all(policy.error < other.error for other in told):
            told.append(policy)
    return [_bought(policy, chosen) for policy in told]


def _bought(policy: PolicyFigures, chosen: PolicyFigures) -> str:
    assert policy.ratio is not None
    value, low, high = policy.ratio
    unit = "activation bits" if policy.costs.ms is None else "ms"
    return (
        f"a looser budget buys {policy.name}: {value:.2f} ({low:.2f} to {high:.2f}) times the error with "
        f"{policy.costs.resident_bytes / chosen.costs.resident_bytes:.2f} times the bytes and "
        f"{policy.costs.time / chosen.costs.time:.2f} times the {unit}"
    )


def remarks(summary: Summary) -> list[str]:
    """Costs of a transform, why a simple policy was returned, and what looser budgets would have bought."""
    parts = [part.sentence for part in (summary.transform, summary.replaced) if part is not None]
    return [*parts, *looser(summary.policies)]
