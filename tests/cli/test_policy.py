"""`policy export` and `policy import`."""

import json
from pathlib import Path

import pytest

from adatsq_trt.policy import Policy

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k")


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    rows = [("bf16", "bf16"), ("fp8", "fp8"), ("fp8", "nvfp4"), ("bf16", "bf16")]
    Policy.from_steps("model", "0" * 64, LAYERS, rows).save(tmp_path / "policy.json")
    return tmp_path / "policy.json"


def test_there_and_back_again(cli, policy: Path, tmp_path: Path) -> None:
    written, back = tmp_path / "step_policy.json", tmp_path / "back.json"
    ended = cli("policy", "export", policy, "--to", "diffusion-step-policy", "--output", written)
    assert ended.code == 0
    assert "first 1 and last 1 steps in 16 bits, the others native, which is fp8" in ended.out
    assert "lost: 1 of 8 (step, layer) are nvfp4: they become fp8" in ended.out
    key = json.loads(written.read_text())["quantization_config"]["runtime"]["diffusion_step_policy"]
    assert key["first_steps"] == {"count": 1, "mode": "a16"}
    ended = cli("policy", "import", written, "--like", policy, "--wide", "bf16", "--output", back)
    assert "reads weights of its own here" in ended.out
    assert "2 of 4 steps in bf16, the others in fp8" in ended.out
    rows = [("bf16", "bf16"), ("fp8", "fp8"), ("fp8", "fp8"), ("bf16", "bf16")]
    assert Policy.load(back) == Policy.from_steps("model", "0" * 64, LAYERS, rows)


@pytest.mark.parametrize(("native", "wide"), [("fp8", "fp8a16"), ("nvfp4", "nvfp4a16"), ("w8a8s", "w8a16")])
def test_steps_in_16_bits_read_the_native_weights(cli, policy: Path, tmp_path: Path, native: str, wide: str) -> None:
    written, back = tmp_path / "step_policy.json", tmp_path / "back.json"
    assert cli("policy", "export", policy, "--output", written).code == 0
    ended = cli("policy", "import", written, "--like", policy, "--native", native, "--output", back)
    assert (
        f"2 of 4 steps in {wide}, the others in {native}; a step in 16 bits reads the weights of {native}" in ended.out
    )
    rows = [(wide, wide), (native, native), (native, native), (wide, wide)]
    assert Policy.load(back) == Policy.from_steps("model", "0" * 64, LAYERS, rows)


def test_files_that_cannot_be_read_are_refused(cli, policy: Path, tmp_path: Path) -> None:
    assert "does not exist" in cli("policy", "export", tmp_path / "no.json", "--output", tmp_path / "x.json").refusal
    ended = cli("policy", "import", policy, "--like", policy, "--output", tmp_path / "x.json")
    assert "quantization_config" in ended.refusal
    ended = cli("policy", "import", policy, "--like", policy, "--native", "fp9", "--output", tmp_path / "x.json")
    assert "unknown format 'fp9'" in ended.refusal
    assert not (tmp_path / "x.json").exists()
