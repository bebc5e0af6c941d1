"""GPTQ of a large layer beside llmcompressor's: same weight, same Hessian, same groups, in turns.

    python benchmarks/solver/run.py [--rounds 2]

Installs llmcompressor into an environment of its own, runs/bench-solver/peer, with the torch of this one. Writes
results.json beside this file and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor

from adatsq_trt.files import write_json_model

FOLDER, RESULTS = Path("runs/bench-solver"), Path(__file__).with_name("results.json")
SOLVE = Path(__file__).with_name("solve.py")
PEER = "llmcompressor==0.14.0.1"
# Flux-dev's two wide layers: (outputs, inputs).
SHAPES = ((12288, 3072), (3072, 12288))
CAUSES = 1024
GOAL = 1.5


class Timing(BaseModel):
    """One solver on one layer.

    Attributes:
        cpu_seconds: of every round, of one thread; pauses and other work on the machine hardly change them.
        wall_seconds: of every round.
        error: tr(ΔW H ΔWᵀ) / tr(W H Wᵀ).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu_seconds: tuple[float, ...]
    wall_seconds: tuple[float, ...]
    error: float


class Layer(BaseModel):
    """Both solvers on one layer.

    Attributes:
        ratio: median CPU seconds of the peer over ours.
        error_ratio: our error over the peer's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    outputs: int
    inputs: int
    ours: Timing
    peer: Timing
    ratio: float
    error_ratio: float


class Results(BaseModel):
    """Content of results.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    machine: str
    threads: int
    torch: str
    versions: dict[str, str]
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Problem:
    """A layer: H = M Mᵀ + D, inputs that share causes and have channels of unequal size, as a transformer's do.

    Attributes:
        weight: float32 [N, K].
        mix: M, float32 [K, causes].
        own: diagonal of D, float32 [K].
    """

    weight: Tensor
    mix: Tensor
    own: Tensor

    @classmethod
    def random(cls, outputs: int, inputs: int) -> Problem:
        """Seeded."""
        generator = torch.Generator().manual_seed(0)
        sizes = torch.exp(0.5 * torch.randn(inputs, generator=generator))
        mix = torch.randn(inputs, CAUSES, generator=generator) * sizes[:, None] / CAUSES**0.5
        weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        return cls(weight, mix, 0.1 * sizes.square())

    def save(self, file: Path) -> None:
        """Write the weight and the Hessian that solvers read."""
        save_file({"weight": self.weight, "hessian": self.mix @ self.mix.mT + self.own.diag()}, file)

    def size(self, delta: Tensor) -> float:
        """tr(Δ H Δᵀ) in float64."""
        delta = delta.double()
        together = (delta @ self.mix.double()).square().sum()
        return float(together + (delta.square() @ self.own.double()).sum())


def python_of_the_peer() -> Path:
    """An environment with the peer; made at the first call."""
    folder = FOLDER / "peer"
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists() or done.read_text() != PEER:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        same_torch = f"torch=={torch.__version__.partition('+')[0]}"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", PEER, same_torch], check=True)
        done.write_text(PEER)
    return python


def solve(python: Path | str, solver: str, problem: Problem, file: Path) -> tuple[float, float, float]:
    """Wall-clock seconds, CPU seconds and error of one run."""
    result = FOLDER / f"{solver}.safetensors"
    subprocess.run([python, SOLVE, solver, file, result], check=True)
    written = load_file(result)
    error = problem.size(written["values"] - problem.weight) / problem.size(problem.weight)
    wall, processor = written["seconds"].tolist()
    return wall, processor, error


def measure(outputs: int, inputs: int, rounds: int) -> Layer:
    """Ours first and the peer first by turns."""
    pythons: dict[str, Path | str] = {"ours": sys.executable, "peer": python_of_the_peer()}
    problem, file = Problem.random(outputs, inputs), FOLDER / "problem.safetensors"
    problem.save(file)
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in pythons}
    for turn in range(rounds):
        for name in sorted(pythons, reverse=turn % 2 == 1):
            runs[name].append(solve(pythons[name], name, problem, file))
    ours, peer = (
        Timing(wall_seconds=tuple(w for w, _, _ in r), cpu_seconds=tuple(c for _, c, _ in r), error=r[0][2])
        for r in (runs["ours"], runs["peer"])
    )
    ratio = median(peer.cpu_seconds) / median(ours.cpu_seconds)
    return Layer(outputs=outputs, inputs=inputs, ours=ours, peer=peer, ratio=ratio, error_ratio=ours.error / peer.error)


def versions() -> dict[str, str]:
    """Of the peer's environment."""
    command = [python_of_the_peer(), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    listed = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    wanted = ("llmcompressor", "compressed-tensors", "torch")
    return {entry["name"]: entry["version"] for entry in listed if entry["name"] in wanted}


def table(results: Results) -> str:
    """The results in Markdown."""
    lines = ["| layer | ours, CPU s | llmcompressor, CPU s | ratio | our error / its |", "|---|---:|---:|---:|---:|"]
    for layer in results.layers:
        figures = f"{median(layer.ours.cpu_seconds):.1f} | {median(layer.peer.cpu_seconds):.1f} | {layer.ratio:.2f}"
        lines.append(f"| {layer.outputs} x {layer.inputs} | {figures} | {layer.error_ratio:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure GPTQ beside llmcompressor's.")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    layers = tuple(measure(outputs, inputs, arguments.rounds) for outputs, inputs in SHAPES)
    results = Results(
        machine=platform.machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        versions=versions(),
        layers=layers,
    )
    write_json_model(RESULTS, results)
    print(table(results))
    missed = [layer for layer in layers if layer.ratio < GOAL or layer.error_ratio > 1]
    print(f"goal of {GOAL} times as fast at no larger error: {'missed' if missed else 'met'}")


if __name__ == "__main__":
    main()
