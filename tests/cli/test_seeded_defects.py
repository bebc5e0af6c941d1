"""Every seeded defect is caught by `adatsq-trt check`, and `--bisect` names the place. docs/checking.md has the table.

The model is digits-flux cut down to one block of each kind, the policy is given: steps 0 and 1 mostly in nvfp4, step 2
in fp8. A defect is written into the files and the manifest is made anew, as if the exporter had been wrong.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from adatsq_trt import zoo
from adatsq_trt.engines.accuracy import CheckReport
from adatsq_trt.engines.bundle import SCALES_NAME, BundleFiles, write_manifest
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.policy import Policy
from tests.one_block import FLUX, build

MODEL = "one-block"
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
SPECIAL = {f"{SINGLE}.attn.to_q": "fp8", f"{SINGLE}.proj_out": "int4wo"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, built once."""

    def rows(layers: Sequence[str]) -> list[Sequence[str]]:
        early = [SPECIAL.get(layer, "nvfp4") for layer in layers]
        return [early, early, ["fp8"] * len(layers)]

    return build(tmp_path_factory.mktemp("defects"), MODEL, FLUX, "nvfp4,fp8,int4wo,bf16", rows)


@dataclass(frozen=True)
class Defect:
    """Something wrong with a bundle.

    Attributes:
        seed: writes it into the bundle's files.
        named: variant, step and layer that `--bisect` has to name.
    """

    seed: Callable[[BundleFiles], None]
    named: set[tuple[str, int, str]]


def change(variant: str, assignment: int, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable:
    """Edit an initializer's bytes, in the graph or in the weight file."""

    def seed(bundle: BundleFiles) -> None:
        path = bundle.graph_path(bundle.graph(variant, assignment))
        model = onnx.load(path, load_external_data=False)
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        if not tensor.external_data:
            tensor.raw_data = edit(np.frombuffer(tensor.raw_data, np.uint8)).tobytes()
            path.write_bytes(model.SerializeToString())
            return
        place = {entry.key: entry.value for entry in tensor.external_data}
        start, length = int(place["offset"]), int(place["length"])
        file = path.with_name(place["location"])
        content = bytearray(file.read_bytes())
        content[start : start + length] = edit(
            np.frombuffer(bytes(content[start : start + length]), np.uint8)
        ).tobytes()
        file.write_bytes(bytes(content))

    return seed


def double(content: np.ndarray) -> np.ndarray:
    return (content.view(np.float32) * 2).view(np.uint8)


def swap_nibbles(codes: np.ndarray) -> np.ndarray:
    return (codes >> 4) | (codes << 4)


def transpose(codes: np.ndarray) -> np.ndarray:
    side = int(len(codes) ** 0.5)
    return codes.reshape(side, side).T.copy()


def zero(content: np.ndarray) -> np.ndarray:
    return np.zeros_like(content)


def exchange(variant: str) -> Callable[[BundleFiles], None]:
    """The graphs of the two buckets."""

    def seed(bundle: BundleFiles) -> None:
        first, second = (bundle.graph_path(bundle.graph(variant, i)) for i in (0, 1))
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)

    return seed


def scale_activation(format_name: str, step: int, layer: str, factor: float) -> Callable[[BundleFiles], None]:
    def seed(bundle: BundleFiles) -> None:
        tables = read_tensors(bundle.folder / SCALES_NAME)
        tables[format_name][step, bundle.policy.layers.index(layer)] *= factor
        write_tensors(bundle.folder / SCALES_NAME, tables)

    return seed


FIRST_LAYER = f"{DOUBLE}.attn.to_q"
DEFECTS = {
    "weight scale x 2": Defect(
        change("cpu", 0, f"{DOUBLE}.ff.net.2.weight_global_scale", double), {("cpu", 0, f"{DOUBLE}.ff.net.2")}
    ),
    "weight scale x 2, target only": Defect(
        change("target", 0, f"{DOUBLE}.attn.to_k.weight_global_scale", double),
        {("target", 0, f"{DOUBLE}.attn.to_k")},
    ),
    "activation scale / 2": Defect(
        scale_activation("fp8", 2, f"{SINGLE}.proj_out", 0.5), {("cpu", 2, f"{SINGLE}.proj_out")}
    ),
    "activation scale / 2, later step of a bucket": Defect(
        scale_activation("nvfp4", 1, f"{DOUBLE}.attn.to_v", 0.5), {("cpu", 1, f"{DOUBLE}.attn.to_v")}
    ),
    "swapped nibbles, nvfp4": Defect(
        change("cpu", 0, f"{DOUBLE}.attn.to_v.weight", swap_nibbles), {("cpu", 0, f"{DOUBLE}.attn.to_v")}
    ),
    "swapped nibbles, int4wo": Defect(
        change("cpu", 0, f"{SINGLE}.proj_out.weight", swap_nibbles), {("cpu", 0, f"{SINGLE}.proj_out")}
    ),
    "transposed weight": Defect(
        change("cpu", 0, f"{SINGLE}.attn.to_q.weight", transpose), {("cpu", 0, f"{SINGLE}.attn.to_q")}
    ),
    "exchanged cpu graphs": Defect(exchange("cpu"), {("cpu", 0, FIRST_LAYER), ("cpu", 2, FIRST_LAYER)}),
    "exchanged target graphs": Defect(exchange("target"), {("target", 0, FIRST_LAYER), ("target", 2, FIRST_LAYER)}),
    "dropped bias": Defect(change("cpu", 1, f"{SINGLE}.attn.to_k.bias", zero), {("cpu", 2, f"{SINGLE}.attn.to_k")}),
    "dropped bias, target only": Defect(
        change("target", 1, f"{DOUBLE}.ff.net.2.bias", zero), {("target", 2, f"{DOUBLE}.ff.net.2")}
    ),
}


def test_without_a_defect_the_check_passes(cli, small: Path, tmp_path: Path) -> None:
    ended = cli("check", small, "--json", "--output", tmp_path)
    assert ended.code == 0, ended.err
    report = CheckReport.model_validate_json(ended.out)
    assert len({row.layer for row in report.rows} - {None}) == len(Policy.load(small / "policy.json").layers)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_caught_and_named(cli, small: Path, tmp_path: Path, name: str, monkeypatch) -> None:
    monkeypatch.setattr(zoo, "ZOO_FOLDER", small.parent / "zoo")
    run = Path(shutil.copytree(small, tmp_path / "run"))
    bundle, defect = BundleFiles.open(run), DEFECTS[name]
    defect.seed(bundle)
    write_manifest(bundle.folder, bundle.manifest)
    ended = cli("check", run, "--bisect", "--json")
    assert ended.code == 1
    assert ended.out, ended.err
    report = CheckReport.model_validate_json(ended.out)
    assert {(layer.variant, layer.step, layer.layer) for layer in report.first_layers} >= defect.named
