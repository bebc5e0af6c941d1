"""Packing against its inverse and against ONNX."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from adatsq_trt.packing import join_planes, pack_nibbles, split_planes, unpack_nibbles
from adatsq_trt.quantizers import decode_e2m1


def unpacked(packed: torch.Tensor, count: int) -> list[int]:
    """`count` codes in [0, 15], the earlier in the low nibble."""
    return [code for byte in packed.tolist() for code in (byte & 15, byte >> 4)][:count]


@given(st.lists(st.integers(-8, 7), max_size=33))
def test_signed_round_trip(values: list[int]) -> None:
    packed = pack_nibbles(torch.tensor(values, dtype=torch.int8))
    assert packed.dtype is torch.uint8
    assert len(packed) == (len(values) + 1) // 2
    assert [code - 16 * (code > 7) for code in unpacked(packed, len(values))] == values


@given(st.lists(st.integers(0, 15), max_size=33))
def test_unsigned_round_trip(values: list[int]) -> None:
    packed = pack_nibbles(torch.tensor(values, dtype=torch.uint8))
    assert unpacked(packed, len(values)) == values


@pytest.mark.parametrize("stored", [torch.uint8, torch.int8])
def test_unpacking_inverts_packing(stored: torch.dtype) -> None:
    codes = (torch.arange(48, dtype=torch.int8).reshape(3, 16) % 16) - 8
    packed = pack_nibbles(codes).view(stored).reshape(3, 8)
    assert unpack_nibbles(packed).dtype is torch.int8
    assert torch.equal(unpack_nibbles(packed), codes)


def test_rows_are_packed_in_memory_order() -> None:
    assert pack_nibbles(torch.tensor([[1, 2], [3, -1]], dtype=torch.int8)).tolist() == [0x21, 0xF3]


@pytest.mark.parametrize("count", [16, 7])
def test_layout_is_that_of_onnx_int4(count: int) -> None:
    values = torch.arange(count, dtype=torch.int8) - 8
    expected = helper.make_tensor("w", onnx.TensorProto.INT4, [count], values.tolist())
    assert bytes(pack_nibbles(values).tolist()) == onnx_bytes(expected)


def test_layout_is_that_of_onnx_float4() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    expected = helper.make_tensor("w", onnx.TensorProto.FLOAT4E2M1, [16], decode_e2m1(codes).tolist())
    assert bytes(pack_nibbles(codes).tolist()) == onnx_bytes(expected)


def onnx_bytes(tensor: onnx.TensorProto) -> bytes:
    """Packed content of a 4-bit tensor, in whichever field the helper put it."""
    return tensor.raw_data or np.array(tensor.int32_data, np.uint8).tobytes()


def test_planes_of_every_code() -> None:
    codes = torch.arange(-120, 120, dtype=torch.int8)
    high, low = split_planes(codes)
    assert high.dtype is low.dtype is torch.int8
    assert (high.min(), high.max(), low.min(), low.max()) == (-7, 7, -8, 7)
    assert torch.equal(join_planes(high, low), codes)
    assert (codes - 16 * high).abs().max() == 8  # the nearest multiple of 16
