"""Types of fields in files that may come from elsewhere.

What they hold goes on into paths, commands, config.pbtxt and terminals, and sizes go on into allocations. So a field
takes only what it needs.
"""

from __future__ import annotations

import re
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field


def _only(pattern: str, expected: str) -> AfterValidator:
    def require(text: str) -> str:
        if re.fullmatch(pattern, text, re.ASCII) is None:
            raise ValueError(f"expected {expected}")
        return text

    return AfterValidator(require)


# Of models, libraries, versions, GPUs: "digits-flux", "owner/model", "2.13.0+cpu". No segment begins with a dot.
Name: TypeAlias = Annotated[
    str, _only(r"\w[\w.+-]{0,99}(/\w[\w.+-]{0,99})?", "up to 100 letters, digits, '_', '.', '+' and '-'")
]
# Of modules, and of the tensors that are called after them: "transformer_blocks.0.attn.to_q".
ModulePath: TypeAlias = Annotated[str, _only(r"\w+(\.\w+)*", "letters, digits and '_', with dots between")]
Count: TypeAlias = Annotated[int, Field(ge=1)]
# A size, or what a dynamic one is called.
Dimension: TypeAlias = Count | Annotated[str, _only(r"[A-Za-z_]\w*", "a number or a name")]
