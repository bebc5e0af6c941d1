"""onnx's own evaluator for `target` graphs: 16-bit types, FP8, the one operator that ONNX does not have, exact sums."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx.helper import tensor_dtype_to_np_dtype
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_layer_normalization, op_softmax
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType

_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
_SIXTEEN_BITS = (ml_dtypes.bfloat16, np.float16)


class TRT_FP4DynamicQuantize(OpRun):  # noqa: N801  (evaluators find an operator by its class name)
    """TensorRT's dynamic FP4 quantization: e2m1 elements, an e4m3 scale per block, under a given global scale.

    With amax the block's largest magnitude and g the global scale: scale = e4m3(amax / (6 g)),
    element = e2m1(x / (scale g)); a block whose scale is zero becomes zeros.
    """

    op_domain = "trt"

    def _run(
        self, x: np.ndarray, global_scale: np.ndarray, axis: int = -1, block_size: int = 16, scale_type: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Quantize along the last axis.

        Args:
            x: [..., K], any floating type.
            global_scale: float32 [].
            axis: the last.
            block_size: elements that share a scale.
            scale_type: e4m3, the only type that TensorRT has.

        Returns:
            e2m1 [..., K] and e4m3 [..., K / block_size].
        """
        if axis not in (-1, x.ndim - 1) or scale_type not in (0, onnx.TensorProto.FLOAT8E4M3FN):
            raise ValueError(f"axis {axis}, scale_type {scale_type}: expected the last axis and FLOAT8E4M3FN")
        blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, block_size)
        largest = np.abs(blocks).max(axis=-1) / (np.float32(_E2M1_MAX) * np.float32(global_scale))
        scales = np.minimum(largest, np.float32(_E4M3_MAX)).astype(ml_dtypes.float8_e4m3fn)
        steps = (scales.astype(np.float32) * np.float32(global_scale))[..., None]
        points = np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0)
        return np.clip(points, -_E2M1_MAX, _E2M1_MAX).reshape(x.shape).astype(ml_dtypes.float4_e2m1fn), scales


def _summed_in_float32(
    operator: Callable[..., Sequence[np.ndarray]], inputs: Sequence[np.ndarray], attributes: Mapping[str, Any]
) -> tuple[np.ndarray, ...]:
    """An operator of onnx's that sums, computed in float32 and rounded once, as TensorRT and PyTorch compute it.

    onnx sums in the type of its inputs. In bfloat16 a sum of ones ends at 256, where one is half a step: a softmax over
    512 equal scores so gives twice its weights, and the mean of 3,072 features a twelfth of it.
    """
    wide = [value.astype(np.float32) if value.dtype in _SIXTEEN_BITS else value for value in inputs]
    return tuple(output.astype(inputs[0].dtype) for output in operator(*wide, **attributes))


class Softmax(op_softmax.Softmax):
    """Along one axis."""

    op_domain = ""

    def _run(self, *inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
        """As onnx has it, with a wide sum."""
        return _summed_in_float32(super()._run, inputs, attributes)


class LayerNormalization(op_layer_normalization.LayerNormalization):
    """Over the last axes; ONNX itself says that mean and deviation are float32 (`stash_type`)."""

    op_domain = ""

    def _run(self, *inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
        """As onnx has it, with wide sums."""
        return _summed_in_float32(super()._run, inputs, attributes)


OPERATORS = (TRT_FP4DynamicQuantize, Softmax, LayerNormalization)


class ReferenceRunner(BaseRunner):  # type: ignore[misc]
    """polygraphy runner around onnx's ReferenceEvaluator: float32 at the borders, the graph's own types inside."""

    def __init__(self, model: onnx.ModelProto, name: str) -> None:
        """Wrap a model.

        Args:
            model: with its weights inside.
            name: of the runner in results.
        """
        super().__init__(name=name)
        self._model = model

    def activate_impl(self) -> None:
        """Prepare the evaluator."""
        self._evaluator = ReferenceEvaluator(_without_overloads(self._model), new_ops=list(OPERATORS))

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Inputs as polygraphy feeds them: 16-bit types as float32."""
        metadata = TensorMetadata()
        for value in self._model.graph.input:
            dtype = np.dtype(tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
            wide = DataType.from_dtype(np.dtype(np.float32) if dtype in _SIXTEEN_BITS else dtype)
            metadata.add(value.name, wide, [-1] * len(value.type.tensor_type.shape.dim))
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        """Round the inputs to the graph's types, evaluate, widen the outputs."""
        types = {v.name: tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in self._model.graph.input}
        outputs = self._evaluator.run(None, {name: feed_dict[name].astype(types[name]) for name in types})
        self.inference_time = 0.0
        return OrderedDict(
            (value.name, np.asarray(output).astype(np.float32))
            for value, output in zip(self._model.graph.output, outputs, strict=True)
        )

    def deactivate_impl(self) -> None:
        """Free the evaluator."""
        del self._evaluator


def _without_overloads(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with a name of its own for every function: onnx's evaluator does not know overloads."""
    same = onnx.ModelProto()
    same.CopyFrom(model)
    for function in same.functions:
        function.name += function.overload
        function.ClearField("overload")
    for node in same.graph.node:
        node.op_type += node.overload
        node.ClearField("overload")
    return same
