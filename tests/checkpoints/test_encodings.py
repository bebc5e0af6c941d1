"""Files of text conditioning that was encoded elsewhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import adatsq_trt
from adatsq_trt.checkpoints.encodings import encoded_prompts, read_encodings
from adatsq_trt.errors import UserError
from adatsq_trt.files import read_tensors
from tests.tiny_checkpoints import CLIP_WIDTH, HEIGHT, T5_WIDTH, WIDTH, make_flux_pipeline

PROMPTS = ("a cat", "two dogs")
TINY: dict[str, Any] = {
    **{"simulate": True, "formats": "w4a4,w8a8", "height": HEIGHT, "width": WIDTH, "steps": 2, "beam": 2},
    **{"calibration_samples": 2, "selection_samples": 2, "held_out_samples": 2},
}


def tensors(**changes: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {
        "tokens": torch.randn(2, 6, 8, generator=generator),
        "pooled": torch.randn(2, 4, generator=generator),
        "negative_tokens": torch.randn(6, 8, generator=generator),
        "negative_pooled": torch.randn(4, generator=generator),
    }
    return {**drawn, **changes}


def test_what_is_read_has_the_unguided_branch_last_and_no_masked_tokens(tmp_path: Path) -> None:
    own, file = tensors(mask=torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6])), tmp_path / "e.safetensors"
    save_file(own, file, {"prompts": json.dumps(PROMPTS)})
    assert encoded_prompts(file) == PROMPTS
    read = read_encodings(file, 8, 4, multiple=4)
    assert read["tokens"].shape == (3, 8, 8)
    assert torch.equal(read["tokens"][0, :2], own["tokens"][0, :2])
    assert not read["tokens"][0, 2:].any()
    assert torch.equal(read["tokens"][1, :6], own["tokens"][1])
    assert torch.equal(read["tokens"][2, :6], own["negative_tokens"])
    assert torch.equal(read["pooled"], torch.cat([own["pooled"], own["negative_pooled"][None]]))


def test_a_model_may_take_no_pooled_projection_and_prompts_no_texts(tmp_path: Path) -> None:
    file = tmp_path / "e.safetensors"
    save_file({"tokens": tensors()["tokens"].bfloat16()}, file)
    assert encoded_prompts(file) == ("0", "1")
    read = read_encodings(file, 8, 0)
    assert read["pooled"].shape == (3, 0)
    assert read["tokens"].dtype == torch.bfloat16
    assert not read["tokens"][2].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(2, 6, 7)}, "'tokens' is [2, 6, 7], expected [2, 6, 8]"),
        ({"tokens": torch.zeros(2, 8)}, "has no tensor 'tokens' [prompts, tokens, width]"),
        ({"pooled": torch.zeros(3, 4)}, "'pooled' is [3, 4], expected [2, 4]"),
        ({"pooled": torch.zeros(2, 4).half()}, "'pooled' is torch.float16, expected float32, float16 or bfloat16"),
        ({"mask": torch.ones(2, 5)}, "'mask' is [2, 5], expected [2, 6]"),
        ({"negative_tokens": torch.full((6, 8), torch.nan)}, "'negative_tokens' has NaN or infinite numbers"),
        ({"txt_ids": torch.zeros(6, 3)}, "unknown tensor 'txt_ids', expected some of tokens, pooled"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Tensor], message: str) -> None:
    save_file(tensors(**changes), tmp_path / "e.safetensors")
    with pytest.raises(UserError) as refused:
        read_encodings(tmp_path / "e.safetensors", 8, 4)
    assert message in str(refused.value)
    assert "docs/how-to/encodings.md" in str(refused.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"prompts": '["a", "a"]'}, "got 1 different texts for 2 prompts"),
        ({"prompts": "a, b"}, "metadata 'prompts' is no JSON list of texts"),
    ],
)
def test_texts_are_one_for_each_prompt(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    save_file(tensors(), tmp_path / "e.safetensors", metadata)
    with pytest.raises(UserError) as refused:
        encoded_prompts(tmp_path / "e.safetensors")
    assert message in str(refused.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.safetensors").write_text("tokens")
    for name in ("e.safetensors", "missing.safetensors"):
        with pytest.raises(UserError, match="--encodings"):
            encoded_prompts(tmp_path / name)


def test_a_pipeline_without_text_encoders_is_searched_as_with_them(tmp_path: Path) -> None:
    """What the encoders give, in a file: the same policy with the same error, from a folder that has no encoders."""
    make_flux_pipeline().save_pretrained(tmp_path / "flux")
    run = tmp_path / "run"
    whole = adatsq_trt.search_policy(tmp_path / "flux", prompts=PROMPTS, output=run, **TINY)
    own = read_tensors(run / "embed" / "encodings.safetensors")
    assert own["tokens"].shape[2] == T5_WIDTH
    assert own["pooled"].shape[1] == CLIP_WIDTH
    split = {name: value[:2].contiguous() for name, value in own.items()}
    negative = {f"negative_{name}": value[2].contiguous() for name, value in own.items()}
    file = tmp_path / "e.safetensors"
    save_file({**split, **negative}, file, {"prompts": json.dumps(PROMPTS)})
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(tmp_path / "flux" / part)
    encoded = adatsq_trt.search_policy(tmp_path / "flux", encodings=file, **TINY)
    assert encoded.assignments == whole.assignments
    assert encoded.step_assignments == whole.step_assignments
    assert encoded.error == whole.error
    with pytest.raises(UserError, match="leave one of them out"):
        adatsq_trt.search_policy(tmp_path / "flux", encodings=file, prompts=PROMPTS, **TINY)
    with pytest.raises(UserError, match="--encodings: model 'digits-flux' of the zoo is complete"):
        adatsq_trt.search_policy("digits-flux", encodings=file, **TINY)
