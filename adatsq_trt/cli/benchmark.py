"""`adatsq-trt benchmark`: bundles on this machine, and the plugin's kernels on its GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adatsq_trt.cli.backends import BackendName, BackendOption

if TYPE_CHECKING:
    from rich.table import Table

    from adatsq_trt.engines.backends.selection import BackendChoice
    from adatsq_trt.engines.benchmark import BundleTimings
    from adatsq_trt.engines.bundle import BundleFiles


def kernels(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")],
    tune: Annotated[
        bool, typer.Option("--tune", help="Search the fastest tiles of this GPU, for 'build plugins --tuning'.")
    ] = False,
    tuning: Annotated[
        Path | None, typer.Option("--tuning", help="Table of tiles to start from.", show_default="the package's")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Compilers at a time, with --tune.", show_default="one per processor"),
    ] = None,
) -> None:
    """Compare the kernels with PyTorch: first the numbers, then the time.

    Example: adatsq-trt benchmark kernels -o results.json
    """
    import importlib.util

    from adatsq_trt.errors import DependencyError

    if importlib.util.find_spec("triton") is None:
        raise DependencyError("the kernels need the Triton language; run: pip install 'adatsq-trt[plugins]'")
    if tune:
        _tune(output, tuning, jobs or os.cpu_count() or 1)
        return
    from adatsq_trt.plugins.benchmark import benchmark

    benchmark(output, tuning)


def _tune(output: Path, table: Path | None, jobs: int) -> None:
    from collections.abc import Callable
    from contextlib import ExitStack
    from datetime import UTC, datetime

    import torch

    from adatsq_trt.cli.progress import progress
    from adatsq_trt.plugins.benchmark import written_whole
    from adatsq_trt.plugins.tiles import TABLE, dump_tiles, load_tiles
    from adatsq_trt.plugins.tune import tune

    known = load_tiles(table or TABLE)
    with ExitStack() as stack:
        part = stack.enter_context(written_whole(output))

        def start(total: int) -> Callable[[], None]:
            return stack.enter_context(progress("tuning kernels", total))

        tuned = tune(jobs, start)
        target = next(iter(tuned)).target
        origin = f"{target} tuned on {torch.cuda.get_device_name()}, {datetime.now(UTC).date()}; the rest as before."
        part.write_text(dump_tiles({**known, **tuned}, origin), encoding="utf-8")


def bundle(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles or run directories; they take turns.")],
    backend: BackendOption = "auto",
    samples: Annotated[int, typer.Option("--samples", min=1, max=1024, help="Pictures in one call.")] = 1,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=10_000, help="Timed calls of each case.")] = 20,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file to write.", show_default="none")
    ] = None,
    layer_times: Annotated[
        Path | None,
        typer.Option(
            "--layer-times",
            help="JSON file to write as well: times of whole layers as plans, for --gpu FILE of 'build engine'.",
            show_default="none",
        ),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform/--no-uniform",
            help="Beside plans, build and time plans that have one of the policy's formats everywhere.",
        ),
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Time a bundle's steps: by its policy, in each assignment, and in full precision.

    Beside plans on a GPU also in each of the policy's formats alone, and in 16 bits.

    Example: adatsq-trt benchmark bundle runs/demo
    """
    from rich.console import Console

    from adatsq_trt.cli.progress import progress
    from adatsq_trt.engines.benchmark import WARM_UP_ROUNDS, benchmark_bundles
    from adatsq_trt.files import write_json_model

    if layer_times is not None:
        _write_layer_times(bundles, backend, rounds, layer_times)
    with progress("benchmark", WARM_UP_ROUNDS + rounds) as advance:
        result = benchmark_bundles(bundles, backend, samples, rounds, advance, _uniform if uniform else None)
    if output is not None:
        write_json_model(output, result)
    if json:
        typer.echo(result.model_dump_json(indent=2))
        return
    console = Console(highlight=False)
    console.print(_timing_table(result))
    for start in result.starts:
        kernels = {None: "", True: ", with compiled kernels", False: ", without compiled kernels"}[start.kernels]
        console.print(
            f"{start.bundle}{kernels}: loads in {start.load_seconds:.1f} s, first picture {start.first_seconds:.2f} s, "
            f"then {start.next_seconds:.2f} s; {start.memory_bytes / 1e9:.2f} GB of the card in use"
        )


def _uniform(files: BundleFiles, choice: BackendChoice, rows: int) -> BundleFiles | None:
    """Made beside plans only, and the exporter takes seconds to import."""
    from adatsq_trt.stages.uniform_plans import uniform_bundle

    return uniform_bundle(files, choice, rows)


def _write_layer_times(bundles: list[Path], backend: BackendName, rounds: int, output: Path) -> None:
    """Of one bundle, since a search is of one model."""
    from adatsq_trt.cli.progress import progress
    from adatsq_trt.engines.benchmark import WARM_UP_ROUNDS
    from adatsq_trt.errors import UserError
    from adatsq_trt.files import write_json_model
    from adatsq_trt.stages.layer_times import measure_layers

    if len(bundles) > 1:
        raise UserError(f"--layer-times: got {len(bundles)} bundles, expected one; measure them one by one")
    with progress("layers", WARM_UP_ROUNDS + rounds) as advance:
        write_json_model(output, measure_layers(bundles[0], backend, rounds, advance))


def _timing_table(result: BundleTimings) -> Table:
    from rich.table import Column, Table

    several = len({timing.bundle for timing in result.timings}) > 1
    of_16 = any(timing.speed_up_16 is not None for timing in result.timings)
    columns = ("formats", "steps/s", "median ms", "10 % to 90 %", "s/picture", "of full precision")
    table = Table(Column("case", no_wrap=True), *columns, *(["of 16 bits"] if of_16 else []), box=None)
    for row in result.timings:
        name = f"{row.bundle}: {row.case}" if several else row.case
        formats = ", ".join(f"{count} {fmt}" for fmt, count in row.formats.items())
        spread = f"{row.p10_ms:.1f} to {row.p90_ms:.1f}"
        faster = [_times(row.speed_up), *([_times(row.speed_up_16)] if of_16 else [])]
        times = (f"{row.steps_per_second:.2f}", f"{row.median_ms:.1f}", spread, f"{row.picture_seconds:.2f}")
        table.add_row(name, formats, *times, *faster)
    machine, first = result.machine, result.timings[0]
    where = machine.gpu or f"{machine.processor} ({', '.join(machine.instructions)}), {machine.cores} cores"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    table.caption = (
        f"{where}; {versions}; layout {first.layout}; {first.samples} samples, {first.rows} rows in a call; "
        f"{first.calls} calls of each after {result.warm_up_rounds} to warm up"
    )
    return table


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} × as fast"
