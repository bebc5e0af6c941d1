"""Inputs of a transformer that an image beside the prompt decides, as data.

The family of a pipeline says it and a bundle's manifest carries it: which inputs of the graph an image decides.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from adatsq_trt.fields import Name
from adatsq_trt.text_call import inside


class ImageCall(BaseModel):
    """The image of a generation: an input, like the prompt, that stays the same over all steps.

    Attributes:
        pipeline: diffusers' class of the pipeline, which makes tensors of the image.
        inputs: graph inputs that these tensors are, the same in both branches of guidance.
        masked: whether a mask goes with the image.
        files: of what encodes the image beside the VAE: path in the pipeline's folder → sha256.
        texts: graph inputs that the text encoder makes of a prompt and its image, other ones for each image in both
            branches of guidance; none where it does not see the image.
        negative_prompt: of the unguided branch, where the text encoder sees the image.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pipeline: Name
    inputs: Annotated[tuple[Name, ...], Field(min_length=1)]
    masked: bool = False
    files: dict[Annotated[str, AfterValidator(inside)], str] = {}
    texts: tuple[Name, ...] = ()
    negative_prompt: str = ""
