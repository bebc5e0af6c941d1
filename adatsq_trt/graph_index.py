"""Index of an export folder: written by `export`, read by `engines`, so that neither imports the other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from adatsq_trt.fields import Dimension, ModulePath

INDEX_NAME = "index.json"
WEIGHTS_NAME = "weights.data"
CONSTANTS_NAME = "constants.json"
ASSIGNMENT_INPUT = "assignment"  # of a graph that holds all assignments: which one, as a scalar int32
LORA_PREFIX = "lora."  # of the inputs that take the matrices of LoRAs at run time
SELECTOR_INPUT = "selector"  # of a graph with plugin nodes: its extent, not its values, says which assignment


class TensorSignature(BaseModel):
    """Name, element type and shape of a graph's input or output.

    Attributes:
        name: as in the graph.
        dtype: ONNX name in lower case: "float", "bfloat16", "float16".
        shape: a string stands for a dynamic dimension.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ModulePath
    dtype: str
    shape: tuple[Dimension, ...]


class GraphFile(BaseModel):
    """One ONNX file.

    Attributes:
        path: file name, relative to the index.
        variant: "target" is the graph for TensorRT; "cpu" is the same assignment in portable operators and float32;
            "reference" is the unquantized model in portable operators and float32.
        assignment: index into the policy's assignments; None for the reference, and for a graph of all assignments.
        expert: the transformer that it computes, in a bundle of two; "" in others. There a graph of all assignments and
            a reference are of one expert.
        first_assignment: of a graph of all assignments of an expert: index of the one that it knows as 0.
        inputs: inputs with a row for each sample and guidance branch.
        position_inputs: of a graph for several sizes: inputs that tell one size from another, without rows.
        lora_inputs: of a graph with slots for LoRAs: the inputs of `lora_inputs` for each layer, without rows.
        outputs: the one output.
        scale_inputs: for each layer with a static activation scale: module path → its scalar float32 input.
        assignment_input: of a graph that switches between assignments: the scalar that takes an assignment's index.
        selector_input: of a graph of layout `plugin`: int32 [1, k], of any content, selects the k-th assignment.
        plain_path: of a target graph of layout `plugin`: the same without its local functions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    variant: Literal["target", "cpu", "reference"]
    assignment: int | None
    expert: str = ""
    first_assignment: int = 0
    inputs: Annotated[tuple[TensorSignature, ...], Field(min_length=1)]
    outputs: tuple[TensorSignature]
    position_inputs: tuple[TensorSignature, ...] = ()
    lora_inputs: tuple[TensorSignature, ...] = ()
    scale_inputs: dict[str, TensorSignature]
    assignment_input: TensorSignature | None = None
    selector_input: TensorSignature | None = None
    plain_path: str | None = None


class GraphIndex(BaseModel):
    """The export folder's table of contents.

    Attributes:
        base_type: 16-bit type of everything that is not quantized in the target graphs.
        graphs: every ONNX file.
        weights: the one external weight file, relative to the index.
        weight_bytes: its size.
        blocks: module paths of the transformer's blocks, in order: units that `check` cuts out.
        branches: module path → rank of the 16-bit branch beside the layer, of layers that have one: its matrices are
            the constants "<module path>.branch_down" [K, rank] and "<module path>.branch_up" [rank, N].
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[2] = 2
    base_type: Literal["bfloat16", "float16", "float32"]
    graphs: tuple[GraphFile, ...]
    weights: str = WEIGHTS_NAME
    weight_bytes: int
    blocks: tuple[ModulePath, ...]
    branches: dict[ModulePath, int] = {}

    def blocks_of(self, expert: str) -> tuple[str, ...]:
        """Those of one of two transformers; all of them for ""."""
        return tuple(block for block in self.blocks if not expert or block.startswith(f"{expert}."))

    def find(self, variant: str, assignment: int | None, expert: str | None = None) -> GraphFile:
        """The graph of an assignment in a variant, or with None the one of all: of an expert where it is named.

        Raises:
            KeyError: there is none.
        """
        for graph in self.graphs:
            if graph.variant == variant and graph.assignment == assignment and expert in (None, graph.expert):
                return graph
        raise KeyError(f"no {variant} graph for assignment {assignment}{f' of {expert}' if expert else ''}")


def lora_inputs(layer: str) -> tuple[str, str]:
    """Name the graph inputs of a layer's slot: down [K, rank] and up [rank, N]."""
    return f"{LORA_PREFIX}{layer}.down", f"{LORA_PREFIX}{layer}.up"


class ConstantHashes(BaseModel):
    """Hashes of the constants that the exporter put into its graphs, by which `check` finds any bit that has changed.

    Attributes:
        variants: variant of the graph → `constant_key` → `constant_hash`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    variants: dict[str, dict[str, str]]


def constant_key(name: str, formats: Mapping[str, str]) -> str:
    """Name a constant among those of all graphs of a variant: "<name>@<format>" for one of a layer.

    Args:
        name: in the graph: begins with the layer's module path, then "." or "/".
        formats: module path → format in this graph.
    """
    ends = [place for place, letter in enumerate(name) if letter in "./"]
    layer = next((name[:end] for end in ends if name[:end] in formats), None)
    return name if layer is None or "@" in name else f"{name}@{formats[layer]}"


def constant_hash(data_type: int, shape: Sequence[int], content_sha256: bytes) -> str:
    """Hash of a constant: of its ONNX element type, its shape and its bytes."""
    return hashlib.sha256(f"{data_type} {list(shape)} ".encode() + content_sha256).hexdigest()
