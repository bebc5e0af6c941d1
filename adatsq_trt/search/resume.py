"""The search's units of work on disk: each appears whole, and an interrupted search goes on after the last one.

FOLDER/sensitivity/step_007.safetensors   contributions and adjoint of a step (written from the last step back)
FOLDER/columns/column_007.safetensors     the paths that survived a step
FOLDER/scores/<hash>.safetensors          errors of one policy on the samples of one batch
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.calibration.units import Measured, backward_sweep
from adatsq_trt.execution import Executor
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.formats import Format
from adatsq_trt.intervals import Floats
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.search.beam import Path as BeamPath
from adatsq_trt.search.beam import Pruning, beam_search
from adatsq_trt.search.candidates import Assignment
from adatsq_trt.search.denoising import DenoisingProblem, row_errors
from adatsq_trt.search.plan import Rows
from adatsq_trt.search.sensitivity import Candidates, Sensitivity, assemble, join_parts, measure_contributions
from adatsq_trt.search.simulation import Simulation, require_finite
from adatsq_trt.solver import State

Progress = Callable[[], None]
# Median samples that one sample counts for at most when policies are ranked.
CAP = 20.0


def measure_sensitivity(
    samples: Samples,
    latents: Tensor,
    start: Tensor,
    formats: Sequence[Format],
    store: CandidateWeights,
    folder: Path,
    on_step: Progress,
    executor: Executor,
    by_block: bool = False,
) -> tuple[Sensitivity, list[State[Tensor]]]:
    """One backward sweep over the trajectory, a file per step.

    Args:
        samples: the calibration batch.
        latents: its full-precision trajectory, float32 [steps + 1, samples, *latent_shape].
        start: projections u = a_T, float32 [projections, samples, *latent_shape].
        formats: cheapest first.
        store: their weights and activation scales.
        folder: of the search.
        on_step: called after each step.
        executor: who computes.
        by_block: whether one block at a time is in memory for its gradients (`backward_step`).

    Returns:
        The sensitivity, and the adjoints of the states before the first step and after each, of float32 [projections,
        samples, *latent_shape].
    """
    steps = samples.schedule.steps
    files = [folder / "sensitivity" / f"step_{t:03d}.safetensors" for t in range(steps)]
    missing = [t for t in range(steps) if not files[t].is_file()]
    for _ in range(steps - len(missing)):
        on_step()
    if missing:
        last = max(missing)
        adjoint = State(start) if last == steps - 1 else State.from_named(read_tensors(files[last + 1]), "adjoint")
        common = executor.share(Measured(samples, Candidates(tuple(formats), store), by_block))
        for swept in backward_sweep(executor, common, measure_contributions, latents, adjoint, last):
            contributions = join_parts(swept.measured, projections=len(start))
            write_tensors(files[swept.step], {"contributions": contributions, **swept.adjoint.named("adjoint")})
            on_step()
    parts = [read_tensors(file) for file in files]
    steps_done = {t: part["contributions"] for t, part in enumerate(parts)}
    active = samples.adapter.active(samples.schedule)
    sensitivity = assemble(formats, steps_done, latents[0, 0].numel(), len(samples.seeds), active)
    return sensitivity, [*(State.from_named(part, "adjoint") for part in parts), State(start)]


def search_columns(
    problem: DenoisingProblem, pruning: Pruning, folder: Path, on_column: Progress
) -> list[BeamPath[State[Tensor]]]:
    """The beam search, a file per column; counts the denoiser calls of earlier attempts too."""
    paths, calls = _last_column(folder / "columns", problem.steps)
    problem.calls = calls
    for _ in range(len(paths[0].assignments) if paths else 0):
        on_column()

    def keep(step: int, survivors: Sequence[BeamPath[State[Tensor]]]) -> None:
        _save_column(folder / "columns" / f"column_{step:03d}.safetensors", survivors, problem.calls)
        on_column()

    return beam_search(problem, pruning, paths, keep)


def _save_column(file: Path, paths: Sequence[BeamPath[State[Tensor]]], calls: int) -> None:
    figures = [[path.bits, path.error, path.estimate] for path in paths]
    write_tensors(
        file,
        {
            **State.joined([path.state for path in paths], torch.stack).named("latents"),
            "assignments": torch.tensor([path.assignments for path in paths], dtype=torch.uint8),
            "figures": torch.tensor(figures, dtype=torch.float64),
            "calls": torch.tensor(calls),
        },
    )


def _last_column(folder: Path, steps: int) -> tuple[list[BeamPath[State[Tensor]]], int]:
    """The surviving paths of the last finished column and the calls so far; nothing when there is none."""
    # Up to the first gap: a damaged column has been removed, and what follows it is made again with it.
    finished = 0
    while finished < steps and (folder / f"column_{finished:03d}.safetensors").is_file():
        finished += 1
    if not finished:
        return [], 0
    column = read_tensors(folder / f"column_{finished - 1:03d}.safetensors")
    states = State.from_named(column, "latents")
    paths = [
        BeamPath(states[i].each(torch.clone), tuple(tuple(row) for row in rows.tolist()), *figures.tolist())
        for i, (rows, figures) in enumerate(zip(column["assignments"], column["figures"], strict=True))
    ]
    return paths, int(column["calls"])


@dataclass(frozen=True)
class Score:
    """How a policy does on a batch.

    Attributes:
        errors: latent MSE of every sample, float64 [samples].
    """

    errors: Floats

    @classmethod
    def joined(cls, scores: Iterable[Score]) -> Score:
        """Of several batches together."""
        return cls(np.concatenate([score.errors for score in scores]))

    @property
    def error(self) -> float:
        """Latent MSE."""
        return float(self.errors.mean())

    @property
    def standard_error(self) -> float:
        """Of that mean, from the spread over the samples."""
        count = len(self.errors)
        return float(self.errors.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0

    @property
    def capped_errors(self) -> Floats:
        """No sample counts for more than `CAP` median ones, float64 [samples].

        A few samples flip to another picture; which ones is mostly chance, so this ranks policies better than the
        errors themselves.
        """
        capped: Floats = np.minimum(self.errors, CAP * float(np.median(self.errors)))
        return capped

    @property
    def capped_error(self) -> float:
        """Their mean."""
        return float(self.capped_errors.mean())


class Scorer:
    """Errors of whole policies on one batch of samples, each kept in a file.

    Attributes:
        samples: the batch.
        reference: full-precision final latents, float32 [samples, *latent_shape].
    """

    def __init__(self, simulation: Simulation, samples: Samples, folder: Path) -> None:
        """Prepare to score.

        Args:
            simulation: of the model.
            samples: the batch whose pictures are compared.
            folder: of the search.
        """
        self.samples = samples
        self._simulation, self._folder = simulation, folder / "scores"
        self.reference = self._full_precision()

    def _full_precision(self) -> Tensor:
        file = self._folder / f"full_precision_{self._key([])}.safetensors"
        if not file.is_file():
            (latents,) = self._simulation.final_latents(self.samples, [None])
            write_tensors(file, {"latents": latents})
        return read_tensors(file)["latents"]

    def _key(self, rows: Rows | list[Assignment]) -> str:
        text = json.dumps([self.samples.seeds, self.samples.prompts, rows])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _file(self, rows: Rows) -> Path:
        return self._folder / f"{self._key(rows)}.safetensors"

    def scores(self, policies: Sequence[Rows]) -> Iterator[Score]:
        """Errors of whole generated samples, in the order of the policies; each policy is measured once."""
        missing = [rows for rows in dict.fromkeys(policies) if not self._file(rows).is_file()]
        measured = self._simulation.final_latents(self.samples, missing)
        for rows in policies:
            if not self._file(rows).is_file():  # results come in the order in which policies are first named
                errors = row_errors(next(measured), self.reference)
                require_finite(self._simulation, self.samples, rows, errors)
                write_tensors(self._file(rows), {"errors": errors})
            yield Score(read_tensors(self._file(rows))["errors"].numpy())
