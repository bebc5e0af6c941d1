"""The export folder of layout `plugin`: one graph whose linear layers are plugin nodes, for all assignments.

plugin.target.onnx        with the local functions, for parsers that prefer a plugin to a function
plugin.target.plain.onnx  without them, for parsers that do not
plugin.cpu.onnx           the same nodes and functions in a float32 graph, for ONNX Runtime without bfloat16 kernels
reference.cpu.onnx        the unquantized model
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir
from onnx_ir.passes import common

from adatsq_trt.base_type import BaseName
from adatsq_trt.errors import MismatchError
from adatsq_trt.export.constant_hashes import HashedConstants
from adatsq_trt.export.emitter import BASE_TYPES
from adatsq_trt.export.encode import tensor_bytes
from adatsq_trt.export.graphs import (
    LOWER_TO_CPU,
    REFERENCE_NAME,
    STANDARD_VERSIONS,
    clear_export,
    encode_transforms,
    move_initializers,
    ranks,
    write_graph,
)
from adatsq_trt.export.insert_plugin import InsertPlugin
from adatsq_trt.export.insert_transforms import InsertTransforms
from adatsq_trt.export.lower_types import LowerTypes
from adatsq_trt.export.normalize_linears import NormalizeLinears
from adatsq_trt.export.plugin_function import PLUGIN_OP, NodeKind, plugin_function
from adatsq_trt.export.plugin_operands import (
    Operand,
    fused_smoothing,
    group_size,
    plugin_operands,
    require_plugin_formats,
    require_plugin_shapes,
)
from adatsq_trt.export.restore_attention_scale import RestoreAttentionScale
from adatsq_trt.export.weight_store import ExternalData, StoredTensor
from adatsq_trt.files import atomic_path, write_json_model
from adatsq_trt.formats import FORMATS
from adatsq_trt.graph_index import CONSTANTS_NAME, INDEX_NAME, WEIGHTS_NAME, GraphFile, GraphIndex
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import QuantizedWeight
from adatsq_trt.transforms import LayerTransform

GRAPHS = 4  # how often export_plugin_graphs reports
_WIDEN = ir.passes.Sequential(RestoreAttentionScale(), LowerTypes(), common.RemoveUnusedNodesPass())


def export_plugin_graphs(
    template: ir.Model,
    policy: Policy,
    weights: Mapping[str, Mapping[str, QuantizedWeight]],
    folder: Path,
    base: BaseName,
    blocks: Sequence[str],
    on_graph: Callable[[], None] = lambda: None,
    transforms: Mapping[str, LayerTransform] = MappingProxyType({}),
) -> GraphIndex:
    """Write a policy's plugin graph, its weights and the index.

    A layer whose 4-bit codes are the high plane of its 8-bit ones is stored as two planes, each once.

    Args:
        template: result of `trace` for the same base type. It is used up: its weights go to the folder, one by one.
        policy: assignments of the layers.
        weights: format → module path → weight.
        folder: is made, or its earlier export replaced.
        base: type of activations and of everything that is not quantized: bfloat16 or float16.
        blocks: module paths of the transformer's blocks, in order.
        on_graph: called GRAPHS times.
        transforms: module path → what the layer's weights were made for. A node divides its input itself where its
            kernels can (`fused_smoothing`).

    Raises:
        UnsupportedFormatError: a format or a layer's shape that the plugin has no kernel for.
        MismatchError: a layer's weight is missing.
        OutputError: the folder cannot be written.
    """
    profiles = dict(zip(policy.layers, zip(*policy.assignments, strict=True), strict=True))
    require_plugin_formats({name for column in profiles.values() for name in column})
    own = {layer: _weights_of(layer, column, weights) for layer, column in profiles.items()}
    require_plugin_shapes({layer: next(iter(several.values())).codes.shape for layer, several in own.items()})
    NormalizeLinears(policy.layers)(template)
    clear_export(folder)
    with atomic_path(folder / WEIGHTS_NAME) as temporary, temporary.open("wb") as file:
        store = ExternalData(file, folder)
        move_initializers(template, store)
        groups = {layer: group_size(weights) for layer, weights in own.items()}
        operands, before = {}, dict(transforms)
        for layer, column in profiles.items():
            operands[layer] = _store(plugin_operands(layer, own.pop(layer)), store)
            smoothing = fused_smoothing(transforms[layer], column) if layer in transforms else None
            if smoothing is not None:
                operands[layer] = _store({"smoothing": smoothing}, store) | operands[layer]
                del before[layer]
        encoded = encode_transforms(before, BASE_TYPES[base], store)
    model = template.clone()
    InsertTransforms(encoded)(model)
    InsertPlugin(profiles, operands, groups)(model)
    constants = HashedConstants(store.hashes)
    files = _write_all(template, model, profiles, folder, constants, on_graph)
    size = (folder / WEIGHTS_NAME).stat().st_size
    index = GraphIndex(
        base_type=base, graphs=files, weight_bytes=size, blocks=tuple(blocks), branches=ranks(transforms)
    )
    write_json_model(folder / CONSTANTS_NAME, constants.record)
    write_json_model(folder / INDEX_NAME, index)
    return index


def _weights_of(
    layer: str, column: Sequence[str], weights: Mapping[str, Mapping[str, QuantizedWeight]]
) -> dict[str, QuantizedWeight]:
    """A layer's weight in the formats that the policy gives to it."""
    missing = [name for name in column if layer not in weights.get(name, {})]
    if missing:
        raise MismatchError(
            f"layer '{layer}': no weight in format '{missing[0]}', which the policy asks for; run 'adatsq-trt "
            f"quantize' with --formats that include {missing[0]}"
        )
    return {name: weights[name][layer] for name in dict.fromkeys(column)}


def _store(operands: Mapping[str, Operand], store: ExternalData) -> dict[str, StoredTensor]:
    return {
        name: store.add(tensor_bytes(operand.content), operand.dtype, tuple(operand.content.shape))
        for name, operand in operands.items()
    }


def _write_all(
    template: ir.Model,
    model: ir.Model,
    profiles: Mapping[str, Sequence[str]],
    folder: Path,
    constants: HashedConstants,
    on_graph: Callable[[], None],
) -> tuple[GraphFile, ...]:
    formats = {layer: [FORMATS[name] for name in set(column)] for layer, column in profiles.items()}
    plain = write_graph(model, folder / "plugin.target.plain.onnx", "target", None, formats, constants)
    on_graph()
    _add_functions(model, in_float32=False)
    target = write_graph(model, folder / "plugin.target.onnx", "target", None, formats, constants)
    on_graph()
    model.functions.clear()
    _WIDEN(model)
    _add_functions(model, in_float32=True)
    cpu = write_graph(model, folder / "plugin.cpu.onnx", "cpu", None, formats, constants)
    on_graph()
    LOWER_TO_CPU(template)
    reference = write_graph(template, folder / REFERENCE_NAME, "reference", None, {}, constants)
    on_graph()
    return target.model_copy(update={"plain_path": plain.path}), cpu, reference


def _add_functions(model: ir.Model, in_float32: bool) -> None:
    """One function for each kind of node in the graph."""
    for node in model.graph:
        if node.op_type == PLUGIN_OP and node.op_identifier() not in model.functions:
            values = node.attributes
            kind = NodeKind(
                tuple(values["profiles"].as_string().split(",")),
                tuple(values["inputs"].as_string().split(",")),
                values["group_size"].as_int(),
            )
            model.functions[node.op_identifier()] = plugin_function(kind, STANDARD_VERSIONS["opset"], in_float32)
