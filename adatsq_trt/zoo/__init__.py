"""Small trained models that ship with the package, and how they were trained."""

from __future__ import annotations

from pathlib import Path

ZOO_FOLDER = Path(__file__).parent / "weights"


def zoo_models() -> dict[str, Path]:
    """Name → folder of every model that ships with the package."""
    return {path.parent.name: path.parent for path in sorted(ZOO_FOLDER.glob("*/model_index.json"))}
