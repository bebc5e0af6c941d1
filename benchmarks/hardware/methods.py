"""The methods of the table, in the order of their worth, and how each is made on a model and a target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from adatsq_trt.calibration.transforms.statistics import sharing_layers
from adatsq_trt.costs import Costs
from adatsq_trt.formats import format_named
from adatsq_trt.models.capture import captured
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.search.bisection import bisected_policy
from adatsq_trt.search.costs import stored_time_model
from adatsq_trt.search.plan import Rows
from adatsq_trt.search.resume import Scorer
from adatsq_trt.search.simulation import Simulation
from adatsq_trt.stages import budget, quantize
from adatsq_trt.stages.context import Context
from benchmarks.hardware import peers
from benchmarks.hardware.costs import svdquant_costs
from benchmarks.hardware.rows import ASSIGNMENTS, Kind

# Target → the formats that its compiler takes: what a search chooses among, and peers are made of.
FORMATS = {
    "sm120": ("nvfp4", "nvfp4a16", "fp8", "fp8a16", "int4wo", "bf16"),
    "sm89": ("int4wo", "fp8", "fp8a16", "bf16"),
}
LOW_HIGH = {"sm120": ("nvfp4", "fp8"), "sm89": ("fp8", "bf16")}
SVDQUANT = {"sm120": "nvfp4", "sm89": "w4a4g64"}
FEW = 2  # engines of the rows that come last
# Of AutoQuantize and TMPDiff: bits per weight, and mean nominal bits.
EFFECTIVE_BITS = 6.0
# Samples that TMPDiff's intervals are measured on.
BISECTION_SAMPLES = 32


@dataclass(frozen=True)
class Made:
    """A method, ready to draw pictures.

    Attributes:
        rows: format of each step and layer.
        costs: bytes and milliseconds.
        store: its weights and scales; None for those of the run.
        origin: what is to be known of it.
    """

    rows: Sequence[Sequence[str]]
    costs: Costs
    store: CandidateWeights | None = None
    origin: str | None = None


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: in results.
        kind: full precision, another's, or a search.
        make: of others: from the calibrated run of a target.
        budget_of: of a search: the peer whose bytes and milliseconds it has to keep.
        most_assignments: of a search: its limit; 1 is its layer-only policy.
    """

    name: str
    kind: Kind
    make: Callable[[Context], Made] | None = None
    budget_of: str | None = None
    most_assignments: int | None = None


def methods(target: str) -> list[Method]:
    """All rows of a target, those of most worth first."""
    low, high = LOW_HIGH[target]
    made: list[Method] = [Method("bf16", "full", uniform("bf16"))]
    made += [Method(f"uniform {name}", "peer", uniform(name)) for name in (low, high) if name != "bf16"]
    if target == "sm120":
        made.append(Method("modelopt nvfp4 max", "peer", modelopt_max))
    made += [Method("svdquant", "peer", svdquant), *searched(f"uniform {low}"), *searched("svdquant")]
    made += [Method("first and last steps", "peer", protected), *searched("first and last steps")]
    if target == "sm120":
        made += [Method("autoquantize", "peer", autoquantize), *searched("autoquantize")]
        made += searched(f"uniform {high}")
    made += [Method("uniform int4wo", "peer", uniform("int4wo")), *searched("uniform int4wo")]
    made += [Method("tmpdiff", "peer", tmpdiff), *searched("tmpdiff")]
    peers_met = dict.fromkeys(method.budget_of for method in made if method.budget_of is not None)
    return made + [Method(f"ours, {FEW} engines, as {peer}", "ours", None, peer, FEW) for peer in peers_met]


def searched(peer: str) -> list[Method]:
    """Searches within a peer's costs: with the default's number of engines, and the best with one."""
    return [
        Method(f"ours, {ASSIGNMENTS} engines, as {peer}", "ours", None, peer, ASSIGNMENTS),
        Method(f"ours, layer-only, as {peer}", "ours", None, peer, 1),
    ]


def uniform(name: str) -> Callable[[Context], Made]:
    """One format everywhere, with this project's weights: GPTQ under the coherent Hessian."""

    def make(context: Context) -> Made:
        return policy_of(context, _everywhere(context, name))

    return make


def policy_of(context: Context, rows: Sequence[Sequence[str]]) -> Made:
    """A policy of the run's formats, with its weights."""
    index = {fmt.name: i for i, fmt in enumerate(context.formats)}
    costs = budget.account(context).costs.costs([tuple(index[name] for name in row) for row in rows])
    return Made(rows, costs)


def _everywhere(context: Context, name: str) -> list[list[str]]:
    return [[name] * len(context.layers)] * context.settings.steps


def modelopt_max(context: Context) -> Made:
    """NVFP4 with max calibration, as modelopt ships it."""
    store = peers.max_calibrated(context, format_named("nvfp4"))
    return replace(policy_of(context, _everywhere(context, "nvfp4")), store=store)


def protected(context: Context) -> Made:
    """The cheap format, and the dear one at the first steps and the last; weights of both stay in memory."""
    (target,) = context.settings.targets
    low, high = LOW_HIGH[target]
    steps = peers.protected_steps(context.settings.steps)
    rows = [[high if t in steps else low] * len(context.layers) for t in range(context.settings.steps)]
    return replace(policy_of(context, rows), origin=f"{high} at steps {', '.join(map(str, steps))}")


def svdquant(context: Context) -> Made:
    """Smoothing, branch and GPTQ in the target's 4-bit form."""
    (target,) = context.settings.targets
    fmt, shapes = format_named(SVDQUANT[target]), budget.shapes_of(context)
    times = stored_time_model(context.settings.times or "")
    assert times.card is not None, "times are a roofline"
    by_name, own = {shape.name: shape for shape in shapes}, budget.account(context).costs
    linears, one = context.adapter.quantizable_layers(), context.calibration.part(slice(0, 1))
    with captured(linears) as capture:
        one.velocity(one.noise(), 0)
    inputs = [by_name[names[0]] for names in sharing_layers(linears, capture.inputs)]
    costs = svdquant_costs(fmt, shapes, inputs, times.card, context.settings.steps, own.rest_ms)
    return Made(_everywhere(context, fmt.name), costs, peers.svdquant(context, fmt), fmt.name)


def autoquantize(context: Context) -> Made:
    """A format for each layer, by modelopt's scores and its integer program."""
    formats = [format_named(name) for name in LOW_HIGH["sm120"]]
    choice = peers.layer_choice(context, quantize.load(context), formats)
    row = [formats[i].name for i in choice.allocate(EFFECTIVE_BITS)]
    rows = [row] * context.settings.steps
    return replace(policy_of(context, rows), origin=f"{EFFECTIVE_BITS:g} bits per weight")


def tmpdiff(context: Context) -> Made:
    """A format for each step, by bisection."""
    (target,) = context.settings.targets
    names = LOW_HIGH[target]
    index = [[fmt.name for fmt in context.formats].index(name) for name in names]
    store, settings = quantize.load(context), context.settings
    with context.simulated(store).installed() as model, TemporaryDirectory() as folder:
        simulation = Simulation(model, context.formats, context.schedule, settings.guidance, context.executor)
        scorer = Scorer(simulation, context.selection.part(slice(0, BISECTION_SAMPLES)), Path(folder))

        def error(rows: Rows) -> float:
            return next(scorer.scores([tuple(tuple(index[i] for i in row) for row in rows)])).error

        bits = np.array([format_named(name).bits for name in names])
        shape = settings.steps, len(context.layers)
        found = bisected_policy(error, bits, float(bits.mean()), *shape, runs=min(settings.steps, 8))
    rows = [[names[i] for i in row] for row in found]
    return replace(policy_of(context, rows), origin=f"a mean of {bits.mean():g} bits")


def named(target: str) -> Mapping[str, Method]:
    """The rows of a target by name."""
    return {method.name: method for method in methods(target)}


def wanted(models: Sequence[str], targets: Sequence[str]) -> Iterator[tuple[str, str, Method]]:
    """All rows, model by model; those with few engines after the others of all targets."""
    for model in models:
        for few in (False, True):
            for target in targets:
                yield from ((model, target, m) for m in methods(target) if (m.most_assignments == FEW) == few)
