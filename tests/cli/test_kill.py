"""kill -9 at moments of every stage: the same command goes on and ends with the bytes of an undisturbed run."""

import os
import random
import signal
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from adatsq_trt import zoo
from tests.cli.conftest import fork_server

STAGES = ("calibrate", "quantize", "search", "export", "bundle")
SEED = 20260


@dataclass(frozen=True)
class Moment:
    """When a process dies, told by its progress and not by a clock.

    Attributes:
        file: relative to the run directory.
        appeared: right after the file has got its name; else right before, when its content lies under a temporary one.
    """

    file: str
    appeared: bool


def files(run: Path, stage: str) -> list[str]:
    """What a stage wrote, in this order."""
    paths = [path for path in (run / stage).rglob("*") if path.is_file()]
    return [path.relative_to(run).as_posix() for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)]


def random_moments(undisturbed: Path) -> list[Moment]:
    """Ten, in the order in which a build meets them: one in each half of every stage's files."""
    draw = random.Random(SEED)
    moments = []
    for stage in STAGES:
        names = files(undisturbed, stage)
        for first, end in pairwise((0, len(names) // 2, len(names))):
            moments.append(Moment(draw.choice(names[first:end]), draw.random() < 0.5))
    return moments


def die_at(moment: Moment, arguments: tuple[str, ...], run: Path, models: Path) -> None:
    """The command as a process group that kills itself, compilers included, at a moment."""
    os.setsid()
    file, renamed = str(run / moment.file), False

    def watch(event: str, values: tuple[Any, ...]) -> None:
        nonlocal renamed
        naming = event == "os.rename" and os.fspath(values[1]) == file
        # Python tells of an event before it happens, so the next one of any kind follows the renaming.
        dying, renamed = renamed or (naming and not moment.appeared), naming and moment.appeared
        if dying:
            os.killpg(0, signal.SIGKILL)

    from adatsq_trt.cli import main

    zoo.ZOO_FOLDER = models
    sys.argv = ["adatsq-trt", *arguments, "--output", str(run)]
    sys.addaudithook(watch)
    main()


@pytest.mark.parametrize("count", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_build_killed_at_any_moment_ends_with_the_same_bytes(cli, built: Path, tmp_path: Path, count: int) -> None:
    run, moments = tmp_path / "run", random_moments(built)
    for index in sorted(random.Random(SEED).sample(range(len(moments)), count)):
        process = fork_server().Process(target=die_at, args=(moments[index], cli.build, run, zoo.ZOO_FOLDER))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, moments[index]
        assert (run / moments[index].file).exists() == moments[index].appeared
    # Nothing that a killed process left behind is damaged, so nothing is said to be made again.
    assert cli(*cli.build, "--output", run).warnings == []
    for stage in STAGES:
        names = files(built, stage)
        assert sorted(files(run, stage)) == sorted(names)
        assert [name for name in names if (run / name).read_bytes() != (built / name).read_bytes()] == []
