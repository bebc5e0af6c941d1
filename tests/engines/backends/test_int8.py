"""Which INT8 product sessions ask for, on whatever processor this runs."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from adatsq_trt.engines.backends import int8
from adatsq_trt.engines.backends.int8 import PRECISE_PRODUCTS
from adatsq_trt.engines.backends.onnxruntime import OnnxRuntimeBackend


@pytest.fixture(autouse=True)
def _not_decided_yet() -> Iterator[None]:
    int8.precise_products_needed.cache_clear()
    yield
    int8.precise_products_needed.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(int8, "processor", lambda: ("some processor", frozenset(flags)))


def saturated(codes: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product as AVX2's vpmaddubsw computes it: unsigned codes, neighbours added in 16 bits."""
    shifted, wide = codes.astype(np.int64) + 128, weight.astype(np.int64)
    even, odd = shifted[:, 0::2, None] * wide[None, 0::2], shifted[:, 1::2, None] * wide[None, 1::2]
    return np.clip(even + odd, -(2**15), 2**15 - 1).sum(axis=1) - 128 * wide.sum(axis=0)


def setting(path: Path) -> str:
    """What a session of the backend asks for."""
    with OnnxRuntimeBackend().load(path) as runner:
        return str(runner._session.get_session_options().get_session_config_entry(PRECISE_PRODUCTS))


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "graph.onnx"
    path.write_bytes(int8._product(int8.saturating_operands()[1]))
    return path


def test_the_proof_is_wrong_everywhere_where_sixteen_bits_saturate() -> None:
    codes, weight = int8.saturating_operands()
    exact = codes.astype(np.int64) @ weight
    assert (np.abs(exact) < 2**24).all(), "float32 holds the sums exactly"
    assert (saturated(codes, weight) != exact).all()


def test_the_proof_runs_the_product_that_graphs_run(graph: Path, tmp_path: Path) -> None:
    """Else it would prove nothing: fused to integers, not float32 on dequantized numbers."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    assert b"MatMulIntegerToFloat" in (tmp_path / "optimized.onnx").read_bytes()


@pytest.mark.parametrize("flags", [(), ("avx2",), ("avx2", "avx512f")])
def test_without_vnni_the_precise_product_is_asked_for(
    flags: tuple[str, ...], graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, *flags)
    assert setting(graph) == "1"


@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni"])
def test_with_vnni_the_proof_decides(
    flag: str, graph: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, "avx2", flag)
    assert setting(graph) == ("0" if int8.fast_products_are_right() else "1")

    class Saturating:
        """A double for ONNX Runtime on a processor that lists VNNI and has the old product all the same."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def run(self, _names: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [saturated(feed["x"], int8.saturating_operands()[1]).astype(np.float32)]

    int8.precise_products_needed.cache_clear()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(onnxruntime, "InferenceSession", Saturating)
        assert int8.precise_products_needed()
    assert "lists VNNI, but INT8 products of ONNX Runtime saturate" in caplog.text


@pytest.mark.parametrize("rows", [1, 2, 16, 67])
def test_products_of_the_backend_are_right_on_this_processor(rows: int, graph: Path) -> None:
    codes, weight = int8.saturating_operands()
    with OnnxRuntimeBackend().load(graph) as runner:
        got = runner.run({"x": codes[:rows].astype(np.float32)})["y"]
    np.testing.assert_array_equal(got, codes[:rows].astype(np.int64) @ weight)
