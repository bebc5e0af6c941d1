"""Who may import whom. These tables are the rules."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import adatsq_trt

ROOT = Path(__file__).parents[2]
BESIDE = ("engines", "export", "plugins")  # folders that the installation maps into the package

DATA = {
    "",
    "amounts",
    "base_type",
    "config",
    "costs",
    "settings",
    "solver",
    "errors",
    "fields",
    "files",
    "formats",
    "graph_index",
    "image",
    "image_call",
    "intervals",
    "loading",
    "policy",
    "progress",
    "schedule",
    "step_policy",
    "text_call",
    "timed_kernels",
    "transformer_call",
}
TENSORS = DATA | {"packing", "quantizers", "transforms"}
MODELS = TENSORS | {"models", "zoo"}
CALIBRATION = MODELS | {"calibration", "execution"}
STAGES = CALIBRATION | {"checkpoints", "engines", "evaluation", "export", "report", "search", "stages"}

# Area (module or subpackage of adatsq_trt) → areas that it may import.
ALLOWED = {
    **dict.fromkeys(DATA, DATA),
    **dict.fromkeys(("packing", "quantizers", "transforms"), TENSORS),
    **dict.fromkeys(("models", "zoo"), MODELS),
    "execution": {"", "errors", "execution"},
    "checkpoints": MODELS | {"checkpoints"},
    "calibration": CALIBRATION,
    "search": CALIBRATION | {"search"},
    "evaluation": CALIBRATION | {"evaluation"},
    "export": TENSORS | {"export"},
    "engines": DATA | {"engines"},
    "plugins": {"", "errors", "files", "formats", "packing", "plugins", "timed_kernels"},
    "report": DATA | {"report"},
    "stages": STAGES,
    "results": STAGES | {"results"},
    "api": STAGES | {"api", "results"},
    "cli": STAGES | {"api", "cli", "plugins"},
}
# Benchmarks call the tool as its users do. Those that measure a part of it, or read its records, may import that part.
PUBLIC = TENSORS | {"api", "engines", "export", "plugins", "report", "results", "zoo"}
INSIDE = {
    "budgets": {"search", "stages"},  # every point of a finished search
    "engines": {"models"},  # graphs of a model without a search
    "hardware": {"calibration", "evaluation", "models", "search", "stages"},
    "hessian": {"calibration", "models", "stages"},
    "nested": {"calibration", "models", "stages"},
    "once": {
        "calibration",
        "models",
        "search",
        "stages",
    },  # errors of single samples, for other prompts than a run keeps
    "pipelines": {"calibration", "checkpoints", "models", "search"},
    "quality": {"evaluation", "search", "stages"},
    "scaling": {"calibration", "execution", "search", "stages"},
    "search": {"calibration", "execution", "models", "search", "stages"},
    "size": {"models", "search", "stages"},
    "solver": {"calibration"},
}
# What the package itself gives out is imported when it is first asked for, from these areas.
LAZY = defaultdict[str, set[str]](set, {"": {"api", "models", "progress", "results"}})
METHOD = set(ALLOWED) - {
    "cli",
    "evaluation",
    "export",
    "engines",
    "plugins",
    "stages",
}  # modelopt's methods are peers of ours
# Tests of the command line that lie elsewhere: random command lines, and the commands that a report shows.
COMMAND_LINE_TESTS = {"tests/fuzz/test_command_line.py", "tests/report/test_page.py"}
DEPLOYMENT_LIBRARIES = {
    "modelopt",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "polygraphy",
    "tensorrt",
    "tensorrt_lean",
    "tensorrt_rtx",
}
HEAVY = DEPLOYMENT_LIBRARIES | {
    "diffusers",
    "matplotlib",
    "numba",
    "ray",
    "scipy",
    "sklearn",
    "torch",
    "transformers",
    "triton",
}
PICKLES = {"cloudpickle", "dill", "joblib", "pickle", "shelve"}


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        target: its dotted name.
        line: where.
        at_startup: whether it runs when the importing module is imported.
    """

    target: str
    line: int
    at_startup: bool

    @property
    def library(self) -> str:
        return self.target.partition(".")[0]


@dataclass(frozen=True)
class Module:
    """One source file.

    Attributes:
        name: as it is imported.
        path: where it lies.
        imports: all that it imports, anywhere in the file.
    """

    name: str
    path: Path
    imports: tuple[Import, ...]

    @property
    def area(self) -> str:
        return area_of(self.name)


def area_of(name: str) -> str:
    """First component below the package: "adatsq_trt.models.flux" → "models"."""
    return name.split(".")[1] if "." in name else ""


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted name and path of every module of the package."""
    for folder, prefix in (("adatsq_trt", ()), *((name, ("adatsq_trt",)) for name in BESIDE)):
        for path in sorted((root / folder).rglob("*.py")):
            parts = (*prefix, *path.relative_to(root).with_suffix("").parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def read_modules(root: Path) -> dict[str, Module]:
    """All modules of the package, parsed."""
    paths = dict(sources(root))
    return {name: Module(name, path, tuple(_imports(path, set(paths)))) for name, path in paths.items()}


def _imports(path: Path, modules: set[str]) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    startup = set(map(id, _startup_statements(tree.body)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in startup)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                # "from package import module" imports the module, "from module import name" does not import a module.
                full = f"{node.module}.{alias.name}"
                # What the package gives out itself comes from where it is made, but for its version.
                public = node.module == "adatsq_trt" and not alias.name.startswith("__")
                yield Import(full if full in modules or public else str(node.module), node.lineno, id(node) in startup)


def _startup_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import: not those in functions and not those for type checkers only."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _startup_statements(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from _startup_statements(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _startup_statements(handler.body)


def wrong_arrows(modules: dict[str, Module]) -> list[str]:
    """Imports inside the package that the rules do not allow."""
    return [
        f"{module.name}:{item.line} imports {item.target}"
        for module in modules.values()
        for item in module.imports
        if item.library == "adatsq_trt" and area_of(item.target) not in (ALLOWED[module.area] | LAZY[module.area])
    ]


def users_of_the_command_line(root: Path) -> list[str]:
    """Files outside the command line and its tests that import it."""
    folders = ("adatsq_trt", *BESIDE, "benchmarks", "examples", "tests")
    files = [file for folder in folders for file in sorted((root / folder).rglob("*.py"))]
    own = {str(file.relative_to(root)) for file in files if "cli" in file.relative_to(root).parts[1:2]}
    outside = [file for file in files if str(file.relative_to(root)) not in own | COMMAND_LINE_TESTS]
    modules = {name for name, _ in sources(root)}
    return [
        f"{file.relative_to(root)}:{item.line} imports {item.target}"
        for file in outside
        for item in _imports(file, modules)
        if item.library == "adatsq_trt" and area_of(item.target) == "cli"
    ]


def benchmarks_that_reach_inside(root: Path) -> list[str]:
    """Imports of benchmarks that are neither public nor of what they measure."""
    modules = {name for name, _ in sources(root)}
    files = sorted((root / "benchmarks").rglob("*.py"))
    return [
        f"{file.relative_to(root)}:{item.line} imports {item.target}"
        for file in files
        for item in _imports(file, modules)
        if item.library == "adatsq_trt"
        and item.target.removeprefix("adatsq_trt.") not in adatsq_trt.__all__
        and area_of(item.target) not in PUBLIC | INSIDE.get(file.relative_to(root).parts[1], set())
    ]


def wrong_libraries(modules: dict[str, Module]) -> list[str]:
    """The method knows no ONNX and no TensorRT, and nobody knows pickle."""
    return [
        f"{module.name}:{item.line} imports {item.target}"
        for module in modules.values()
        for item in module.imports
        if item.library in PICKLES or (module.area in METHOD and item.library in DEPLOYMENT_LIBRARIES)
    ]


def heavy_at_startup(modules: dict[str, Module], start: str) -> list[str]:
    """Heavy libraries that `import start` pulls in, with the way that leads to them."""
    found, ways = [], {start: start}
    queue = [start]
    while queue:
        name = queue.pop(0)
        for item in modules[name].imports if name in modules else ():
            if not item.at_startup:
                continue
            if item.library in HEAVY:
                found.append(f"{ways[name]} → {item.target}")
            # Importing a.b.c imports a and a.b first.
            parts = item.target.split(".")
            for target in (".".join(parts[: i + 1]) for i in range(len(parts))):
                if target in modules and target not in ways:
                    ways[target] = f"{ways[name]} → {target}"
                    queue.append(target)
    return found


def test_every_area_has_a_rule() -> None:
    areas = {module.area for module in read_modules(ROOT).values()}
    assert areas <= set(ALLOWED), "give the new area a row in ALLOWED"


def test_arrows() -> None:
    assert wrong_arrows(read_modules(ROOT)) == []


def test_nobody_but_its_tests_imports_the_command_line() -> None:
    assert users_of_the_command_line(ROOT) == []


def test_benchmarks_use_what_is_public_and_what_they_measure() -> None:
    assert benchmarks_that_reach_inside(ROOT) == []


def test_libraries() -> None:
    assert wrong_libraries(read_modules(ROOT)) == []


def test_command_line_starts_without_heavy_libraries() -> None:
    assert heavy_at_startup(read_modules(ROOT), "adatsq_trt.cli") == []


# ------------------------------------------------------------------------------------- the tests can fail


@pytest.fixture
def bad_tree(tmp_path: Path) -> Path:
    """A package that breaks every rule once."""
    files = {
        "adatsq_trt/__init__.py": "",
        "adatsq_trt/errors.py": "import pickle\n",
        "adatsq_trt/cli/__init__.py": "import typing\nfrom adatsq_trt import formats\n",
        "adatsq_trt/formats.py": (
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    import matplotlib\n"
            "try:\n    import torch.nn\nexcept ImportError:\n    pass\n"
            "def plot():\n    import diffusers\n"
        ),
        "adatsq_trt/search/__init__.py": "",
        "adatsq_trt/search/beam.py": "from adatsq_trt import cli\nimport adatsq_trt.engines.build\n",
        "adatsq_trt/calibration/__init__.py": "def f():\n    from adatsq_trt.search import beam\n    import onnx_ir\n",
        "engines/__init__.py": "",
        "engines/build.py": "import onnx\nimport adatsq_trt.quantizers\nfrom adatsq_trt.export import qdq\n",
        "export/__init__.py": "from adatsq_trt.errors import UserError\n",
        "benchmarks/run.py": "from adatsq_trt import cli\n",
        "benchmarks/solver/run.py": "from adatsq_trt import build\nfrom adatsq_trt.search import beam\n",
        "tests/cli/test_help.py": "from adatsq_trt import cli\n",
        "tests/test_run.py": "def f():\n    import adatsq_trt.cli.build\n",
        "export/qdq.py": "import onnx_ir\nfrom adatsq_trt.models.flux import FluxAdapter\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_wrong_arrows_are_found(bad_tree: Path) -> None:
    assert wrong_arrows(read_modules(bad_tree)) == [
        "adatsq_trt.calibration:2 imports adatsq_trt.search.beam",
        "adatsq_trt.search.beam:1 imports adatsq_trt.cli",
        "adatsq_trt.search.beam:2 imports adatsq_trt.engines.build",
        "adatsq_trt.engines.build:2 imports adatsq_trt.quantizers",
        "adatsq_trt.engines.build:3 imports adatsq_trt.export.qdq",
        "adatsq_trt.export.qdq:2 imports adatsq_trt.models.flux",
    ]


def test_users_of_the_command_line_are_found(bad_tree: Path) -> None:
    assert users_of_the_command_line(bad_tree) == [
        "adatsq_trt/search/beam.py:1 imports adatsq_trt.cli",
        "benchmarks/run.py:1 imports adatsq_trt.cli",
        "tests/test_run.py:2 imports adatsq_trt.cli.build",
    ]


def test_benchmarks_that_reach_inside_are_found(bad_tree: Path) -> None:
    assert benchmarks_that_reach_inside(bad_tree) == [
        "benchmarks/run.py:1 imports adatsq_trt.cli",
        "benchmarks/solver/run.py:2 imports adatsq_trt.search.beam",
    ]


def test_wrong_libraries_are_found(bad_tree: Path) -> None:
    assert wrong_libraries(read_modules(bad_tree)) == [
        "adatsq_trt.calibration:3 imports onnx_ir",
        "adatsq_trt.errors:1 imports pickle",
    ]


def test_heavy_startup_is_found(bad_tree: Path) -> None:
    found = heavy_at_startup(read_modules(bad_tree), "adatsq_trt.cli")
    assert found == ["adatsq_trt.cli → adatsq_trt.formats → torch.nn"]
