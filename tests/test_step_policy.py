"""Policies in the words of vLLM-Omni, SGLang and diffusers, and back."""

import json
from pathlib import Path

import pytest

from adatsq_trt.errors import DamagedFileError, MismatchError
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.policy import Policy
from adatsq_trt.step_policy import StepPolicy, StepPolicyFile, Window, export_policy, import_policy

LAYERS = ("a", "b", "c")
# As NVIDIA publishes it with Cosmos 3.
PUBLISHED = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "scope": ["transformer"],
    "default_mode": "native",
    "first_steps": {"count": 3, "mode": "a16"},
    "last_steps": {"count": 3, "mode": "a16"},
    "overlap": "a16",
    "reasoner": "a16",
}


def policy_of(*rows: tuple[str, str, str]) -> Policy:
    return Policy.from_steps("model", "0" * 64, LAYERS, rows)


def write_config(file: Path, policy: object) -> Path:
    runtime = {"diffusion_step_policy": policy}
    file.write_text(json.dumps({"_class_name": "X", "quantization_config": {"quant_algo": "FP8", "runtime": runtime}}))
    return file


def test_the_published_key_is_read(tmp_path: Path) -> None:
    policy = read_json_model(write_config(tmp_path / "config.json", PUBLISHED), StepPolicyFile).policy
    assert policy.modes(8) == ("a16",) * 3 + ("native",) * 2 + ("a16",) * 3
    assert policy.modes(4) == ("a16",) * 4
    assert policy.modes(1) == ("native",)
    assert policy.model_copy(update={"overlap": "native"}).modes(4) == ("a16", "native", "native", "a16")
    assert json.loads(policy.model_dump_json()) == PUBLISHED


@pytest.mark.parametrize(
    "change",
    [{"type": "list"}, {"schema_version": 2}, {"first_steps": {"count": -1, "mode": "a16"}}, {"index_space": "sigma"}],
)
def test_another_key_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    file = write_config(tmp_path / "config.json", PUBLISHED | change)
    with pytest.raises(DamagedFileError, match="diffusion_step_policy"):
        read_json_model(file, StepPolicyFile)


def test_what_the_key_can_say_comes_back(tmp_path: Path) -> None:
    policy = policy_of(*[("bf16",) * 3] * 2, *[("fp8",) * 3] * 3, ("bf16",) * 3)
    exported = export_policy(policy)
    assert (exported.policy.first_steps.count, exported.policy.last_steps.count, exported.native) == (2, 1, "fp8")
    assert exported.lost == ("9 of 18 (step, layer) are bf16 in 16-bit steps: they read the fp8 weights, dequantized",)
    write_json_model(tmp_path / "step.json", StepPolicyFile.of(exported.policy))
    again = read_json_model(tmp_path / "step.json", StepPolicyFile).policy
    assert import_policy(again, "model", "0" * 64, LAYERS, 6, "fp8", "bf16") == policy


def test_a_uniform_policy_loses_nothing() -> None:
    exported = export_policy(policy_of(*[("nvfp4",) * 3] * 4))
    assert (exported.policy.first_steps.count, exported.policy.last_steps.count) == (0, 0)
    assert (exported.native, exported.lost) == ("nvfp4", ())


def test_every_loss_is_told() -> None:
    exported = export_policy(
        policy_of(
            ("bf16", "bf16", "nvfp4"), ("nvfp4", "fp8", "nvfp4"), ("bf16", "bf16", "bf16"), ("nvfp4", "bf16", "nvfp4")
        )
    )
    assert exported.native == "nvfp4"
    assert exported.lost == (
        "steps 2 are 16-bit but lie between others: they become native (nvfp4)",
        "4 of 12 (step, layer) have 16-bit activations in native steps: they become nvfp4",
        "1 of 12 (step, layer) are fp8: they become nvfp4",
        "2 of 12 (step, layer) are bf16 in 16-bit steps: they read the nvfp4 weights, dequantized",
    )


def test_a_policy_without_a_quantized_path_is_refused() -> None:
    with pytest.raises(MismatchError, match="there is no quantized path"):
        export_policy(policy_of(*[("bf16", "int4wo", "fp8")] * 3))


def test_the_windows_are_written_as_others_read_them() -> None:
    written = StepPolicy(first_steps=Window(count=1), last_steps=Window(count=0)).model_dump(mode="json")
    assert written.keys() == PUBLISHED.keys()
