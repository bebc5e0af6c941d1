"""The one external weight file: every distinct content once, whatever graphs and types read it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
from onnx_ir import DataType

from adatsq_trt.graph_index import WEIGHTS_NAME

# Smaller tensors stay in the graph: TensorRT and ONNX Runtime want shapes and axes there. The cpu variant widens them
# from 16 to 32 bit, hence two limits.
INLINE_BYTES = 512
INLINE_LIMIT_BYTES = 2 * INLINE_BYTES
_PAGE_BYTES, _LINE_BYTES, _LARGE_BYTES = 4096, 64, 1 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are.

    Attributes:
        dtype: element type; 4-bit types lie two to a byte.
        shape: in elements.
        content: the bytes, when they are so few that they stay in the graph.
        offset: else their place in the weight file.
        length: in bytes.
        folder: the weight file's folder.
    """

    dtype: DataType
    shape: tuple[int, ...]
    content: bytes | None
    offset: int
    length: int
    folder: Path

    def tensor(self) -> ir.TensorProtocol:
        """A new initializer's content."""
        if self.content is not None:
            return ir.serde.deserialize_tensor(
                onnx.TensorProto(data_type=self.dtype.value, dims=self.shape, raw_data=self.content)
            )
        shape = ir.Shape(self.shape)
        return ir.ExternalTensor(
            WEIGHTS_NAME, self.offset, self.length, self.dtype, shape=shape, name="", base_dir=self.folder
        )


class ExternalData:
    """Appends tensors to the weight file."""

    def __init__(self, file: BinaryIO, folder: Path) -> None:
        """Start an empty store.

        Args:
            file: open for writing, at its beginning.
            folder: folder in which the file will be found under the name WEIGHTS_NAME.
        """
        self._file, self._folder = file, folder
        self._offsets: dict[bytes, int] = {}

    @property
    def hashes(self) -> dict[int, bytes]:
        """Offset → sha256 of the content that was to be put there."""
        return {offset: digest for digest, offset in self._offsets.items()}

    def add(self, content: bytes, dtype: DataType, shape: tuple[int, ...]) -> StoredTensor:
        """Store a tensor, unless the same bytes are there already."""
        if len(content) < INLINE_BYTES:
            return StoredTensor(dtype, shape, content, 0, len(content), self._folder)
        digest = hashlib.sha256(content).digest()
        if digest not in self._offsets:
            self._offsets[digest] = self._append(content)
        return StoredTensor(dtype, shape, None, self._offsets[digest], len(content), self._folder)

    def _append(self, content: bytes) -> int:
        """Write at the next aligned place: large tensors on a page, so that they can be mapped into memory."""
        unit = _PAGE_BYTES if len(content) >= _LARGE_BYTES else _LINE_BYTES
        self._file.write(b"\0" * (-self._file.tell() % unit))
        offset = self._file.tell()
        self._file.write(content)
        return offset


def reinterpret(tensor: ir.TensorProtocol, dtype: DataType) -> ir.TensorProtocol:
    """The same bytes read as another type of the same width."""
    shape = tuple(int(size) for size in tensor.shape.numpy())
    if not isinstance(tensor, ir.ExternalTensor):
        return ir.serde.deserialize_tensor(
            onnx.TensorProto(data_type=dtype.value, dims=shape, raw_data=tensor.tobytes())
        )
    place, folder = (tensor.location, tensor.offset, tensor.length), tensor.base_dir
    return ir.ExternalTensor(*place, dtype, shape=ir.Shape(shape), name="", base_dir=folder)
