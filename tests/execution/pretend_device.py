"""A device that is not there: its tensors lie apart from the processor's, but the processor computes with them.

It stands in for a GPU: a tensor that was forgotten on the way there makes an operation fail. The arithmetic is the
processor's, put together from other operations in places. What a GPU's own arithmetic does to numbers it cannot show.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_JOINS = (torch.ops.aten.cat.default, torch.ops.aten.stack.default)
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_libraries: list[torch.library.Library] = []


def pretend_device() -> torch.device:
    """The device; the first call makes PyTorch know it."""
    if not _libraries:
        _setup_privateuseone_for_python_backend(NAME)
        library = torch.library.Library("_", "IMPL")
        library.fallback(lambda operation, *args, **kwargs: _compute(operation, args, kwargs), "PrivateUse1")
        _libraries.append(library)
    return torch.device(NAME, 0)


class PretendTensor(Tensor):
    """A tensor there."""

    content: Tensor  # of the processor

    @staticmethod
    def __new__(cls, content: Tensor) -> "PretendTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            content.size(),
            strides=content.stride(),
            storage_offset=content.storage_offset(),
            dtype=content.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.content = content
        return tensor

    def tolist(self) -> Any:
        """PyTorch has this for tensors of its own classes only."""
        return self.content.tolist()

    def data_ptr(self) -> int:
        """Where the content lies: a wrapper has no memory of its own."""
        return self.content.data_ptr()

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _compute(operation, args, dict(kwargs or {}))


def _compute(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    # A number of the processor may take part, but be neither changed nor joined to tensors there.
    strict = operation._schema.is_mutable or operation in _JOINS
    strangers = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor) and (strict or tensor.dim())]
    if strangers and operation not in _COPIES:
        raise RuntimeError(f"{operation}: expected all tensors to be on one device, found {NAME} and cpu")
    device = kwargs.get("device")
    own_args, own_kwargs = tree_map_only(PretendTensor, lambda tensor: tensor.content, (args, kwargs))
    if device is not None:
        own_kwargs["device"] = torch.device("cpu")
    result = operation(*own_args, **own_kwargs)
    if device is not None and torch.device(device).type == "cpu":
        return result
    if operation is torch.ops.aten.copy_.default:
        return args[0]
    wrapped = tree_map_only(Tensor, PretendTensor, result)
    return return_and_correct_aliasing(operation, args, kwargs, wrapped) if tensors else wrapped
