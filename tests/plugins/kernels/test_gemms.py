"""Every GEMM in the interpreter against its reference, on shapes that do not fit its tiles.

The bound is that of Reference.bound: the last rounding to 16 bits, and as many float32 roundings before it as there are
operations. Nothing is added to it.
"""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adatsq_trt.packing import pack_nibbles, unpack_nibbles
from adatsq_trt.plugins.catalog import GROUPS, KERNELS
from adatsq_trt.plugins.kernels import cases, gemm_float, gemm_int4, gemm_int8, quantize
from adatsq_trt.plugins.kernels.cases import GEMMS, Case, Problem
from adatsq_trt.plugins.kernels.reference import Reference
from adatsq_trt.plugins.tiles import Tile

DTYPES = (torch.float16, torch.bfloat16)
NAMES = [(name, group) for name in GEMMS for group in KERNELS[name].groups]
SMALL = Tile(16, 16, 32, 2, 4, 2)


def inner(name: str, group: int) -> st.SearchStrategy[int]:
    """Any K that the kernel takes."""
    if group:
        return st.integers(1, 3).map(lambda groups: groups * group)
    return st.integers(1, 4).map(lambda k: 32 * k) if name.endswith("_nested") else st.integers(1, 100)


@st.composite
def problems(draw: st.DrawFn, name: str, group: int) -> tuple[Problem, Tile]:
    """A shape with tails in all directions, and a tile."""
    shape = draw(st.integers(1, 50)), draw(st.integers(1, 50)), draw(inner(name, group))
    block = st.sampled_from((16, 32))
    tile = Tile(draw(block), draw(block), group or draw(st.sampled_from((32, 64))), draw(st.integers(1, 3)), 4, 2)
    return Problem(*shape, draw(st.sampled_from(DTYPES)), draw(st.booleans()), draw(st.integers(0, 99))), tile


def error_of_bound(y: Tensor, case: Case, reference: Reference) -> float:
    """Largest error, in units of what is allowed; NaN where something was not written."""
    bound = reference.bound(y.dtype, case.roundings, case.unit)
    return float(((y.double() - reference.value).abs() / bound).max())


@pytest.mark.parametrize(("name", "group"), NAMES)
@settings(max_examples=25)
@given(data=st.data())
def test_result_is_the_reference_s_up_to_rounding(name: str, group: int, data: st.DataObject) -> None:
    problem, tile = data.draw(problems(name, group))
    case = GEMMS[name](problem, group)
    assert error_of_bound(case.launch(tile), case, case.reference()) <= 1


@pytest.mark.parametrize(("name", "group"), NAMES)
def test_the_bound_is_tight(name: str, group: int) -> None:
    """On few summands the result's own rounding is nearly all of it, and it does occur."""
    case = GEMMS[name](Problem(50, 50, group or 32, torch.bfloat16), group)
    tile = Tile(16, 16, group or 32, 2, 4, 2)
    assert 0.8 < error_of_bound(case.launch(tile), case, case.reference()) <= 1


def with_one_wrong(packed: Tensor) -> Tensor:
    """Unpacked codes of which one is off by one."""
    codes = unpack_nibbles(packed)
    codes[3, 5] += -1 if codes[3, 5] > 0 else 1
    return codes


@pytest.mark.parametrize("name", ["gemm_w8a8_nested", "gemm_w8a16_nested", "gemm_w4a8", "gemm_w4a16"])
def test_one_wrong_nibble_is_seen(name: str) -> None:
    group = 0 if name.endswith("_nested") else 64
    problem = Problem(20, 20, 128, torch.float16)
    case = GEMMS[name](problem, group)
    y = case.launch(Tile(16, 16, 64, 2, 4, 2))
    with pytest.MonkeyPatch.context() as patch:
        for module in (gemm_float, gemm_int4, gemm_int8):
            patch.setattr(module, "unpack_nibbles", with_one_wrong)
        assert error_of_bound(y, case, case.reference()) > 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_beside_y(dtype: torch.dtype) -> None:
    m, n, k = 17, 19, 33
    room = torch.full((m * n + 2048,), 7.0, dtype=dtype)
    y = room[1024 : 1024 + m * n].view(m, n)
    x, w = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
    cases.gemm(gemm_float.gemm_16, (x, w), None, y, k, SMALL)
    assert (y == k).all()
    assert (room[:1024] == 7).all()
    assert (room[1024 + m * n :] == 7).all()


def test_sums_of_int8_are_exact_at_their_largest() -> None:
    """2^24 is where float32 sums would begin to lose units."""
    k = 1500
    x, w = torch.full((1, k), 127, dtype=torch.int8), torch.full((1, k), 127, dtype=torch.int8)
    w[0, 0] = 126
    scale, y = torch.tensor([2.0**-24]), torch.empty(1, 1, dtype=torch.float16)
    exact = 127 * 127 * k - 127
    assert exact > 2**24
    cases.gemm(gemm_int8.gemm_w8a8, (x, torch.ones(1), w, scale), None, y, k, SMALL)
    assert float(y) == float(torch.tensor(exact * 2.0**-24, dtype=torch.float16))


def test_nested_planes_are_one_int8_weight() -> None:
    """The same weights nested and plain give the same bits."""
    generator = torch.Generator().manual_seed(0)
    high = torch.randint(-7, 8, (24, 64), generator=generator, dtype=torch.int8)
    low = torch.randint(-8, 8, (24, 64), generator=generator, dtype=torch.int8)
    q, x_scale = quantize.quantize_tokens_reference(torch.randn(5, 64, generator=generator).half(), None)
    w_scale, y = torch.rand(24, generator=generator), torch.empty(2, 5, 24, dtype=torch.float16)
    planes = [pack_nibbles(plane).view(torch.int8).reshape(24, -1) for plane in (high, low)]
    cases.gemm(gemm_int8.gemm_w8a8, (q, x_scale, 16 * high + low, w_scale), None, y[0], 64, SMALL)
    nested = (quantize.even_odd(q), x_scale, *planes, w_scale)
    cases.gemm(gemm_int8.gemm_w8a8_nested, nested, None, y[1], 64, SMALL)
    assert torch.equal(y[0], y[1])


def test_nested_planes_are_one_int8_weight_beside_16_bit_activations() -> None:
    """Powers of two as activations: every sum is exact in any order."""
    generator = torch.Generator().manual_seed(0)
    high = torch.randint(-7, 8, (24, 64), generator=generator, dtype=torch.int8)
    low = torch.randint(-8, 8, (24, 64), generator=generator, dtype=torch.int8)
    x = torch.randint(-2, 3, (5, 64), generator=generator).half() / 4
    w_scale, y = torch.rand(24, generator=generator), torch.empty(2, 5, 24, dtype=torch.float16)
    planes = [pack_nibbles(plane).view(torch.int8).reshape(24, -1) for plane in (high, low)]
    cases.gemm(gemm_float.gemm_w8a16, (x, 16 * high + low, w_scale), None, y[0], 64, SMALL)
    cases.gemm(gemm_float.gemm_w8a16_nested, (x, *planes, w_scale), None, y[1], 64, SMALL)
    assert torch.equal(y[0], y[1])


@pytest.mark.parametrize("name", KERNELS)
def test_catalog_lists_the_parameters_in_their_order(name: str) -> None:
    kernel = KERNELS[name]
    names = getattr(importlib.import_module(f"adatsq_trt.plugins.kernels.{kernel.module}"), name).arg_names
    parameters = [parameter for parameter, _ in kernel.parameters]
    assert names[: len(parameters)] == parameters
    assert all(rest.isupper() for rest in names[len(parameters) :])


def test_groups_are_those_of_the_catalog() -> None:
    assert {group for _, group in NAMES} == {0, *GROUPS}
    assert {name for name, _ in NAMES} | {"quantize_tokens", "quantize_fp8"} == set(KERNELS)


@pytest.mark.parametrize("group_m", [1, 2, 3, 8])
def test_every_tile_is_computed(group_m: int) -> None:
    """y is NaN before, so a missing tile shows. There are 5 blocks of tokens, so the last group is often cut."""
    m, n = 70, 50
    y = torch.full((m, n), torch.nan, dtype=torch.float16)
    bias, zeros = torch.ones(n, dtype=torch.float16), torch.zeros(m, 16, dtype=torch.float16)
    tile = Tile(16, 16, 16, group_m, 4, 2)
    cases.gemm(gemm_float.gemm_16, (zeros, torch.zeros(n, 16, dtype=torch.float16)), bias, y, 16, tile)
    assert (y == 1).all()
