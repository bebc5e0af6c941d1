import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adatsq_trt.plugins import embed


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit kernels.json in place."""
    content = json.loads((folder / "kernels.json").read_text())
    edit(content)
    (folder / "kernels.json").write_text(json.dumps(content))


def test_table_is_ordered_by_tile_and_complete(kernels: Path) -> None:
    table, digest = embed.read_kernels(kernels)
    assert len(table) == len(list(kernels.glob("*.cubin")))
    tiles = [k["block_m"] for k in table if (k["kernel"], k["target"], k["dtype"]) == ("gemm_w8a8", "sm80", "fp16")]
    assert tiles == [16, 64]
    source = embed.source_of(kernels, table, digest)
    assert source.count(".incbin") == len(table)
    assert f"kKernelCount = {len(table)};" in source


def test_x_beside_x_scale_is_the_quantized_x(kernels: Path) -> None:
    table, digest = embed.read_kernels(kernels)
    source = embed.source_of(kernels, table, digest)
    symbol = {name: next(i for i, k in enumerate(table) if k["kernel"] == name) for name in ("gemm_w8a8", "gemm_16")}
    assert f"kParameters{symbol['gemm_w8a8']}[] = {{{{Argument::kQ, true}}, {{Argument::kXScale, true}}" in source
    assert f"kParameters{symbol['gemm_16']}[] = {{{{Argument::kX, true}}" in source


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.update(schema_version=2), "schema version 2; expected 1"),
        (lambda c: c["kernels"][0].update(file="gone.cubin"), "there is no cubin"),
        (lambda c: c["kernels"][0].update(file="../kernels/kernels.json"), "there is no cubin"),
        (lambda c: c["kernels"][0].update(sha256="0" * 64), "is not the cubin whose sha256"),
        (lambda c: c["kernels"][0]["parameters"][0].update(name="stride"), "parameter 'stride' of type 'pointer'"),
        (lambda c: c["kernels"][0]["parameters"][0].update(type="int32"), "parameter 'x' of type 'int32'"),
    ],
)
def test_what_is_wrong_is_said(kernels: Path, edit: Callable[[dict[str, Any]], object], words: str) -> None:
    change(kernels, edit)
    with pytest.raises(embed.EmbedError, match=words):
        embed.read_kernels(kernels)


def test_script_fails_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert embed.main([str(tmp_path), str(tmp_path / "out.cpp")]) == 2
    assert "kernels.json" in capsys.readouterr().err
    assert not (tmp_path / "out.cpp").exists()
