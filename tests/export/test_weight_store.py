import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir import DataType

from adatsq_trt.export.weight_store import INLINE_BYTES, ExternalData, reinterpret
from adatsq_trt.graph_index import WEIGHTS_NAME


@pytest.fixture
def store(tmp_path):
    with (tmp_path / WEIGHTS_NAME).open("wb") as file:
        yield ExternalData(file, tmp_path)


def test_the_same_bytes_are_stored_once_whatever_their_type(store):
    content = bytes(range(256)) * 4
    first = store.add(content, DataType.INT8, (1024,))
    store.add(b"\1" * 1000, DataType.INT8, (1000,))
    again = store.add(content, DataType.FLOAT16, (512,))
    assert (first.offset, first.length) == (again.offset, again.length)


def test_offsets_are_aligned_and_the_content_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    contents = [rng.integers(0, 256, size, dtype=np.uint8) for size in (1001, 2000, 1 << 20)]
    with (tmp_path / WEIGHTS_NAME).open("wb") as file:
        store = ExternalData(file, tmp_path)
        stored = [store.add(content.tobytes(), DataType.UINT8, content.shape) for content in contents]
    for place, content in zip(stored, contents, strict=True):
        np.testing.assert_array_equal(place.tensor().numpy(), content)
    assert [place.offset % 64 for place in stored] == [0, 0, 0]
    assert stored[-1].offset % 4096 == 0


def test_small_tensors_stay_in_the_graph(store):
    small = store.add(b"\1" * (INLINE_BYTES - 1), DataType.UINT8, (INLINE_BYTES - 1,))
    assert not isinstance(small.tensor(), ir.ExternalTensor)
    large = store.add(b"\1" * INLINE_BYTES, DataType.UINT8, (INLINE_BYTES,))
    assert isinstance(large.tensor(), ir.ExternalTensor)


@pytest.mark.parametrize("count", [16, 4096])
def test_reinterpret_reads_the_same_bytes(tmp_path, count):
    packed = np.random.default_rng(0).integers(0, 256, count // 2, dtype=np.uint8)
    with (tmp_path / WEIGHTS_NAME).open("wb") as file:
        tensor = ExternalData(file, tmp_path).add(packed.tobytes(), DataType.FLOAT4E2M1, (count,)).tensor()
    codes = reinterpret(tensor, DataType.UINT4)
    assert codes.dtype == DataType.UINT4
    np.testing.assert_array_equal(codes.numpy().astype(np.uint8)[::2], packed & 15)
    np.testing.assert_array_equal(codes.numpy().astype(np.uint8)[1::2], packed >> 4)
