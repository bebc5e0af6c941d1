"""How every kernel is cut into tiles on every target: `tuning.json`, measured or by default.

Standard library only, because the GPU script runs beside torch and the Triton language alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from adatsq_trt.errors import DamagedFileError, MissingFileError

TABLE = Path(__file__).with_name("tuning.json")
_SCHEMA_VERSION = 1
_LARGEST = 1024  # of any number in a row
_ADVICE = "restore the file that ships with the package, or write one with 'adatsq-trt benchmark kernels --tune'"


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut.

    Attributes:
        block_m: tokens of a tile.
        block_n: output features of a tile.
        block_k: elements of K at a time; the group, for weights in groups.
        group_m: blocks of tokens that run together, so that they share weights in the L2 cache.
        num_warps: warps of a program.
        num_stages: loads in flight, in iterations.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Place:
    """Kernel, target and group that a tile is tuned for.

    Attributes:
        kernel: its name.
        target: such as sm90.
        group: elements of K that share a weight scale; 0 where there are no groups.
    """

    kernel: str
    target: str
    group: int


Tiles = Mapping[Place, tuple[Tile, ...]]


def load_tiles(path: Path = TABLE) -> Tiles:
    """Read a table of tiles, those for few tokens first.

    Raises:
        MissingFileError: no such file.
        DamagedFileError: not JSON, of another schema version, or with wrong fields.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFileError(f"'{path}' does not exist; {_ADVICE}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"'{path}' is not complete JSON ({error}); {_ADVICE}") from error
    got = content.get("schema_version") if isinstance(content, dict) else None
    if got != _SCHEMA_VERSION:
        raise DamagedFileError(f"'{path}' has schema version {got}, expected {_SCHEMA_VERSION}; {_ADVICE}")
    rows = content.get("tiles", [])
    if not isinstance(rows, list):
        raise DamagedFileError(f"'{path}': got {rows!r} as tiles, expected a list; {_ADVICE}")
    table: dict[Place, list[Tile]] = {}
    for number, row in enumerate(rows):
        try:
            place, tile = _parse(row)
        except (TypeError, ValueError) as error:
            raise DamagedFileError(f"'{path}', row {number} of tiles: {error}; {_ADVICE}") from error
        table.setdefault(place, []).append(tile)
    return {place: tuple(sorted(tiles, key=lambda tile: tile.block_m)) for place, tiles in table.items()}


def _parse(row: object) -> tuple[Place, Tile]:
    if not isinstance(row, dict):
        raise TypeError(f"got {row!r}, expected an object")
    names = [field.name for field in fields(Place)]
    place = Place(**{name: value for name, value in row.items() if name in names})
    tile = Tile(**{name: value for name, value in row.items() if name not in names})
    if not (isinstance(place.kernel, str) and isinstance(place.target, str) and type(place.group) is int):
        raise TypeError(f"got {place}, expected two names and a number")
    for name, value in asdict(tile).items():
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise ValueError(f"{name}: got {value!r}, expected a number from 1 to {_LARGEST}")
        if value & (value - 1) and name not in ("group_m", "num_stages"):
            raise ValueError(f"{name}: got {value}, expected a power of two")
    if place.group and tile.block_k != place.group:
        raise ValueError(f"block_k: got {tile.block_k}, expected the group, {place.group}")
    return place, tile


def dump_tiles(tiles: Tiles, origin: str) -> str:
    """The table as JSON, one row to a line.

    Args:
        tiles: the table.
        origin: one sentence: where the tiles come from.
    """
    rows: Iterable[str] = (json.dumps({**asdict(place), **asdict(tile)}) for place in tiles for tile in tiles[place])
    head = f'"schema_version": {_SCHEMA_VERSION},\n  "origin": {json.dumps(origin)},\n  "tiles": [\n    '
    return "{\n  " + head + ",\n    ".join(rows) + "\n  ]\n}\n"


def tile_for(tiles: tuple[Tile, ...], m: int) -> Tile:
    """The tile for so many tokens, as the plugin picks it: the lowest that holds them all, else the highest."""
    return next((tile for tile in tiles if tile.block_m >= m), tiles[-1])
