"""The table of tiles: what ships, and files that somebody else wrote."""

import json
from pathlib import Path

import pytest

from adatsq_trt.errors import DamagedFileError, MissingFileError
from adatsq_trt.plugins.aot import variants
from adatsq_trt.plugins.catalog import TARGETS
from adatsq_trt.plugins.tiles import Place, dump_tiles, load_tiles

ROW = {"kernel": "gemm_w4a8", "target": "sm90", "group": 64}
TILE = {"block_m": 16, "block_n": 64, "block_k": 64, "group_m": 8, "num_warps": 4, "num_stages": 3}


def test_shipped_table_covers_everything_with_a_tile_for_few_and_for_many_tokens() -> None:
    gemms = [v for v in variants(TARGETS, load_tiles()) if v.place.kernel.startswith("gemm")]
    assert {v.place.target for v in gemms} == set(TARGETS)
    for place in {v.place for v in gemms}:
        heights = [tile.block_m for tile in load_tiles()[place]]
        assert heights[0] == 16
        assert heights[-1] >= 64


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file, tiles = tmp_path / "tuning.json", dict(load_tiles())
    file.write_text(dump_tiles(tiles, 'by "hand"'))
    assert load_tiles(file) == tiles


def test_tiles_for_few_tokens_come_first(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    file.write_text(json.dumps({"schema_version": 1, "tiles": [ROW | TILE | {"block_m": 128}, ROW | TILE]}))
    assert [tile.block_m for tile in load_tiles(file)[Place("gemm_w4a8", "sm90", 64)]] == [16, 128]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not complete JSON"),
        ("[]", "has schema version None, expected 1"),
        ('{"schema_version": 2}', "has schema version 2, expected 1"),
        ('{"schema_version": 1, "tiles": [7]}', "row 0 of tiles: got 7, expected an object"),
        (ROW | TILE | {"block_n": 48}, "row 0 of tiles: block_n: got 48, expected a power of two"),
        (ROW | TILE | {"num_stages": 0}, "num_stages: got 0"),
        (ROW | TILE | {"block_m": 1 << 60}, "block_m: got 1152921504606846976, expected a number from 1 to 1024"),
        (ROW | TILE | {"target": ["sm90"]}, "expected two names and a number"),
        ('{"schema_version": 1, "tiles": 7}', "got 7 as tiles, expected a list"),
        (ROW | TILE | {"block_k": 128}, "block_k: got 128, expected the group, 64"),
        (ROW | TILE | {"colour": 3}, "unexpected keyword argument 'colour'"),
        (TILE, "missing 3 required positional arguments"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, content: str | dict[str, object], message: str) -> None:
    file = tmp_path / "tuning.json"
    file.write_text(content if isinstance(content, str) else json.dumps({"schema_version": 1, "tiles": [content]}))
    with pytest.raises(DamagedFileError, match=message):
        load_tiles(file)


def test_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="benchmark kernels --tune"):
        load_tiles(tmp_path / "tuning.json")


def test_a_target_without_tiles_is_refused() -> None:
    tiles = {place: tile for place, tile in load_tiles().items() if place != Place("gemm_w4a8", "sm90", 64)}
    with pytest.raises(DamagedFileError, match="none for gemm_w4a8 with group 64 on sm90"):
        list(variants(("sm90",), tiles))
