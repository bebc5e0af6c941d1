"""The step policy of other programs: the key `quantization_config.runtime.diffusion_step_policy` of a checkpoint.

vLLM-Omni (#6560), SGLang (#36380) and diffusers (#14664) read it from a transformer's `config.json`: the checkpoint's
own quantized path ("native") everywhere, but for the first and the last steps, whose activations stay in 16 bits
("a16"). It names no layers and no other formats, so a policy goes in with losses, and every loss is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from adatsq_trt.errors import MismatchError
from adatsq_trt.formats import FORMATS, Format, format_named
from adatsq_trt.policy import Policy

Mode = Literal["native", "a16"]
NonNegative = Annotated[int, Field(ge=0, strict=True)]


class Window(BaseModel):
    """Steps at one end of the loop, and their mode."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: NonNegative
    mode: Literal["a16"] = "a16"


class StepPolicy(BaseModel):
    """The key's value, schema version 1.

    Attributes:
        schema_version: of the key.
        type: steps are counted from both ends.
        index_space: index that the windows count.
        scope: components of the pipeline.
        default_mode: of all other steps.
        first_steps: at the beginning.
        last_steps: at the end.
        overlap: mode of steps that are in both, where the loop is short.
        reasoner: mode of the language model inside Cosmos 3; other models have none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    type: Literal["first_last_n"] = "first_last_n"
    index_space: Literal["denoising_loop_iteration"] = "denoising_loop_iteration"
    scope: tuple[Literal["transformer"], ...] = ("transformer",)
    default_mode: Literal["native"] = "native"
    first_steps: Window
    last_steps: Window
    overlap: Mode = "a16"
    reasoner: Mode = "a16"

    def modes(self, steps: int) -> tuple[Mode, ...]:
        """The mode of every step; a loop of one step is native, as its readers have it."""
        result: list[Mode] = []
        for step in range(steps):
            first, last = step < self.first_steps.count, step >= steps - self.last_steps.count
            mode: Mode = self.overlap if first and last else "a16" if first or last else "native"
            result.append("native" if steps == 1 else mode)
        return tuple(result)


class _Runtime(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    diffusion_step_policy: StepPolicy


class _QuantizationConfig(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    runtime: _Runtime


class StepPolicyFile(BaseModel):
    """A `config.json` with the key, or a file with nothing else; other keys are not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    quantization_config: _QuantizationConfig

    @property
    def policy(self) -> StepPolicy:
        """The key's value."""
        return self.quantization_config.runtime.diffusion_step_policy

    @classmethod
    def of(cls, policy: StepPolicy) -> StepPolicyFile:
        """A file with nothing but the key."""
        return cls(quantization_config=_QuantizationConfig(runtime=_Runtime(diffusion_step_policy=policy)))


@dataclass(frozen=True)
class Exported:
    """Result of turning one of our policies into a step policy.

    Attributes:
        policy: as others read it.
        native: format that the checkpoint's own path should have.
        lost: parts that could not be expressed, a sentence each.
    """

    policy: StepPolicy
    native: str
    lost: tuple[str, ...]


def export_policy(policy: Policy) -> Exported:
    """Say a policy in windows at both ends.

    A step counts as 16-bit when most of its layers have 16-bit activations; the native format is the one that most
    layers of the other steps have.

    Args:
        policy: of any formats.

    Raises:
        MismatchError: no step has quantized activations in most layers, so there is no native path; or a policy of
            two transformers, of which the key knows one.
    """
    if any(name is None for row in policy.assignments for name in row):
        raise MismatchError(
            "the policy is of two transformers, and a step policy is read for one; use it with this package alone"
        )
    rows = [list(policy.rows[index].values()) for index in policy.step_assignments]
    high = [sum(_wide(name) for name in row) * 2 > len(row) for row in rows]
    if all(high):
        raise MismatchError(
            "the policy keeps activations in 16 bits in most layers of every step, so there is no quantized path that "
            "a step policy could leave; use a policy with a smaller budget"
        )
    first = high.index(False)
    last = high[::-1].index(False)
    counted = Counter(n for row, wide in zip(rows, high, strict=True) if not wide for n in row if not _wide(n))
    native = counted.most_common(1)[0][0]
    written = StepPolicy(first_steps=Window(count=first), last_steps=Window(count=last), overlap="a16")
    return Exported(written, native, tuple(_losses(rows, high, written, native)))


def _wide(name: str) -> bool:
    """Whether a format leaves activations in 16 bits or more."""
    return format_named(name).activation_bits >= 16


def _losses(rows: Sequence[Sequence[str]], high: Sequence[bool], written: StepPolicy, native: str) -> list[str]:
    modes, lost = written.modes(len(rows)), []
    inner = [step for step, mode in enumerate(modes) if mode == "native" and high[step]]
    if inner:
        lost.append(f"steps {_listed(inner)} are 16-bit but lie between others: they become native ({native})")
    pairs = [(mode, name) for mode, row in zip(modes, rows, strict=True) for name in row]
    kept = [name for mode, name in pairs if mode == "native" and _wide(name)]
    if kept:
        lost.append(
            f"{len(kept)} of {len(pairs)} (step, layer) have 16-bit activations in native steps: they become {native}"
        )
    other = Counter(name for mode, name in pairs if mode == "native" and name != native and not _wide(name))
    lost += [f"{count} of {len(pairs)} (step, layer) are {name}: they become {native}" for name, count in other.items()]
    weights = Counter(name for mode, name in pairs if mode == "a16")
    lost += [
        f"{count} of {len(pairs)} (step, layer) are {name} in 16-bit steps: they read the {native} weights, dequantized"
        for name, count in weights.items()
        if format_named(name).weight != format_named(native).weight
    ]
    return lost


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def wide_twin(native: Format) -> Format:
    """Find the format of 16-bit steps: the same weights with 16-bit activations, or bf16 where no format has these."""
    names = (name for name, fmt in FORMATS.items() if fmt.weight == native.weight and fmt.activation_bits == 16)
    return FORMATS[next(names, "bf16")]


def import_policy(
    step_policy: StepPolicy, model: str, weights_sha256: str, layers: Sequence[str], steps: int, native: str, wide: str
) -> Policy:
    """The policy that readers of the key would follow.

    Args:
        step_policy: of a checkpoint.
        model: name of the model that the policy is for.
        weights_sha256: of its transformer.
        layers: module paths.
        steps: of the loop.
        native: format of the checkpoint's quantized path.
        wide: format of 16-bit steps.
    """
    names = {"native": native, "a16": wide}
    rows = [[names[mode]] * len(layers) for mode in step_policy.modes(steps)]
    return Policy.from_steps(model, weights_sha256, layers, rows)
