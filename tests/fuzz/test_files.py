"""Damaged and hostile files: each is read as what it is or refused with a sentence, and nothing else happens."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from safetensors.numpy import save

from adatsq_trt.engines.accuracy import CheckReport, bisect, check
from adatsq_trt.engines.bundle import (
    MANIFEST_NAME,
    PROMPTS_NAME,
    REFERENCE_NAME,
    BundleFiles,
    Manifest,
    read_arrays,
    write_manifest,
)
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.sizes import size_report
from adatsq_trt.errors import UserError
from adatsq_trt.files import parse_json_model, read_tensors, write_tensors
from adatsq_trt.graph_index import GraphIndex
from adatsq_trt.policy import Policy
from adatsq_trt.report.summary import Summary
from adatsq_trt.stages.run_directory import StageRecord
from tests.engines.conftest import make_bundle
from tests.fuzz.conftest import FUZZ
from tests.report.test_summary import example

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("../../etc/passwd"),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)


@st.composite
def mutated_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut off, overwritten, or with something put in."""
    place = draw(st.integers(0, len(content)))
    noise = draw(st.binary(max_size=16))
    skipped = draw(st.sampled_from((0, len(noise), len(content))))
    return content[:place] + noise + content[place + skipped :]


@st.composite
def mutated_json(draw: st.DrawFn, content: str) -> str:
    """The same document with one value replaced, removed or added, somewhere."""
    root: Any = [json.loads(content)]
    parent, key = root, 0
    while draw(st.booleans()) and isinstance(parent[key], dict | list) and parent[key]:
        parent = parent[key]
        key = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
    if draw(st.booleans()):
        parent[key] = draw(JSON)
    elif isinstance(parent, dict):
        parent[draw(st.text(max_size=8))] = parent.pop(key)
    return json.dumps(root[0])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> BundleFiles:
    return make_bundle(tmp_path_factory.mktemp("fuzz") / "bundle")


@pytest.fixture(scope="module")
def documents(bundle: BundleFiles, tmp_path_factory: pytest.TempPathFactory) -> Mapping[type[BaseModel], str]:
    """A sound document of each kind."""
    stage = StageRecord(name="search", key="0" * 64, complete=True, seconds=1.5, peak_bytes=1, outputs={"a": "b"})
    report = check(bundle, tmp_path_factory.mktemp("check"))
    short = report.model_copy(update={"rows": report.rows[:2]})
    models = (bundle.policy, bundle.manifest, bundle.index, example(), stage, short)
    return {type(model): model.model_dump_json(indent=2) for model in models}


@pytest.mark.parametrize("kind", [Policy, Manifest, GraphIndex, Summary, StageRecord, CheckReport])
def test_documents(go_on: Callable, documents: Mapping[type[BaseModel], str], kind: type[BaseModel]) -> None:
    content = documents[kind]

    @FUZZ
    @given(mutated_json(content) | mutated_bytes(content.encode()).map(lambda b: b.decode(errors="replace")))
    def one_round(text: str) -> None:
        try:
            model = parse_json_model(text, "file", kind)
        except UserError:
            return
        assert parse_json_model(model.model_dump_json(), "file", kind) == model

    go_on(one_round)


def test_safetensors(go_on: Callable, tmp_path: Path) -> None:
    file, copy = tmp_path / "sound.safetensors", tmp_path / "mutated.safetensors"
    write_tensors(file, {"scales": torch.arange(6.0).reshape(2, 3), "codes": torch.arange(8, dtype=torch.uint8)})
    content = file.read_bytes()
    header = int.from_bytes(content[:8], "little")

    @st.composite
    def mutated_header(draw: st.DrawFn) -> bytes:
        text = draw(mutated_json(content[8 : 8 + header].decode())).encode()
        length = draw(st.sampled_from((len(text), 0, 2**63, 2**64 - 1, header)))
        return length.to_bytes(8, "little") + text + content[8 + header :]

    @FUZZ
    @given(mutated_bytes(content) | mutated_header())
    def one_round(mutated: bytes) -> None:
        copy.write_bytes(mutated)
        for read in (read_tensors, read_arrays):
            try:
                tensors = read(copy)
            except UserError:
                continue
            # Whatever is taken for whole lies in the file.
            assert sum(value.nbytes for value in tensors.values()) <= len(mutated)

    go_on(one_round)


def test_bundles(go_on: Callable, bundle: BundleFiles) -> None:
    """With a manifest that knows nothing of the change, and with one that vouches for it."""
    names = [MANIFEST_NAME, "policy.json", "onnx/index.json", PROMPTS_NAME, "activation_scales.safetensors"]
    sound = {name: (bundle.folder / name).read_bytes() for name in (*names, "onnx/weights.data")}

    @st.composite
    def damage(draw: st.DrawFn) -> tuple[str, bytes]:
        name = draw(st.sampled_from(list(sound)))
        parts = mutated_bytes(sound[name])
        if name.endswith(".json"):
            parts |= mutated_json(sound[name].decode()).map(str.encode)
        return name, draw(parts)

    @FUZZ
    @given(damage(), st.booleans())
    def one_round(damaged: tuple[str, bytes], vouched: bool) -> None:
        name, content = damaged
        try:
            (bundle.folder / name).write_bytes(content)
            if vouched and name != MANIFEST_NAME:
                write_manifest(bundle.folder, bundle.manifest)
            use(bundle.folder)
            assert vouched or name == MANIFEST_NAME or content == sound[name]
        except UserError:
            pass
        finally:
            for path, original in sound.items():
                (bundle.folder / path).write_bytes(original)

    go_on(one_round)


def test_checks_of_damaged_bundles(go_on: Callable, bundle: BundleFiles, tmp_path: Path) -> None:
    """Graphs, their weights and PyTorch's arrays, damaged under a manifest that vouches for them."""
    graphs = sorted(path.relative_to(bundle.folder).as_posix() for path in (bundle.folder / "onnx").glob("*.onnx"))
    sound = {name: (bundle.folder / name).read_bytes() for name in (*graphs, "onnx/weights.data", REFERENCE_NAME)}
    arrays = read_arrays(bundle.folder / REFERENCE_NAME)

    @st.composite
    def damaged_arrays(draw: st.DrawFn) -> bytes:
        name = draw(st.sampled_from(sorted(arrays)))
        value = arrays[name]
        others = [value[:0], value[:1], value.reshape(-1), value[None], np.full_like(value, draw(st.integers(-1, 9)))]
        if np.issubdtype(value.dtype, np.floating):
            others.append(np.full_like(value, np.nan))
        return save({**arrays, name: np.ascontiguousarray(draw(st.sampled_from(others)))})

    @st.composite
    def damage(draw: st.DrawFn) -> tuple[str, bytes]:
        name = draw(st.sampled_from(list(sound)))
        return name, draw(damaged_arrays() if name == REFERENCE_NAME else mutated_bytes(sound[name]))

    @settings(FUZZ, max_examples=FUZZ.max_examples // 4)
    @given(damage())
    def one_round(damaged: tuple[str, bytes]) -> None:
        name, content = damaged
        before = {path.name for path in tmp_path.parent.iterdir()}
        try:
            (bundle.folder / name).write_bytes(content)
            write_manifest(bundle.folder, bundle.manifest)
            report = check(BundleFiles.open(bundle.folder), tmp_path / "check")
            assert {row.step for row in report.rows} == set(range(bundle.policy.steps))
            bisect(bundle, report, tmp_path / "check")
        except UserError:
            pass
        finally:
            (bundle.folder / name).write_bytes(sound[name])
        assert {path.name for path in tmp_path.parent.iterdir()} == before

    go_on(one_round)


def use(folder: Path) -> None:
    """Open a bundle and look at everything in it."""
    opened = BundleFiles.open(folder)
    for step in range(opened.policy.steps):
        graph = opened.graph("cpu", opened.policy.step_assignments[step])
        assert opened.graph_path(graph).resolve().is_relative_to(folder.resolve())
        opened.scales(step)
    bundle = Bundle(opened)
    conditioning = bundle.conditioning([0, opened.manifest.prompts - 1])
    inputs = bundle.step_inputs(0, bundle.noise([0, 1]), conditioning, opened.manifest.guidance)
    assert bundle.decode(inputs[bundle.latent_input]).ndim == 4
    size_report(opened)
