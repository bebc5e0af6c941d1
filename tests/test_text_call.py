"""How a pipeline encodes a text, as data; tests/engines/triton_server/test_pipeline.py compares what comes out."""

import inspect
from typing import Any

import pytest
from pydantic import ValidationError
from torch import Tensor

from adatsq_trt.models.families import families
from adatsq_trt.models.wan import WanFamily
from adatsq_trt.text_call import TextCall


def test_all_families_say_how_a_text_is_encoded() -> None:
    """Else they would be served without texts. An image that the text encoder sees is not in a request."""
    for family in families():
        call = family.text_call
        if family.reads_image:
            assert call is None
            continue
        assert call is not None, f"{family.pipeline} encodes by code of its own"
        signature = inspect.signature(family.load_pipeline_class().encode_prompt)
        signature.bind(None, prompt="", device="cpu", **call.arguments)
        assert TextCall.model_validate_json(call.model_dump_json()) == call


def test_a_family_that_encodes_by_code_of_its_own_is_not_served_with_text() -> None:
    class Coded(WanFamily):
        def encode(self, pipe: Any, prompt: str) -> tuple[Tensor, Tensor]:
            raise NotImplementedError

    assert WanFamily().text_call is not None
    assert Coded().text_call is None


def test_names_that_are_none_are_refused() -> None:
    """The library goes into a Dockerfile."""
    for changes in ({"library": "ftfy\nRUN true"}, {"pipeline": "WanPipeline; true"}):
        with pytest.raises(ValidationError, match="expected up to 100 letters"):
            TextCall.model_validate({"pipeline": "WanPipeline", "arguments": {}, "outputs": {}, **changes})


@pytest.mark.parametrize("path", ["../weights.safetensors", "/etc/passwd", "a/../../b", ""])
def test_files_outside_of_the_pipelines_folder_are_refused(path: str) -> None:
    with pytest.raises(ValidationError, match="outside"):
        TextCall(pipeline="WanPipeline", arguments={}, outputs={}, files={path: "0" * 64})
