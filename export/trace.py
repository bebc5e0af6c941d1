"""One trace of a model, in the 16-bit type of its target graphs.

The trace runs in 16 bit, instead of converting a float32 graph afterwards, so that the graph keeps the mixed precision
that diffusers gives to rotary frequencies, timestep embeddings and normalizations.
"""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

from adatsq_trt.base_type import keeps_float32
from adatsq_trt.errors import AdatsqError
from adatsq_trt.export.name_nodes import NameNodes
from adatsq_trt.export.widen_convolutions import WidenConvolutions

# FP4 needs opset 23, but with it the exporter writes attention as one `Attention` node, which TensorRT-RTX 1.7 refuses
# wherever it has no fused kernel. Every operator that opset 21 exports means the same in 23.
OPSET = 21
BATCH_AXIS = "batch"


def trace(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    output: str,
    base: torch.dtype,
    float32_inputs: Collection[str] = (),
    positions: Mapping[str, Tensor] | None = None,
    axes: Mapping[str, Mapping[int, Any]] | None = None,
    part: str = "",
) -> ir.Model:
    """Export a module once, with a dynamic batch and, for several sizes, other dynamic axes.

    Args:
        module: positional tensors in, one tensor out (`ModelAdapter.trace_module`); it is left as it is.
        inputs: an example, name → [batch, ...] float32, in the order of the module's arguments.
        output: name of the graph's output.
        base: bfloat16, float16 or float32: type of the parameters, inputs and output.
        float32_inputs: names of inputs that stay float32.
        positions: name → float32, without a batch: arguments of the module before the others; they stay float32.
        axes: name → axis → `torch.export.Dim`, of what differs between sizes beside the batch.
        part: name of one of several modules, before all module paths and constants.

    Returns:
        An opset 21 graph. Its nodes are named by module path, which they also carry as metadata (`name_nodes`).

    Raises:
        AdatsqError: the module computes with the number of rows, or with an axis of `axes`, as a constant.
    """
    positions, axes = positions or {}, axes or {}
    twin = _twin(module, base)
    batch = torch.export.Dim(BATCH_AXIS)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            twin,
            (
                *positions.values(),
                *(_example(v, torch.float32 if n in float32_inputs else base) for n, v in inputs.items()),
            ),
            dynamo=True,
            opset_version=OPSET,
            input_names=[*positions, *inputs],
            output_names=[output],
            dynamic_shapes=(
                *(dict(axes.get(name, {})) for name in positions),
                *({0: batch, **axes.get(name, {})} for name in inputs),
            ),
            verbose=False,
            optimize=False,
        )
        model = _optimized(program)
    _require_dynamic(model, {**{name: {0} for name in inputs}, output: {0}}, axes)
    _name_axes(model)
    tidy = (NameNodes(_wrapper_prefix(module), part), WidenConvolutions(), common.RemoveUnusedNodesPass())
    ir.passes.Sequential(*tidy)(model)
    return model


def _twin(module: nn.Module, base: torch.dtype) -> nn.Module:
    """A copy whose parameters are in the base type."""
    # Buffers keep their type: they hold position ids and frequencies, which forward casts where it wants to. Parameters
    # are copied in the base type at once, since a copy in float32 first would take three times the memory, and not at
    # all where they have it: nothing here changes them.
    memo: dict[int, object] = {}
    for name, parameter in module.named_parameters():
        dtype = torch.float32 if keeps_float32(module, name) else base
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
    return copy.deepcopy(module, memo).eval()


def _optimized(program: torch.onnx.ONNXProgram | None) -> ir.Model:
    """The exporter's own optimization, after which no weight is known but those of the model.

    It writes some weights anew, and its rules, which live as long as the process, remember the graph with the others.
    """
    assert program is not None, "the exporter was given no file, so it returns the program"
    before = list(program.model.graph.initializers.values())
    program.optimize()
    kept = {id(value) for value in program.model.graph.initializers.values()}
    for value in before:
        if id(value) not in kept:
            value.const_value = None
    return program.model


def _require_dynamic(
    model: ir.Model, batched: Mapping[str, Collection[int]], axes: Mapping[str, Mapping[int, Any]]
) -> None:
    """The exporter does not complain when a module turns a dynamic axis into a number, by len() or int()."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        name = str(value.name)
        wanted = {*batched.get(name, ()), *axes.get(name, ())}
        if value.shape is None or any(isinstance(value.shape[axis], int) for axis in wanted):
            raise AdatsqError(
                f"'{value.name}' has the shape {value.shape} in the traced graph, expected any number of rows"
                f"{' and sizes' if axes else ''}; use x.shape[0] or -1 in the trace module where it uses len(x) or a "
                "number"
            )


def _name_axes(model: ir.Model) -> None:
    """Axes that the exporter calls by a formula, such as 2*rows, get a plain name."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([size if isinstance(size, int) else _plain(str(size.value)) for size in value.shape])


def _plain(formula: str) -> str:
    name = re.sub(r"\W+", "_", formula)
    return name if name.isidentifier() else f"_{name}"


def _example(value: Tensor, base: torch.dtype) -> Tensor:
    """An input in the base type; a batch of one is doubled, since the exporter would take it for a constant."""
    batch = torch.cat([value, value]) if len(value) == 1 else value
    return batch.to(base) if batch.is_floating_point() else batch


def _wrapper_prefix(module: nn.Module) -> str:
    """The trace wrapper's own name for the model, which users do not know: "transformer." or nothing."""
    children = [name for name, _ in module.named_children()]
    return f"{children[0]}." if len(children) == 1 else ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's remarks on optional packages and on its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
