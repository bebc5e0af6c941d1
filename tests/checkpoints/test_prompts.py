"""Prompts are read line by line, and encoded by text encoders all of whose weights are those of their files."""

import json
import re
from collections.abc import Callable
from importlib import util
from pathlib import Path

import pytest
import torch
from diffusers import ChromaPipeline, FluxPipeline, WanPipeline
from torch import Tensor

from adatsq_trt.checkpoints.loading import open_pipeline
from adatsq_trt.checkpoints.prompts import encode_prompts, read_prompts
from adatsq_trt.checkpoints.source import find_source
from adatsq_trt.errors import DependencyError, UserError
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.settings import PipelineSettings
from tests.tiny_checkpoints import HEIGHT, WIDTH

PROMPTS = ("a red", "three green and seven", "a")
T5, CLIP = "text_encoder_2", "text_encoder"


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x0c", "\x0b", "\x1c", "\x1d", "\x1e", "\x85"])
def test_nothing_but_a_line_feed_ends_a_prompt(tmp_path: Path, mark: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"a red{mark}three\r\n\n seven \r\na red{mark}three\n".encode())
    assert read_prompts(file) == (f"a red{mark}three", "seven")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a red\rseven\rthree\r", r"line 1: got the character '\\r' in a prompt, where old Macs end a line"),
        (b"seven\na red\rthree\n", "line 2: got the character"),
        ("a red\nseven\n".encode("utf-16-le"), r"line 1: got the character '\\x00' in a prompt, as in UTF-16"),
    ],
)
def test_files_in_which_other_characters_end_a_line_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """Else all of them would be one long prompt, or prompts with zeros between the letters."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        read_prompts(file)
    assert refused.value.exit_code == 2


def encode(folder: Path, prompts: tuple[str, ...] = PROMPTS) -> dict[str, Tensor]:
    return encode_prompts(find_source(str(folder), None), prompts, lambda: None)


def test_encodings_are_the_pipelines(saved_flux: Path) -> None:
    pipe = FluxPipeline.from_pretrained(saved_flux, transformer=None, vae=None, local_files_only=True)
    got = encode(saved_flux)
    with torch.no_grad():
        for row, prompt in enumerate((*PROMPTS, "")):
            tokens, pooled, _ = pipe.encode_prompt(prompt, None)
            assert torch.equal(got["tokens"][row], tokens[0])
            assert torch.equal(got["pooled"][row], pooled[0])


def change_weights(folder: Path, part: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / part / "model.safetensors"
    tensors = {name: value.clone() for name, value in read_tensors(file).items()}
    file.unlink()
    write_tensors(file, change(tensors))


def edit_config(folder: Path, part: str, **changes: object) -> None:
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_outputs(folder: Path) -> None:
    change_weights(folder, T5, lambda tensors: {n: v for n, v in tensors.items() if "DenseReluDense.wo" not in n})


def more_layers(folder: Path) -> None:
    edit_config(folder, T5, num_layers=3)


def fewer_layers(folder: Path) -> None:
    edit_config(folder, T5, num_layers=0)


def more_layers_of_clip(folder: Path) -> None:
    edit_config(folder, CLIP, num_hidden_layers=2)


def of_another_width(folder: Path) -> None:
    change_weights(folder, T5, lambda tensors: tensors | {"encoder.final_layer_norm.weight": torch.ones(31)})


def a_tensor_too_many(folder: Path) -> None:
    change_weights(folder, CLIP, lambda tensors: tensors | {"text_model.extra.weight": torch.ones(2)})


def zeros(folder: Path) -> None:
    change_weights(folder, T5, lambda tensors: {n: torch.zeros_like(v) for n, v in tensors.items()})


def one_embedding(folder: Path) -> None:
    """All words alike."""
    change_weights(
        folder, T5, lambda tensors: {n: torch.ones_like(v) if "shared" in n else v for n, v in tensors.items()}
    )


def one_pooled(folder: Path) -> None:
    """Its last normalization gives the same for whatever comes before."""
    names = {"final_layer_norm.weight": torch.zeros_like, "final_layer_norm.bias": torch.ones_like}

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        fills = {n: fill for n in tensors for end, fill in names.items() if n.endswith(end)}
        assert len(fills) == 2
        return {name: fills[name](value) if name in fills else value for name, value in tensors.items()}

    change_weights(folder, CLIP, change)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            without_outputs,
            r"text_encoder_2': 1 tensors are missing, so they would be random, 'encoder.block.0.*wo.weight",
        ),
        (more_layers, r"text_encoder_2': \d+ tensors are missing, so they would be random, 'encoder.block.1"),
        (more_layers_of_clip, r"text_encoder': \d+ tensors are missing"),
        (fewer_layers, r"text_encoder_2': \d+ tensors are more than its configuration has layers for"),
        (a_tensor_too_many, r"text_encoder': 1 tensors are more than .*extra.weight' among them"),
        (of_another_width, r"text encoders do not load|have another shape"),
        (zeros, "the encoding of the prompt 'a red' is zero throughout"),
        (one_embedding, "the prompts, 'a red' and the empty one among them, all have the same tokens"),
        (one_pooled, "the prompts, 'a red' and the empty one among them, all have the same pooled projections"),
    ],
)
def test_encoders_that_are_not_whole_are_refused(own_flux: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(own_flux)
    with pytest.raises(UserError) as refused:
        encode(own_flux)
    assert re.search(message, str(refused.value))
    assert "\n" not in str(refused.value)


def test_what_whole_models_hold_beside_their_encoder_is_left_out(own_flux: Path) -> None:
    """As in a file of a whole T5 with its decoder, and of a CLIP with its picture encoder."""
    wanted = encode(own_flux)
    change_weights(
        own_flux, T5, lambda t: t | {"decoder.block.0.x.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
    )
    change_weights(own_flux, CLIP, lambda t: t | {"vision_model.x.weight": torch.ones(2), "logit_scale": torch.ones(1)})
    got = encode(own_flux)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_prompts_that_the_encoder_does_not_tell_apart(saved_wan: Path) -> None:
    """Wan's pipeline makes one space of several."""
    with pytest.raises(
        UserError, match=r"--prompts: 'a red' and 'a  red' have the same encoding: .* leave one of them out"
    ):
        encode(saved_wan, ("a red", "three", "a  red"))


# ------------------------------------------------------------------------------------------------------ ftfy


def test_wans_prompts_are_cleaned_as_the_pipeline_says(saved_wan: Path) -> None:
    """By ftfy, which makes one letter of a ligature: without it the prompt would be another."""
    got = encode(saved_wan, ("\ufb01ve", "three"))
    pipe = WanPipeline.from_pretrained(saved_wan, transformer=None, vae=None, local_files_only=True)
    with torch.no_grad():
        wanted, _ = pipe.encode_prompt("five", do_classifier_free_guidance=False, max_sequence_length=512)
    assert torch.equal(got["tokens"][0], wanted[0])


def test_wan_without_ftfy_is_refused_by_name(
    saved_wan: Path, saved_flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "ftfy" else find(name))

    def opening(folder: Path) -> None:
        open_pipeline(PipelineSettings(path=str(folder), height=HEIGHT, width=WIDTH, prompts=PROMPTS))

    with pytest.raises(DependencyError, match=r"with the library ftfy, .* pip install ftfy"):
        opening(saved_wan)
    opening(saved_flux)  # which does without


def test_masks_of_prompts_of_one_length_are_one(saved_chroma: Path) -> None:
    """No text encoder is damaged then; masks are as the pipeline makes them, in the type of the tokens."""
    pipe = ChromaPipeline.from_pretrained(saved_chroma, transformer=None, vae=None, local_files_only=True)
    prompts = ("a red", "a green")
    got = encode_prompts(find_source(str(saved_chroma), None), prompts, lambda: None, "a seven")
    with torch.no_grad():
        tokens, _, masks, *_ = pipe.encode_prompt([*prompts, "a seven"], do_classifier_free_guidance=False)
    torch.testing.assert_close(got["tokens"], tokens, rtol=0, atol=1e-6)
    assert torch.equal(got["pooled"], masks)
    assert got["pooled"].sum(dim=1).tolist() == [4, 4, 4]  # two words, the end, and one that fills it up


def test_encodings_without_a_mask_of_the_pipelines_own_are_refused(saved_chroma: Path, tmp_path: Path) -> None:
    settings = PipelineSettings(path=str(saved_chroma), encodings=str(tmp_path / "e.safetensors"), prompts=("a",))
    with pytest.raises(UserError, match=r"a ChromaPipeline gives its transformer a mask of its own .*--prompts"):
        open_pipeline(settings)
