"""`adatsq-trt policy`: policies in the words of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

_KEY: Literal["diffusion-step-policy"] = "diffusion-step-policy"
Kind = Annotated[Literal["diffusion-step-policy"], typer.Option("--to", help="What to write.", show_default=True)]
From = Annotated[Literal["diffusion-step-policy"], typer.Option("--from", help="What to read.", show_default=True)]


def export(
    policy: Annotated[Path, typer.Argument(help="A policy.json.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.", show_default=False)],
    to: Kind = _KEY,
) -> None:
    """Write the key quantization_config.runtime.diffusion_step_policy that vLLM-Omni, SGLang and diffusers read.

    The key says less than a policy: what was lost is printed, a line each.

    Example: adatsq-trt policy export runs/demo/policy.json --to diffusion-step-policy -o step_policy.json
    """
    from adatsq_trt.files import write_json_model
    from adatsq_trt.policy import GIVEN_POLICY_ADVICE, Policy
    from adatsq_trt.step_policy import StepPolicyFile, export_policy

    exported = export_policy(Policy.load(policy, GIVEN_POLICY_ADVICE))
    write_json_model(output, StepPolicyFile.of(exported.policy))
    first, last = exported.policy.first_steps.count, exported.policy.last_steps.count
    typer.echo(
        f"{output}: first {first} and last {last} steps in 16 bits, the others native, which is {exported.native}"
    )
    for loss in exported.lost:
        typer.echo(f"lost: {loss}")
    if not exported.lost:
        typer.echo("nothing was lost")


def import_(
    step_policy: Annotated[Path, typer.Argument(help="A config.json with the key, or the key alone.")],
    like: Annotated[
        Path, typer.Option("--like", help="A policy.json of the same model: its layers and steps.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="policy.json to write.", show_default=False)],
    from_: From = _KEY,
    native: Annotated[str, typer.Option("--native", help="Format of the checkpoint's quantized path.")] = "fp8",
    wide: Annotated[
        str | None,
        typer.Option(
            "--wide",
            help="Format of steps in 16 bits.",
            show_default="16-bit activations over --native's weights, bf16 where there is no such format",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Of the loop.", show_default="as --like")] = None,
) -> None:
    """Read that key as a policy, for 'build engine --policy'.

    Example: adatsq-trt policy import config.json --like runs/demo/policy.json -o policy.json
    """
    from adatsq_trt.files import read_json_model
    from adatsq_trt.formats import format_named
    from adatsq_trt.policy import GIVEN_POLICY_ADVICE, Policy
    from adatsq_trt.step_policy import StepPolicyFile, import_policy, wide_twin

    own = format_named(native)
    other_steps = wide_twin(own) if wide is None else format_named(wide)
    advice = "give a config.json with quantization_config.runtime.diffusion_step_policy"
    known = read_json_model(step_policy, StepPolicyFile, advice).policy
    other = Policy.load(like, GIVEN_POLICY_ADVICE)
    count = steps or other.steps
    names = (own.name, other_steps.name)
    policy = import_policy(known, other.model, other.weights_sha256, other.layers, count, *names)
    policy.save(output)
    shared = other_steps.weight == own.weight
    in_16_bits = known.modes(count).count("a16")
    weights = (
        f"reads the weights of {native}, as in other programs"
        if shared
        else f"reads weights of its own here, where other programs dequantize those of {native}"
    )
    typer.echo(
        f"{output}: {in_16_bits} of {count} steps in {other_steps.name}, the others in {native}; "
        f"a step in 16 bits {weights}"
    )
