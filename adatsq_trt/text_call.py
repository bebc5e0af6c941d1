"""How a pipeline's text encoders make the condition of a transformer from a prompt, as data.

The family of a pipeline says it, a bundle's manifest carries it, and a server that is given text does what it says: so
it needs no code for each family.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, JsonValue, NonNegativeInt

from adatsq_trt.fields import Name


def inside(path: str) -> str:
    """A path in a folder, as a model's field takes it.

    Raises:
        ValueError: it leads out of the folder.
    """
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise ValueError(f"'{path}' lies outside the pipeline's folder")
    return path


class TextCall(BaseModel):
    """A call of a pipeline's `encode_prompt` with one prompt.

    Attributes:
        pipeline: diffusers' class of the pipeline.
        arguments: of `encode_prompt`, beside the prompt and the device.
        outputs: graph input → index into what `encode_prompt` returns; tokens first, then a pooled projection
            or a mask.
        masks: of these tokens, graph input → index of the mask that says which there are; where it has none, they are
            left out.
        library: that the pipeline reads prompts with; without it they would be encoded differently, or not at all.
        files: of the text encoders and tokenizers, and the pipeline's index: path in its folder → sha256.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pipeline: Name
    arguments: dict[str, JsonValue]
    outputs: dict[str, NonNegativeInt]
    masks: dict[str, NonNegativeInt] = {}
    library: Name | None = None
    files: dict[Annotated[str, AfterValidator(inside)], str] = {}

    def encode(self, pipe: Any, prompt: str) -> dict[str, Any]:
        """Encode a prompt where the text encoders are.

        Args:
            pipe: the pipeline; only its text encoders and tokenizers are used.
            prompt: what is too long for an encoder is cut off, as the pipeline does.

        Returns:
            A tensor for each of `outputs`, in the encoders' type: tokens [tokens, width], pooled [width] or a mask
            [tokens].
        """
        returned = pipe.encode_prompt(prompt=prompt, device=pipe.device, **self.arguments)
        values = {name: returned[index][0] for name, index in self.outputs.items()}
        seen = {name: returned[index][0].bool() for name, index in self.masks.items()}
        tokens = next(iter(values.values()))
        return {name: value[seen[name]] if name in seen else value.type_as(tokens) for name, value in values.items()}
