"""The page: complete, self-contained, safe against names, and honest about what is missing."""

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from adatsq_trt.cli import app
from adatsq_trt.costs import Limits
from adatsq_trt.errors import OutputError, UserError
from adatsq_trt.formats import FORMATS as ALL_FORMATS
from adatsq_trt.policy import Policy
from adatsq_trt.report.charts import along_steps, error_by_memory, error_by_time
from adatsq_trt.report.data import Check, Comparison, EngineFile, ReportData
from adatsq_trt.report.maps import policy_map, sensitivity_map
from adatsq_trt.report.page import bucket_rows, commands, draw, engine_rows, page, write_report
from adatsq_trt.settings import PipelineSettings
from tests.report.conftest import FORMATS, ROWS

NAMES = ["policy", "sensitivity", "memory", "time", "pareto", "steps", "check", "stages"]


def comparison(step: int, of_limit: float | None, passed: bool = True) -> Comparison:
    return Comparison(step, "cpu, assignment 0", "PyTorch", of_limit, passed, f"polygraphy run step_{step}.onnx")


def html(data: ReportData) -> str:
    return page(data, draw(data))


def text(data: ReportData) -> str:
    """What a reader sees of the page, in one line."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", html(data), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_page_needs_no_network(data: ReportData) -> None:
    content = html(data)
    assert "default-src 'none'" in content  # the browser holds the page to it
    targets = re.findall(r"""(?:src|href)=["']?([^"'>]*)""", content)
    assert targets
    assert [
        target
        for target in targets
        if not target.startswith(("data:image/png;base64,", "data:image/webp;base64,", "#"))
    ] == []
    assert not re.search(r"@import|url\((?!#)", content)


def test_page_shows_the_figures_of_the_run(data: ReportData) -> None:
    shown = text(data)
    for figure in ("6.500", "of 7 allowed", "1.00 × 10⁻³", "0.25 ×", "30.0 MB", "6 plans, embedded", "2 comparisons"):
        assert figure in shown, figure
    assert "3 plans for sm89, layout embedded 15.0 MB" in shown
    assert "best layer-only 325.0 kB 6.50 6.50 1 2.00 × 10⁻³ 2.00 ×" in shown
    assert "uniform fp8* 400.0 kB 8.00 8.00 1 5.00 × 10⁻⁴ 0.50 ×" in shown


def test_names_are_text_and_never_markup_or_formulas(data: ReportData) -> None:
    content = html(replace(data, run_name="</script><script>alert(1)</script>"))
    assert "alert(1)</script>" not in content
    assert "proj.$x$" in draw(data)["policy"].inline
    inside = re.search(r'<script type="application/json" id="map-data">(.*?)</script>', content, re.DOTALL)
    assert inside is not None
    places = json.loads(inside.group(1))
    assert tuple(places["layers"]) == data.policy.layers
    assert places["chosen"] == [[0, 1, 0], [0, 1, 0], [1, 1, 2], [0, 0, 0]]


def test_figures_are_files_that_do_not_change(data: ReportData, tmp_path: Path) -> None:
    written = write_report(data, tmp_path / "a" / "report.html", tmp_path / "a" / "report")
    again = write_report(data, tmp_path / "b" / "report.html", tmp_path / "b" / "report")
    assert [path.name for path in written.figures] == [f"{name}.{kind}" for name in NAMES for kind in ("svg", "png")]
    for first, second in zip((written.page, *written.figures), (again.page, *again.figures), strict=True):
        assert first.read_bytes() == second.read_bytes()
    with Image.open(tmp_path / "a" / "report" / "policy.png") as image:
        assert image.width > 700
    assert "serves 58 % of all places" in (tmp_path / "a" / "report" / "policy.svg").read_text()


def test_inlined_figures_share_no_ids_and_follow_the_page_s_colours(data: ReportData) -> None:
    charts = draw(data)
    ids = [name for chart in charts.values() for name in re.findall(r'\bid="([^"]+)"', chart.inline)]
    assert len(ids) == len(set(ids))
    assert all("var(--" in chart.inline and "#1c2024" not in chart.inline for chart in charts.values())


def test_what_is_missing_is_said_with_the_command(data: ReportData) -> None:
    bare = replace(data, sensitivity=None, trajectory_errors={}, check=None, pictures=None, engines=())
    shown = text(bare)
    assert "Fisher information of every layer" in shown
    assert "adatsq-trt check compares" in shown
    assert "adatsq-trt generate draws" in shown
    assert list(draw(bare)) == ["policy", "sensitivity", "memory", "time", "pareto", "stages"]


def test_failed_and_outdated_checks_are_not_called_passed(data: ReportData) -> None:
    rows = (comparison(0, 0.2), comparison(1, None, passed=False), comparison(2, 3.0, passed=False))
    failed = text(replace(data, check=Check(False, True, rows)))
    assert "check failed 3 comparisons" in failed
    assert "2 of 3 comparisons leave their limits" in failed
    assert "not comparable failed polygraphy run step_1.onnx" in failed
    old = text(replace(data, check=Check(True, False, rows[:1])))
    assert "check out of date" in old
    assert "earlier bundle" in old


def test_of_many_comparisons_the_critical_ones_are_listed(data: ReportData) -> None:
    rows = (*(comparison(step, step / 1000) for step in range(900)), comparison(900, 2.0, passed=False))
    shown = text(replace(data, check=Check(False, True, rows)))
    assert "The 60 closest to their limits" in shown
    assert "step_900.onnx" in shown
    assert "step_899.onnx" in shown
    assert "step_100.onnx" not in shown


def test_errors_of_zero_are_drawn(data: ReportData) -> None:
    """As when every candidate is exact."""
    summary = data.summary.model_copy(update={"final_error": 0.0, "uniform_errors": {"nvfp4": 0.0}})
    judged = tuple(replace(policy, error=0.0, held_out_error=0.0) for policy in data.judged)
    errors = {name: np.zeros(5) for name in data.trajectory_errors}
    zeros = replace(data, summary=summary, judged=judged, trajectory_errors=errors, sensitivity=np.zeros((3, 4, 3)))
    assert "digits-flux" in text(zeros)


def with_formats(data: ReportData, formats: tuple[str, ...]) -> ReportData:
    settings = data.settings.model_copy(update={"formats": formats})
    return replace(data, settings=settings, sensitivity=np.ones((len(formats), 4, 3)))


def test_maps_have_one_size_and_room_for_the_names_of_all_formats(data: ReportData) -> None:
    for formats in (FORMATS, tuple(ALL_FORMATS)):
        maps = [chart(with_formats(data, formats)).figure for chart in (policy_map, sensitivity_map)]
        assert maps[0].axes[0].get_position().bounds == maps[1].axes[0].get_position().bounds
        legend = maps[0].texts
        assert len(legend) == len(formats)
        assert min(text.get_position()[1] for text in legend) > 0
        assert max(text.get_position()[1] for text in legend) < maps[0].axes[0].get_position().y0


def test_one_step_is_a_mark(data: ReportData) -> None:
    policy = Policy.from_steps("digits-flux", "a" * 64, data.policy.layers, [ROWS[0]])
    errors = {"chosen": np.array([0, 1e-3])}
    chart = along_steps(replace(data, policy=policy, timesteps=(1000.0,), trajectory_errors=errors))
    assert [line.get_marker() for line in chart.figure.axes[0].lines] == ["o"]


def test_figures_that_are_missing_in_an_altered_summary(data: ReportData) -> None:
    shown = text(replace(data, summary=data.summary.model_copy(update={"uniform_errors": {}, "versions": {}})))
    assert "The chosen policy averages 6.50 bits" in shown


def test_bucket_rows_follow_the_steps(data: ReportData) -> None:
    rows = [(row.steps, row.assignment, row.shares, row.engine_bytes) for row in bucket_rows(data)]
    assert rows[0] == ("0-1", 0, (("nvfp4", 2), ("fp8", 1)), 10_000_000)
    assert rows[2] == ("3", 2, (("nvfp4", 3),), 10_000_000)


def test_engine_rows_say_which_steps_a_plan_runs(data: ReportData) -> None:
    rows = engine_rows(data)
    assert [(row.target, row.assignment, row.steps) for row in rows[:3]] == [
        ("sm120", 0, "0-1"),
        ("sm120", 1, "2"),
        ("sm120", 2, "3"),
    ]
    whole = replace(data, engines=(EngineFile("sm120", None, 7),))
    assert [(row.assignment, row.steps, row.bytes) for row in engine_rows(whole)] == [(None, "0-3", 7)]
    assert "sm120 all 0-3 7 bytes" in text(whole)


def test_an_assignment_that_returns_is_one_engine_of_all_its_steps(data: ReportData) -> None:
    policy = Policy.from_steps("digits-flux", "a" * 64, data.policy.layers, [ROWS[0], ROWS[2], ROWS[0], ROWS[0]])
    rows = engine_rows(replace(data, policy=policy, engines=(EngineFile("sm89", 0, 1), EngineFile("sm89", 1, 1))))
    assert [row.steps for row in rows] == ["0, 2-3", "1"]


def test_errors_are_drawn_beside_bytes_and_time(data: ReportData) -> None:
    timed = data.summary.model_copy(update={"ms": 0.0065, "ms_source": "roofline of a card"})
    memory, time = error_by_memory(data), error_by_time(replace(data, summary=timed))
    assert memory.title == "1.62 × the bytes of uniform nvfp4, 0.25 × its error"
    assert time.title == "1.62 × the time of uniform nvfp4, 0.25 × its error"
    assert "roofline of a card" in time.caption
    names = {text.get_text().strip() for text in memory.figure.axes[0].texts}
    assert names == {"chosen", "layer-only", "nvfp4", "fp8"}  # 16 bits would leave the others no room
    limited = timed.model_copy(update={"limits": Limits(bytes=300_000, ms=0.006)})
    for chart in (error_by_memory, error_by_time):
        assert "budget" in {
            text.get_text().strip() for text in chart(replace(data, summary=limited)).figure.axes[0].texts
        }


def test_activation_bits_stand_for_a_time_that_nobody_knows(data: ReportData) -> None:
    policies = tuple(
        policy.model_copy(update={"costs": policy.costs.model_copy(update={"ms": None})})
        for policy in data.summary.policies
    )
    summary = data.summary.model_copy(update={"policies": policies, "ms": None, "ms_source": None})
    chart = error_by_time(replace(data, summary=summary))
    assert chart.figure.axes[0].get_xlabel() == "activation bits"
    assert chart.title == "1.62 × the activation bits of uniform nvfp4, 0.25 × its error"


def test_the_build_command_says_everything_that_it_can(data: ReportData) -> None:
    """An option that it leaves out would fall back to a default that the run may not have had."""
    checkpoint = PipelineSettings(
        path="/models/mine",
        base="/models/base",
        loras=("/a:0.5",),
        height=64,
        width=32,
        frames=5,
        prompts=("a",),
        negative_prompt="blurry",
        images="/photos",
    )
    plans = {"backend": "tensorrt", "hardware_compatibility": "ampere_plus", "batch": (1, 8)}
    plans |= {
        "version_compatible": True,
        "weight_streaming": True,
        "plugins": "/libraries/adatsq.so",
        "max_assignments": 4,
        "guidance_2": 2.5,
        "sigmas": (1.0, 0.5),
        "timesteps": (1000.0,),
        "lora_slots": 8,
        "transform": "smooth",
        "clips": "none",
        "refine": True,
        "formats_for": {"blocks.0.proj": ("fp8",)},
        "expansions": 8,
        "excluded": ("blocks.0.proj",),
    }
    budgets = {"budget_bits": 20 / 3, "budget_bytes": 1e6, "budget_ms": 2.5, "times": "a100"}
    settings = data.settings.model_copy(update={**plans, **budgets, "layout": "switch", "pipeline": checkpoint})
    words = commands(replace(data, settings=settings))[0]
    build: Any = get_command(app)
    for name in ("build", "engine"):
        build = build.commands[name]
    shown = [option for option in build.params if option.param_type_name == "option" and not option.hidden]
    options = {option.opts[0] for option in shown}
    # What a run may take and who computes it are not settings of it; sizes stand in the place of batches.
    unsaid = {"--simulate", "--policy", "--memory-limit", "--ray", "--device", "--shapes", "--encodings"}
    assert options - set(words) == unsaid
    assert words[words.index("--budget-bits") + 1] == "6.666666666666667"
    assert words[words.index("--layout") + 1] == "switch"
    assert words[words.index("--sigmas") + 1] == "1.0,0.5"
    assert [words[i + 1] for i, word in enumerate(words) if word == "--batch"] == ["1", "8"]
    assert words[3] == "/models/mine"
    encoded = settings.model_copy(update={"pipeline": checkpoint.model_copy(update={"encodings": "/e.safetensors"})})
    assert options - set(commands(replace(data, settings=encoded))[0]) == unsaid - {"--encodings"} | {"--prompts"}
    in_memory = settings.model_copy(update={"pipeline": checkpoint.model_copy(update={"path": "memory:FluxPipeline"})})
    assert commands(replace(data, settings=in_memory))[0][3] == "FOLDER-OF-FluxPipeline"
    sizes = settings.model_copy(update={"shapes": ((1, 64, 32), (4, 32, 32))})
    words = commands(replace(data, settings=sizes))[0]
    assert words[words.index("--shapes") + 1] == "1x64x32,4x32x32"
    alone = data.settings.model_copy(update={"budget_bits": None, "budget_bytes": 1e6})
    assert "--budget-bits" not in commands(replace(data, settings=alone))[0]


def test_commands_are_ones_that_the_command_line_takes(data: ReportData) -> None:
    build = commands(data)[0]
    assert build[:3] == ["adatsq-trt", "build", "engine"]
    ended = CliRunner().invoke(app, [*build[1:], "--help"])
    assert ended.exit_code == 0
    given = replace(data, settings=data.settings.model_copy(update={"policy": "{}", "simulate": True, "targets": ()}))
    assert {"--simulate", "--policy"} < set(commands(given)[0])


@pytest.mark.parametrize("name", ["report", "report.pdf"])
def test_other_kinds_of_files_are_refused(data: ReportData, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"expected a name that ends in \.html"):
        write_report(data, tmp_path / name, tmp_path / "report")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_page(
    data: ReportData, tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    with pytest.raises(OutputError), full_disk():
        write_report(data, tmp_path / "report.html", tmp_path / "report")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
