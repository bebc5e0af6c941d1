"""TMPDiff's idea beside the search: error and denoiser calls, on the same weights, activations and samples.

    python -m benchmarks.search.bisection RUN [SAMPLES]

RUN is a run directory with a finished search. The bisection measures its intervals on the screening batch; its policy,
the chosen one and the best static ones are measured on fresh samples (256), which are none of the run's held-out ones.
Prints a Markdown table.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from adatsq_trt.calibration.prompt_shares import Use, shared_prompts
from adatsq_trt.files import read_json_model
from adatsq_trt.search.bisection import bisected_policy
from adatsq_trt.search.denoising import format_bits
from adatsq_trt.search.plan import Rows
from adatsq_trt.search.resume import Scorer
from adatsq_trt.search.select import SearchResult
from adatsq_trt.search.simulation import Simulation
from adatsq_trt.stages import judging, quantize, search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.models import open_run

SAMPLES = 256


def policies(context: Context, result: SearchResult) -> dict[str, Rows]:
    """The chosen policy and the best static ones, by name."""
    index = {fmt.name: i for i, fmt in enumerate(context.formats)}
    wanted = {"chosen": result.chosen, "layer-only": result.layer_only, "time-only": result.time_only}
    return {
        f"{name} ({result.points[i].kind})": tuple(tuple(index[f] for f in row) for row in result.points[i].formats)
        for name, i in wanted.items()
        if i is not None
    }


def measure(context: Context, samples: int, folder: Path) -> list[tuple[str, float, float, int]]:
    """Name, mean bits, error and calls of every policy."""
    settings, bits = context.settings, format_bits(context.formats)
    result = read_json_model(search.stage(context).folder / search.RESULT, SearchResult)
    assert settings.budget_bits is not None, "the bisection is compared at a mean of bits"
    with context.simulated(quantize.load(context)).installed() as model:
        simulation = Simulation(model, context.formats, context.schedule, settings.guidance, context.executor)
        screening = Scorer(simulation, context.selection.part(slice(0, judging.SCREENING)), folder)
        runs = list[Rows]()

        def error(rows: Rows) -> float:
            runs.append(rows)
            return next(screening.scores([rows])).error

        found = policies(context, result)
        shape = settings.steps, len(context.layers)
        found["bisection"] = bisected_policy(error, bits, settings.budget_bits, *shape, runs=settings.steps)
        prompts = shared_prompts(len(context.adapter.prompts), Use.SCORING)
        fresh = Scorer(simulation, context.evaluation([prompts[i % len(prompts)] for i in range(samples)]), folder)
        errors = fresh.scores(list(found.values()))
        calls = dict.fromkeys(found, result.denoiser_calls) | {"bisection": len(set(runs)) * settings.steps}
        return [
            (name, float(bits[list(map(list, rows))].mean()), score.error, calls[name])
            for (name, rows), score in zip(found.items(), errors, strict=True)
        ]


def main() -> None:
    """Measure and print."""
    context = open_run(Path(sys.argv[1]))
    samples = int(sys.argv[2]) if len(sys.argv) > 2 else SAMPLES
    with TemporaryDirectory() as folder:
        rows = measure(context, samples, Path(folder))
    print("| policy | mean bits | latent MSE | denoiser calls |\n|---|---:|---:|---:|")
    for name, bits, error, calls in rows:
        print(f"| {name} | {bits:.3f} | {error:.2e} | {calls} |")


if __name__ == "__main__":
    main()
