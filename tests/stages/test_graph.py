"""The table of stages: its order, and what is run, skipped and loaded."""

from pathlib import Path
from typing import Any

import pytest

from adatsq_trt.config import BuildConfig
from adatsq_trt.errors import BudgetError
from adatsq_trt.progress import Progress, Reporter
from adatsq_trt.stages.graph import STAGES, Build, run_stages, stages_up_to
from adatsq_trt.stages.models import OpenedModel
from adatsq_trt.stages.prepare import prepare

SMALL: dict[str, Any] = {
    **{"target": "cpu", "steps": 2, "beam": 2, "candidates": 2},
    **{"calibration_samples": 2, "selection_samples": 2, "held_out_samples": 2},
}


def test_every_stage_comes_after_what_it_reads() -> None:
    names = list(STAGES)
    for name, node in STAGES.items():
        assert getattr(node.module, "NAME", None) == name
        assert all(names.index(other) < names.index(name) for other in node.inputs)


@pytest.mark.parametrize(
    ("last", "names"),
    [
        ("embed", ("embed",)),
        ("quantize", ("embed", "calibrate", "quantize")),
        ("bundle", ("embed", "calibrate", "quantize", "search", "refine", "export", "bundle")),
    ],
)
def test_a_stage_needs_all_that_those_before_it_read(last: str, names: tuple[str, ...]) -> None:
    assert stages_up_to(last) == names


def test_done_stages_are_skipped_and_the_model_is_not_loaded_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prepare("digits-flux", BuildConfig(**SMALL), "quantize")
    seen: list[Progress] = []
    with asked.run(tmp_path / "run", Reporter(seen.append)) as build:
        assert isinstance(build, Build)
        assert build.run("calibrate").name == "calibrate"
        assert build.run("quantize").done
    assert {progress.task.partition(":")[0] for progress in seen} == {"calibrate", "quantize"}
    seen.clear()

    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(OpenedModel, "load", load)
    with prepare("digits-flux", BuildConfig(**SMALL), "quantize").run(tmp_path / "run", Reporter(seen.append)) as build:
        assert build.run("quantize").done
        assert run_stages(build.outline, "quantize").done
    assert seen == []


def test_a_budget_that_nobody_can_keep_is_refused_after_calibration(tmp_path: Path) -> None:
    """Calibration counts the rows that milliseconds depend on; nothing is quantized for such a budget."""
    config = BuildConfig(**SMALL | {"target": "sm80", "budget_speed": "1e-9ms", "gpu": "a100"})
    with (
        prepare("digits-flux", config, "search").run(tmp_path / "run", Reporter()) as build,
        pytest.raises(BudgetError, match="the fastest policy of these formats takes"),
    ):
        build.run("search")
    assert (tmp_path / "run" / "calibrate").is_dir()
    assert not (tmp_path / "run" / "quantize").exists()
