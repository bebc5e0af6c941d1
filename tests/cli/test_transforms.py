"""Bundles with transforms, over targets, layouts and architectures: `check` passes, and catches what is wrong in them.

What is built are models of the zoo with one block of each kind and a given policy; only one has its plans compiled,
since `tests/export/test_transformed_layouts.py` compiles every transform.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto
from onnx.helper import make_node

from adatsq_trt import zoo
from adatsq_trt.engines.accuracy import CheckReport
from adatsq_trt.engines.bundle import BundleFiles, write_manifest
from adatsq_trt.engines.plan_weights import weight_of
from tests.cli.one_block import FLUX, WAN, Z_IMAGE, Source, build

MODEL = "one-block"
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
# A transform, a model, a target, a layout, the formats that take turns.
CASES = {
    "balance-low-rank": (FLUX, "sm120", "switch", ("nvfp4", "fp8")),
    "smooth": (Z_IMAGE, "sm89", "embedded", ("fp8", "fp8a16")),
    "hadamard": (WAN, "cpu", None, ("w8a8s", "w8a32")),
    "low-rank": (FLUX, "cpu", None, ("w8a8s", "fp32")),
    "balance": (Z_IMAGE, "sm120", "switch", ("nvfp4", "nvfp4a16")),
    "hadamard-low-rank": (FLUX, "sm90", "plugin", ("w4a8", "w8a8", "fp8")),
    "smooth in plugin nodes": (FLUX, "sm90", "plugin", ("w4a8", "w8a8")),
}


def make(folder: Path, name: str) -> Path:
    source, target, layout, formats = CASES[name]

    def rows(layers: Sequence[str]) -> list[Sequence[str]]:
        return [[formats[(step + place) % len(formats)] for place in range(len(layers))] for step in range(2)]

    return build(
        folder,
        MODEL,
        source,
        ",".join(formats),
        rows,
        target=target,
        layout=layout,
        transform=name.partition(" ")[0],
    )


@pytest.fixture(scope="module")
def balanced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("balanced"), "balance-low-rank")


@pytest.mark.parametrize("name", [name for name in CASES if name != "balance-low-rank"])
def test_graphs_compute_what_pytorch_computes(cli, tmp_path: Path, name: str) -> None:
    run = make(tmp_path, name)
    ended = cli("check", run, "--json")
    assert ended.code == 0, ended.out[-3000:]


def test_a_balanced_bundle_passes(cli, balanced: Path, tmp_path: Path) -> None:
    ended = cli("check", balanced, "--json", "--output", tmp_path)
    assert ended.code == 0, ended.out[-3000:]
