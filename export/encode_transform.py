"""A layer's transform as graphs hold it: constants of the base type, in the one weight file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from onnx_ir import DataType
from torch import Tensor

from adatsq_trt.errors import MismatchError
from adatsq_trt.export.encode import TORCH_TYPES, tensor_bytes
from adatsq_trt.export.weight_store import ExternalData, StoredTensor
from adatsq_trt.transforms import LayerTransform


@dataclass(frozen=True)
class EncodedMap:
    """x → x · inverse, turned by the rotation; equal for layers that are given the same tensor.

    Attributes:
        inverse: 1 / divisor, [K]; None for ones.
        rotation: R of every block of channels, [block, block]; None for 1.
    """

    inverse: StoredTensor | None = None
    rotation: StoredTensor | None = None


@dataclass(frozen=True)
class EncodedBranch:
    """x̃ → x̃ · down · up, turned as a product reads them.

    Attributes:
        down: [K, rank].
        up: [rank, N].
    """

    down: StoredTensor
    up: StoredTensor


@dataclass(frozen=True)
class EncodedTransform:
    """A layer's transform.

    Attributes:
        input_map: of its input.
        branch: None where nothing stays in 16 bits.
    """

    input_map: EncodedMap
    branch: EncodedBranch | None = None


def encode_transform(layer: str, transform: LayerTransform, base: DataType, store: ExternalData) -> EncodedTransform:
    """Store the parts of a transform.

    Args:
        layer: module path, for messages.
        transform: made for graphs.
        base: type of what is not quantized.
        store: where the bytes go.

    Raises:
        MismatchError: a part has numbers that the base type does not hold.
    """

    def stored(part: Tensor) -> StoredTensor:
        narrow = part.to(TORCH_TYPES[base])
        if not torch.equal(narrow.float(), part):
            raise MismatchError(
                f"layer '{layer}': its transform has numbers that {base.name.lower()} does not hold, since it was made "
                "for a simulated run; run 'adatsq-trt quantize' without --simulate"
            )
        return store.add(tensor_bytes(narrow), base, tuple(part.shape))

    given, branch = transform.input_map, transform.branch
    return EncodedTransform(
        EncodedMap(
            None if given.divisor is None else stored(given.divisor.reciprocal()),
            None if given.rotation is None else stored(given.rotation),
        ),
        None if branch is None else EncodedBranch(stored(branch.down.mT), stored(branch.up.mT)),
    )
