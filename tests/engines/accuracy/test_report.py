"""JUnit XML says what `check.json` says."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from adatsq_trt.engines.accuracy import CheckReport, check, write_junit
from adatsq_trt.engines.bundle import BundleFiles


@pytest.fixture(scope="module")
def report(tiny_bundle: BundleFiles, tmp_path_factory: pytest.TempPathFactory) -> CheckReport:
    return check(tiny_bundle, tmp_path_factory.mktemp("check"))


def test_a_suite_for_each_bucket_and_a_case_for_each_row(report: CheckReport, tmp_path: Path) -> None:
    write_junit(tmp_path / "check.xml", report)
    suites = ElementTree.parse(tmp_path / "check.xml").getroot().findall("testsuite")
    assert [suite.get("name") for suite in suites] == [
        *(f"bucket {i}: steps {i} to {i}" for i in range(4)),
        "bit for bit",
        "denoising loop",
    ]
    assert [int(suite.get("tests", "")) for suite in suites] == [10, 10, 10, 5, len(report.exact), 4]
    assert all(suite.get("failures") == "0" for suite in suites)


def test_failures_carry_figures_and_command(report: CheckReport, tmp_path: Path) -> None:
    wrong = report.rows[1].model_copy(update={"passed": False, "layer": "a<b&c"})
    loop = report.loop.model_copy(update={"passed": False, "fail_above": 0.25})
    rows = (report.rows[0], wrong, *report.rows[2:])
    write_junit(tmp_path / "check.xml", report.model_copy(update={"rows": rows, "passed": False, "loop": loop}))
    root = ElementTree.parse(tmp_path / "check.xml").getroot()
    first, second = root.findall(".//testcase[failure]")
    assert first.get("name") == "step 0, cpu graph of assignment 0, a<b&c"
    failure = first.find("failure")
    assert failure is not None
    assert failure.get("message") == wrong.finding
    assert wrong.command in (failure.text or "")
    assert second.get("name") == "quantization error"


def test_colours_of_a_library_s_message_do_not_break_the_file(report: CheckReport, tmp_path: Path) -> None:
    wrong = report.rows[0].model_copy(update={"passed": False, "failure": "\x1b[31mno kernel\x1b[0m\ud800\n"})
    write_junit(tmp_path / "check.xml", report.model_copy(update={"rows": (wrong,), "passed": False}))
    failure = ElementTree.parse(tmp_path / "check.xml").getroot().find(".//failure")
    assert failure is not None
    assert "[31mno kernel" in (failure.get("message") or "")
