"""Score methods on one model, cell by cell: the same layers, calibration samples, prompts and seeds for all.

FOLDER/evaluation.json               what all cells have in common
FOLDER/cells/METHOD-4-4.json         a cell's figures, written last
FOLDER/cells/METHOD-4-4.safetensors  its latents, and the judge's value of each sample
FOLDER/runs/NAME/                    run directories of the methods that calibrate or search
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples, final_latents, trajectory
from adatsq_trt.calibration.transforms.low_rank import rank_of
from adatsq_trt.calibration.transforms.make import make_transforms
from adatsq_trt.calibration.transforms.statistics import measure_groups
from adatsq_trt.errors import MismatchError
from adatsq_trt.evaluation.batch import Batch, Verdict, make_batch
from adatsq_trt.evaluation.methods import FULL_BITS, FULL_PRECISION, Method, Peer, Weights, require_bits
from adatsq_trt.evaluation.peers import apply_peer
from adatsq_trt.evaluation.scores import psnr, psnr_of_mean, worst_psnr
from adatsq_trt.files import read_json_model, read_tensors, write_json_model, write_tensors
from adatsq_trt.formats import Format, resolve_formats
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.policy import LayerShape, Policy, resident_weight_bytes
from adatsq_trt.progress import Reporter
from adatsq_trt.quantizers import quantize_nearest
from adatsq_trt.search.select import SearchResult
from adatsq_trt.settings import Settings
from adatsq_trt.stages import calibrate, quantize, search
from adatsq_trt.stages.budget import shapes_of
from adatsq_trt.stages.context import Context, layer_shapes
from adatsq_trt.stages.graph import run_stages
from adatsq_trt.stages.run_directory import RunDirectory, Stage
from adatsq_trt.transforms import BRANCH_BITS, LayerTransform
from adatsq_trt.zoo.loading import LoadedModel, load_model

log = logging.getLogger(__name__)
# A temperature at which all steps weigh the same.
_FLAT = 1e9


class Effort(BaseModel):
    """Settings that all cells of a model share.

    Attributes:
        model: its name.
        model_sha256: hash of its weights and configurations.
        samples: pictures of a cell.
        seed: of calibration and samples.
        steps: denoising steps.
        guidance: its scale.
        calibration_samples: trajectories that methods are calibrated on.
        selection_samples: trajectories that decide between found policies.
        prompts: whether those of calibration and selection are apart from those that are scored, if there are enough.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model: str
    model_sha256: str
    samples: int
    seed: int
    steps: int
    guidance: float
    calibration_samples: int
    selection_samples: int
    prompts: Literal["all", "apart"] = "all"


class Cell(BaseModel):
    """One method at one width on one model.

    Attributes:
        model: its name.
        method: name of the method.
        bits: weights/activations, a mean for searched policies.
        effective_weight_bits: bits per weight that a step uses, a mean over steps, with scales and 16-bit branches,
            weighted by parameters.
        resident_weight_bits: bits per weight that are stored: each distinct weight format of a layer once; None for
            cells of before it was told.
        activation_bits: mean over steps of bits per activation, weighted by multiply-accumulates; None likewise, and
            where nothing was calibrated.
        proposal: kind of the proposal that a search chose; None for other methods.
        mean_score: mean of `scores`; None for a model without a judge.
        scores: column → share of its samples that show what was asked for; for clips, the means of their scores.
        psnr_db: mean over samples against full precision; None for that itself.
        mean_error_psnr_db: PSNR of the mean squared error; None likewise, and for cells of before it was told.
        worst_psnr_db: 5 % quantile over samples; None likewise.
        samples: how many.
        seed: of calibration and samples.
        seconds: duration of the cell; depends on the machine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    method: str
    bits: str
    effective_weight_bits: float
    resident_weight_bits: float | None = None
    activation_bits: float | None = None
    proposal: str | None = None
    mean_score: float | None
    scores: dict[str, float]
    psnr_db: float | None
    mean_error_psnr_db: float | None = None
    worst_psnr_db: float | None = None
    samples: int
    seed: int
    seconds: float


@dataclass(frozen=True)
class Generated:
    """Result of one method on the batch.

    Attributes:
        latents: float32 [samples, *latent_shape].
        weight_bits: bits per weight that a step uses.
        resident_bits: bits per weight that are stored.
        activation_bits: mean over multiply-accumulates; None where nobody counted these.
        proposal: kind of the proposal that a search chose.
    """

    latents: Tensor
    weight_bits: float
    resident_bits: float
    activation_bits: float | None = None
    proposal: str | None = None


class Evaluation:
    """All methods on one model.

    Attributes:
        effort: settings that all cells share.
    """

    def __init__(self, folder: Path, effort: Effort, model: LoadedModel, progress: Reporter | None = None) -> None:
        """Begin or go on.

        Args:
            folder: of the model.
            effort: settings that all cells share.
            model: loaded.
            progress: who is told how it goes on.

        Raises:
            MismatchError: the folder holds cells of another effort.
        """
        self._folder, self.effort, self._model = folder, effort, model
        self._progress = progress or Reporter()
        file = folder / "evaluation.json"
        if file.is_file():
            before = read_json_model(file, Effort)
            if before != effort:
                differing = [name for name in Effort.model_fields if getattr(before, name) != getattr(effort, name)]
                name = differing[0]
                raise MismatchError(
                    f"'{folder}' holds cells with {name} {getattr(before, name)}, this evaluation has "
                    f"{getattr(effort, name)}; choose another --output or the same options"
                )
        write_json_model(file, effort)

    @cached_property
    def batch(self) -> Batch:
        """Prompts of the samples, and their judge."""
        return make_batch(self._model.adapter, self.effort.samples)

    def cell(self, method: Method, bits: str) -> Cell:
        """A cell, measured or found."""
        file = self._file(method.name, bits)
        if file.is_file():
            return read_json_model(file, Cell)
        log.info("%s: %s at %s", self.effort.model, method.name, bits)
        start = time.monotonic()
        generated = self._generate(method, bits)
        seconds = time.monotonic() - start
        images = self._model.adapter.decode(generated.latents)
        verdict = Verdict(np.zeros(len(images)), {}) if self.batch.judge is None else self.batch.judge(images)
        tensors = {"latents": generated.latents, "values": torch.from_numpy(verdict.values)}
        write_tensors(file.with_suffix(".safetensors"), tensors)
        cell = self._cell(method, bits, generated, verdict.scores, seconds)
        write_json_model(file, cell)
        return cell

    def has(self, method: Method, bits: str) -> bool:
        """Whether a cell was measured."""
        return self._file(method.name, bits).is_file()

    def run_of(self, method: Method, bits: str) -> Path:
        """The run directory that a searched method's cell has."""
        assert method.searched is not None, "only searches have one of their own"
        transform = f"-{method.transform}" if method.transform else ""
        flat = "" if method.weights is Weights.FISHER else "-flat"
        name = f"{method.searched[bits]}{transform}{flat}-beam{method.beam}-{bits.replace('/', '-')}"
        return self._folder / "runs" / name

    def outcomes(self, method: str, bits: str) -> tuple[np.ndarray, np.ndarray]:
        """The judge's value of each sample of a measured cell, and its PSNR in dB: float64 [samples] each."""
        tensors = self._tensors(method, bits)
        return tensors["values"].numpy(), psnr(self.images(method, bits), self.images(FULL_PRECISION, FULL_BITS))

    def images(self, method: str, bits: str) -> np.ndarray:
        """The pictures of a measured cell, float32 [samples, height, width, channels] in [0, 1]."""
        pictures: np.ndarray = self._model.adapter.decode(self._tensors(method, bits)["latents"]).numpy()
        return pictures

    def _tensors(self, method: str, bits: str) -> dict[str, Tensor]:
        return read_tensors(self._file(method, bits).with_suffix(".safetensors"))

    def _file(self, method: str, bits: str) -> Path:
        return self._folder / "cells" / f"{method}-{bits.replace('/', '-')}.json"

    def _cell(
        self, method: Method, bits: str, generated: Generated, scores: Mapping[str, float], seconds: float
    ) -> Cell:
        decibels = None if method.name == FULL_PRECISION else self.outcomes(method.name, bits)[1]
        return Cell(
            model=self.effort.model,
            method=method.name,
            bits=bits,
            effective_weight_bits=round(generated.weight_bits, 4),
            resident_weight_bits=round(generated.resident_bits, 4),
            activation_bits=generated.activation_bits,
            proposal=generated.proposal,
            mean_score=sum(scores.values()) / len(scores) if scores else None,
            scores=dict(scores),
            psnr_db=None if decibels is None else float(decibels.mean()),
            mean_error_psnr_db=None if decibels is None else psnr_of_mean(decibels),
            worst_psnr_db=None if decibels is None else worst_psnr(decibels),
            samples=self.effort.samples,
            seed=self.effort.seed,
            seconds=round(seconds, 1),
        )

    def _generate(self, method: Method, bits: str) -> Generated:
        if method.name == FULL_PRECISION:
            with self._context("base", method, "4/4", "w4a4") as context:
                return Generated(final_latents(context.evaluation(self.batch.prompts)), 16.0, 16.0)
        if method.peer is not None:
            return self._peer(method, method.peer, bits)
        if method.searched is not None:
            return self._searched(method, bits, method.searched[bits])
        return self._uniform(method, bits)

    def _peer(self, method: Method, peer: Peer, bits: str) -> Generated:
        """Another library's modules in a model of their own."""
        width, layers = require_bits(bits), self._model.adapter.quantizable_layers()
        rank = max(rank_of(linear.in_features, linear.out_features) for linear in layers.values())
        other = load_model(self.effort.model).adapter
        with self._context("base", method, bits, f"w{width[0]}a{width[1]}") as context:
            own = context.calibration
            calibration = Samples(other, own.schedule, own.guidance, own.prompts, own.seeds)
            with redirect_stdout(sys.stderr):  # modelopt prints, and standard output may be JSON
                apply_peer(peer, other.transformer, list(layers), width, rank, lambda: trajectory(calibration))
            asked = context.evaluation(self.batch.prompts)
            latents = final_latents(Samples(other, asked.schedule, asked.guidance, asked.prompts, asked.seeds))
            policy = _everywhere(context, context.formats[0])
            extra = sum(BRANCH_BITS * rank * (w.in_features + w.out_features) for w in layers.values())
            branch = extra / _parameters(context) if peer is Peer.SVDQUANT else 0.0
            bits_per_weight = policy.mean_weight_bits(_shapes(context)) + branch
            return Generated(latents, bits_per_weight, bits_per_weight)

    def _uniform(self, method: Method, bits: str) -> Generated:
        """One format everywhere."""
        weight_bits, activation_bits = require_bits(bits)
        with self._context("base", method, bits, f"w{weight_bits}a{activation_bits}") as context:
            calibrate.run(context)
            fmt = context.formats[0]
            store = _uniform_store(context, fmt, method)
            return self._simulate(context, store, _everywhere(context, fmt))

    def _searched(self, method: Method, bits: str, formats: str) -> Generated:
        """A policy of the search."""
        with self._context(self.run_of(method, bits).name, method, bits, formats) as context:
            self._adopt(calibrate.stage(context))
            calibrate.run(context)
            self._adopt(quantize.stage(context))
            result = read_json_model(run_stages(context, search.NAME).folder / search.RESULT, SearchResult)
            index: int | None = getattr(result, method.kind)
            assert index is not None, "every budget here has policies of both static kinds"
            point = result.points[index]
            policy = Policy.from_steps(
                self.effort.model, context.settings.weights_sha256, context.layers, point.formats
            )
            return replace(self._simulate(context, quantize.load(context), policy), proposal=point.kind)

    def _adopt(self, stage: Stage) -> None:
        """Take over what another method's run has done already."""
        for folder in sorted((self._folder / "runs").iterdir()):
            if folder != stage.directory.path and (folder / "run.json").is_file():
                stage.adopt(RunDirectory.existing(folder))

    def _simulate(self, context: Context, store: CandidateWeights, policy: Policy) -> Generated:
        with context.simulated(store).installed() as model:
            asked = context.evaluation(self.batch.prompts)
            latents = final_latents(asked, lambda step: model.assign(policy.formats_at(step), step))
        shapes = shapes_of(context)
        branches = sum(transform.bits for transform in store.transforms.values()) / _parameters(context)
        resident = 8 * resident_weight_bytes(policy, {shape.name: shape for shape in shapes}) / _parameters(context)
        return Generated(
            latents,
            policy.mean_weight_bits(shapes) + branches,
            resident + branches,
            policy.mean_activation_bits(shapes),
        )

    @contextmanager
    def _context(self, name: str, method: Method, bits: str, formats: str) -> Iterator[Context]:
        """A run of this model, in a run directory of its own."""
        effort, members = self.effort, resolve_formats(formats)
        width = require_bits(bits)
        settings = Settings(
            model=effort.model,
            weights_sha256=self._model.weights_sha256,
            model_sha256=effort.model_sha256,
            format_set=formats,
            formats=tuple(fmt.name for fmt in members),
            targets=(),
            simulate=True,
            steps=effort.steps,
            guidance=effort.guidance,
            budget_bits=sum(width) / 2,
            seed=effort.seed,
            calibration_samples=effort.calibration_samples,
            selection_samples=effort.selection_samples,
            held_out_samples=0,  # cells have samples of their own
            beam=method.beam,
            transform=method.transform if method.searched else None,
        )
        if method.searched and method.weights is not Weights.FISHER:
            settings = settings.model_copy(update={"temperature": _FLAT})
        with RunDirectory.open(self._folder / "runs" / name) as run:
            yield Context(run, settings, self._model, progress=self._progress)


def _everywhere(context: Context, fmt: Format) -> Policy:
    rows = [[fmt.name] * len(context.layers)] * context.settings.steps
    return Policy.from_steps(context.model.name, context.settings.weights_sha256, context.layers, rows)


def _uniform_store(context: Context, fmt: Format, method: Method) -> CandidateWeights:
    """A format's weights as the method makes them."""
    folder = calibrate.stage(context).folder
    transforms: dict[str, LayerTransform] = {}
    if method.transform is not None:
        latents = read_tensors(folder / calibrate.TRAJECTORY)["latents"]
        transforms = make_transforms(method.transform, measure_groups(context.calibration, latents))
    if method.weights is Weights.NEAREST:
        rounded = {
            name: transforms[name].rounded_weight(linear.weight.detach()) if transforms else linear.weight.detach()
            for name, linear in context.adapter.quantizable_layers().items()
        }
        weights = {name: quantize_nearest(weight, fmt) for name, weight in rounded.items()}
    else:
        file = calibrate.HESSIANS if method.weights is Weights.FISHER else calibrate.PLAIN_HESSIANS
        weights = quantize.solve(context, fmt, calibrate.load_hessians(context, file), transforms)
    return CandidateWeights({fmt.name: weights}, {}, transforms)


def _shapes(context: Context) -> tuple[LayerShape, ...]:
    """Bits of weights do not depend on the tokens."""
    return layer_shapes(context.adapter, dict.fromkeys(context.layers, 1))


def _parameters(context: Context) -> int:
    layers = context.adapter.quantizable_layers().values()
    return sum(linear.in_features * linear.out_features for linear in layers)
