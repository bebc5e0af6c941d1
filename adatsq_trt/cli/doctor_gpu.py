"""`adatsq-trt doctor --gpu`: the GPU, what would run a bundle on it, and how that goes."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import typer

from adatsq_trt.errors import AdatsqError

if TYPE_CHECKING:
    from rich.console import Console

    from adatsq_trt.engines.gpu_report import GpuMachine, GpuReport, Trial

_DEMO = "digits-flux"


def examine(bundle: Path | None, output: Path | None, json: bool) -> None:
    """Look, try, and say what was found.

    Args:
        bundle: to try; the demo's model is built where there is a GPU and no bundle is given.
        output: JSON file to write.
        json: print the report as JSON.

    Raises:
        AdatsqError: something that was tried went wrong.
        UserError: there is no bundle, or it is damaged.
    """
    from rich.console import Console

    from adatsq_trt.engines.gpu_report import GpuReport, look_at_machine
    from adatsq_trt.files import write_json_model

    machine = look_at_machine()
    with TemporaryDirectory(prefix="adatsq-gpu-") as scratch:
        if bundle is None and machine.gpus:
            bundle = _build_demo(machine, Path(scratch))
        report = GpuReport(machine=machine) if bundle is None else _try(bundle, Path(scratch))
    if output is not None:
        write_json_model(output, report)
    if json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        _print(Console(markup=False, highlight=False, soft_wrap=True), report)
    if not report.passed:
        raise AdatsqError("something went wrong on the GPU; attach the file of --output to a bug report")


def _build_demo(machine: GpuMachine, folder: Path) -> Path | None:
    """The bundle of a small model for the first GPU; None where there are no plans for such a GPU."""
    from adatsq_trt import api
    from adatsq_trt.cli.progress import bars
    from adatsq_trt.formats import TARGETS

    capability = machine.gpus[0].capability
    target = next((name for name, t in TARGETS.items() if t.compute_capability == capability and t.formats), None)
    if target is None:
        typer.echo(f"there are no targets for sm{capability}; the demo is built for the processor", err=True)
    with bars() as progress:
        result = api.build(_DEMO, output=folder / "run", target=target or "cpu", progress=progress)
    return Path(result.path)


def _try(bundle: Path, folder: Path) -> GpuReport:
    from adatsq_trt.engines.gpu_report import try_bundle

    return try_bundle(bundle, folder / "check", lambda name: typer.echo(f"{name} ...", err=True))


def _print(console: Console, report: GpuReport) -> None:
    machine = report.machine
    console.print(f"driver: {machine.driver or 'there is no NVIDIA driver'}")
    for gpu in machine.gpus:
        console.print(f"GPU: {gpu.name}, sm{gpu.capability}, {gpu.memory_bytes / 1e9:.0f} GB")
    console.print(f"PyTorch sees: {', '.join(machine.torch_sees) or 'no GPU'}")
    for name, version in machine.libraries.items():
        console.print(f"{name}: {version}")
    if report.bundle is None:
        console.print(
            f"\nwith a GPU, {_DEMO} would be built for it, run, checked and timed; --bundle RUN says why a bundle's "
            "plans do not run here"
        )
        return
    console.print(f"\n{report.bundle}, best first:")
    for backend, reason in report.backends.items():
        chosen = " (auto takes this)" if backend == report.choice else ""
        console.print(f"  {backend}: {'runs here' if reason is None else reason}{chosen}")
    for trial in report.trials:
        console.print(_line(trial))
    if not report.trials:
        console.print("on a GPU the bundle would be run, checked and timed")


def _line(trial: Trial) -> str:
    if trial.error is not None:
        return f"{trial.name}: FAILED after {trial.seconds:.1f} s\n{trial.error}"
    told = [f"{name} {value:.3g}" for name, value in trial.result.items() if isinstance(value, float)]
    told += [f"{name} {value}" for name, value in trial.result.items() if isinstance(value, bool | int | str)]
    return f"{trial.name}: {trial.seconds:.1f} s; {', '.join(told)}"
