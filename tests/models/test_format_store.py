"""Weights and scales on disk."""

from pathlib import Path

import pytest
import torch

from adatsq_trt.errors import DamagedFileError, MissingFileError
from adatsq_trt.files import write_tensors
from adatsq_trt.formats import FORMATS, Format
from adatsq_trt.models.format_store import SCALES_NAME, BlockFiles, load_store, save_weights, weights_name
from adatsq_trt.quantizers import QuantizedWeight, dequantize_weight, quantize_nearest

LAYERS = ("blocks.0.ff", "blocks.1.ff")


def random_weights(fmt: Format) -> dict[str, QuantizedWeight]:
    generator = torch.Generator().manual_seed(0)
    return {layer: quantize_nearest(torch.randn(8, 128, generator=generator), fmt) for layer in LAYERS}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_every_format_survives_the_disk(tmp_path: Path, fmt: Format) -> None:
    weights = random_weights(fmt)
    for layer in LAYERS:
        save_weights(tmp_path / weights_name(fmt.name, layer[:8]), {layer: weights[layer]})
    loaded = BlockFiles(tmp_path / fmt.name, LAYERS)
    assert tuple(loaded) == LAYERS
    for layer in LAYERS:
        before, after = weights[layer].tensors(), loaded[layer].tensors()
        assert list(before) == list(after)
        for part in before:
            assert before[part].dtype == after[part].dtype
            assert torch.equal(before[part].reshape(-1).view(torch.uint8), after[part].reshape(-1).view(torch.uint8))
        assert torch.equal(dequantize_weight(weights[layer], fmt), dequantize_weight(loaded[layer], fmt))


def test_a_store_is_the_wanted_formats_and_all_scales(tmp_path: Path) -> None:
    for name in ("w4a4", "fp8", "bf16"):
        save_weights(tmp_path / weights_name(name, "blocks"), random_weights(FORMATS[name]))
    scales = torch.rand(3, 2)
    write_tensors(tmp_path / SCALES_NAME, {"fp8": scales})
    store = load_store(tmp_path, ["fp8", "w4a4"], LAYERS)
    assert list(store.weights) == ["fp8", "w4a4"]
    assert torch.equal(store.scales["fp8"], scales)


def test_formats_of_one_weight_grid_share_what_is_stored(tmp_path: Path) -> None:
    save_weights(tmp_path / weights_name("w4a3", "blocks"), random_weights(FORMATS["w4a3"]))
    save_weights(tmp_path / weights_name("fp8", "blocks"), random_weights(FORMATS["fp8"]))
    write_tensors(tmp_path / SCALES_NAME, {"fp8": torch.rand(3, 2)})
    store = load_store(tmp_path, ["w4a3", "fp8", "w4a4", "w4a6"], LAYERS)
    assert list(store.weights) == ["w4a3", "fp8", "w4a4", "w4a6"]
    assert store.weights["w4a3"] is store.weights["w4a4"] is store.weights["w4a6"]
    assert store.weights["w4a3"] is not store.weights["fp8"]


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    file = tmp_path / weights_name("w4a4", "blocks")
    save_weights(file, random_weights(FORMATS["w4a4"]))
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DamagedFileError, match=r"w4a4/blocks\.safetensors' is not a complete safetensors file"):
        BlockFiles(file.parent, LAYERS)


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    file = tmp_path / weights_name("w4a4", "blocks")
    save_weights(file, random_weights(FORMATS["w4a4"]))
    with pytest.raises(DamagedFileError, match=r"w4a4' has no weight for layer 'blocks\.2\.ff'"):
        BlockFiles(file.parent, [*LAYERS, "blocks.2.ff"])


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="w4a4' holds no weights"):
        load_store(tmp_path, ["w4a4"], LAYERS)
    save_weights(tmp_path / weights_name("w4a4", "blocks"), random_weights(FORMATS["w4a4"]))
    with pytest.raises(MissingFileError, match=SCALES_NAME):
        load_store(tmp_path, ["w4a4"], LAYERS)
