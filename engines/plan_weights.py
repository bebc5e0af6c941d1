"""Layout `shared`: plans without weights, and the one store that all of them are bound to.

The store is a safetensors file. Each tensor begins at a multiple of 256 bytes of the data section, so that one copy of
that section to a GPU leaves every tensor where TensorRT can read it. Four-bit tensors lie two elements to a byte, low
nibble first, as "U8".

A plan without weights is mostly source text for the driver to compile, with one preamble for every kernel. So it is
kept compressed, at a fraction of its size.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_tensor, uses_external_data

from adatsq_trt.engines.bundle import REBUILD, PlanFile
from adatsq_trt.errors import DamagedFileError
from adatsq_trt.files import atomic_path
from adatsq_trt.graph_index import GraphIndex

STORE_NAME = "store.safetensors"
ALIGNMENT_BYTES = 256
_PADDING = "padding."
_PRESET = 1  # higher ones take longer and save little
_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "F32",
    TensorProto.FLOAT16: "F16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.FLOAT8E4M3FN: "F8_E4M3",
    TensorProto.INT8: "I8",
    TensorProto.INT4: "U8",
    TensorProto.FLOAT4E2M1: "U8",
}
_FOUR_BITS = (TensorProto.INT4, TensorProto.FLOAT4E2M1)


@dataclass(frozen=True)
class Weight:
    """A tensor of the export folder's weight file, as a graph reads it.

    Attributes:
        offset: in the weight file.
        length: in bytes.
        dtype: ONNX element type.
        shape: in elements.
    """

    offset: int
    length: int
    dtype: int
    shape: tuple[int, ...]


def name_weights(path: Path) -> dict[Weight, str]:
    """The weights that engines need and their names in the store: those of the graph of all assignments.

    Args:
        path: `switch.target.onnx`, where every name is unique.
    """
    model = onnx.load(path, load_external_data=False)
    names: dict[Weight, str] = {}
    for tensor in initializers(model.graph):
        weight = weight_of(tensor)
        if weight is not None:
            names.setdefault(weight, tensor.name)
    return names


def name_all_weights(folder: Path, index: GraphIndex) -> dict[Weight, str]:
    """The same of a whole export; one place that two transformers read has one name.

    Args:
        folder: of the graphs.
        index: of them.
    """
    together = [graph.path for graph in index.graphs if (graph.variant, graph.assignment) == ("target", None)]
    return {weight: name for path in together for weight, name in name_weights(folder / path).items()}


def initializers(graph: GraphProto) -> Iterator[TensorProto]:
    """The constants of a graph and its subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from initializers(attribute.g)


def weight_of(tensor: TensorProto) -> Weight | None:
    """A large tensor of a type that can be a network's input; None for the rest, which stays inside the plan.

    Raises:
        ValueError: the graph does not say, or says nonsense about, where it lies.
    """
    if not uses_external_data(tensor) or tensor.data_type not in _TYPES:
        return None
    place = ExternalDataInfo(tensor)
    if place.length is None:
        raise ValueError(f"tensor '{tensor.name}' has no length")
    return Weight(place.offset or 0, place.length, tensor.data_type, tuple(tensor.dims))


def self_contained(tensor: TensorProto, folder: Path) -> TensorProto:
    """A copy of a constant with its content inside.

    Args:
        tensor: of a graph.
        folder: folder of the graph's external data.
    """
    copy = TensorProto()
    copy.CopyFrom(tensor)
    if uses_external_data(copy):
        load_external_data_for_tensor(copy, str(folder))
        copy.ClearField("external_data")
        copy.data_location = TensorProto.DEFAULT
    return copy


def without_weights(path: Path, names: Mapping[Weight, str]) -> ModelProto:
    """A graph that takes its weights as inputs, under their names in the store; self-contained otherwise.

    Args:
        path: an assignment's target graph.
        names: of `name_weights`.
    """
    model = onnx.load(path, load_external_data=False)
    renamed, kept, inputs = dict[str, str](), list[TensorProto](), dict[str, Weight]()
    for tensor in model.graph.initializer:
        weight = weight_of(tensor)
        if weight is not None:
            renamed[tensor.name] = names[weight]
            inputs[names[weight]] = weight
            continue
        kept.append(self_contained(tensor, path.parent))
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for name, weight in inputs.items():
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, weight.dtype, weight.shape))
    return model


def write_store(path: Path, weights_file: Path, names: Mapping[Weight, str]) -> int:
    """Write the store, whole or not at all.

    Args:
        path: of the store.
        weights_file: the export folder's weight file.
        names: of `name_weights`.

    Returns:
        Bytes of the weights, without padding and header.

    Raises:
        DamagedFileError: the weight file ends before a weight does.
        OutputError: the folder cannot be written.
    """
    needed, held = max((weight.offset + weight.length for weight in names), default=0), weights_file.stat().st_size
    if needed > held:
        raise DamagedFileError(
            f"'{weights_file}': got {held} bytes, its graphs need {needed}; run 'adatsq-trt export' again"
        )
    header, end = dict[str, object](), 0
    for weight, name in names.items():
        header[name] = _entry(_TYPES[weight.dtype], _stored_shape(weight), end, weight.length)
        end += weight.length
        padding = -end % ALIGNMENT_BYTES
        if padding:  # safetensors allows no holes
            header[f"{_PADDING}{len(header)}"] = _entry("U8", (padding,), end, padding)
            end += padding
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT_BYTES)
    with atomic_path(path) as temporary, temporary.open("wb") as file, weights_file.open("rb") as source:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in names:
            source.seek(weight.offset)
            file.write(source.read(weight.length))
            file.write(bytes(-weight.length % ALIGNMENT_BYTES))
    return sum(weight.length for weight in names)


def store_difference(store: Path, weights_file: Path, names: Mapping[Weight, str]) -> str | None:
    """The first weight of a store that is not the weight file's, as a sentence; None where all are the same.

    Args:
        store: the store that the plans are bound to.
        weights_file: the export folder's.
        names: of `name_all_weights`.

    Raises:
        DamagedFileError: the store is not a safetensors file.
    """
    with store.open("rb") as stored, weights_file.open("rb") as source:
        try:
            size = int.from_bytes(stored.read(8), "little")
            header = json.loads(stored.read(size))
            places = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
            kinds = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedFileError(f"'{store}' is not a complete safetensors file ({error}); {REBUILD}") from error
        lost = sorted(set(names.values()) ^ {name for name in places if not name.startswith(_PADDING)})
        if lost:
            return f"'{lost[0]}' is in the store or among the graph's weights, but not in both"
        for weight, name in names.items():
            begin, end = places[name]
            stored.seek(8 + size + begin)
            source.seek(weight.offset)
            kind = (_TYPES[weight.dtype], _stored_shape(weight))
            if kinds[name] != kind or stored.read(end - begin) != source.read(weight.length):
                return f"'{name}' is not what '{weights_file.name}' holds"
    return None


def pack_plan(plan: bytes) -> bytes:
    """A plan, compressed; the same plan gives the same bytes."""
    return lzma.compress(plan, preset=_PRESET)


def read_plan(folder: Path, plan: PlanFile) -> bytes:
    """A plan as its compiler gave it.

    Args:
        folder: of the bundle, whose hashes hold.
        plan: its entry in the manifest.

    Raises:
        DamagedFileError: the file does not hold a compressed plan of the size that the manifest says.
    """
    content, size = (folder / plan.path).read_bytes(), plan.unpacked_bytes
    if size is None:
        return content
    try:
        unpacked = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(content, max_length=size + 1)
    except lzma.LZMAError as error:
        raise DamagedFileError(f"'{folder / plan.path}' is not a compressed plan ({error}); {REBUILD}") from error
    if len(unpacked) != size:
        raise DamagedFileError(
            f"'{folder / plan.path}': got {len(unpacked)} bytes unpacked, the manifest says {size}; {REBUILD}"
        )
    return unpacked


def _entry(dtype: str, shape: tuple[int, ...], begin: int, length: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + length]}


def _stored_shape(weight: Weight) -> tuple[int, ...]:
    if weight.dtype not in _FOUR_BITS:
        return weight.shape
    return (*weight.shape[:-1], weight.shape[-1] // 2)
