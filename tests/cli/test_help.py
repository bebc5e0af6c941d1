"""What `--help` says, and what it must not import to say it quickly."""

import subprocess
import sys
from typing import Any

import pytest

from adatsq_trt.cli import app
from adatsq_trt.config import choice_of, choices, option_name

HEAVY = ("diffusers", "matplotlib", "numpy", "onnx", "onnxruntime", "polygraphy", "pydantic", "tensorrt_rtx", "torch")
COMMANDS = (
    *(("build", "engine"), ("build", "plugins"), ("benchmark", "kernels"), ("benchmark", "bundle")),
    *(("calibrate",), ("quantize",), ("search",), ("export",)),
    *(("check",), ("generate",), ("inspect",), ("compare",), ("evaluate",), ("report",), ("models",), ("doctor",)),
    *(("deploy", "triton"), ("serve",)),
)

BUILDING = (("build", "engine"), ("calibrate",), ("quantize",), ("search",), ("export",))


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    code = f"import sys, adatsq_trt.cli; print([name for name in {HEAVY} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(cli, command: tuple[str, ...]) -> None:
    ended = cli(*command, "--help")
    assert ended.code == 0
    assert f"Usage: adatsq-trt {' '.join(command)}" in ended.out
    if command not in (("models",), ("doctor",)):
        assert f"Example: adatsq-trt {' '.join(command)} " in ended.out
    if command not in (("models",), ("doctor",), *BUILDING):
        assert cli(*command).out.strip() == ended.out.strip()  # without arguments


@pytest.mark.parametrize("command", BUILDING, ids=" ".join)
def test_a_build_of_nothing_says_how_to_begin(cli, command: tuple[str, ...]) -> None:
    for options in ((), ("--target", "sm89")):
        ended = cli(*command, *options)
        assert ended.code == 2
        lines = ended.err.splitlines()
        assert lines[0] == "Which model? For example:"
        examples = [line for line in lines if line.startswith("  ")]
        assert len(examples) == 3
        assert all(line.startswith(f"  adatsq-trt {' '.join(command)} ") for line in examples)
        assert len(lines) < 12  # it fits on a terminal


def test_every_command_is_in_the_list_above() -> None:
    names = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert names | {"build", "benchmark", "deploy"} == {command[0] for command in COMMANDS}


@pytest.mark.parametrize("group", [(), ("build",), ("benchmark",)], ids=["top", "build", "benchmark"])
def test_a_group_without_a_command_shows_help(cli, group: tuple[str, ...]) -> None:
    ended = cli(*group)
    assert "Usage: adatsq-trt" in ended.out
    assert "Commands" in ended.out


def test_every_choice_has_an_option_with_its_default() -> None:
    """All commands that build have the same options: the fields of `BuildConfig`, the model and the run directory."""
    commands = {command.callback.__name__: command for command in app.registered_commands if command.callback}
    for name in ("calibrate", "quantize", "search", "export"):
        # Options of earlier versions are hidden, and refused by their present names.
        parameters = {p.name: p for p in get_params(commands[name]) if not getattr(p, "hidden", False)}
        fields = [field for field, _ in choices() if not choice_of(field).in_python_only]
        assert set(parameters) == {"model", "output", *(field.name for field in fields)}
        for field in fields:
            option = parameters[field.name]
            assert option.opts == [option_name(field.name)]
            assert option.default == (None if field.default == () else field.default)


def get_params(command: Any) -> list[Any]:
    from typer.main import get_command_from_info

    return get_command_from_info(command, pretty_exceptions_short=False, rich_markup_mode=None).params


def test_version_is_the_package_s(cli) -> None:
    from adatsq_trt import __version__

    assert cli("--version").out.strip() == __version__


def test_unknown_commands_and_options_are_usage_errors(cli) -> None:
    for arguments in (("bild",), ("build", "engines"), ("models", "--jsn")):
        ended = cli(*arguments)
        assert ended.code == 2
        assert "Usage: " in ended.err
        assert "Traceback" not in ended.err


def test_a_number_out_of_bounds_is_told_in_one_sentence(cli) -> None:
    message = "--steps: got 0, expected at least 1; pass a larger number"
    assert message in cli("build", "engine", "digits-flux", "--steps", "0").refusal
