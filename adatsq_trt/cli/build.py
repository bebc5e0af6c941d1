"""`adatsq-trt build engine`: all stages, from a model to a bundle of engines; its options serve single stages too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from adatsq_trt.cli.budgets import BudgetRequest


class StageName(StrEnum):
    """The stages of a run, in order."""

    CALIBRATE = "calibrate"
    QUANTIZE = "quantize"
    SEARCH = "search"
    EXPORT = "export"
    BUNDLE = "bundle"


class LayoutName(StrEnum):
    """How plans and weights are arranged."""

    EMBEDDED = "embedded"
    SHARED = "shared"
    SWITCH = "switch"
    PLUGIN = "plugin"


class PrecisionName(StrEnum):
    """What denoiser calls are computed in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class BackendName(StrEnum):
    """What compiles plans."""

    RTX = "rtx"
    TENSORRT = "tensorrt"


class HardwareName(StrEnum):
    """Which GPUs run a plan of enterprise TensorRT."""

    NONE = "none"
    SAME = "same_compute_capability"
    AMPERE_PLUS = "ampere_plus"


class TransformName(StrEnum):
    """What can happen to weights and inputs before they are rounded."""

    SMOOTH = "smooth"
    HADAMARD = "hadamard"
    BALANCE = "balance"
    LOW_RANK = "low-rank"
    HADAMARD_LOW_RANK = "hadamard-low-rank"
    BALANCE_LOW_RANK = "balance-low-rank"


_CHECKPOINT, _POLICY, _EFFORT = "A checkpoint of your own", "The policy", "The effort"
_ENTERPRISE = "Enterprise TensorRT"
# Parameters of `engine` that are settings as they are.
_GIVEN = (
    *("beam", "candidates", "expansions", "calibration_samples", "selection_samples", "held_out_samples"),
    *("seed", "steps", "max_assignments", "search_precision"),
)
# Each batch of samples has a million seeds of its own; a scheduler has a thousand timesteps.
_MOST_ROWS = 4096
_MOST_SAMPLES, _MOST_STEPS, _MOST_PATHS = 1_000_000, 1000, 1000

Model = Annotated[
    str,
    typer.Argument(
        help="Name of a model (see 'adatsq-trt models'), folder of a diffusers pipeline or transformer, .safetensors "
        "file of a transformer, or hub id of a pipeline.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="Folder or hub id of the pipeline that a transformer or a single file belongs to.",
        show_default="none",
        rich_help_panel=_CHECKPOINT,
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:SCALE]",
        help="LoRA to fuse into the transformer first; may be repeated.",
        show_default="none",
        rich_help_panel=_CHECKPOINT,
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        help="File with what calibration draws, a prompt in each line.",
        show_default="128 prompts of this package",
        rich_help_panel=_CHECKPOINT,
    ),
]
Height = Annotated[
    int | None,
    typer.Option(
        "--height", min=1, help="Of the picture, in pixels.", show_default="the model's", rich_help_panel=_CHECKPOINT
    ),
]
Width = Annotated[
    int | None,
    typer.Option(
        "--width", min=1, help="Of the picture, in pixels.", show_default="the model's", rich_help_panel=_CHECKPOINT
    ),
]
Frames = Annotated[
    int | None,
    typer.Option("--frames", min=1, help="Of a video.", show_default="the model's", rich_help_panel=_CHECKPOINT),
]
TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target", help="What to build for: sm80, sm86, sm89, sm90 (layout plugin), sm120 or cpu; may be repeated."
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Run directory: results are kept, reused and resumed there.",
        show_default="runs/MODEL-TARGET",
    ),
]
Simulate = Annotated[
    bool,
    typer.Option("--simulate", help="Study a policy: allow formats without an accelerated path, build no engines."),
]
Layout = Annotated[
    LayoutName | None,
    typer.Option(
        "--layout",
        help="embedded: a self-contained plan for each assignment; shared: plans without weights over one store; "
        "switch: one plan in which assignments take turns; plugin: one graph of plugin nodes and the commands that "
        "compile it with enterprise TensorRT.",
        show_default="embedded",
    ),
]
Backend = Annotated[
    BackendName,
    typer.Option(
        "--backend",
        help="What compiles plans. rtx: TensorRT-RTX, without a GPU; tensorrt: enterprise TensorRT, on a machine with "
        "the target's GPU.",
    ),
]
Batch = Annotated[
    list[int] | None,
    typer.Option(
        "--batch",
        min=1,
        max=_MOST_ROWS,
        help="Samples in a call that plans are tuned for; may be repeated: an optimization profile for each, and the "
        "largest is the most that plans accept.",
        show_default="32",
    ),
]
Shapes = Annotated[
    str | None,
    typer.Option(
        "--shapes",
        metavar="BxHxW,...",
        help="Samples and size in pixels (for videos BxFxHxW) of each optimization profile, such as "
        "1x1024x1024,4x512x512; instead of --batch. One size is the model's own, at which the policy is searched: "
        "--height and --width, or the first.",
        show_default="the model's size",
    ),
]
Hardware = Annotated[
    HardwareName,
    typer.Option("--hardware-compatibility", help="Which other GPUs run the plans.", rich_help_panel=_ENTERPRISE),
]
VersionCompatible = Annotated[
    bool,
    typer.Option(
        "--version-compatible",
        help="Plans for later versions of TensorRT too, and for its lean runtime.",
        rich_help_panel=_ENTERPRISE,
    ),
]
WeightStreaming = Annotated[
    bool,
    typer.Option(
        "--weight-streaming",
        help="Keep weights in the host's memory as far as the GPU's does not suffice.",
        rich_help_panel=_ENTERPRISE,
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(
        "--formats",
        help="Candidates: a set (paper, paper-fine, paper-low, paper-pairs, blackwell, ada, hopper, ampere, cpu) or a "
        "list such as nvfp4,fp8.",
        show_default="the target's set",
        rich_help_panel=_POLICY,
    ),
]
TransformOption = Annotated[
    TransformName | None,
    typer.Option(
        "--transform",
        help="What happens to weights and inputs before they are rounded; simulated only. smooth: SmoothQuant; "
        "hadamard: QuaRot's rotation; balance: ViDiT-Q's scaling and rotation; low-rank: SVDQuant's smoothing and "
        "16-bit branch; hadamard-low-rank and balance-low-rank: two of these.",
        show_default="nothing",
        rich_help_panel=_POLICY,
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget-bits",
        help="Largest mean over steps and layers of (weight bits + activation bits) / 2.",
        show_default="by format set, unless there is another budget",
        rich_help_panel=_POLICY,
    ),
]
BudgetBytes = Annotated[
    str | None,
    typer.Option(
        "--budget-bytes",
        metavar="SIZE",
        help="Most bytes of quantized weights, each weight format of a layer once: a number, or one with kB, MB or GB.",
        show_default="no limit",
        rich_help_panel=_POLICY,
    ),
]
BudgetMs = Annotated[
    float | None,
    typer.Option(
        "--budget-ms",
        help="Most milliseconds per sample on the card that --gpu names.",
        show_default="no limit",
        rich_help_panel=_POLICY,
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        help="Card of --budget-ms: a name, for a roofline of its published rates, or a file that "
        "'adatsq-trt benchmark kernels' wrote there.",
        show_default="none",
        rich_help_panel=_POLICY,
    ),
]
MaxAssignments = Annotated[
    int | None,
    typer.Option(
        "--max-assignments",
        min=1,
        max=_MOST_STEPS,
        help="Most distinct assignments, which are engines in the layouts embedded and shared; steps share them.",
        show_default="any number",
        rich_help_panel=_POLICY,
    ),
]
Policy = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        help="Use this policy.json instead of searching.",
        show_default="search",
        rich_help_panel=_POLICY,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps", min=1, max=_MOST_STEPS, help="Denoising steps.", show_default="the model's", rich_help_panel=_POLICY
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        help="Scale of guidance.",
        show_default="the model's",
        rich_help_panel=_POLICY,
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", min=0, max=2**32 - 1, help="Of prompts, noise and projections.", rich_help_panel=_EFFORT),
]
Beam = Annotated[
    int | None,
    typer.Option(
        "--beam", min=1, max=_MOST_PATHS, help="Paths kept after each step.", show_default="4", rich_help_panel=_EFFORT
    ),
]
Candidates = Annotated[
    int | None,
    typer.Option(
        "--candidates",
        min=1,
        max=_MOST_PATHS,
        help="Assignments tried per path and step, besides the previous one.",
        show_default="5",
        rich_help_panel=_EFFORT,
    ),
]
Expansions = Annotated[
    int | None,
    typer.Option(
        "--expansions",
        min=1,
        max=_MOST_PATHS**2,
        help="Denoiser calls of the beam per step: of all paths and candidates the most promising ones.",
        show_default="all",
        rich_help_panel=_EFFORT,
    ),
]
SearchPrecision = Annotated[
    PrecisionName | None,
    typer.Option(
        "--search-precision",
        help="What the search computes in; bfloat16 suits a GPU.",
        show_default="float32",
        rich_help_panel=_EFFORT,
    ),
]
Calibration = Annotated[
    int | None,
    typer.Option(
        "--calibration-samples",
        min=1,
        max=_MOST_SAMPLES,
        help="Pictures that Hessians, sensitivities and the beam are measured on.",
        show_default="64",
        rich_help_panel=_EFFORT,
    ),
]
Selection = Annotated[
    int | None,
    typer.Option(
        "--selection-samples",
        min=1,
        max=_MOST_SAMPLES,
        help="Fresh pictures that decide between finished policies.",
        show_default="256",
        rich_help_panel=_EFFORT,
    ),
]
HeldOut = Annotated[
    int | None,
    typer.Option(
        "--held-out-samples",
        min=1,
        max=_MOST_SAMPLES,
        help="Fresh pictures that the reported errors are measured on.",
        show_default="512",
        rich_help_panel=_EFFORT,
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory-limit",
        metavar="SIZE",
        help="Most resident memory of the stages, such as 12GB: what does not fit is read or computed again.",
        show_default="the machine's",
        rich_help_panel=_EFFORT,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Compute on a Ray cluster: HOST:PORT of its head, 'local' for workers on this machine, or 'local:N' for N "
        "of them. The result is the same.",
        show_default="in this process",
        rich_help_panel=_EFFORT,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="What PyTorch computes on: 'cpu', 'cuda', 'cuda:N' for the GPU of that number, or 'auto' for a GPU where "
        "there is one.",
        rich_help_panel=_EFFORT,
    ),
]


def engine(
    model: Model,
    target: TargetOption = None,
    output: Output = None,
    formats: Formats = None,
    transform: TransformOption = None,
    budget_bits: Budget = None,
    budget_bytes: BudgetBytes = None,
    budget_ms: BudgetMs = None,
    gpu: Gpu = None,
    max_assignments: MaxAssignments = None,
    simulate: Simulate = False,
    layout: Layout = None,
    batch: Batch = None,
    shapes: Shapes = None,
    backend: Backend = BackendName.RTX,
    hardware: Hardware = HardwareName.NONE,
    versions: VersionCompatible = False,
    streaming: WeightStreaming = False,
    steps: Steps = None,
    guidance: Guidance = None,
    policy: Policy = None,
    seed: Seed = 0,
    beam: Beam = None,
    candidates: Candidates = None,
    expansions: Expansions = None,
    search_precision: SearchPrecision = None,
    calibration_samples: Calibration = None,
    selection_samples: Selection = None,
    held_out_samples: HeldOut = None,
    memory_limit: MemoryLimit = None,
    base: Base = None,
    lora: Lora = None,
    prompts: Prompts = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    ray: Ray = None,
    device: Device = "auto",
    until: Annotated[StageName, typer.Option(hidden=True)] = StageName.BUNDLE,
) -> None:
    """Run all stages: from a model to TensorRT engines in a bundle.

    Stages whose inputs have not changed are reused; an interrupted run goes on where it stopped.

    Example: adatsq-trt build engine digits-flux --target sm120 -o runs/demo
    """
    from adatsq_trt.cli import loading, options

    request = options.Request(
        model=loading.ModelRequest(model, base, tuple(lora or ()), prompts, height, width, frames, guidance),
        targets=tuple(dict.fromkeys(target or ())),
        place=options.PlaceRequest(output, memory_limit, ray, device),
        formats=options.FormatRequest(formats, _value(transform), simulate),
        budgets=BudgetRequest(budget_bits, budget_bytes, budget_ms, gpu),
        compiler=options.PlanRequest(_value(layout), backend.value, hardware.value, versions, streaming, batch, shapes),
        policy=policy,
        given=_given(locals()),
    )
    options.run_stages(request, until)


def _value(choice: LayoutName | TransformName | None) -> Any:
    """What was chosen, None for nothing."""
    return None if choice is None else choice.value


def _given(parameters: Mapping[str, Any]) -> dict[str, int | str]:
    """Those of `engine`'s that are settings as they are and were given."""
    return {name: parameters[name] for name in _GIVEN if parameters[name] is not None}


def until(stage: StageName, summary: str) -> Callable[..., None]:
    """The command that runs the stages up to one, with the options of `build engine`."""

    @functools.wraps(engine)
    def command(*args: Any, **kwargs: Any) -> None:
        engine(*args, **{**kwargs, "until": stage})

    command.__name__ = stage.value
    command.__doc__ = (
        f"{summary}\n\nRuns the stages up to '{stage.value}' with the options of 'build engine', which reuses them.\n\n"
        f"Example: adatsq-trt {stage.value} digits-flux --target sm120 -o runs/demo"
    )
    return command
