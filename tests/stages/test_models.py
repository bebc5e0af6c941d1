"""The model of a run: what can be none, which layers stay out, and runs that are opened again."""

import logging
from pathlib import Path

import pytest
import torch

from adatsq_trt.checkpoints.prompts import default_prompts
from adatsq_trt.config import BuildConfig
from adatsq_trt.errors import MissingFileError, UnknownNameError, UserError
from adatsq_trt.files import write_json_model
from adatsq_trt.settings import IN_MEMORY, SETTINGS_NAME, PipelineSettings
from adatsq_trt.stages.models import (
    _drawn_prompts,
    declared,
    exclude_layers,
    open_model,
    open_run,
    pipeline_of,
    reopen_model,
    require_model,
)
from adatsq_trt.stages.run_directory import RunDirectory
from tests.stages.tiny_run import make_model, make_settings


@pytest.mark.parametrize("options", [{"lora": "a"}, {"base": "b"}, {"prompts": ("p",)}, {"height": 8}, {"frames": 9}])
def test_a_model_of_the_zoo_takes_no_options_of_checkpoints(options: dict[str, object]) -> None:
    require_model("digits-flux", BuildConfig())
    with pytest.raises(UserError, match=rf"--{next(iter(options))}: model 'digits-flux' of the zoo is complete"):
        require_model("digits-flux", BuildConfig(**options))


def test_other_names_are_checked_where_they_can_be(tmp_path: Path) -> None:
    for model in ("owner/name", tmp_path, str(tmp_path), object()):
        require_model(model, BuildConfig(lora="a"))
    with pytest.raises(UnknownNameError, match="did you mean 'digits-flux'"):
        require_model("digit-flux", BuildConfig())


def test_excluded_layers_are_no_layers_any_more() -> None:
    model = make_model()
    before = list(model.adapter.quantizable_layers())
    excluded = exclude_layers(model, ["*.to_q", "single_*.proj_mlp"])
    assert excluded == tuple(n for n in before if n.endswith(".to_q") or (n.startswith("single_") and "proj_mlp" in n))
    assert list(model.adapter.quantizable_layers()) == [name for name in before if name not in excluded]


def test_patterns_that_match_nothing_or_all_are_refused() -> None:
    with pytest.raises(UserError, match=r"--exclude '\*\.to_w': no layer of model 'tiny' has such a name; the nearest"):
        exclude_layers(make_model(), ["*.to_q", "*.to_w"])
    with pytest.raises(UserError, match="no layer is left to quantize"):
        exclude_layers(make_model(), ["*"])


def test_no_more_prompts_are_encoded_than_are_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = {"calibration_samples": 2, "selection_samples": 3, "held_out_samples": 1}
    assert _drawn_prompts(BuildConfig(**few)) == default_prompts()[:3]
    assert _drawn_prompts(BuildConfig(prompts=("a", "b"), **few)) == ("a", "b")
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\nthree\nfour\n")
    with caplog.at_level(logging.WARNING):
        assert _drawn_prompts(BuildConfig(prompts=file, **few)) == ("one", "two", "three")
    assert "the first 3 of 4 prompts are drawn" in caplog.text
    with pytest.raises(UserError, match="they stand in the place of --prompts"):
        _drawn_prompts(BuildConfig(prompts=file, encodings=tmp_path / "encodings.safetensors"))


def test_a_model_is_rounded_to_the_type_of_its_graphs() -> None:
    model = make_model()
    rounded = declared(model, make_settings(formats=("fp8", "bf16"), targets=("sm89",)))
    assert rounded.rounding.dtype is torch.bfloat16
    weight = rounded.adapter.transformer.get_submodule("transformer_blocks.0.attn.to_q").weight
    assert torch.equal(weight, weight.bfloat16().float())
    assert declared(make_model(), make_settings()).rounding.changes_nothing


def test_a_zoo_model_has_no_checkpoint() -> None:
    opened = open_model("digits-flux", BuildConfig())
    assert opened.pipeline is None
    assert opened.settings is None
    assert opened.outline.name == "digits-flux"


def test_a_run_is_opened_with_its_settings(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        open_run(tmp_path / "none")
    settings = make_settings(model="digits-flux", excluded=("transformer_blocks.0.attn.to_q",))
    with RunDirectory.open(tmp_path / "run") as run:
        write_json_model(run.path / SETTINGS_NAME, settings)
    context = open_run(tmp_path / "run")
    assert context.settings == settings
    assert context.model.name == "digits-flux"
    assert "transformer_blocks.0.attn.to_q" not in context.layers


def test_a_model_that_was_in_memory_cannot_be_opened_again(tmp_path: Path) -> None:
    pipeline = PipelineSettings(path=f"{IN_MEMORY}FluxPipeline", prompts=("a",))
    with (
        RunDirectory.open(tmp_path / "run") as run,
        pytest.raises(MissingFileError, match="made of a FluxPipeline"),
    ):
        reopen_model(make_settings(pipeline=pipeline), run)


def test_a_run_s_pipeline_is_found_where_it_is_and_never_downloaded(tmp_path: Path) -> None:
    assert pipeline_of(tmp_path) is None  # a bundle has no settings

    def found(path: str, base: str | None = None) -> Path | None:
        own = PipelineSettings(path=path, base=base, height=8, width=8, prompts=("a",))
        write_json_model(tmp_path / SETTINGS_NAME, make_settings().model_copy(update={"pipeline": own}))
        return pipeline_of(tmp_path)

    assert found(str(tmp_path)) == tmp_path
    assert found("transformer.safetensors", base=str(tmp_path)) == tmp_path
    assert found("owner/name") is None
    assert found(str(tmp_path / "gone")) is None
