"""`~` is expanded in every path of every command, however the shell was asked to leave it alone."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, get_origin, get_type_hints

import pytest
from typer.main import get_command

from adatsq_trt.cli import app
from adatsq_trt.cli.homes import PLACES, expanding_homes
from adatsq_trt.errors import MissingFileError


def callbacks() -> dict[str, Callable[..., None]]:
    """The functions of all commands by the commands' names."""
    pending, found = [("", get_command(app))], {}
    while pending:
        name, command = pending.pop()
        inner = getattr(command, "commands", {})
        pending.extend((f"{name} {child}".strip(), own) for child, own in inner.items())
        if not inner:
            found[name] = command.callback
    return found


@pytest.mark.parametrize("name", sorted(callbacks()))
def test_every_command_expands_them(name: str) -> None:
    layers = [callbacks()[name]]
    while hasattr(layers[-1], "__wrapped__"):
        layers.append(layers[-1].__wrapped__)
    assert "expanding" in [layer.__code__.co_name for layer in layers]


def test_every_text_that_may_be_a_path_is_known_as_one() -> None:
    found = set()
    for callback in callbacks().values():
        for name, hint in get_type_hints(inspect.unwrap(callback), include_extras=True).items():
            if get_origin(hint) is Annotated and "Path" not in str(hint.__origin__) and "str" in str(hint.__origin__):
                words = (hint.__metadata__[0].help or "").lower()
                if any(word in words for word in ("folder", ".safetensors", "lora", "or a file")):
                    found.add(name)
    assert found == PLACES


def test_paths_lists_of_paths_and_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    got: dict[str, object] = {}
    command = expanding_homes(lambda **given: got.update(given))
    command(
        output=Path("~/run"),
        bundles=[Path("~/a"), Path("b~")],
        model="~/flux",
        lora=["~/style.safetensors:0.5", "other"],
        prompt=["~/is a prompt"],
        base=None,
        steps=3,
    )
    assert got == {
        "output": tmp_path / "run",
        "bundles": [tmp_path / "a", Path("b~")],
        "model": f"{tmp_path}/flux",
        "lora": [f"{tmp_path}/style.safetensors:0.5", "other"],
        "prompt": ["~/is a prompt"],
        "base": None,
        "steps": 3,
    }
    with pytest.raises(MissingFileError, match="'~nobody-at-all/run': there is no such home directory"):
        command(output=Path("~nobody-at-all/run"))


def test_a_run_in_the_home_directory(cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "'~" not in cli("inspect", "~/no-run").refusal
    assert str(tmp_path / "no-run") in cli("inspect", "~/no-run").refusal
    refused = cli("calibrate", "digits-flux", "--target", "cpu", "--policy=~/policy.json").refusal
    assert str(tmp_path / "policy.json") in refused
