"""Opening bundles: what is accepted, and every way of being refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from adatsq_trt.engines.bundle import (
    MANIFEST_NAME,
    PROMPTS_NAME,
    REFERENCE_NAME,
    SCALES_NAME,
    BundleFiles,
    read_arrays,
    require_prompts,
    write_manifest,
)
from adatsq_trt.errors import DamagedFileError, MissingFileError, UserError


def edit_manifest(bundle: BundleFiles, **changes: object) -> None:
    path = bundle.folder / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_opens_the_bundle_and_the_run_that_holds_it(own_bundle: BundleFiles) -> None:
    assert BundleFiles.open(own_bundle.folder.parent).folder == own_bundle.folder
    assert BundleFiles.open(own_bundle.folder).policy == own_bundle.policy


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="build engine"):
        BundleFiles.open(tmp_path)


def test_altered_file_is_named_with_both_hashes(own_bundle: BundleFiles) -> None:
    path = own_bundle.folder / "onnx" / "weights.data"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(bytes(content))
    expected = own_bundle.manifest.files["onnx/weights.data"]
    with pytest.raises(DamagedFileError, match=rf"weights\.data.*got sha256 [0-9a-f]{{64}}, expected {expected}"):
        BundleFiles.open(own_bundle.folder)


def test_hashes_come_before_parsing(own_bundle: BundleFiles) -> None:
    (own_bundle.folder / "onnx" / "index.json").write_text("{}")
    with pytest.raises(DamagedFileError, match="sha256"):
        BundleFiles.open(own_bundle.folder)


def test_missing_file(own_bundle: BundleFiles) -> None:
    (own_bundle.folder / "onnx" / "assignment_001.cpu.onnx").unlink()
    with pytest.raises(MissingFileError, match="assignment_001"):
        BundleFiles.open(own_bundle.folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "onnx/../../outside", "a\\..\\b", ""])
def test_paths_that_lead_outside(own_bundle: BundleFiles, name: str) -> None:
    (own_bundle.folder.parent / "outside").write_text("x")
    edit_manifest(own_bundle, files={**own_bundle.manifest.files, name: "0" * 64})
    with pytest.raises(DamagedFileError, match="inside the bundle"):
        BundleFiles.open(own_bundle.folder)


def test_links_that_lead_outside(own_bundle: BundleFiles) -> None:
    outside = own_bundle.folder.parent / "outside"
    outside.write_text("x")
    (own_bundle.folder / "link").symlink_to(outside)
    edit_manifest(own_bundle, files={**own_bundle.manifest.files, "link": "0" * 64})
    with pytest.raises(DamagedFileError, match="inside the bundle"):
        BundleFiles.open(own_bundle.folder)


def test_graph_without_a_hash(own_bundle: BundleFiles) -> None:
    files = {k: v for k, v in own_bundle.manifest.files.items() if k != "onnx/assignment_000.cpu.onnx"}
    edit_manifest(own_bundle, files=files)
    with pytest.raises(DamagedFileError, match=r"assignment_000\.cpu\.onnx"):
        BundleFiles.open(own_bundle.folder)


def test_schedule_of_another_length(own_bundle: BundleFiles) -> None:
    record = own_bundle.manifest.schedule
    edit_manifest(own_bundle, schedule={**record.model_dump(), "timesteps": record.timesteps[:-1]})
    with pytest.raises(DamagedFileError, match="4 steps"):
        BundleFiles.open(own_bundle.folder)


MANIFESTS = {
    "a latent larger than memory": ({"latent_shape": [10**6, 10**6]}, "a latent of 1000000000000 elements, the most"),
    "a latent of no size": ({"latent_shape": [-1, 16]}, r"latent_shape\.0: got -1"),
    "a latent without a shape": ({"latent_shape": []}, "latent_shape"),
    "another image": ({"image": {"patches": 3, "channels": 4}}, "a latent has 64 elements, its image 144"),
    "no prompts": ({"prompts": 0}, "prompts: got 0"),
    "guidance": ({"guidance": float("nan")}, "guidance: got nan: Input should be a finite number"),
    "a comment's end": ({"model": 'x\nbackend: "evil"'}, r"model: got .*: expected up to 100 letters"),
    "a shell command": ({"versions": {"tensorrt-rtx": "1 && evil"}}, r"versions\.tensorrt-rtx: got '1 && evil'"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_fields_that_would_do_harm(own_bundle: BundleFiles, name: str) -> None:
    changes, message = MANIFESTS[name]
    edit_manifest(own_bundle, **changes)
    with pytest.raises(DamagedFileError, match=message):
        BundleFiles.open(own_bundle.folder)


def scale_of_no_layer(index: dict[str, Any]) -> None:
    index["graphs"][0]["scale_inputs"] = {"blocks.9": {"name": "scale", "dtype": "float", "shape": []}}


def no_inputs(index: dict[str, Any]) -> None:
    index["graphs"][0]["inputs"] = []


def two_outputs(index: dict[str, Any]) -> None:
    index["graphs"][0]["outputs"] *= 2


def another_assignment(index: dict[str, Any]) -> None:
    index["graphs"][0]["assignment"] = 3


def block_outside(index: dict[str, Any]) -> None:
    index["blocks"] = ["x/../../outside"]


def quoted_input(index: dict[str, Any]) -> None:
    index["graphs"][0]["inputs"][0]["name"] = 'x" } ] backend: "evil"'


def dimension_of_text(index: dict[str, Any]) -> None:
    index["graphs"][0]["inputs"][0]["shape"] = ["batch", "1 ] } ]"]


INDICES = {
    scale_of_no_layer: "has a scale of layer 'blocks.9', which the policy does not have",
    another_assignment: "has assignment 3, which the policy does not have",
    no_inputs: r"graphs\.0\.inputs",
    two_outputs: r"graphs\.0\.outputs",
    block_outside: r"blocks\.0: got 'x/\.\./\.\./outside': expected letters",
    quoted_input: r"graphs\.0\.inputs\.0\.name: got",
    dimension_of_text: r"graphs\.0\.inputs\.0\.shape\.1",
}


@pytest.mark.parametrize("damage", INDICES)
def test_an_index_that_does_not_hold_together(
    own_bundle: BundleFiles, damage: Callable[[dict[str, Any]], None]
) -> None:
    path = own_bundle.folder / "onnx" / "index.json"
    index = json.loads(path.read_text())
    damage(index)
    path.write_text(json.dumps(index))
    write_manifest(own_bundle.folder, own_bundle.manifest)
    with pytest.raises(DamagedFileError, match=INDICES[damage]):
        BundleFiles.open(own_bundle.folder)


@pytest.mark.parametrize("name", [SCALES_NAME, PROMPTS_NAME, REFERENCE_NAME])
def test_tensors_without_a_hash_are_not_read(own_bundle: BundleFiles, name: str) -> None:
    edit_manifest(own_bundle, files={k: v for k, v in own_bundle.manifest.files.items() if k != name})
    opened = BundleFiles.open(own_bundle.folder)
    read = {SCALES_NAME: lambda: opened.scales(0), PROMPTS_NAME: lambda: opened.prompts}.get(name)
    with pytest.raises(DamagedFileError, match=f"has no hash for '{name}', so it is not read"):
        read() if read is not None else opened.reference


def test_other_schema_version_and_truncated_manifest(own_bundle: BundleFiles) -> None:
    edit_manifest(own_bundle, schema_version=99)
    with pytest.raises(DamagedFileError, match="schema version 99"):
        BundleFiles.open(own_bundle.folder)
    path = own_bundle.folder / MANIFEST_NAME
    path.write_text(path.read_text()[:40])
    with pytest.raises(DamagedFileError, match="not complete JSON"):
        BundleFiles.open(own_bundle.folder)


def test_manifest_is_reproducible_and_ignores_leftovers(own_bundle: BundleFiles) -> None:
    before = (own_bundle.folder / MANIFEST_NAME).read_bytes()
    (own_bundle.folder / ".policy.json.1.part").write_text("interrupted")
    assert "policy.json" in write_manifest(own_bundle.folder, own_bundle.manifest).files
    assert (own_bundle.folder / MANIFEST_NAME).read_bytes() == before


def test_scales_are_those_of_the_step(tiny_bundle: BundleFiles) -> None:
    tables = read_arrays(tiny_bundle.folder / SCALES_NAME)
    assert tiny_bundle.scales(2) == {"blocks.1.linear.scale": tables["fp8"][2, 1]}
    assert tiny_bundle.scales(1) == {
        "blocks.0.linear.scale": tables["w8a8s"][1, 0],
        "blocks.1.linear.scale": tables["fp8"][1, 1],
    }
    assert all(value.dtype == np.float32 and value.shape == () for value in tiny_bundle.scales(1).values())


@pytest.mark.parametrize(
    "prompts",
    [np.zeros((2, 16), np.float32), np.full((3, 16), np.nan, np.float32), np.zeros((3, 16), np.int64), np.float32(0)],
)
def test_stored_prompts_must_be_what_the_manifest_says(own_bundle: BundleFiles, prompts: np.ndarray) -> None:
    save_file({"conditional.pooled": np.asarray(prompts)}, own_bundle.folder / PROMPTS_NAME)
    with pytest.raises(DamagedFileError, match=r"'conditional\.pooled': got .*, expected 3 rows of finite float32"):
        _ = own_bundle.prompts


@pytest.mark.parametrize("value", [np.nan, 0.0, -1.0, np.inf])
def test_a_needed_scale_must_be_positive(own_bundle: BundleFiles, value: float) -> None:
    tables = read_arrays(own_bundle.folder / SCALES_NAME)
    tables["fp8"][0, 0] = value
    save_file(tables, own_bundle.folder / SCALES_NAME)
    with pytest.raises(DamagedFileError, match=r"format 'fp8', step 0, layer 'blocks\.0\.linear'"):
        own_bundle.scales(0)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E8M0"])
def test_types_that_numpy_lacks(tmp_path: Path, kind: str) -> None:
    header = json.dumps({"a": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(DamagedFileError, match="not a complete safetensors"):
        read_arrays(tmp_path / "a.safetensors")


def test_truncated_tensors(own_bundle: BundleFiles) -> None:
    path = own_bundle.folder / SCALES_NAME
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DamagedFileError, match="not a complete safetensors"):
        own_bundle.scales(0)


def test_prompts_must_exist(tiny_bundle: BundleFiles) -> None:
    require_prompts(tiny_bundle, [0, 2])
    with pytest.raises(UserError, match="prompts 0 to 2"):
        require_prompts(tiny_bundle, [3])
