"""Every choice of a build, with its default and its bounds, said once.

The Python functions take these as keyword arguments, the command line makes its options of them, and what a run was
built with is recorded in `adatsq_trt.settings`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, get_type_hints

from adatsq_trt.amounts import Amount, parse_bytes, parse_size, parse_speed
from adatsq_trt.errors import UnknownNameError, UserError

if TYPE_CHECKING:
    from adatsq_trt.policy import Policy

Layout: TypeAlias = Literal["embedded", "shared", "switch", "plugin"]
DEFAULT_LAYOUT: Layout = "embedded"
Backend: TypeAlias = Literal["rtx", "tensorrt"]
Hardware: TypeAlias = Literal["none", "same_compute_capability", "ampere_plus"]
Precision: TypeAlias = Literal["float32", "bfloat16"]
Clips: TypeAlias = Literal["searched", "none"]
Weights: TypeAlias = Literal["once", "free"]
HessianForm: TypeAlias = Literal["coherent", "row", "linear", "paper", "plain"]
Transform: TypeAlias = Literal["smooth", "hadamard", "balance", "low-rank", "hadamard-low-rank", "balance-low-rank"]

CHECKPOINT, POLICY, EFFORT, ENTERPRISE = "A checkpoint of your own", "The policy", "The effort", "Enterprise TensorRT"
# Each batch of samples has a million seeds of its own; a scheduler has a thousand timesteps.
_MOST_ROWS = 4096
_MOST_SAMPLES, _MOST_STEPS, _MOST_PATHS = 1_000_000, 1000, 1000
_MOST_GUIDANCE = 1000  # far beyond what any model is used with
_MOST_RANK = 1024
MOST_PIXELS = 1 << 15  # along a side, and of frames
# Options of earlier versions, and what took their place.
RENAMED = {
    "budget_bytes": ("budget_size", "a size such as 300kB, or 0.3x of that in 16 bits"),
    "budget_ms": ("budget_speed", "milliseconds such as 12ms, or 1.8x the speed of 16 bits"),
}


@dataclass(frozen=True)
class Choice:
    """Description of a field of `BuildConfig`, beside its type and its default.

    Attributes:
        help: one sentence.
        group: of options that belong together; None for those that most users look at first.
        shown: text for a default that is None.
        least: of a number.
        most: of a number.
        metavar: how a value is written, where its type does not say it.
        in_python_only: whether the command line has no such option.
    """

    help: str
    group: str | None = None
    shown: str | None = None
    least: float | None = None
    most: float | None = None
    metavar: str | None = None
    in_python_only: bool = False


def _choice(default: Any, help: str, group: str | None = None, shown: str | None = None, **more: Any) -> Any:
    return field(default=default, metadata={"choice": Choice(help, group, shown, **more)})


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Choices of a build; None stands for a default that depends on other choices or on the model.

    The first of the types of a field is what the command line reads.

    The attributes are described where they are defined; `adatsq-trt build engine --help` shows the same texts.

    Raises:
        UserError: a value that is none of the choices, or outside its bounds.
    """

    target: str | Sequence[str] = _choice(
        (),
        "What to build for: sm80, sm86, sm89, sm90 (layout plugin), sm120 or cpu; may be repeated.",
        shown="the GPU of this machine; sm120 without one",
    )
    formats: str | None = _choice(
        None,
        "Candidates: a set (grid, paper, paper-fine, paper-low, paper-pairs, blackwell, ada, hopper, ampere, cpu) or a "
        "list such as nvfp4,fp8.",
        POLICY,
        "the target's set",
    )
    transform: Transform | None = _choice(
        None,
        "What happens to weights and inputs before they are rounded. smooth: SmoothQuant; hadamard: QuaRot's rotation, "
        "in graphs of blocks of channels; balance: ViDiT-Q's scaling and rotation; low-rank: SVDQuant's smoothing and "
        "16-bit branch; hadamard-low-rank and balance-low-rank: two of these.",
        POLICY,
        "nothing",
    )
    clips: Clips = _choice(
        "searched",
        "What scales of integer activations keep of the largest magnitude, at each step and layer. searched: what errs "
        "least; none: all of it.",
        POLICY,
    )
    refine: bool = _choice(
        False,
        "After the search, solve the policy's weights again for the inputs that it rounds, and keep them where they "
        "err less.",
        POLICY,
    )
    exclude: str | Sequence[str] = _choice(
        (),
        "Layers that stay in full precision, by module path with * and ?, such as 'transformer_blocks.0.*'; may be "
        "repeated. Budgets and means are over the others.",
        POLICY,
        "none",
        metavar="PATTERN",
    )
    formats_for: str | Sequence[str] = _choice(
        (),
        "Candidates of some layers, by module path with * and ?: '*.ff.*=fp8,bf16'; may be repeated, and where several "
        "patterns match, all hold.",
        POLICY,
        "all candidates",
        metavar="PATTERN=FORMATS",
    )
    budget_bits: float | None = _choice(
        None,
        "Largest mean over steps and layers of (weight bits + activation bits) / 2.",
        POLICY,
        "without a target by format set, unless there is another budget",
    )
    budget_size: str | float | None = _choice(
        None,
        "Most resident bytes of quantized weights, each weight format of a layer once, with its scales: bytes such as "
        "300kB or 2.5GB, or a part of what the same weights take in 16 bits, such as 0.3x.",
        POLICY,
        "1.1 times that of the target's reference format, unless there is another budget",
        metavar="SIZE",
    )
    budget_speed: str | None = _choice(
        None,
        "Least speed of one sample on the card that --gpu names: 1.8x is 1.8 times as fast as 16 bits everywhere, 12ms "
        "is at most 12 milliseconds.",
        POLICY,
        "as --budget-size",
        metavar="SPEED",
    )
    gpu: str | None = _choice(
        None,
        "Card whose milliseconds are told and limited: a name, for a roofline of its published rates, or a file that "
        "'adatsq-trt benchmark' wrote there.",
        POLICY,
        "a card of the target, as far as it has rates for all formats",
    )
    weights: Weights = _choice(
        "once",
        "once: a layer has one weight format for all steps, and a step chooses the format of its activations; free: a "
        "step may change both, as the paper has it, and every weight format of a layer is stored.",
        POLICY,
    )
    max_assignments: int | None = _choice(
        None,
        "Most distinct assignments, which are engines in the layouts embedded and shared; steps share them.",
        POLICY,
        "4 in these layouts, else any number",
        least=1,
        most=_MOST_STEPS,
    )
    simulate: bool = _choice(False, "Study a policy: allow formats without an accelerated path, build no engines.")
    layout: Layout | None = _choice(
        None,
        "embedded: a self-contained plan for each assignment; shared: plans without weights over one store; switch: "
        "one plan in which assignments take turns; plugin: one graph of plugin nodes, and its plan or the commands "
        "that compile it with enterprise TensorRT.",
        shown=f"{DEFAULT_LAYOUT}; shared where formats share a weight",
    )
    batch: int | Sequence[int] = _choice(
        (),
        "Samples in a call that plans are tuned for; may be repeated: an optimization profile for each, and the "
        "largest is the most that plans accept.",
        shown="32",
        least=1,
        most=_MOST_ROWS,
    )
    shapes: str | None = _choice(
        None,
        "Samples and size in pixels (for videos BxFxHxW) of each optimization profile, such as "
        "1x1024x1024,4x512x512; instead of --batch. One size is the model's own, at which the policy is searched: "
        "--height and --width, or the first.",
        shown="the model's size",
        metavar="BxHxW,...",
    )
    backend: Backend = _choice(
        "rtx",
        "What compiles plans. rtx: TensorRT-RTX, without a GPU; tensorrt: enterprise TensorRT, on a machine with the "
        "target's GPU.",
    )
    hardware_compatibility: Hardware = _choice("none", "Which other GPUs run the plans.", ENTERPRISE)
    version_compatible: bool = _choice(
        False, "Plans for later versions of TensorRT too, and for its lean runtime.", ENTERPRISE
    )
    weight_streaming: bool = _choice(
        False, "Keep weights in the host's memory as far as the GPU's does not suffice.", ENTERPRISE
    )
    plugins: Path | None = _choice(
        None,
        "Library that 'build plugins' made: with --layout plugin and --backend tensorrt its plan is compiled too.",
        ENTERPRISE,
        "none",
    )
    steps: int | None = _choice(None, "Denoising steps.", POLICY, "the model's", least=1, most=_MOST_STEPS)
    sigmas: str | Sequence[float] | None = _choice(
        None,
        "Noise levels in the place of --steps, falling from 1, as the pipeline takes them in its own argument of this "
        "name: before the scheduler shifts them.",
        POLICY,
        "those of --steps",
        metavar="NUMBER,...",
    )
    timesteps: str | Sequence[float] | None = _choice(
        None,
        "Likewise, falling from 1000, for pipelines whose call takes timesteps.",
        POLICY,
        "those of --steps",
        metavar="NUMBER,...",
    )
    guidance: float | None = _choice(
        None, "Scale of guidance.", POLICY, "the model's", least=-_MOST_GUIDANCE, most=_MOST_GUIDANCE
    )
    guidance_2: float | None = _choice(
        None,
        "The same at the steps of a pipeline's second transformer.",
        POLICY,
        "--guidance",
        least=-_MOST_GUIDANCE,
        most=_MOST_GUIDANCE,
    )
    policy: Path | str | Policy | None = _choice(None, "Use this policy.json instead of searching.", POLICY, "search")
    seed: int = _choice(0, "Of prompts, noise and projections.", EFFORT, least=0, most=2**32 - 1)
    beam: int = _choice(
        0,
        "Paths kept after each step by a beam search, whose policies are judged beside the plan's; 0 makes none.",
        EFFORT,
        least=0,
        most=_MOST_PATHS,
    )
    candidates: int = _choice(
        5,
        "Assignments tried per path and step of the beam, besides the previous.",
        EFFORT,
        least=1,
        most=_MOST_PATHS,
    )
    expansions: int | None = _choice(
        None,
        "Denoiser calls of the beam per step: of all paths and candidates the most promising ones.",
        EFFORT,
        "all",
        least=1,
        most=_MOST_PATHS**2,
    )
    search_precision: Precision = _choice("float32", "What the search computes in; bfloat16 suits a GPU.", EFFORT)
    calibration_samples: int = _choice(
        64,
        "Pictures that Hessians, sensitivities and the beam are measured on.",
        EFFORT,
        least=1,
        most=_MOST_SAMPLES,
    )
    selection_samples: int = _choice(
        256, "Fresh pictures that decide between finished policies.", EFFORT, least=1, most=_MOST_SAMPLES
    )
    held_out_samples: int = _choice(
        512, "Fresh pictures that the reported errors are measured on.", EFFORT, least=1, most=_MOST_SAMPLES
    )
    projections: int = _choice(
        8, "Random projections per calibration sample.", EFFORT, least=1, most=_MOST_SAMPLES, in_python_only=True
    )
    hessian: HessianForm = _choice(
        "coherent",
        "What GPTQ minimizes. coherent: what an error of a weight that all steps share does to the final picture; "
        "row: the same, for a token and a step alone; paper and linear: errors of the layer's outputs, weighted over "
        "steps by a softmax of Fisher information or in proportion to it; plain: these, all steps alike.",
        EFFORT,
    )
    temperature: float = _choice(3.0, "Tau of the temporal weights of --hessian paper.", EFFORT, in_python_only=True)
    damping: float = _choice(
        0.01, "Of the Hessian, as a part of its mean diagonal.", EFFORT, least=0, in_python_only=True
    )
    slack: float = _choice(0.1, "Relative slack of dominance.", EFFORT, least=0, in_python_only=True)
    memory_limit: str | float | None = _choice(
        None,
        "Most resident memory of the stages, such as 12GB: what does not fit is read or computed again.",
        EFFORT,
        "the machine's",
        metavar="SIZE",
    )
    base: str | Path | None = _choice(
        None, "Folder or hub id of the pipeline that a transformer or a single file belongs to.", CHECKPOINT, "none"
    )
    lora: str | Sequence[str] = _choice(
        (),
        "LoRA to fuse into the transformer first; may be repeated. Of two transformers, transformer_2=FILE names one.",
        CHECKPOINT,
        "none",
        metavar="FILE[:SCALE]",
    )
    lora_slots: int | None = _choice(
        None,
        "Rank of the 16-bit branch that every layer gets, so that the finished bundle takes LoRAs of up to that rank, "
        "one or several together.",
        CHECKPOINT,
        "none",
        least=1,
        most=_MOST_RANK,
    )
    prompts: Path | str | Sequence[str] | None = _choice(
        None,
        "File with what calibration draws, a prompt in each line.",
        CHECKPOINT,
        "128 prompts of this package",
    )
    encodings: Path | str | None = _choice(
        None,
        "Safetensors file with what calibration draws, encoded already (docs/how-to/encodings.md); not with --prompts.",
        CHECKPOINT,
        "none",
    )
    negative_prompt: str = _choice(
        "", "What guidance leads away from, for all prompts.", CHECKPOINT, "the empty prompt", metavar="TEXT"
    )
    images: Path | str | None = _choice(
        None,
        "Folder of the images that calibration draws with the prompts, for pipelines that take an image too; "
        "NAME.mask.png is the mask of NAME.png.",
        CHECKPOINT,
        "images made here",
    )
    height: int | None = _choice(
        None, "Of the picture, in pixels.", CHECKPOINT, "the model's", least=1, most=MOST_PIXELS
    )
    width: int | None = _choice(
        None, "Of the picture, in pixels.", CHECKPOINT, "the model's", least=1, most=MOST_PIXELS
    )
    frames: int | None = _choice(None, "Of a video.", CHECKPOINT, "the model's", least=1, most=MOST_PIXELS)
    ray: str | None = _choice(
        None,
        "Compute on a Ray cluster: HOST:PORT of its head, 'local' for workers on this machine, or 'local:N' for N of "
        "them. The result is the same.",
        EFFORT,
        "in this process",
        metavar="ADDRESS",
    )
    device: str = _choice(
        "auto",
        "What PyTorch computes on: 'cpu', 'cuda', 'cuda:N' for the GPU of that number, or 'auto' for a GPU where there "
        "is one.",
        EFFORT,
        metavar="DEVICE",
    )

    def __post_init__(self) -> None:
        """Refuse values outside their bounds."""
        for one, kind in choices():
            _require(one, kind, getattr(self, one.name))

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> BuildConfig:
        """From names and values.

        Raises:
            UserError: a name of an earlier version, or a name that is none of the fields; says what is meant.
        """
        known = [one.name for one, _ in choices()]
        for name in options:
            if name in RENAMED:
                new, meaning = RENAMED[name]
                raise UserError(f"{option_name(name)} is now {option_name(new)}, which takes {meaning}")
            if name not in known:
                raise UnknownNameError("option", name, known)
        return cls(**options)

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets to build for, without repetitions."""
        return tuple(dict.fromkeys(_several(self.target)))

    @property
    def loras(self) -> tuple[str, ...]:
        """LoRAs that are fused into the transformer."""
        return tuple(_several(self.lora))

    @property
    def excludes(self) -> tuple[str, ...]:
        """Patterns of the layers that stay in full precision."""
        return tuple(_several(self.exclude))

    @property
    def restrictions(self) -> tuple[str, ...]:
        """Patterns of layers with the formats that they may have."""
        return tuple(_several(self.formats_for))

    @property
    def batches(self) -> tuple[int, ...]:
        """Samples of each optimization profile, ascending; none for the default."""
        return tuple(sorted(set(self.batch if isinstance(self.batch, Sequence) else (self.batch,))))

    @property
    def size(self) -> Amount | None:
        """Most resident bytes of quantized weights; None for any number.

        Raises:
            UserError: not a size.
        """
        return None if self.budget_size is None else parse_size(self.budget_size, "--budget-size")

    @property
    def speed(self) -> Amount | None:
        """Most milliseconds, or least speed; None for any.

        Raises:
            UserError: not a speed.
        """
        return None if self.budget_speed is None else parse_speed(self.budget_speed, "--budget-speed")

    @property
    def limit_bytes(self) -> int | None:
        """Of memory; None for what the machine has.

        Raises:
            UserError: not a size.
        """
        return None if self.memory_limit is None else int(parse_bytes(self.memory_limit, "--memory-limit"))


def choices() -> list[tuple[Field[Any], Any]]:
    """The fields of `BuildConfig` with their types."""
    kinds = get_type_hints(BuildConfig, localns={"Policy": object})
    return [(one, kinds[one.name]) for one in fields(BuildConfig)]


def choice_of(one: Field[Any]) -> Choice:
    """Return the description of a field."""
    choice: Choice = one.metadata["choice"]
    return choice


def _several(value: str | Sequence[str]) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value


def option_name(name: str) -> str:
    """Name a field as the command line does."""
    return f"--{name.replace('_', '-')}"


def _require(one: Field[Any], kind: Any, value: Any) -> None:
    """Refuse what is none of the choices of a field, no finite number, or out of bounds."""
    option, choice = option_name(one.name), choice_of(one)
    names = [name for part in (kind, *get_args(kind)) for name in get_args(part) if isinstance(name, str)]
    if names and value is not None and value not in names:
        raise UnknownNameError(option, str(value), names)
    if isinstance(one.default, bool) and not isinstance(value, bool):
        raise UserError(f"{option}: got {value!r}, expected true or false")
    numeric = choice.least is not None or kind in (float, float | None)
    for number in (value if isinstance(value, list | tuple) else (value,)) if numeric else ():
        if number is not None:
            _require_number(option, choice, number, whole=kind not in (float, float | None))


def _require_number(option: str, choice: Choice, number: Any, whole: bool) -> None:
    if isinstance(number, bool) or not isinstance(number, int if whole else (int, float)):
        raise UserError(f"{option}: got {number!r}, expected a {'whole ' if whole else ''}number")
    if not math.isfinite(number):
        raise UserError(f"{option}: got {number}, expected a finite number; pass such a number or leave the option out")
    if choice.least is not None and number < choice.least:
        raise UserError(f"{option}: got {number}, expected at least {choice.least:g}; pass a larger number")
    if choice.most is not None and number > choice.most:
        raise UserError(f"{option}: got {number}, expected at most {choice.most:g}; pass a smaller number")
