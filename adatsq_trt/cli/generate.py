"""`adatsq-trt generate`: pictures from a bundle, beside full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adatsq_trt.cli.backends import BackendOption, OffloadOption
from adatsq_trt.errors import UserError


def generate(
    bundle: Annotated[Path, typer.Argument(help="A bundle or a run directory.")],
    samples: Annotated[int, typer.Option("--samples", min=1, max=10_000, help="How many pictures.")] = 40,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="A prompt or its number; may be repeated.", show_default="all in turn"),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="HxW",
            help="Of the pictures, in pixels (FxHxW of videos): one of those that the bundle was built with.",
            show_default="the bundle's own",
        ),
    ] = None,
    lora: Annotated[list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="For slots; may be repeated.")] = None,
    lora_partial: Annotated[bool, typer.Option("--lora-partial", help="Drop what of a LoRA has no slot.")] = False,
    image: Annotated[Path | None, typer.Option("--image", help="What a model is shown beside the prompt.")] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="Of the image: white where it is drawn anew.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the first picture; the others follow.")] = 3_000_000,
    backend: BackendOption = "auto",
    offload: OffloadOption = "none",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="PNG file.", show_default="samples.png beside the bundle"),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Show the file with this machine's viewer.")] = False,
) -> None:
    """Generate pictures with the best backend that this machine has for a bundle, beside full precision.

    Example: adatsq-trt generate runs/demo --samples 10 --prompt 3 --prompt 7
    """
    from adatsq_trt.cli.progress import progress
    from adatsq_trt.engines.bundle import prompt_number
    from adatsq_trt.engines.runtime import Bundle
    from adatsq_trt.stages.images import shown_conditioning
    from adatsq_trt.stages.lora_slots import load_loras
    from adatsq_trt.stages.report import SAMPLES_NAME, SAMPLES_WITH_LORA, draw_both, write_samples
    from adatsq_trt.stages.shapes import parse_size

    asked = None if size is None else parse_size(size, "--size")
    opened = Bundle.open(bundle, backend, offload)
    files = opened.files
    typer.echo(opened.choice.sentence, err=True)
    file = output or files.folder.parent / (SAMPLES_WITH_LORA if lora else SAMPLES_NAME)
    if file.suffix != ".png":
        raise UserError(f"--output '{file}': got '{file.suffix}', expected a name that ends in .png")
    load_loras(opened, lora or (), lora_partial)
    choices = [prompt_number(files, text) for text in prompt or ()] or range(opened.manifest.prompts)
    conditioning = shown_conditioning(opened, [choices[i % len(choices)] for i in range(samples)], image, mask)
    sheets = draw_both(opened, opened.noise(range(seed, seed + samples), asked), conditioning, asked, progress)
    write_samples(file, sheets, [f"{len(opened.policy.buckets)} buckets, {opened.policy.mean_bits:.2f} mean bits", ""])
    error = float(((sheets["quantized"] - sheets["full precision"]) ** 2).mean())
    typer.echo(f"{file}: {samples} samples; mean squared pixel difference from full precision {error:.2e}")
    if show:
        typer.launch(str(file))
