"""The tutorial's own commands, run as they stand but for smaller settings."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
# What a test cannot run: it is about the machine's environment, in which the tests already are.
SETUP = ("make install", ". .venv/bin/activate")


def shell_commands() -> list[str]:
    """The indented lines of the page, one command each."""
    return re.findall(r"^ {4}(\S.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_tutorial_works(cli, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build finds the shared run's stages done, so it must ask for the same settings."""
    shutil.copytree(built, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    commands = [command for command in shell_commands() if command not in SETUP]
    assert [shlex.split(command)[1] for command in commands] == [
        *("doctor", "models", "build", "inspect", "check", "generate", "report"),
    ]
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "adatsq-trt"
        ended = cli(*words[1:], *(cli.small if words[1] == "build" else ()))
        assert ended.code == 0, f"{command}\n{ended.err}"
    for name in ("summary.json", "check/check.json", "samples.png", "report.html"):
        assert (tmp_path / "runs" / "demo" / name).is_file(), name
    for block in python_blocks():
        names: dict[str, Any] = {}
        exec(block, names)
        assert names["ratio"] > 0
