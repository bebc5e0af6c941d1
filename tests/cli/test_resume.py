"""Interrupted runs go on where they stopped and end as if nothing had happened."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adatsq_trt import zoo
from adatsq_trt.search import resume
from adatsq_trt.stages.run_directory import RunDirectory
from tests.cli.conftest import fork_server
from tests.cli.test_kill import Moment, die_at

STEPS = 4


@pytest.fixture
def search(cli) -> tuple[str, ...]:
    """A search with enough columns to be interrupted."""
    return ("search", "digits-flux", "--simulate", "--formats", "w4a4,w4a6", *cli.small, "--steps", str(STEPS))


def kill(arguments: tuple[str, ...], run: Path, column: int) -> None:
    """Run the search in a process that kills itself as soon as a column of the beam is on disk."""
    moment = Moment(f"search/columns/column_{column:03d}.safetensors", appeared=True)
    process = fork_server().Process(target=die_at, args=(moment, arguments, run, zoo.ZOO_FOLDER))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def columns(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in (run / "search" / "columns").glob("*.safetensors")}


@contextmanager
def ctrl_c_after_the_first_column() -> Iterator[None]:
    """The signal of Ctrl-C at a known place."""
    save = resume._save_column

    def save_and_interrupt(file: Path, *rest: Any) -> None:
        save(file, *rest)
        if file.stem == "column_000":
            signal.raise_signal(signal.SIGINT)

    # A shell without job control gives its background processes an ignored Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resume, "_save_column", save_and_interrupt)
            yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupted_and_killed_search_ends_in_the_same_policy(cli, search: tuple[str, ...], tmp_path: Path) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    with ctrl_c_after_the_first_column():
        ended = cli(*search, "--output", run)
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == "adatsq-trt: interrupted; the same command goes on where this one stopped"
    assert "Traceback" not in ended.err
    first = columns(run)
    assert list(first) == ["column_000.safetensors"]

    kill(search, run, 1)
    second = columns(run)
    assert 1 < len(second) < STEPS
    assert not (run / "search" / "policy.json").exists()

    assert cli(*search, "--output", run).warnings == []
    # What was finished before was not done again.
    assert first.items() <= second.items() <= columns(run).items()
    assert cli(*search, "--output", undisturbed).warnings == []
    for name in ("policy.json", "result.json"):
        assert (run / "search" / name).read_bytes() == (undisturbed / "search" / name).read_bytes()


def test_a_run_that_is_in_use_is_refused(cli, tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run"):
        assert "is in use by another adatsq-trt process" in cli(*cli.build, "--output", tmp_path / "run").refusal
