"""Stage `refine`: an interrupted one goes on, and what is kept is what the export reads."""

from pathlib import Path
from typing import Any

import pytest

from adatsq_trt.config import BuildConfig
from adatsq_trt.errors import UserError
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.models.format_store import CandidateWeights, save_weights
from adatsq_trt.policy import Policy
from adatsq_trt.progress import Reporter
from adatsq_trt.stages import export, quantize, refine
from adatsq_trt.stages.graph import Build
from adatsq_trt.stages.prepare import prepare

NAMES = ("w4a3", "w4a4")
ASKED: dict[str, Any] = {
    **{"simulate": True, "formats": ",".join(NAMES), "steps": 1, "refine": True, "clips": "none", "hessian": "plain"},
    **{"calibration_samples": 2, "selection_samples": 2, "held_out_samples": 2, "projections": 1},
}


def codes(store: CandidateWeights, name: str) -> bytes:
    return b"".join(weight.codes.numpy().tobytes() for weight in store.weights[name].values())


def test_an_interrupted_stage_goes_on_and_the_export_reads_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prepare("digits-flux", BuildConfig(**ASKED), "refine")
    layers = tuple(asked.opened.outline.adapter.quantizable_layers())
    rows = [[NAMES[i % 2] for i in range(len(layers))]]
    policy = Policy.from_steps("digits-flux", asked.settings.weights_sha256, layers, rows)
    written = list[Path]()

    def save_two(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        save_weights(path, *rest)

    def run() -> Build:
        given = prepare("digits-flux", BuildConfig(**ASKED, policy=policy), "refine")
        with given.run(tmp_path, Reporter()) as build:
            build.run("refine")
        return build

    with monkeypatch.context() as patch:
        patch.setattr(refine, "save_weights", save_two)
        with pytest.raises(KeyboardInterrupt):
            run()
    first = written[0].stat().st_ino
    context = run().loaded
    assert written[0].stat().st_ino == first
    folder = refine.stage(context).folder
    found = read_json_model(folder / refine.RESULT, refine.Refined)
    assert found.kept == (found.after.capped_error < found.before.capped_error)

    keys = set[str]()
    before = quantize.load(context)
    for kept in (False, True):
        write_json_model(folder / refine.RESULT, found.model_copy(update={"kept": kept}))
        keys.add(export.stage(context).key)
        assert (codes(refine.load(context), "w4a4") == codes(before, "w4a4")) != kept
    assert len(keys) == 2


def test_layers_whose_widths_may_share_planes_are_refused() -> None:
    with pytest.raises(UserError, match=r"--refine: .*--layout plugin"):
        prepare("digits-flux", BuildConfig(refine=True, layout="plugin"), "search")
