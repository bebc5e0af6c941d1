"""Size of files and functions, forbidden calls, and packages that the build forgets."""

import ast
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ("adatsq_trt", "engines", "export", "plugins")
FOLDERS = (*PACKAGE, "examples")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60


def python_files(root: Path, folders: Iterable[str] = FOLDERS) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def too_long(root: Path) -> Iterator[str]:
    """Files and functions beyond the limits."""
    for path in python_files(root):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(root)
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            yield f"{name}: {lines} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    yield f"{name}:{node.lineno} {node.name}: {lines} lines"


def forbidden_calls(root: Path) -> Iterator[str]:
    """Calls that pickle or unpickle, and print."""
    for path in python_files(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            pickles = any(k.arg in ("allow_pickle", "weights_only") for k in node.keywords)
            prints = called == "print" and path.parent != root / "examples"  # short scripts talk to their user
            if called in ("torch.load", "torch.save") or prints or pickles:
                yield f"{path.relative_to(root)}:{node.lineno} {called}"


def missing_packages(root: Path) -> set[str]:
    """Folders with modules that pyproject.toml does not list."""
    listed = set(tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(root).as_posix().replace("/", ".") for path in python_files(root, PACKAGE)}
    return {f if f.startswith("adatsq_trt") else f"adatsq_trt.{f}" for f in folders} ^ listed


def test_files_and_functions_are_short() -> None:
    assert list(too_long(ROOT)) == []


def test_nothing_unpickles_or_prints() -> None:
    assert list(forbidden_calls(ROOT)) == []


def test_every_folder_is_packaged() -> None:
    assert missing_packages(ROOT) == set()


def test_breaches_are_found(tmp_path: Path) -> None:
    (tmp_path / "adatsq_trt" / "new").mkdir(parents=True)
    body = "\n".join(["def long():", *["    x = 1"] * 60, "", "import torch", "torch.load('x')", "print()", ""])
    (tmp_path / "adatsq_trt" / "bad.py").write_text(body + "pass\n" * 440)
    (tmp_path / "adatsq_trt" / "new" / "module.py").write_text("np.load('x', allow_pickle=True)\n")
    (tmp_path / "pyproject.toml").write_text("[tool.setuptools]\npackages = ['adatsq_trt', 'adatsq_trt.gone']\n")
    assert list(too_long(tmp_path)) == ["adatsq_trt/bad.py: 505 lines", "adatsq_trt/bad.py:1 long: 61 lines"]
    assert list(forbidden_calls(tmp_path)) == [
        "adatsq_trt/bad.py:64 torch.load",
        "adatsq_trt/bad.py:65 print",
        "adatsq_trt/new/module.py:1 np.load",
    ]
    assert missing_packages(tmp_path) == {"adatsq_trt.new", "adatsq_trt.gone"}
