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

KINDS = {
    "formats": ("paper", "blackwell", "nvfp4,fp8", "int4wo", "fp8,fp8", ","),
    "policy": ("policy.json", "bundle/policy.json", "file", "missing"),
}


@cache
def commands() -> dict[tuple[str, ...], Any]:
    """Words of a command → the command."""
    from typer.main import get_command

    from adatsq_trt.cli import app

    def found(command: Any, words: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
        members = getattr(command, "commands", None)
        if members is None:
            return {words: command}
        return {w: c for name, member in members.items() for w, c in found(member, (*words, name)).items()}

    return found(get_command(app))


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command, its argument, options with values of their kind; now and then a wrong or missing word."""
    anything = st.sampled_from(VALUES) | st.text(st.characters(exclude_characters="\0"), max_size=6)
    name = draw(st.sampled_from(sorted(commands())))
    parameters = commands()[name].params
    line, options = [*name], [p for p in parameters if p.param_type_name == "option" and p.name != "help"]
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            line.append(draw(st.just("digits-flux" if parameter.name == "model" else "bundle") | anything))
    for option in options:
        if option.required:
            line += [option.opts[0], draw(st.sampled_from(("out", "out/new", "file")) | anything)]
    if any(option.name == "target" for option in options):
        line += ["--target", draw(st.sampled_from(("sm120", "sm80", "cpu")))]
    for option in draw(st.lists(st.sampled_from(options), max_size=3)) if options else ():
        number = option.type_descriptor.annotation in (int, float, list[int])
        kind = st.integers(-1, 9).map(str) if number else st.sampled_from(KINDS.get(option.name, ("out", "0")))
        line += [option.opts[0], *([] if option.is_flag else [draw(kind | kind | anything)])]
    if draw(st.integers(0, 9)) == 0:
        line[draw(st.integers(0, len(line) - 1))] = draw(anything)
    return [word for word in line if word != "--debug"]


def test_command_lines(cli: CommandLine, go_on: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adatsq_trt.stages import bundle, calibrate, export, quantize, search

    def stop(*_: object) -> None:
        raise UserError("the request is sound")

    for stage in (calibrate, quantize, search, export, bundle):
        monkeypatch.setattr(stage, "run", stop)
    for long in (
        "plugins.build.compile_kernels",
        "plugins.benchmark.require_gpu",
        "engines.triton_server.server.Server",
    ):
        monkeypatch.setattr(f"adatsq_trt.{long}", stop)
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
