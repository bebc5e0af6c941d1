"""Usage: python -m scripts.docs_rooms: draw the rooms of the package and their imports in docs/architecture.md.

An arrow goes from a room to one that it imports from; those that follow from others are left out. What `TYPE_CHECKING`
guards counts too, since it is what a reader has to know.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms:begin -->", "<!-- rooms:end -->"
BESIDE = ("engines", "export", "plugins")
# Single modules that are drawn as one room.
TOGETHER = {
    **dict.fromkeys(
        (
            *(
                "base_type",
                "config",
                "errors",
                "fields",
                "files",
                "formats",
                "graph_index",
                "image",
                "loading",
                "policy",
                "progress",
            ),
            *("schedule", "settings", "solver", "step_policy", "timed_kernels", "transformer_call"),
        ),
        "data types",
    ),
    **dict.fromkeys(("packing", "quantizers"), "tensor functions"),
    **dict.fromkeys(("api", "results"), "api"),
}


def room_of(module: str) -> str | None:
    """The room of a dotted name; None for the package itself and for other packages."""
    package, _, rest = module.partition(".")
    if package != "adatsq_trt" or not rest:
        return None
    area = rest.partition(".")[0]
    return TOGETHER.get(area, area)


def arrows(root: Path) -> dict[str, set[str]]:
    """Room → rooms that it imports from."""
    found: dict[str, set[str]] = {}
    for folder in ("adatsq_trt", *BESIDE):
        for file in sorted((root / folder).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            room = room_of(".".join(parts if folder == "adatsq_trt" else ("adatsq_trt", *parts)))
            if room is None or (parts[1:] == ("__init__",) and folder == "adatsq_trt"):
                continue
            found.setdefault(room, set()).update(other for other in _imported(file) if other != room)
    return found


def _imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names if not alias.name.startswith("__")]
        yield from (room for name in names if (room := room_of(name)) is not None)


def reduced(rooms: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that do not follow from others."""

    def beyond(room: str) -> set[str]:
        seen, waiting = set[str](), [*rooms.get(room, ())]
        while waiting:
            other = waiting.pop()
            if other not in seen:
                seen.add(other)
                waiting += rooms.get(other, ())
        return seen

    return {
        room: {one for one in others if not any(one in beyond(other) for other in others - {one})}
        for room, others in rooms.items()
    }


def drawing(root: Path) -> str:
    """The marked part of the document, as Mermaid has it."""
    lines = [BEGIN, "```mermaid", "flowchart TD"]
    found = reduced(arrows(root))
    names = {
        room: room.replace(" ", "_") for room in sorted({*found, *(o for others in found.values() for o in others)})
    }
    lines += [f'    {name}["{room}"]' for room, name in names.items()]
    lines += [f"    {names[room]} --> {names[other]}" for room in sorted(found) for other in sorted(found[room])]
    return "\n".join([*lines, "```", END])


def redrawn(text: str, root: Path) -> str:
    """A document with its marked part made anew."""
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return before + drawing(root) + after


def main() -> None:
    """Redraw."""
    DOCUMENT.write_text(redrawn(DOCUMENT.read_text(encoding="utf-8"), ROOT), encoding="utf-8")


if __name__ == "__main__":
    main()
