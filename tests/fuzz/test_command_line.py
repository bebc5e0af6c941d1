"""Any command line ends with a sentence or a result: no traceback, nothing written where nobody asked for it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adatsq_trt.errors import UserError
from tests.cli.conftest import CommandLine
from tests.engines.conftest import make_bundle
from tests.fuzz.conftest import FUZZ

VALUES = (
    *("digits-flux", "digit-flux", "sm120", "cpu", "sm90", "paper", "nvfp4,fp8", "fp8,", "w8a8s"),
    *("0", "1", "-1", "4", "1e999", "nan", "0x10", "99999999999999999999", "∞", "", " ", "ü\n", "x" * 5000),
    *("out", "file", "bundle", "bundle/policy.json", "missing/deeper", "file/below", "/proc/none", "--", "--help"),
)


@cache
def commands() -> dict[tuple[str, ...], list[str]]:
    """Words of a command → its options."""
    from typer.main import get_command

    from adatsq_trt.cli import app

    root: Any = get_command(app)
    found = {(name,): command for name, command in root.commands.items()}
    found |= {("build", name): command for name, command in root.commands["build"].commands.items()}
    return {words: [o for p in command.params for o in p.opts if o.startswith("-")] for words, command in found.items()}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command, its argument, options with values; now and then a word too many or too few."""
    value = st.sampled_from(VALUES) | st.text(st.characters(exclude_characters="\0"), max_size=6)
    words = draw(st.sampled_from(sorted(commands())))
    given_options = draw(st.lists(st.tuples(st.sampled_from(commands()[words] or ["--json"]), value), max_size=4))
    argument = draw(st.sampled_from(("bundle", "digits-flux")) | value)  # mostly one that a command can use
    line = [*words, argument, *(word for pair in given_options for word in pair)]
    if draw(st.integers(0, 4)) == 0:
        del line[draw(st.integers(0, len(line) - 1))]
    return [word for word in line if word != "--debug"]


def test_command_lines(cli: CommandLine, go_on: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adatsq_trt.cli.stages import bundle, calibrate, export, quantize, search

    def stop(_context: Any) -> None:
        raise UserError("the request is sound")

    for stage in (calibrate, quantize, search, export, bundle):
        monkeypatch.setattr(stage, "run", stop)
    monkeypatch.chdir(tmp_path)
    make_bundle(tmp_path / "bundle")
    (tmp_path / "file").write_text("years of work")
    before = cli.state(tmp_path / "bundle")

    @FUZZ
    @given(command_lines())
    def one_round(words: list[str]) -> None:
        ended = cli(*words)
        assert ended.code in (0, 1, 2), (words, ended.err)
        assert "Traceback" not in ended.err, words
        assert "adatsq-trt: unexpected" not in ended.err, (words, ended.err)
        assert cli.state(tmp_path / "bundle") == before, words
        assert (tmp_path / "file").read_text() == "years of work", words

    go_on(one_round)
