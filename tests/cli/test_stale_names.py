"""Documents name only options, commands, files and functions that are there."""

import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import click
import pytest
import typer

from adatsq_trt.cli import app

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
# Records of decisions and the change log tell of what was there at their time.
HISTORY = {"decisions"}
# Options of pip, polygraphy, trtexec, nvcc, Triton, Ray and curl in commands for them.
FOREIGN = {
    *("--config-settings", "--no-deps", "--onnxrt", "--validate", "--onnx-outputs", "--load-inputs", "--load-outputs"),
    *(
        "--strongly-typed",
        "--stronglyTyped",
        "--dynamicPlugins",
        "--build",
        "--plugins",
        "--backend-config",
        "--head",
        "--data",
    ),
}
CODE = re.compile(r"```.*?```|`[^`\n]+`|(?<=\n\n)(?: {4}[^\n]+\n)+", re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--[a-z][A-Za-z0-9-]*")
ROOMS = "adatsq_trt|export|engines|plugins|scripts|tests|docs|benchmarks|examples"
FILE = re.compile(rf"(?<![\w/.-])(?:{ROOMS})/[\w./-]*\w")
DOTTED = re.compile(r"(?<![\w/.-])adatsq_trt(?:\.[A-Za-z_]\w*)+")
COMMAND = re.compile(r"^[` ]*adatsq-trt ([a-z]+(?: [a-z]+)?)", re.MULTILINE)
TARGET = re.compile(r"(?<![\w-])make ([a-z][a-z-]*)")


def documents() -> list[Path]:
    """Those at the root and below docs, and the benchmarks' page."""
    pages = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.parent.name not in HISTORY]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", BENCHMARKS / "README.md", *pages]


def commands(group: click.Command, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command with its name after `adatsq-trt`."""
    for name, command in getattr(group, "commands", {}).items():
        yield f"{before}{name}", command
        yield from commands(command, f"{before}{name} ")


@cache
def known_options() -> set[str]:
    """Those of the command line, of scripts and benchmarks, and of pytest as it is configured here."""
    ours = {o for _, command in commands(typer.main.get_command(app)) for p in command.params for o in p.opts}
    ours |= {
        o for _, command in commands(typer.main.get_command(app)) for p in command.params for o in p.secondary_opts
    }
    scripts = [
        path for room in ("scripts", "benchmarks", "examples", "tests/fuzz") for path in (ROOT / room).rglob("*")
    ]
    texts = [path.read_text("utf-8") for path in scripts if path.is_file() and path.suffix in {".py", ""}]
    return ours | {option for text in texts for option in OPTION.findall(text)} | FOREIGN | {"--help", "--version"}


def stale(text: str) -> list[str]:
    """What the code of a document names and is not there."""
    code = "\n".join(CODE.findall(text)).replace("docs/decisions/NNNN-title.md", "")  # a name to be filled in
    names = {name for name, _ in commands(typer.main.get_command(app))}
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    found = [option for option in OPTION.findall(code) if option not in known_options()]
    found += [path for path in FILE.findall(code) if not any((room / path).exists() for room in (ROOT, BENCHMARKS))]
    found += [name for name in DOTTED.findall(code) if not resolves(name)]
    found += [f"adatsq-trt {name}" for name in COMMAND.findall(code) if not names & {name, name.split()[0]}]
    return found + [f"make {target}" for target in TARGET.findall(code) if target not in targets]


def resolves(name: str) -> bool:
    """Whether a dotted name is a module or in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: object = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return all((value := getattr(value, part, None)) is not None for part in parts[end:])
    return False


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_name_what_is_there(document: Path) -> None:
    assert stale(document.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "planted",
    [
        "--budget-megabytes",
        "adatsq_trt/search/annealing.py",
        "adatsq_trt.search.annealing.cool",
        "adatsq-trt quantise",
        "make bench-everything",
    ],
)
def test_a_planted_name_is_found(planted: str) -> None:
    assert stale(f"Call `{planted}` first.") == [planted]
