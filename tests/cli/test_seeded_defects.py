"""Every seeded defect is caught by `adatsq-trt check`, and `--bisect` names the place. docs/checking.md has the table.

The model is digits-flux cut down to one block of each kind, the policy is given: steps 0 and 1 mostly in nvfp4, step 2
in fp8. A defect is written into the files and the manifest is made anew, as if the exporter had been wrong.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

import adatsq_trt
from adatsq_trt import zoo
from adatsq_trt.engines.accuracy import CheckReport
from adatsq_trt.engines.bundle import SCALES_NAME, BundleFiles, write_manifest
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.policy import Policy

MODEL = "one-block"
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
SPECIAL = {f"{SINGLE}.attn.to_q": "fp8", f"{SINGLE}.proj_out": "int4wo"}


def write_model(folder: Path) -> None:
    """digits-flux without its later blocks."""
    shutil.copytree(zoo.find_model("digits-flux"), folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 1, "num_single_layers": 1}))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    kept = {
        name: value
        for name, value in read_tensors(weights).items()
        if "transformer_blocks" not in name or name.startswith((f"{DOUBLE}.", f"{SINGLE}."))
    }
    write_tensors(weights, kept)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, built once."""
    from adatsq_trt.stages import bundle as bundle_stage
    from adatsq_trt.zoo.loading import load_model

    base = tmp_path_factory.mktemp("defects")
    with pytest.MonkeyPatch.context() as patch:
        write_model(base / "zoo" / MODEL)
        patch.setattr(zoo, "ZOO_FOLDER", base / "zoo")
        model = load_model(MODEL)
        layers = tuple(model.adapter.quantizable_layers())
        early = tuple(SPECIAL.get(layer, "nvfp4") for layer in layers)
        rows = [early, early, ("fp8",) * len(layers)]
        Policy.from_steps(MODEL, model.weights_sha256, layers, rows).save(base / "policy.json")
        patch.setattr(bundle_stage, "_plans", lambda *_: ())  # the check runs none
        adatsq_trt.build(
            MODEL,
            target="sm120",
            output=base / "run",
            formats="nvfp4,fp8,int4wo,bf16",
            budget_bits=16,
            policy=base / "policy.json",
            steps=3,
            calibration_samples=2,
            selection_samples=1,
            held_out_samples=1,
        )
    return base / "run"


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
