"""Stage `refine`: an interrupted one goes on, the better weights are kept, and the export takes them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adatsq_trt.calibration.trajectory import trajectory
from adatsq_trt.config import BuildConfig
from adatsq_trt.errors import UserError
from adatsq_trt.files import read_json_model, read_tensors, write_json_model
from adatsq_trt.graph_index import WEIGHTS_NAME
from adatsq_trt.models.format_store import CandidateWeights, save_weights
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.policy import Policy
from adatsq_trt.progress import Reporter
from adatsq_trt.stages import export, quantize, refine, search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.graph import Build
from adatsq_trt.stages.prepare import prepare

ASKED: dict[str, Any] = {
    **{"simulate": True, "formats": "w4a3,w4a4,w4a5", "steps": 2, "beam": 1, "candidates": 1, "refine": True},
    **{"calibration_samples": 4, "selection_samples": 4, "held_out_samples": 4},
}


def codes(store: CandidateWeights, name: str) -> bytes:
    return b"".join(weight.codes.numpy().tobytes() for weight in store.weights[name].values())


def quantized_loop(context: Context, store: CandidateWeights, policy: Policy) -> torch.Tensor:
    samples = context.calibration.part(slice(0, export.CHECK_SAMPLES))
    with SimulatedModel(context.adapter, store).installed() as model:
        return trajectory(samples, lambda step: model.assign(policy.formats_at(step), step))


def test_an_interrupted_stage_goes_on_and_the_export_takes_the_better_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = list[Path]()

    def save_two(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        save_weights(path, *rest)

    def run(folder: Path, last: str) -> Build:
        with prepare("digits-flux", BuildConfig(**ASKED), last).run(folder, Reporter()) as build:
            build.run(last)
        return build

    with monkeypatch.context() as patch:
        patch.setattr(refine, "save_weights", save_two)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "refine")
    first = written[0].stat().st_ino
    context = run(tmp_path, "refine").loaded
    assert written[0].stat().st_ino == first
    folder = refine.stage(context).folder
    found = read_json_model(folder / refine.RESULT, refine.Refined)
    assert found.kept == (found.after.capped_error < found.before.capped_error)

    policy = Policy.load(search.stage(context).folder / search.POLICY)
    name, before = policy.assignments[0][0], quantize.load(context)
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
    chosen = dict[bool, bytes]()
    for kept in (False, True):
        write_json_model(folder / refine.RESULT, found.model_copy(update={"kept": kept}))
        chosen[kept] = codes(refine.load(context), name)
    assert chosen[False] == codes(before, name) != chosen[True]
    write_json_model(folder / refine.RESULT, found)

    # All of it again, from the first block on, with the last stage that takes the weights.
    for path in files:
        (folder / path).unlink()
    exported = run(tmp_path, "export")
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")} == files
    where, store = export.stage(exported.loaded).folder, refine.load(context)
    loop = read_tensors(where / export.REFERENCE)["loop.quantized"]
    assert torch.equal(loop, quantized_loop(exported.loaded, store, policy))
    layer = next(layer for layer, own in zip(policy.layers, policy.assignments[0], strict=True) if own == name)
    kept = store.weights[name][layer].scales
    assert kept is not None
    assert kept.bfloat16().float().equal(kept)
    assert (where / export.GRAPHS / WEIGHTS_NAME).stat().st_size > 0


def test_layers_whose_widths_may_share_planes_are_refused() -> None:
    with pytest.raises(UserError, match=r"--refine: .*--layout plugin"):
        prepare("digits-flux", BuildConfig(refine=True, layout="plugin"), "search")
