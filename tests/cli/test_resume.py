"""Interrupted runs go on where they stopped and end as if nothing had happened."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from adatsq_trt.run import RunDirectory

STEPS = 4


@pytest.fixture
def search(cli) -> tuple[str, ...]:
    """A search with enough columns to be interrupted."""
    return ("search", "digits-flux", "--simulate", "--formats", "w4a4,w8a8", *cli.small, "--steps", str(STEPS))


def interrupt(cli, arguments: tuple[str, ...], run: Path, column: int, number: signal.Signals) -> tuple[int, str]:
    """Start the console script and send it a signal as soon as a column of the beam is on disk."""
    file = run / "search" / "columns" / f"column_{column:03d}.safetensors"
    # A shell without job control gives its background processes an ignored Ctrl-C.
    process = subprocess.Popen(
        [cli.script, *arguments, "--output", run],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not file.is_file():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.0005)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err


def columns(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in (run / "search" / "columns").glob("*.safetensors")}


def test_interrupted_and_killed_search_ends_in_the_same_policy(cli, search: tuple[str, ...], tmp_path: Path) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    code, err = interrupt(cli, search, run, 0, signal.SIGINT)
    assert code == 130
    assert err.splitlines()[-1] == "adatsq-trt: interrupted; the same command goes on where this one stopped"
    assert "Traceback" not in err
    first = columns(run)
    assert 0 < len(first) < STEPS
    code, _ = interrupt(cli, search, run, len(first), signal.SIGKILL)
    assert code == -signal.SIGKILL
    second = columns(run)
    assert len(first) < len(second) < STEPS
    assert not (run / "search" / "policy.json").exists()
    assert not RunDirectory.existing(run).stage("search", {}).done

    assert cli(*search, "--output", run).warnings == []
    assert cli(*search, "--output", undisturbed).warnings == []
    for name in ("policy.json", "result.json"):
        assert (run / "search" / name).read_bytes() == (undisturbed / "search" / name).read_bytes()
    # What was finished before was not done again.
    assert first.items() <= second.items() <= columns(run).items()


def test_a_run_that_is_in_use_is_refused(cli, tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run"):
        assert "is in use by another adatsq-trt process" in cli(*cli.build, "--output", tmp_path / "run").refusal
