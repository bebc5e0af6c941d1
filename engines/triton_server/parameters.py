"""Named values that come with a request beside its tensors: unknown ones are refused, and messages cut long ones."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from adatsq_trt.errors import UnknownNameError, UserError

# What the server, its clients and the protocol put there themselves (docs/protocol/extension_parameters.md of Triton
# server); `id` is the request's own in generate.
_RESERVED = frozenset(
    ("binary_data_output", "headers", "id", "priority", "sequence_end", "sequence_id", "sequence_start", "timeout")
)
_RESERVED_PREFIX = "triton_"
_SHOWN_CHARACTERS = 80


def read_parameters(text: str, known: Sequence[str], inputs: Collection[str]) -> dict[str, object]:
    """A request's parameters by name, without those that are the server's own.

    Fields of `generate` that are no inputs come as parameters too.

    Args:
        text: JSON object, as the server hands it over; empty for none.
        known: names that the model reads.
        inputs: names of the model's inputs.

    Raises:
        UserError: a name that the model does not read, the name of an input, or a name that is given twice.
    """
    found: dict[str, object] = {}
    for name, value in json.loads(text or "{}", object_pairs_hook=list):
        if name in _RESERVED or name.startswith(_RESERVED_PREFIX):
            continue
        if name in inputs:
            raise UserError(f"'{name}' is an input, not a parameter: put it beside 'parameters', not into it")
        if name not in known:
            raise UnknownNameError("request field", cut(name), [*known, *sorted(inputs)])
        if name in found:
            raise UserError(f"parameter '{name}' is given twice; give it once")
        found[name] = value
    return found


def cut(text: str) -> str:
    """Shorten a client's text for a message: to its beginning where it is long."""
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
