"""From one trace to the export folder: every distinct assignment's graph and one of all, over one weight file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import onnx_ir as ir
from onnx_ir import DataType
from onnx_ir.passes import common

from adatsq_trt.base_type import BaseName
from adatsq_trt.errors import MismatchError, OutputError, UnsupportedFormatError
from adatsq_trt.export.conditions import check_graph
from adatsq_trt.export.constant_hashes import HashedConstants
from adatsq_trt.export.emitter import BASE_TYPES, TRT_DOMAIN
from adatsq_trt.export.encode import EncodedWeight, encode_weight
from adatsq_trt.export.encode_transform import EncodedTransform, encode_transform
from adatsq_trt.export.insert_lora_slots import InsertLoraSlots
from adatsq_trt.export.insert_qdq import SCALE_SUFFIX, InsertQdq
from adatsq_trt.export.insert_transforms import InsertTransforms
from adatsq_trt.export.lower_quantizers import LowerQuantizers
from adatsq_trt.export.lower_types import LowerTypes
from adatsq_trt.export.normalize_linears import NormalizeLinears
from adatsq_trt.export.plugin_function import PLUGIN_DOMAIN
from adatsq_trt.export.restore_attention_scale import RestoreAttentionScale
from adatsq_trt.export.switch import switch
from adatsq_trt.export.trace import BATCH_AXIS
from adatsq_trt.export.weight_store import INLINE_BYTES, ExternalData
from adatsq_trt.files import atomic_path, write_json_model
from adatsq_trt.formats import TARGETS, Format, Grid, format_named
from adatsq_trt.graph_index import (
    ASSIGNMENT_INPUT,
    CONSTANTS_NAME,
    INDEX_NAME,
    LORA_PREFIX,
    SELECTOR_INPUT,
    WEIGHTS_NAME,
    GraphFile,
    GraphIndex,
    TensorSignature,
)
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import QuantizedWeight
from adatsq_trt.transforms import LayerTransform

Variant = Literal["target", "cpu", "reference"]
TARGET_FORMATS = frozenset().union(*(target.formats for target in TARGETS.values()))
REFERENCE_NAME = "reference.cpu.onnx"
LOWER_TO_CPU = ir.passes.Sequential(
    RestoreAttentionScale(), LowerTypes(), LowerQuantizers(), common.RemoveUnusedNodesPass()
)
STANDARD_VERSIONS = {"opset": 21, "ir": 10}
_FP4_VERSIONS = {"opset": 23, "ir": 11}


@dataclass(frozen=True)
class Template:
    """A trace, and the part of the model that it is of.

    Attributes:
        model: result of `trace`.
        expert: the transformer's name in a model of two, before its module paths; "" for the whole model.
    """

    model: ir.Model
    expert: str = ""

    def layers(self, policy: Policy) -> list[str]:
        """Those of a policy's layers that are in it."""
        return [layer for layer in policy.layers if not self.expert or layer.startswith(f"{self.expert}.")]

    def assignments(self, policy: Policy) -> list[int]:
        """Those of a policy's assignments that name its layers."""
        own = set(self.layers(policy))
        return [index for index, row in enumerate(policy.rows) if own & row.keys()]


def export_graphs(
    template: ir.Model | Iterable[Template],
    policy: Policy,
    weights: Mapping[str, Mapping[str, QuantizedWeight]],
    folder: Path,
    base: BaseName,
    blocks: Sequence[str],
    variants: Sequence[str],
    on_graph: Callable[[int, int], None] | None = None,
    transforms: Mapping[str, LayerTransform] = MappingProxyType({}),
    lora_slots: int | None = None,
) -> GraphIndex:
    """Write a policy's graphs, their weights and the index.

    Args:
        template: result of `trace` for the same base type; or those of several parts of the model, one after another.
            It is used up: its weights go to the folder, one by one.
        policy: assignments of the layers.
        weights: format → module path → weight.
        folder: is made, or its earlier export replaced.
        base: type of everything that is not quantized in the target graphs.
        blocks: module paths of the transformer's blocks, in order.
        variants: "target", "cpu" or both; the reference graph is always written.
        on_graph: told (graphs done, graphs in all) after each.
        transforms: module path → what the layer's weights were made for.
        lora_slots: rank of the branch for LoRAs that every layer gets, in all graphs; None for no branches.

    Raises:
        UnsupportedFormatError: variant "target" for a format that no TensorRT path holds.
        MismatchError: a layer's weight is missing, or differs between formats that share a weight grid.
        OutputError: the folder cannot be written.
    """
    _require_target_path(policy, variants)
    clear_export(folder)
    used = list[Template]()
    with atomic_path(folder / WEIGHTS_NAME) as temporary, temporary.open("wb") as file:
        store = ExternalData(file, folder)
        for own in [Template(template)] if isinstance(template, ir.Model) else template:
            NormalizeLinears(own.layers(policy))(own.model)
            if lora_slots is not None:
                InsertLoraSlots(own.layers(policy), lora_slots)(own.model)
            move_initializers(own.model, store)
            used.append(own)
        encoded = _encode_weights(policy, weights, BASE_TYPES[base], store)
        moved = encode_transforms(transforms, BASE_TYPES[base], store)
    total = len(used) + (len(policy.assignments) + len(used)) * len(variants)
    files, constants = [], HashedConstants(store.hashes)
    for own in used:
        for written in _write_all(own, policy, encoded, moved, folder, BASE_TYPES[base], variants, constants):
            files.append(written)
            if on_graph is not None:
                on_graph(len(files), total)
    size = (folder / WEIGHTS_NAME).stat().st_size
    index = GraphIndex(
        base_type=base, graphs=tuple(files), weight_bytes=size, blocks=tuple(blocks), branches=ranks(transforms)
    )
    write_json_model(folder / CONSTANTS_NAME, constants.record)
    write_json_model(folder / INDEX_NAME, index)
    return index


def _require_target_path(policy: Policy, variants: Sequence[str]) -> None:
    refused = sorted(policy.formats - TARGET_FORMATS)
    if "target" in variants and refused:
        raise UnsupportedFormatError(
            f"no TensorRT path holds {', '.join(refused)}, so there is no target graph for this policy; search among "
            f"{', '.join(sorted(TARGET_FORMATS))} with --formats, or pass --simulate to export cpu graphs only"
        )


def clear_export(folder: Path) -> None:
    """Remove an earlier export, its index first, so that no index ever speaks of other graphs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in [folder / INDEX_NAME, folder / CONSTANTS_NAME, *folder.glob("*.onnx")]:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write '{folder}': {error.strerror}; choose a folder that is writable") from error


def move_initializers(model: ir.Model, store: ExternalData) -> None:
    """Put the trace's large tensors into the store."""
    for value in model.graph.initializers.values():
        content = value.const_value
        assert content is not None
        if content.nbytes >= INLINE_BYTES:
            shape = tuple(int(size) for size in content.shape.numpy())
            value.const_value = store.add(content.tobytes(), content.dtype, shape).tensor()


def _encode_weights(
    policy: Policy, weights: Mapping[str, Mapping[str, QuantizedWeight]], base: DataType, store: ExternalData
) -> dict[tuple[str, str], EncodedWeight]:
    """(layer, format) → its place in the store, for every pair that the policy uses.

    Formats of a layer that share a weight grid share its bytes.
    """
    pairs = dict.fromkeys(pair for row in policy.rows for pair in row.items())
    encoded: dict[tuple[str, str], EncodedWeight] = {}
    stored: dict[tuple[str, Grid], str] = {}  # the first format of a layer that has a grid
    for layer, name in pairs:
        weight = weights.get(name, {}).get(layer)
        if weight is None:
            raise MismatchError(
                f"layer '{layer}': no weight in format '{name}', which the policy asks for; run 'adatsq-trt quantize' "
                f"with --formats that include {name}"
            )
        fmt = format_named(name)
        encoded[layer, name] = encode_weight(weight, fmt, base, store)
        first = stored.setdefault((layer, fmt.weight), name)
        if encoded[layer, name] != encoded[layer, first]:
            raise MismatchError(
                f"layer '{layer}': {first} and {name} have different weights, though they share a grid; run "
                "'adatsq-trt quantize' again"
            )
    return encoded


def encode_transforms(
    transforms: Mapping[str, LayerTransform], base: DataType, store: ExternalData
) -> dict[str, EncodedTransform]:
    """Module path → a layer's transform, with its place in the store."""
    return {layer: encode_transform(layer, transform, base, store) for layer, transform in transforms.items()}


def ranks(transforms: Mapping[str, LayerTransform]) -> dict[str, int]:
    """Module path → rank of the layer's branch, where there is one."""
    return {layer: own.branch.rank for layer, own in transforms.items() if own.branch is not None}


def _write_all(
    template: Template,
    policy: Policy,
    encoded: Mapping[tuple[str, str], EncodedWeight],
    transforms: Mapping[str, EncodedTransform],
    folder: Path,
    base: DataType,
    variants: Sequence[str],
    constants: HashedConstants,
) -> Iterator[GraphFile]:
    start, expert = template.model, template.expert
    if transforms:
        start = template.model.clone()
        InsertTransforms(transforms)(start)
    own, layers = template.assignments(policy), template.layers(policy)
    models = [_quantized(start, policy, index, encoded, base) for index in own]
    rows = [[policy.rows[index][layer] for layer in layers] for index in own]
    columns = zip(layers, zip(*rows, strict=True), strict=True)
    everything = {layer: [format_named(name) for name in set(column)] for layer, column in columns}
    middle = f"{expert}." if expert else ""
    for variant in _in_order(variants):
        for index, model in zip(own, models, strict=True):
            if variant == "cpu":
                LOWER_TO_CPU(model)
            formats = {layer: [format_named(name)] for layer, name in policy.rows[index].items()}
            path = folder / f"assignment_{index:03d}.{variant}.onnx"
            yield write_graph(model, path, variant, index, formats, constants, expert)
        together = switch(models, layers, rows, constants_outside=variant == "cpu")
        path = folder / f"switch.{middle}{variant}.onnx"
        file = write_graph(together, path, variant, None, everything, constants, expert)
        yield file.model_copy(update={"first_assignment": own[0]})
    reference, name = template.model.clone(), f"reference.{middle}cpu.onnx"
    LOWER_TO_CPU(reference)
    yield write_graph(reference, folder / name, "reference", None, {}, constants, expert)


def _quantized(
    template: ir.Model,
    policy: Policy,
    index: int,
    encoded: Mapping[tuple[str, str], EncodedWeight],
    base: DataType,
) -> ir.Model:
    """The graph of one assignment, as TensorRT gets it."""
    formats = {layer: format_named(name) for layer, name in policy.rows[index].items()}
    model = template.clone()
    InsertQdq(formats, {layer: encoded[layer, fmt.name] for layer, fmt in formats.items()}, base)(model)
    return model


def _in_order(variants: Sequence[str]) -> list[Variant]:
    """Target graphs come first, because they are lowered to cpu graphs in place."""
    order: tuple[Variant, ...] = ("target", "cpu")
    return [variant for variant in order if variant in variants]


def write_graph(
    model: ir.Model,
    path: Path,
    variant: Variant,
    assignment: int | None,
    formats: Mapping[str, Collection[Format]],
    constants: HashedConstants,
    expert: str = "",
) -> GraphFile:
    """Write one graph; it gets its name when it has passed the checks.

    Args:
        model: the graph; its versions are set.
        path: path of its file, beside the weight file.
        variant: as in the index.
        assignment: index into the policy's assignments; None for all of them, and for the reference.
        formats: module path → its formats.
        constants: takes in the graph's.
        expert: as in the index.
    """
    _set_versions(model)
    proto = ir.to_proto(model)
    constants.add(proto, variant, {layer: next(iter(own)).name for layer, own in formats.items() if len(own) == 1})
    with atomic_path(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
        check_graph(temporary, formats)
    scales = {
        f"{layer}.{SCALE_SUFFIX}": layer
        for layer, several in formats.items()
        if any(fmt.scaled_activation for fmt in several)
    }
    signatures = {str(value.name): _signature(value) for value in model.graph.inputs}
    slots = tuple(s for name, s in signatures.items() if name.startswith(LORA_PREFIX))
    given = [
        s
        for name, s in signatures.items()
        if name not in (*scales, ASSIGNMENT_INPUT, SELECTOR_INPUT) and s not in slots
    ]
    return GraphFile(
        path=path.name,
        variant=variant,
        assignment=assignment,
        expert=expert,
        inputs=tuple(s for s in given if s.shape[0] == BATCH_AXIS),
        position_inputs=tuple(s for s in given if s.shape[0] != BATCH_AXIS),
        lora_inputs=slots,
        outputs=tuple(_signature(value) for value in model.graph.outputs),
        scale_inputs={layer: signatures[name] for name, layer in scales.items()},
        assignment_input=signatures.get(ASSIGNMENT_INPUT),
        selector_input=signatures.get(SELECTOR_INPUT),
    )


def _set_versions(model: ir.Model) -> None:
    """FP4 types exist from opset 23 and IR version 11 on; everything else stays where older readers follow."""
    nodes = list(model.graph.all_nodes())
    operators = {node.domain for node in nodes}
    read = {value.dtype for node in nodes for value in node.inputs if value is not None}
    versions = _FP4_VERSIONS if DataType.FLOAT4E2M1 in read else STANDARD_VERSIONS
    model.opset_imports.clear()
    model.opset_imports[""] = versions["opset"]
    if TRT_DOMAIN in operators:
        model.opset_imports[TRT_DOMAIN] = 1
    if PLUGIN_DOMAIN in operators:
        model.opset_imports[PLUGIN_DOMAIN] = 1
    model.ir_version = versions["ir"]


def _signature(value: ir.Value) -> TensorSignature:
    assert value.name is not None and value.dtype is not None and value.shape is not None
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorSignature(name=value.name, dtype=value.dtype.name.lower(), shape=shape)
