"""The command line as a user meets it, and one real run for all its tests, of a model with one block of either kind."""

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from tests.doubles.gpu import book, device, library
from tests.permissions import permissions_hold
from tests.traces import trace_once

__all__ = ["book", "device", "library"]

SCRIPT = Path(sys.executable).with_name("adatsq-trt")
# The console script's function, for which models are in the folder that is the first argument.
IN_ZOO = """
import sys
from pathlib import Path
from adatsq_trt import zoo
from adatsq_trt.cli import main
zoo.ZOO_FOLDER = Path(sys.argv.pop(1))
main()
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit code.
        out: standard output.
        err: standard error.
    """

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """What a refused request is told: exit code 2 and one sentence, the last and only message."""
        assert self.code == 2, (self.code, self.err)
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("adatsq-trt: ")]
        assert len(lines) == 1, self.err
        assert self.err.endswith(lines[0] + "\n"), self.err
        return lines[0].removeprefix("adatsq-trt: ")

    @property
    def warnings(self) -> list[str]:
        """What a command that succeeded said beside its result."""
        assert self.code == 0, self.err
        return [line.removeprefix("adatsq-trt: ") for line in self.err.splitlines() if line.startswith("adatsq-trt: ")]


class CommandLine:
    """Calls the console script's own function in this process, so that heavy libraries are imported once.

    Attributes:
        small: options for the least effort.
        choice: formats and budget of the shared run.
        build: arguments of the shared run, without --output.
        script: path of the console script.
    """

    samples = ("--calibration-samples", "2", "--selection-samples", "2", "--held-out-samples", "2")
    small = (*samples, "--steps", "2", "--beam", "2", "--candidates", "2")
    # Weights of three formats, which change over the steps, and a plan for each assignment.
    choice = ("--formats", "nvfp4,fp8,bf16", "--weights", "free", "--budget-bits", "6")
    build = ("build", "engine", "digits-flux", "--target", "sm120", *small, *choice)
    script = SCRIPT

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *arguments: str | Path) -> Ended:
        self._capture.readouterr()
        code = self.here(*arguments)
        out, err = self._capture.readouterr()
        return Ended(code, out, err)

    @staticmethod
    def here(*arguments: str | Path) -> int:
        """Run a command in this process; its exit code."""
        from adatsq_trt.cli import main

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
            with pytest.raises(SystemExit) as end:
                main()
        return int(end.value.code or 0)

    @staticmethod
    def alone(*arguments: str | Path) -> list[str]:
        """What starts a command in a process of its own, with the models that this one has."""
        from adatsq_trt import zoo

        return [sys.executable, "-c", IN_ZOO, str(zoo.ZOO_FOLDER), *map(str, arguments)]

    @staticmethod
    def process(*arguments: str | Path) -> Ended:
        """Run the console script itself."""
        ended = subprocess.run([SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    @staticmethod
    def state(path: Path) -> dict[str, tuple[int, int, int]]:
        """What changes when a file does: path below `path` → size, time and inode of every file but the lock."""
        files = [file for file in (path, *path.rglob("*")) if file.is_file() and file.name != ".lock"]
        stats = {file.relative_to(path).as_posix(): file.stat() for file in files}
        return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}


def fork_server() -> ForkServerContext:
    """Children of a server that has imported everything, and computed nothing, start at once."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["adatsq_trt.stages.bundle", "adatsq_trt.stages.summary"])
    return context


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line."""
    return CommandLine(capsys)


@pytest.fixture(scope="module", autouse=True)
def _small_zoo(small_zoo: None) -> None:
    """All that is said of digits-flux here holds for any model; a module with its own `small_zoo` has the real one."""


@contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        with permissions_hold():
            yield
    finally:
        for path in folders:
            path.chmod(0o755)


@pytest.fixture
def read_only() -> Callable[[Path], AbstractContextManager[None]]:
    """A block in which nothing below a folder may be written."""
    return _read_only


@pytest.fixture(scope="session")
def built(small_zoo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run for sm120, built once for all workers; for reading."""
    base = tmp_path_factory.getbasetemp()
    # With xdist every worker has a folder of its own in the session's.
    shared = base.parent if base.name.startswith("popen-") else base
    run, ready = shared / "built", shared / "built.ready"
    with (shared / "built.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("adatsq_trt.zoo.ZOO_FOLDER", small_zoo_folder)
                patch.setattr("adatsq_trt.stages.export.trace", trace_once)  # and later builds find it
                assert CommandLine.here(*CommandLine.build, "--output", run) == 0
            ready.touch()
    return run


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A copy of that run, for writing."""
    return Path(shutil.copytree(built, tmp_path / "run"))


@pytest.fixture(scope="session")
def reported(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of that run with check, pictures and report; for reading."""
    run = Path(shutil.copytree(built, tmp_path_factory.mktemp("reported") / "demo"))
    for arguments in (("check", run), ("generate", run, "--samples", "10"), ("report", run)):
        assert CommandLine.here(*arguments) == 0
    return run
