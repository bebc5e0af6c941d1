"""From what the user asked for to settings; each refusal before anything is opened or written."""

from pathlib import Path

import pytest

from adatsq_trt.config import BuildConfig
from adatsq_trt.errors import MissingFileError, UserError
from adatsq_trt.execution import InProcess
from adatsq_trt.formats import resolve_formats
from adatsq_trt.policy import Policy
from adatsq_trt.settings import Settings
from adatsq_trt.stages.resolve import choose_executor, open_and_resolve
from adatsq_trt.zoo.loading import load_model


def resolve(last: str = "bundle", **choices: object) -> Settings:
    return open_and_resolve("digits-flux", BuildConfig(**choices), last)[1]


def test_defaults_are_the_model_s_and_the_target_s() -> None:
    model, settings = load_model("digits-flux"), resolve(target="cpu")
    assert (settings.formats, settings.format_set, settings.targets) == (
        tuple(fmt.name for fmt in resolve_formats("cpu")),
        "cpu",
        ("cpu",),
    )
    assert (settings.steps, settings.guidance) == (model.default_steps, model.default_guidance)
    assert (settings.weights_sha256, settings.model_sha256) == (model.weights_sha256, model.model_sha256)
    assert (settings.budget_bits, settings.reference) == (None, "w8a8s")
    assert settings.weights == "once"
    assert settings.pipeline is None


@pytest.mark.parametrize(("weights", "formats"), [("once", "grid"), ("free", "paper-fine")])
def test_a_simulated_study_has_a_set_of_its_own(weights: str, formats: str) -> None:
    settings = resolve(simulate=True, weights=weights)
    assert (settings.format_set, settings.targets, settings.simulate) == (formats, (), True)


def test_options_of_effort_are_settings_as_they_are() -> None:
    effort = {"expansions": 3, "search_precision": "bfloat16", "max_assignments": 2, "beam": 7, "slack": 0.5}
    settings = resolve(target="cpu", **effort)
    assert {name: getattr(settings, name) for name in effort} == effort


def test_another_budget_replaces_that_in_bits() -> None:
    assert resolve(target="cpu", budget_size="2MB").budget_bits is None
    both = resolve(target="cpu", budget_size="2MB", budget_bits=20.0)
    assert (both.budget_bytes, both.budget_bits) == (2e6, 20.0)
    timed = resolve(target="sm89", budget_speed="1ms", gpu="rtx-4090")
    assert (timed.budget_bits, timed.budget_ms) == (None, 1.0)
    assert timed.times is not None


def test_what_is_given_is_kept(tmp_path: Path) -> None:
    settings = resolve(target=("sm120", "sm89"), formats="fp8,bf16", steps=3, guidance=1.5, seed=7, batch=(1, 8))
    assert settings.formats == ("fp8", "bf16")
    assert (settings.steps, settings.guidance, settings.seed, settings.batch) == (3, 1.5, 7, (1, 8))
    layers = list(load_model("digits-flux").adapter.quantizable_layers())
    policy = Policy.from_steps("digits-flux", settings.weights_sha256, layers, [["fp8"] * len(layers)] * 3)
    policy.save(tmp_path / "policy.json")
    for given in (policy, tmp_path / "policy.json"):
        text = resolve(target="sm120", formats="fp8,bf16", steps=3, policy=given).policy
        assert text is not None
        assert Policy.model_validate_json(text) == policy


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"target": "sm99"}, "unknown target 'sm99'"),
        ({"target": "cpu", "formats": "w9a9"}, "w9a9"),
        ({"target": ("sm120", "cpu"), "formats": "fp8,bf16"}, "target 'cpu' does not accelerate fp8, bf16"),
        ({"target": "cpu", "formats": "fp8"}, "fp8"),
        ({"target": "sm89", "formats": "fp16,bf16"}, "bf16"),
        ({"target": "cpu", "layout": "switch"}, "target 'cpu' runs graphs, not plans"),
        ({"simulate": True, "layout": "switch"}, "--simulate builds nothing that has a layout"),
        ({"target": "sm89", "weight_streaming": True}, "only enterprise TensorRT has this"),
        ({"simulate": True, "backend": "tensorrt"}, "this request compiles no plans"),
        ({"layout": "plugin", "backend": "tensorrt"}, "got no --plugins, expected the libadatsq_plugins.so"),
        ({"layout": "plugin", "backend": "tensorrt", "plugins": Path("none.so")}, "got no file 'none.so'"),
        ({"target": "sm89", "backend": "tensorrt", "plugins": Path(__file__)}, "only plans of --layout plugin need"),
        ({"layout": "plugin", "plugins": Path(__file__)}, "--plugins: only enterprise TensorRT has this"),
        ({"target": "cpu", "shapes": "1x8x8", "batch": 1}, "--shapes says how many samples"),
        ({"target": "cpu", "shapes": "8"}, "--shapes '8'"),
        ({"simulate": True, "transform": "smooth"}, "which ends before the export, or leave out --simulate"),
        ({"target": "cpu", "memory_limit": "much"}, "much"),
        ({"target": "cpu", "budget_speed": "1ms"}, "--gpu"),
        ({"target": "cpu", "exclude": "nothing"}, "--exclude 'nothing'"),
        ({"layout": "plugin", "lora_slots": 4}, "--lora-slots 4: not with --layout plugin"),
        ({"target": "cpu", "shapes": "1x16x16,1x8x16", "lora_slots": 4}, "--lora-slots 4: not with --shapes"),
        ({"target": "cpu", "lora_slots": 0}, "--lora-slots: got 0, expected at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(choices: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(**choices)


def test_a_transform_is_searched_with_and_built_with() -> None:
    assert resolve("search", simulate=True, transform="smooth").transform == "smooth"
    assert resolve(target="cpu", transform="balance-low-rank").transform == "balance-low-rank"


def test_a_policy_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"none\.json"):
        resolve(target="cpu", policy=tmp_path / "none.json")


def test_who_computes() -> None:
    with choose_executor(BuildConfig(device="cpu")) as executor:
        assert isinstance(executor, InProcess)
    with pytest.raises(UserError, match="--device cuda: with --ray the workers' processors compute"):
        choose_executor(BuildConfig(device="cuda", ray="local"))
    with pytest.raises(UserError, match="--ray"):
        choose_executor(BuildConfig(ray="no address"))


@pytest.mark.parametrize(("capability", "target"), [(89, "sm89"), (120, "sm120"), (None, "sm120")])
def test_without_a_target_the_gpu_here_decides(
    capability: int | None, target: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu_here(monkeypatch, capability)
    with caplog.at_level("INFO"):
        assert resolve().targets == (target,)
    assert f"no --target: the target is {target}" in caplog.text


@pytest.mark.parametrize(("capability", "words"), [(75, "the GPU here is sm75"), (90, "--layout plugin")])
def test_a_gpu_that_no_plan_is_for_is_named(capability: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_here(monkeypatch, capability)
    with pytest.raises(UserError, match=words):
        resolve()


def gpu_here(monkeypatch: pytest.MonkeyPatch, capability: int | None) -> None:
    """As PyTorch tells of a GPU, or of none."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
    if capability is not None:
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda: divmod(capability, 10))
