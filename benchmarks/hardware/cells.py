"""Rows that are measured once and kept on disk: a killed run goes on at the first that is missing.

FOLDER/MODEL/full.safetensors                 latents in full precision, of the model as all targets declare it
FOLDER/MODEL/TARGET/run                       run directory that everything is calibrated and quantized in
FOLDER/MODEL/TARGET/searches/BYTES-MS-N       run directory of a search with at most N assignments
FOLDER/MODEL/TARGET/policies/HASH.safetensors squared errors and the judge's values of a policy's samples
FOLDER/MODEL/TARGET/METHOD.{json,safetensors} a row, and those of its samples
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples, final_latents
from adatsq_trt.config import BuildConfig
from adatsq_trt.errors import BudgetError, MismatchError
from adatsq_trt.evaluation.batch import Batch, make_batch
from adatsq_trt.evaluation.scores import bootstrap, psnr
from adatsq_trt.files import read_json_model, read_tensors, write_json_model, write_tensors
from adatsq_trt.formats import format_named
from adatsq_trt.intervals import DRAWS, Floats, limits
from adatsq_trt.search.select import SearchResult
from adatsq_trt.settings import SETTINGS_NAME, Settings
from adatsq_trt.stages import calibrate, quantize, search
from adatsq_trt.stages.budget import sixteen_bit_bytes
from adatsq_trt.stages.context import Context, layer_shapes
from adatsq_trt.stages.graph import run_stages
from adatsq_trt.stages.models import declared
from adatsq_trt.stages.resolve import open_and_resolve
from adatsq_trt.stages.run_directory import RunDirectory, Stage
from adatsq_trt.zoo.loading import LoadedModel, load_model
from benchmarks.hardware.methods import FORMATS, Made, Method, policy_of
from benchmarks.hardware.rows import ASSIGNMENTS, SLACK, Effort, Figure, Row

log = logging.getLogger(__name__)
# Units of a search that do not depend on its budgets.
_SHARED = ("sensitivity", "scores", calibrate.TRAJECTORY)
EFFORT, FULL = "effort.json", "full.safetensors"


class Cells:
    """The rows of one model on one target.

    Attributes:
        effort: settings of all of them.
    """

    def __init__(self, folder: Path, effort: Effort, target: str) -> None:
        """Begin or go on.

        Args:
            folder: of all models.
            effort: settings of the rows.
            target: as on the command line.

        Raises:
            MismatchError: the folder holds rows of another effort.
        """
        self.effort, self._target = effort, target
        self._model_folder, self._folder = folder / effort.model, folder / effort.model / target
        file = self._model_folder / EFFORT
        if file.is_file() and (before := read_json_model(file, Effort)) != effort:
            names = [name for name in Effort.model_fields if getattr(before, name) != getattr(effort, name)]
            raise MismatchError(
                f"'{self._model_folder}' holds rows with {names[0]} {getattr(before, names[0])}, these would have "
                f"{getattr(effort, names[0])}; delete it, or ask for the same"
            )
        write_json_model(file, effort)

    def has(self, method: Method) -> bool:
        """Whether a row was measured."""
        return self._file(method.name).is_file()

    def read(self, method: Method) -> Row:
        """A row that was measured."""
        return read_json_model(self._file(method.name), Row)

    def outcomes(self, name: str) -> dict[str, Floats]:
        """Squared error of a row's pictures, and the judge's values where there is one: float64 [samples] each."""
        tensors = read_tensors(self._file(name).with_suffix(".safetensors"))
        return {key: value.double().numpy() for key, value in tensors.items()}

    def measure(self, method: Method) -> Row:
        """A row, measured or found.

        Raises:
            BudgetError: no policy keeps the budgets of a search.
        """
        if self.has(method):
            return self.read(method)
        log.info("%s, %s: %s", self.effort.model, self._target, method.name)
        start = time.monotonic()
        with self._base() as base:
            if method.make is not None:
                return self._measured(base, method, method.make(base), start)
            made, context = self._searched(base, method)
            return self._measured(context, method, made, start)

    # ------------------------------------------------------------------------------------------------ measuring

    @cached_property
    def batch(self) -> Batch:
        """Prompts of the samples, which nothing was calibrated or chosen on, and their judge."""
        return make_batch(self._model.adapter, self.effort.samples)

    def _measured(self, context: Context, method: Method, made: Made, start: float) -> Row:
        # A policy of the run's weights may be that of another row.
        text = json.dumps([made.rows, "run" if made.store is None else method.name])
        known = self._folder / "policies" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
        if not known.is_file():
            write_tensors(known, self._outcomes_of(context, made))
        outcomes = read_tensors(known)
        row = self._row(context, method, made, outcomes, start)
        write_tensors(self._file(method.name).with_suffix(".safetensors"), outcomes)
        write_json_model(self._file(method.name), row)
        return row

    def _outcomes_of(self, context: Context, made: Made) -> dict[str, Tensor]:
        """Squared errors of a method's pictures, and what the judge says of them: float32 [samples] each."""
        formats = [
            {layer: format_named(name) for layer, name in zip(context.layers, row, strict=True)} for row in made.rows
        ]
        asked = context.evaluation(self.batch.prompts)
        full = self._full_precision(asked)
        store = quantize.load(context) if made.store is None else made.store
        with context.simulated(store).installed() as model:
            latents = final_latents(asked, lambda step: model.assign(formats[step], step))
        images, exact = (context.adapter.decode(value) for value in (latents, full))
        errors = 10 ** (-psnr(images.numpy(), exact.numpy()) / 10)
        outcomes = {"errors": torch.from_numpy(errors).float()}
        if self.batch.judge is not None:
            outcomes["values"] = torch.from_numpy(self.batch.judge(images).values).float()
        return outcomes

    def _full_precision(self, asked: Samples) -> Tensor:
        file = self._model_folder / FULL
        if not file.is_file():
            write_tensors(file, {"latents": final_latents(asked)})
        return read_tensors(file)["latents"]

    def _row(self, context: Context, method: Method, made: Made, outcomes: dict[str, Tensor], start: float) -> Row:
        errors, names = outcomes["errors"].double().numpy(), self.batch.columns
        shapes = layer_shapes(context.adapter, dict.fromkeys(context.layers, 1))
        assert made.costs.ms is not None, "targets have cards"
        return Row(
            model=self.effort.model,
            target=self._target,
            method=method.name,
            kind=method.kind,
            budget_of=method.budget_of,
            most_assignments=method.most_assignments,
            origin=made.origin,
            resident_bytes=made.costs.resident_bytes,
            resident=made.costs.resident_bytes / sixteen_bit_bytes(shapes),
            ms=made.costs.ms,
            engines=len({tuple(row) for row in made.rows}),
            activation_bits=made.costs.activation_bits,
            **picture_figures(errors),
            score=mean_score(outcomes["values"].double().numpy(), names) if "values" in outcomes else None,
            seconds=round(time.monotonic() - start, 1),
        )

    # ------------------------------------------------------------------------------------------------ runs

    def _file(self, name: str) -> Path:
        return self._folder / f"{re.sub('[^a-z0-9]+', '-', name)}.json"

    @cached_property
    def _model(self) -> LoadedModel:
        return declared(load_model(self.effort.model), self._settings())

    def _settings(self, **budgets: object) -> Settings:
        effort = self.effort
        config = BuildConfig(
            target=self._target,
            formats=",".join(FORMATS[self._target]),
            steps=effort.steps,
            seed=effort.seed,
            calibration_samples=effort.calibration_samples,
            selection_samples=effort.selection_samples,
            projections=effort.projections,
            **budgets,  # type: ignore[arg-type]
        )
        settings = open_and_resolve(effort.model, config, search.NAME)[1]
        return settings.model_copy(update={"held_out_samples": 0})  # rows have samples of their own

    @contextmanager
    def _run(self, folder: Path, settings: Settings) -> Iterator[Context]:
        with RunDirectory.open(folder) as run:
            write_json_model(run.path / SETTINGS_NAME, settings)
            yield Context(run, settings, self._model)

    @contextmanager
    def _base(self) -> Iterator[Context]:
        """The run whose calibration and weights all rows share."""
        with self._run(self._folder / "run", self._settings()) as context:
            run_stages(context, quantize.NAME)
            yield context

    def _searched(self, base: Context, method: Method) -> tuple[Made, Context]:
        """The policy that a search finds within a peer's costs, and its run."""
        assert method.budget_of is not None
        assert method.most_assignments is not None
        peer = read_json_model(self._file(method.budget_of), Row)
        # The layer-only policy is judged by the search that may have more.
        most = ASSIGNMENTS if method.most_assignments == 1 else method.most_assignments
        settings = self._settings(
            budget_size=float(peer.resident_bytes), budget_speed=f"{SLACK * peer.ms!r}ms", max_assignments=most
        )
        name = f"{peer.resident_bytes}B-{peer.ms:.9g}ms-{most}"  # peers may cost the same
        with self._run(self._folder / "searches" / name, settings) as context:
            calibrate.stage(context).adopt(base.run)
            quantize.stage(context).adopt(base.run)
            _share_units(search.stage(context), self._folder / "searches")
            result = read_json_model(run_stages(context, search.NAME).folder / search.RESULT, SearchResult)
            index = result.layer_only if method.most_assignments == 1 else result.chosen
            if index is None:
                raise BudgetError(f"no layer-only policy keeps the budgets of {method.budget_of}")
            point = result.points[index]
            return replace(policy_of(context, point.formats), origin=point.kind), context


class _Begun(Exception):  # noqa: N818  (no error)
    """A stage was begun, so that it has a folder."""


def _share_units(stage: Stage, searches: Path) -> None:
    """Give a search the units of an earlier one, of the same weights, that do not depend on budgets."""
    if stage.folder.exists():  # begun or done
        return
    done = [file.parent for file in sorted(searches.glob(f"*/{search.NAME}/{search.RESULT}"))]
    if not done:
        return
    with suppress(_Begun), stage.run() as folder:
        for name in _SHARED:
            if (done[0] / name).is_dir():
                shutil.copytree(done[0] / name, folder / name)
            elif (done[0] / name).is_file():
                shutil.copy(done[0] / name, folder / name)
        raise _Begun


# ------------------------------------------------------------------------------------------------ figures


def picture_figures(errors: Floats) -> dict[str, Figure]:
    """The columns of a row that come from squared errors of pictures in [0, 1], float64 [samples]."""
    return {
        "psnr_of_mean_db": _figure(errors, lambda e: -10 * np.log10(e.mean(axis=-1))),
        "psnr_db": _figure(errors, lambda e: -10 * np.log10(e).mean(axis=-1)),
        "worst_psnr_db": _figure(errors, lambda e: -10 * np.log10(np.quantile(e, 0.95, axis=-1))),
    }


def _figure(errors: Floats, statistic: Callable[[Floats], Floats]) -> Figure:
    """A statistic over samples with its bootstrap interval."""
    drawn = errors[np.random.default_rng(0).integers(0, len(errors), (DRAWS, len(errors)))]
    low, high = limits(statistic(drawn))
    return Figure(value=float(statistic(errors)), low=low, high=high)


def mean_score(values: Floats, columns: tuple[str, ...]) -> Figure:
    """The judge's mean over columns of the columns' means."""
    interval = bootstrap(values, columns)
    return Figure(value=interval.value, low=interval.low, high=interval.high)
