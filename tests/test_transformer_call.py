"""How a pipeline calls its transformer, as data: what is consistent, and what classes of diffusers have."""

import pytest
from diffusers import FluxTransformer2DModel, ZImageTransformer2DModel
from pydantic import ValidationError

from adatsq_trt.transformer_call import TIMESTEPS, TransformerCall, forward_arguments

INPUTS = {"hidden_states": "x"}


def test_arguments_are_in_order_and_have_their_defaults() -> None:
    arguments = forward_arguments(ZImageTransformer2DModel)
    assert list(arguments)[:3] == ["x", "t", "cap_feats"]
    assert (arguments["return_dict"], arguments["patch_size"], arguments["siglip_feats"]) == (True, 2, None)
    assert forward_arguments(FluxTransformer2DModel)["controlnet_blocks_repeat"] is False


def test_it_is_text() -> None:
    call = TransformerCall(arguments={"x": None, "t": None}, inputs=INPUTS, time="t", time_range=TIMESTEPS)
    assert TransformerCall.model_validate_json(call.model_dump_json()) == call
    assert call.required == ("x", "t")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": "timestep"}, "'timestep' is none of the arguments x, t"),
        ({"positions": "ids"}, "'ids' is none of the arguments"),
        ({"zeros": ("txt_ids",)}, "'txt_ids' is none of the arguments"),
        ({"counted": ("txt_ids",)}, "'txt_ids' is none of the arguments"),
        ({"position_axes": 2}, "greater than or equal to 3"),
        ({"grids": "img_shapes"}, "'img_shapes' is none of the arguments"),
        ({"masks": {"hidden_states": "mask"}}, "'mask' is none of the arguments"),
        ({"masks": {"x": "t"}}, "masks of x, expected of graph inputs: hidden_states"),
        ({"sides": ("height",)}, "'height' is none of the arguments"),
        ({"numbers": {"scale": (1.0,)}}, "'scale' is none of the arguments"),
        ({"ones_behind": ("x",)}, "ones_behind .*, expected graph inputs: hidden_states"),
        ({"time_range": (1.0, 1.0)}, "one value for noise and for a finished sample"),
        ({"time_range": (float("nan"), 1.0)}, "finite"),
        ({"inputs": {"a": "x", "b": "x"}}, r"joined \[\], several inputs are of \['x'\]"),
        ({"joined": {"x": 1}}, r"joined \['x'\], several inputs are of \[\]"),
        ({"inputs": {"a": "x", "b": "x"}, "joined": {"x": 0}}, "greater than 0"),
        ({"unit_axis": -1}, "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    given = {"arguments": {"x": None, "t": None}, "inputs": INPUTS, "time": "t", **changes}
    with pytest.raises(ValidationError, match=message):
        TransformerCall.model_validate(given)
