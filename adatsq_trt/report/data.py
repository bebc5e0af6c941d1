"""Contents of a report: plain data that the command line gathers from a run's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from adatsq_trt.policy import Policy
from adatsq_trt.report.summary import Summary
from adatsq_trt.settings import Settings

Array: TypeAlias = NDArray[np.floating]
STATIC_LABELS = {"layer_only": "best layer-only", "time_only": "best time-only"}


@dataclass(frozen=True)
class JudgedPolicy:
    """One policy that the search measured.

    Attributes:
        kind: its origin: "beam", "plan", "merged", "layer_only", "time_only", "uniform" or "given".
        name: for uniform policies the format, else kind and number.
        mean_bits: mean of nominal bits.
        error: latent MSE on the screening batch; for the shortlist, on the whole selection batch.
        held_out_error: latent MSE on the held-out samples; None where it was not measured.
        on_front: whether no other policy had fewer bits and a smaller error on the screening batch.
        chosen: whether it is the one that was built.
    """

    kind: str
    name: str
    mean_bits: float
    error: float
    held_out_error: float | None
    on_front: bool
    chosen: bool

    @property
    def label(self) -> str:
        """Name in figures and tables."""
        if self.chosen:
            return "chosen"
        return STATIC_LABELS.get(self.kind, self.name)


@dataclass(frozen=True)
class Comparison:
    """One row of the accuracy check.

    Attributes:
        step: the step whose inputs were fed.
        graph: graph that was checked, and the part of it.
        reference: name of the computation that it was compared with.
        of_limit: largest of its errors as a part of that error's limit; None when outputs could not be compared.
        passed: whether all limits hold.
        command: repeats the comparison in the folder of the check.
    """

    step: int
    graph: str
    reference: str
    of_limit: float | None
    passed: bool
    command: str


@dataclass(frozen=True)
class Check:
    """The accuracy check of a bundle.

    Attributes:
        passed: whether nothing was missing and everything passed.
        current: whether it belongs to the bundle as it is now.
        comparisons: steps first.
    """

    passed: bool
    current: bool
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class EngineFile:
    """One compiled plan: its target, the assignment that it holds (None: all of them), its size."""

    target: str
    assignment: int | None
    bytes: int


@dataclass(frozen=True)
class Pictures:
    """The same samples twice, as WebP of one size.

    Attributes:
        quantized: drawn by the bundle.
        full_precision: drawn by the same model without quantization.
    """

    quantized: bytes = field(repr=False)
    full_precision: bytes = field(repr=False)


@dataclass(frozen=True)
class ReportData:
    """A run as its report shows it.

    Attributes:
        run_name: last part of the run directory's path.
        summary: the figures that scripts read too.
        settings: everything that the run depends on.
        policy: the one that was built.
        timesteps: the model's time input at each step.
        sigmas: noise level at the start of each step.
        information: Fisher information I[t,l], [steps, layers].
        sensitivity: latent MSE of each rounding alone, [formats, steps, layers], formats as in the settings; None when
            the policy was given, so that nothing was searched.
        judged: all policies that the search measured.
        trajectory_errors: label of a policy → latent MSE after 0, 1, … steps on the calibration batch, [steps + 1].
        layout: how plans and weights are arranged in the bundle.
        engines: compiled plans.
        check: None when the bundle was not checked.
        pictures: None when none were generated.
    """

    run_name: str
    summary: Summary
    settings: Settings
    policy: Policy
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    information: Array
    sensitivity: Array | None
    judged: tuple[JudgedPolicy, ...]
    trajectory_errors: Mapping[str, Array]
    layout: str
    engines: tuple[EngineFile, ...]
    check: Check | None = None
    pictures: Pictures | None = None

    @property
    def cheapest(self) -> str:
        """The candidate format with the fewest bits."""
        return self.settings.formats[0]

    def format_indices(self) -> NDArray[np.intp]:
        """The policy as indices into the settings' formats, [steps, layers]; -1 where a layer does not run."""
        index: dict[str | None, int] = {name: i for i, name in enumerate(self.settings.formats)} | {None: -1}
        rows = [[index[name] for name in assignment] for assignment in self.policy.assignments]
        return np.array([rows[i] for i in self.policy.step_assignments])
