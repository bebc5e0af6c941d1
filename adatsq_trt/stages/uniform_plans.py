"""Plans of a bundle's model in one format everywhere, to compare its policy with.

They are made when they are first compared with: the exporter takes the policy out of the bundle's graphs, puts one
format in and rounds the model's weights to it, and the compiler of the bundle builds for the card that is there. What
was built is kept beside the bundle, or in the user's cache folder. They are to be timed: no scale is calibrated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from adatsq_trt.engines.backends.base import BatchRange
from adatsq_trt.engines.backends.rtx_steps import cache_folder
from adatsq_trt.engines.backends.selection import BackendChoice
from adatsq_trt.engines.benchmark import machine
from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.bundle import (
    GRAPH_FOLDER,
    MANIFEST_NAME,
    POLICY_NAME,
    PROMPTS_NAME,
    SCALES_NAME,
    BundleFiles,
    write_manifest,
)
from adatsq_trt.errors import UserError
from adatsq_trt.export import export_graphs
from adatsq_trt.export.remove_qdq import read_template, read_weights
from adatsq_trt.files import sha256, write_tensors
from adatsq_trt.formats import FORMATS, PLUGIN_LAYOUT, TARGETS, Format
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import QuantizedWeight, quantize_nearest
from adatsq_trt.stages.layer_times import compiler_of, linear_schedule, suits

LOGGER = logging.getLogger(__name__)
UNIFORM_FOLDER = "uniform-plans"
_SCALE = 1 / 64


def uniform_bundle(files: BundleFiles, choice: BackendChoice, rows: int) -> BundleFiles | None:
    """A bundle of the same model whose step i has the i-th of the policy's formats in all layers.

    Args:
        files: the bundle.
        choice: what runs it; plans.
        rows: of a call, samples times guidance branches.

    Returns:
        None where nothing is left to build, or cannot be: the log says why.

    Raises:
        AdatsqError: the compiler refuses a graph.
        OutputError: there is no room for the files.
    """
    manifest = files.manifest
    reasons = {
        "of several sizes": bool(manifest.shapes),
        "of two transformers": len(files.experts) > 1,
        f"of layout {PLUGIN_LAYOUT}": manifest.layout == PLUGIN_LAYOUT,
        "with 16-bit branches": bool(files.index.branches) or manifest.lora_slots is not None,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        LOGGER.info("'%s': no plans in one format beside those of a bundle %s", files.folder, found[0])
        return None
    weights = read_weights(files.graph_path(files.graph("reference", None)), files.policy.layers)
    formats = _formats(files, choice.plans[0].target, weights)
    if not formats:
        return None
    folder = _folder(files, choice, rows, formats)
    if (known := _opened(folder)) is not None:
        return known
    LOGGER.info("building plans in one format each: %s", ", ".join(fmt.name for fmt in formats))
    shutil.rmtree(folder, ignore_errors=True)
    return _build(files, choice, rows, formats, weights, folder)


def _formats(files: BundleFiles, target: str, weights: Mapping[str, ir.TensorProtocol]) -> list[Format]:
    """The policy's formats that all layers can have, but for those that an assignment has everywhere already."""
    manifest, widths = files.manifest, {int(weight.shape.numpy()[1]) for weight in weights.values()}
    there = {row[0] for row in files.policy.assignments if len(set(row)) == 1}
    names = TARGETS[target].accelerated(manifest.layout, manifest.backend).intersection(manifest.formats) - there
    return [FORMATS[name] for name in sorted(names) if all(suits(manifest, FORMATS[name], width) for width in widths)]


def _folder(files: BundleFiles, choice: BackendChoice, rows: int, formats: list[Format]) -> Path:
    """Of the plans, which depend on all of this."""
    here = machine(choice.name)
    key = json.dumps(
        [sha256(files.folder / MANIFEST_NAME), here.gpu, here.versions, rows, [fmt.name for fmt in formats]]
    )
    return cache_folder(files, UNIFORM_FOLDER) / hashlib.sha256(key.encode()).hexdigest()[:16] / "bundle"


def _opened(folder: Path) -> BundleFiles | None:
    """Open the bundle of an earlier comparison, if it is whole."""
    try:
        known = BundleFiles.open(folder)
    except UserError:
        return None
    return known if known.manifest.plans else None


def _build(
    files: BundleFiles,
    choice: BackendChoice,
    rows: int,
    formats: list[Format],
    weights: Mapping[str, ir.TensorProtocol],
    folder: Path,
) -> BundleFiles:
    manifest, layers, steps = files.manifest, files.policy.layers, len(formats)
    policy = Policy.from_steps(manifest.model, "0" * 64, list(layers), [[fmt.name] * len(layers) for fmt in formats])
    template = read_template(files.graph_path(files.graph("target", 0)), weights, manifest.base_type)
    rounded = {fmt.name: _Rounded(weights, fmt) for fmt in formats}
    graphs, variants = folder / GRAPH_FOLDER, ("target", "cpu")
    index = export_graphs(template, policy, rounded, graphs, files.index.base_type, files.index.blocks, variants)
    policy.save(folder / POLICY_NAME)
    scaled = [fmt.name for fmt in formats if fmt.scaled_activation]
    write_tensors(folder / SCALES_NAME, {name: torch.full((steps, len(layers)), _SCALE) for name in scaled})
    shutil.copyfile(files.file(PROMPTS_NAME), folder / PROMPTS_NAME)
    targets, batch = [TARGETS[choice.plans[0].target]], BatchRange(1, rows, rows)
    plans = build_plans(folder, index, targets, batch, compiler=compiler_of(files), layout=manifest.layout)
    changes = {"schedule": linear_schedule(steps), "plans": plans, "call": None}
    write_manifest(folder, manifest.model_copy(update=changes))
    return BundleFiles.open(folder)


class _Rounded(Mapping[str, QuantizedWeight]):
    """Module path → weight to the nearest points of a format, made when it is asked for."""

    def __init__(self, weights: Mapping[str, ir.TensorProtocol], fmt: Format) -> None:
        self._weights, self._format = weights, fmt

    def __getitem__(self, layer: str) -> QuantizedWeight:
        return quantize_nearest(torch.from_numpy(self._weights[layer].numpy().astype(np.float32)), self._format)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
