"""Results of the verbs: objects over the files of a run directory, with the figures of `summary.json`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import Field

from adatsq_trt.engines import runtime
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.errors import OutputError
from adatsq_trt.files import read_json_model, read_tensors
from adatsq_trt.formats import format_named
from adatsq_trt.graph_index import INDEX_NAME, GraphFile, GraphIndex
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import dequantize_weight
from adatsq_trt.report.summary import StageFigures, Summary
from adatsq_trt.search.select import SearchResult
from adatsq_trt.settings import Settings
from adatsq_trt.stages import calibrate, export, quantize
from adatsq_trt.stages.summary import SUMMARY_NAME

if TYPE_CHECKING:
    from torch import Tensor

    from adatsq_trt.engines.backends.selection import BackendName, Offload
    from adatsq_trt.engines.transformer import AdatsqTransformer
    from adatsq_trt.models.format_store import CandidateWeights
    from adatsq_trt.stages.lora_slots import LoadedLora


@dataclass(frozen=True)
class Run:
    """A run directory, up to some stage.

    Attributes:
        folder: folder of its files; a temporary one goes with the last object that knows it.
        settings: those of the run, defaults filled in.
        layers: module paths of the quantizable layers.
        figures: stage → seconds and peak memory.
    """

    folder: Path
    settings: Settings
    layers: tuple[str, ...]
    figures: Mapping[str, StageFigures]
    _temporary: TemporaryDirectory[str] | None = field(default=None, repr=False, compare=False)

    def save(self, folder: Path | str) -> Path:
        """Copy the run directory, such as a temporary one that is to stay.

        Raises:
            OutputError: the folder exists already.
        """
        return _copy(self.folder, Path(folder))


@dataclass(frozen=True)
class Calibration(Run):
    """Measurements on full-precision trajectories."""

    @cached_property
    def _statistics(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / calibrate.NAME / calibrate.STATISTICS)

    @property
    def information(self) -> np.ndarray:
        """Fisher information of every step and layer, float32 [steps, layers]."""
        return np.asarray(self._statistics["information"])

    @property
    def temporal_weights(self) -> np.ndarray:
        """Weight of every step in a layer's Hessian, float32 [steps, layers]."""
        return np.asarray(self._statistics["alpha"])

    @property
    def largest_inputs(self) -> np.ndarray:
        """Largest magnitude of a layer's inputs at every step, float32 [steps, layers]."""
        return np.asarray(self._statistics["largest"])

    @property
    def latents(self) -> np.ndarray:
        """The trajectories, float32 [steps + 1, samples, *latent_shape]."""
        return np.asarray(read_tensors(self.folder / calibrate.NAME / calibrate.TRAJECTORY)["latents"])


@dataclass(frozen=True)
class QuantizedWeights(Run):
    """Every layer in every candidate format."""

    @cached_property
    def _store(self) -> CandidateWeights:
        from adatsq_trt.models.format_store import load_store

        return load_store(self.folder / quantize.NAME, self.settings.formats, self.layers)

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the candidates, cheapest first."""
        return self.settings.formats

    def weight(self, layer: str, format_name: str) -> Tensor:
        """Dequantize the weight that a layer has in a format: float32 [N, K].

        Raises:
            UnknownNameError: no such format.
            KeyError: no such layer, or a format that is no candidate.
        """
        fmt = format_named(format_name)
        return dequantize_weight(self._store.weights[fmt.name][layer], fmt)


class SearchedPolicy(Policy):
    """A policy with the figures of its search, which are not written to its file.

    Attributes:
        result: all policies that were judged; `result.points[result.chosen]` is this one.
        run: the run directory.
    """

    result: SearchResult = Field(exclude=True)
    run: Any = Field(exclude=True, repr=False)

    @property
    def error(self) -> float | None:
        """Latent MSE against full precision on held-out samples."""
        return self.result.points[self.result.chosen].held_out_error

    @property
    def uniform_errors(self) -> dict[str, float | None]:
        """Format → the same for that format everywhere."""
        return {point.name: point.held_out_error for point in self.result.points if point.kind == "uniform"}


@dataclass(frozen=True)
class ExportedGraphs(Run):
    """ONNX graphs of every assignment, over one weight file."""

    @property
    def path(self) -> Path:
        """The folder of the graphs."""
        return self.folder / export.NAME / export.GRAPHS

    @cached_property
    def index(self) -> GraphIndex:
        """Which graphs there are."""
        return read_json_model(self.path / INDEX_NAME, GraphIndex)

    def graph(self, variant: str, assignment: int | None) -> tuple[Path, GraphFile]:
        """A graph's file and its inputs and outputs.

        Raises:
            KeyError: there is none.
        """
        found = self.index.find(variant, assignment)
        return self.path / found.path, found


class Bundle(runtime.Bundle):
    """A bundle that is ready to run, with the figures of the build where it lies in its run directory.

    Attributes:
        files: the opened bundle's files and records.
        summary: the figures; None for a bundle alone.
    """

    def __init__(self, files: BundleFiles, backend: BackendName = "auto", offload: Offload = "none") -> None:
        """Wrap files; see `adatsq_trt.load` and `adatsq_trt.build`."""
        super().__init__(files, backend, offload)
        file = files.folder.parent / SUMMARY_NAME
        self.summary: Summary | None = read_json_model(file, Summary) if file.is_file() else None
        self._temporary: TemporaryDirectory[str] | None = None

    @classmethod
    def built(cls, folder: Path, temporary: TemporaryDirectory[str] | None) -> Self:
        """The bundle of a build that has just ended, whose files need not be compared with their hashes."""
        bundle = cls(BundleFiles.open(folder, verify=False))
        bundle._temporary = temporary
        return bundle

    @property
    def path(self) -> Path:
        """The folder."""
        return self.files.folder

    def transformer(self) -> AdatsqTransformer:
        """Make the module that takes the transformer's place in an unmodified diffusers pipeline.

        Raises:
            MismatchError: a model that no supported pipeline has.
        """
        from adatsq_trt.engines.transformer import AdatsqTransformer

        return AdatsqTransformer.from_bundle(self)

    def transformers(self) -> tuple[AdatsqTransformer, ...]:
        """Make those that take the places of all transformers of a pipeline: pipe.transformer, pipe.transformer_2.

        Raises:
            MismatchError: as `transformer`.
        """
        from adatsq_trt.engines.transformer import AdatsqTransformer

        return AdatsqTransformer.experts_from_bundle(self)

    def load_lora(self, file: Path | str, scale: float = 1.0, partial: bool = False) -> LoadedLora:
        """Put a LoRA into the slots of a bundle that was built with `lora_slots`, beside those that are loaded.

        It counts from the next call on, also in the transformers that were made of this bundle. Quantized weights stay
        as they are; `unload_lora` takes all LoRAs out again.

        Args:
            file: in safetensors, in any of the dialects that a build fuses.
            scale: factor of its changes.
            partial: apply what has a slot, and drop the rest; otherwise such a file is refused.

        Returns:
            Which of the file's tensors are applied, and to which layers.

        Raises:
            MismatchError: no slots, or ranks that add up to more than theirs; a file of another model, or one that
                matches in part.
            DamagedFileError: the file holds something that is no LoRA.
            MissingFileError: there is none.
            UserError: the scale is not finite; the bundle is closed.
        """
        from adatsq_trt.checkpoints.lora import parse_lora
        from adatsq_trt.stages.lora_slots import load_lora

        _ = self.lora_slots  # refused here if there are none
        return load_lora(self, parse_lora(f"{Path(file).absolute()}:{float(scale)!r}"), partial)

    def save(self, folder: Path | str) -> Path:
        """Copy the bundle, such as one in a temporary run directory.

        Raises:
            OutputError: the folder exists already.
        """
        return _copy(self.path, Path(folder))


def _copy(source: Path, folder: Path) -> Path:
    if folder.exists():
        raise OutputError(f"'{folder}' exists already; choose a new folder")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".lock"))
    return folder
