"""Stage `search`: sensitivities, beam, selection on whole samples, figures on held-out samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adatsq_trt.calibration.finite import require_finite_trajectory
from adatsq_trt.calibration.fisher import projections
from adatsq_trt.calibration.trajectory import SAMPLES_PER_CALL, state_tensors, trajectory_states
from adatsq_trt.calibration.units import measured_trajectory
from adatsq_trt.errors import MismatchError, UserError
from adatsq_trt.execution import Executor, InProcess
from adatsq_trt.execution.device import CPU
from adatsq_trt.execution.precision import Bfloat16
from adatsq_trt.execution.threads import threads
from adatsq_trt.files import parse_json_model, read_tensors, write_json_model, write_tensors
from adatsq_trt.formats import format_named
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.stored import count_weights
from adatsq_trt.policy import GIVEN_POLICY_ADVICE, Policy
from adatsq_trt.search.active import indices_of
from adatsq_trt.search.beam import Pruning, most_expansions
from adatsq_trt.search.denoising import ConstrainedProblem, DenoisingProblem, format_bits, row_errors
from adatsq_trt.search.joint import Shrinkage
from adatsq_trt.search.merge import Allowance, MeanBits, Several, merged_policies
from adatsq_trt.search.plan import (
    ONCE_SHRINKAGES,
    SHRINKAGES,
    Plan,
    Rows,
    make_constrained_plan,
    make_plan,
    most_policies,
)
from adatsq_trt.search.resume import measure_sensitivity, search_columns
from adatsq_trt.search.select import Proposal, SearchResult
from adatsq_trt.search.sensitivity import Sensitivity
from adatsq_trt.search.simulation import Simulation
from adatsq_trt.search.static import (
    MOST_PROPOSALS,
    constrained_layer_only,
    constrained_time_only,
    layer_only,
    time_only,
    uniform,
)
from adatsq_trt.settings import Settings
from adatsq_trt.solver import State
from adatsq_trt.stages import budget, calibrate, judging, quantize
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.run_directory import Stage
from adatsq_trt.stages.work import Work
from adatsq_trt.zoo.loading import LoadedModel

LOGGER = logging.getLogger(__name__)

NAME = "search"
# Copies of the model and of its weights in all formats, beyond which one unit at a time takes all processors.
_MOST_COPIED_BYTES = 512 << 20
RESULT, POLICY = "result.json", "policy.json"
# Kept for the report: latent MSE of each rounding alone, and of whole policies after every step.
SENSITIVITY, TRAJECTORY_ERRORS = "sensitivity.safetensors", "trajectory_errors.safetensors"
_SETTINGS = (
    *("model", "weights_sha256", "model_sha256", "formats", "steps", "guidance", "policy", "seed"),
    *("budget_bits", "budget_bytes", "budget_ms", "times"),
    *("calibration_samples", "projections", "selection_samples", "held_out_samples", "beam", "candidates", "slack"),
)
_NEWER_SETTINGS = (
    *("max_assignments", "expansions", "search_precision", "weights", "formats_for", "budget_speedup", "reference"),
)


def stage(context: Context) -> Stage:
    """The stage for these settings."""
    files = [calibrate.stage(context).folder / calibrate.TRAJECTORY, quantize.stage(context).folder]
    # Newer settings count where they are not the default, so that earlier runs go on.
    changed = [name for name in _NEWER_SETTINGS if getattr(context.settings, name) != _default(name)]
    inputs = context.inputs((*_SETTINGS, *changed))
    return context.run.stage(NAME, inputs, files)


def _default(name: str) -> object:
    return Settings.model_fields[name].default


def require_possible(settings: Settings, model: LoadedModel) -> None:
    """Refuse, before anything runs, a budget that no policy can meet and a policy that is not for this model.

    Raises:
        BudgetError: names the cheapest policy there is.
        MismatchError: the given policy is for another model, step count or set of formats.
        DamagedFileError: the given policy is not a policy.
    """
    if settings.policy is not None:
        _require_active(_given_policy(settings, tuple(model.adapter.quantizable_layers())), settings, model)
        return
    if settings.expansions is not None and settings.beam == 0:
        raise UserError(
            f"--expansions {settings.expansions}: there is no beam search that it could shorten; add --beam 4, or "
            "leave it out"
        )
    budget.require_possible(settings, model.adapter)


def require_affordable(context: Context) -> None:
    """Refuse budgets that no policy can meet: after calibration, which counts rows, and before weights are quantized.

    Raises:
        BudgetError: names the cheapest policy there is.
        UnsupportedFormatError: a format that takes nobody knows how long.
    """
    if context.settings.policy is None and budget.penalty(context.settings):
        budget.account(context)


def _given_policy(settings: Settings, layers: Sequence[str]) -> Policy:
    assert settings.policy is not None
    policy = parse_json_model(settings.policy, "--policy", Policy, GIVEN_POLICY_ADVICE)
    policy.require(settings.weights_sha256, settings.steps, layers)
    limit = settings.max_assignments
    if limit is not None and len(policy.assignments) > limit:
        raise MismatchError(
            f"--policy has {len(policy.assignments)} assignments, --max-assignments is {limit}; leave out one of them: "
            "a given policy is built as it is"
        )
    unknown = sorted(policy.formats - set(settings.formats))
    if unknown:
        raise MismatchError(
            f"--policy uses {', '.join(unknown)}, the formats of this run are {', '.join(settings.formats)}; "
            "pass --formats with all of the policy's formats"
        )
    for row in policy.rows:
        for layer, name in row.items():
            if name not in settings.formats_for.get(layer, (name,)):
                raise MismatchError(
                    f"--policy gives layer '{layer}' the format {name}, --formats-for leaves it "
                    f"{', '.join(settings.formats_for[layer])}; leave out one of them"
                )
    return policy


def _require_active(policy: Policy, settings: Settings, model: LoadedModel) -> None:
    """Refuse a policy with formats for other layers than those that run at a step.

    Raises:
        MismatchError: names the first.
    """
    active = model.adapter.active(model.adapter.schedule(settings.asked_steps))
    for step, own in enumerate(active):
        given = policy.formats_at(step)
        for layer, runs in zip(policy.layers, own, strict=True):
            if (layer in given) != runs:
                wanted = "a format: the layer runs then" if runs else "null: the layer does not run then"
                raise MismatchError(f"--policy, step {step}, layer '{layer}': expected {wanted}; {GIVEN_POLICY_ADVICE}")


def run(context: Context) -> Stage:
    """Search, unless that is done."""
    this = stage(context)
    if this.done:
        return this
    with this.run() as folder:
        account = budget.account(context)  # which counts operations in the model's own precision
        with computing(context) as executor:
            result = _search(context, executor, account, folder)
        chosen = result.points[result.chosen]
        policy = Policy.from_steps(context.model.name, context.settings.weights_sha256, context.layers, chosen.formats)
        policy.save(this.unit(POLICY))
        write_json_model(this.unit(RESULT), result)
    return this


def work(context: Context) -> Work:
    """Count what there is to do, with as many distinct policies as there may be."""
    settings, uniforms = context.settings, len(_uniforms(context))
    batch, found = settings.steps * settings.calibration_samples, budget.work(settings)
    if _reduced(context):
        found["call"] += batch
    if settings.policy is not None:
        return found + judging.work(settings, 1 + uniforms, uniforms)
    found["sensitivity"] += batch
    if settings.beam:
        expansions = most_expansions(settings.steps, settings.candidates, _pruning(settings))
        found["rounded"] += expansions * settings.calibration_samples
    return found + judging.work(settings, _most_proposals(context) + uniforms, uniforms)


def _most_proposals(context: Context) -> int:
    """Count the policies that there may be beside uniform ones."""
    settings, shrinkages = context.settings, _shrinkages(context)
    grids = len({fmt.weight for fmt in context.formats}) if budget.chooses_weights(settings) else 1
    starts = most_policies(shrinkages) + settings.beam + MOST_PROPOSALS * (1 + grids)
    return starts if settings.max_assignments is None else 2 * starts + len(shrinkages) - 1


def most_assignments(settings: Settings) -> int:
    """Count the distinct assignments that a policy may have: those of the given one, else by limit and steps."""
    if settings.policy is not None:
        return len(parse_json_model(settings.policy, "--policy", Policy, GIVEN_POLICY_ADVICE).assignments)
    return min(settings.max_assignments or settings.steps, settings.steps)


def _search(context: Context, executor: Executor, account: budget.Account, folder: Path) -> SearchResult:
    """The steps of the search, each kept on disk as it goes."""
    store = quantize.load(context)
    reference = _reference(context, executor, folder)
    if context.settings.policy is not None:
        with simulation_of(context, store, executor) as simulation:
            return _judge(context, simulation, [_given_proposal(context), *_uniforms(context)], account, 0, folder)
    sensitivity, adjoints = _sensitivity(context, store, reference["latents"], executor, folder)
    plan, make_problem, static, allowance = _plans(context, sensitivity, account)
    with simulation_of(context, store, executor) as simulation:
        states = trajectory_states(reference, context.schedule.solver.memory)
        problem = make_problem(context.calibration, simulation, states, adjoints, plan)
        paths = _beam(context, problem, folder)
        starts = [*plan.policies, *plan.hedges, *paths, *(p.rows for p in static)]
        proposals = [
            *(Proposal("beam", rows) for rows in paths),
            *(Proposal("plan", rows) for rows in (*plan.policies, *plan.hedges)),
            *(Proposal("merged", rows) for rows in _merged(context, sensitivity, allowance, starts)),
            *static,
            *_uniforms(context),
        ]
        return _judge(context, simulation, proposals, account, problem.calls, folder)


def _beam(context: Context, problem: DenoisingProblem, folder: Path) -> list[Rows]:
    """The policies of a beam search, where one is asked for."""
    settings = context.settings
    if settings.beam == 0:
        return []
    with context.progress("search: beam", settings.steps) as advance:
        return [path.assignments for path in search_columns(problem, _pruning(settings), folder, advance)]


def _pruning(settings: Settings) -> Pruning:
    return Pruning(settings.beam, settings.slack, settings.expansions)


@contextmanager
def computing(context: Context) -> Iterator[Executor]:
    """Have the model where units are computed, and who computes them, in the precision of the search.

    For a small model in this process there are as many threads as torch would take for one unit.
    """
    precision = getattr(torch, context.settings.search_precision)
    with context.on_device(precision), _exact_executor(context) as executor:
        yield Bfloat16(executor, context.device.type) if _reduced(context) else executor


def _reduced(context: Context) -> bool:
    """Whether the search computes in less than float32."""
    return context.settings.search_precision == "bfloat16"


@contextmanager
def _exact_executor(context: Context) -> Iterator[Executor]:
    count = torch.get_num_threads()
    size = 4 * count_weights(context.adapter.transformer)
    copied = count * size * (1 + len(context.formats))
    together = copied + count * context.memory.backward_bytes_of(context.settings.projections)
    small = copied <= _MOST_COPIED_BYTES and together <= context.memory.room_bytes
    if count == 1 or not small or not isinstance(context.executor, InProcess):
        yield context.executor
    else:
        with threads(count) as executor:
            yield executor


@contextmanager
def simulation_of(context: Context, store: CandidateWeights, executor: Executor) -> Iterator[Simulation]:
    """The fake-quantized model, given to the workers."""
    with context.simulated(store).installed() as model:
        settings = context.settings
        # A processor's cache holds one path; elsewhere a call has as many samples as one of a finished policy.
        most = max(SAMPLES_PER_CALL // settings.calibration_samples, 1)
        together = 1 if context.device.type == CPU else max(min(settings.beam, most), 1)
        scales = settings.guidance, settings.guidance_2
        yield Simulation(model, context.formats, context.schedule, scales[0], executor, together, scales[1])


def _plans(
    context: Context, sensitivity: Sensitivity, account: budget.Account
) -> tuple[Plan, Callable[..., DenoisingProblem], list[Proposal], Allowance]:
    """The plan, what makes the beam's problem of it, the static policies, and what merged ones may spend."""
    bits, count = format_bits(context.formats), context.settings.candidates if context.settings.beam else 0
    allowance: Allowance
    budgets = account.budgets
    if budget.constrained(context.settings):
        if budgets.once and len({fmt.weight for fmt in context.formats}) == len(context.formats):
            LOGGER.warning(
                "--weights once: no two of the formats %s share a weight, so a policy is the same at all steps; add "
                "such formats, or pass --weights free",
                ", ".join(context.settings.formats),
            )
        by_layer = constrained_layer_only(sensitivity, bits, budgets)
        plan, cost, prices = make_constrained_plan(sensitivity, bits, budgets, count, by_layer, _shrinkages(context))
        by_step = constrained_time_only(sensitivity, bits, budgets)
        make_problem: Callable[..., DenoisingProblem] = partial(
            ConstrainedProblem, budget=math.inf, budgets=budgets, cost=cost
        )
        allowance = Several(budgets, prices)
    else:
        mean = context.settings.budget_bits
        assert mean is not None
        plan = make_plan(sensitivity, bits, mean, count, _shrinkages(context))
        by_layer, by_step = layer_only(sensitivity, bits, mean), time_only(sensitivity, bits, mean)
        make_problem = partial(DenoisingProblem, budget=mean)
        allowance = MeanBits(bits, budgets.limits()["bits"], context.active)
    static = [*(Proposal("layer_only", rows) for rows in by_layer), *(Proposal("time_only", rows) for rows in by_step)]
    return plan, make_problem, static, allowance


def _shrinkages(context: Context) -> tuple[Shrinkage, ...]:
    """How far covariances are believed."""
    return ONCE_SHRINKAGES if context.settings.weights == "once" else SHRINKAGES


def _reference(context: Context, executor: Executor, folder: Path) -> dict[str, Tensor]:
    """The trajectory of the calibration batch without fake quantization, as `state_tensors`.

    In the precision of the search: what that changes of a picture is no error of a policy.
    """
    if not (file := _reference_file(context, folder)).is_file():
        noise = context.calibration.noise()
        after = measured_trajectory(executor, executor.share(context.calibration), noise, context.settings.steps)
        whole = state_tensors([State(noise), *after])
        require_finite_trajectory(context.calibration, whole["latents"])
        write_tensors(file, whole)
    return read_tensors(file)


def _reference_file(context: Context, folder: Path) -> Path:
    """In float32 it is what was calibrated on."""
    return (folder if _reduced(context) else calibrate.stage(context).folder) / calibrate.TRAJECTORY


def _sensitivity(
    context: Context, store: CandidateWeights, latents: Tensor, executor: Executor, folder: Path
) -> tuple[Sensitivity, list[State[Tensor]]]:
    """Sensitivity and adjoints along the trajectory of the calibration batch."""
    settings = context.settings
    start = projections(len(latents[0]), context.adapter.latent_shape, settings.projections, settings.seed)
    by_block = context.by_block(settings.projections, torch.bfloat16 if _reduced(context) else torch.float32)
    with context.progress("search: sensitivity", settings.steps) as advance:
        sensitivity, adjoints = measure_sensitivity(
            context.calibration, latents, start, context.formats, store, folder, advance, executor, by_block
        )
    write_tensors(folder / SENSITIVITY, {"errors": sensitivity.errors})
    return sensitivity, adjoints


def _merged(context: Context, sensitivity: Sensitivity, allowance: Allowance, starts: Sequence[Rows]) -> list[Rows]:
    """Policies with few assignments, where they are asked for."""
    limit, bits = context.settings.max_assignments, format_bits(context.formats)
    if limit is None:
        return []
    return merged_policies(sensitivity, bits, allowance, starts, limit, _shrinkages(context))


def _uniforms(context: Context) -> list[Proposal]:
    """One format everywhere: every format, for the report; without a report those that a budget in bits allows."""
    settings, layers = context.settings, len(context.layers)
    most = math.inf if settings.held_out_samples or settings.budget_bits is None else settings.budget_bits
    within = [i for i, fmt in enumerate(context.formats) if fmt.bits <= most]
    rows = [uniform(i, settings.steps, layers, context.active) for i in within]
    return [Proposal("uniform", row) for row in rows]


def _given_proposal(context: Context) -> Proposal:
    """The policy that the user brought."""
    policy = _given_policy(context.settings, context.layers)
    if context.settings.weights == "once":
        _mention_changed_weights(policy)
    rows = [policy.assignments[i] for i in policy.step_assignments]
    return Proposal("given", indices_of(rows, context.settings.formats))


def _mention_changed_weights(policy: Policy) -> None:
    """Say that a policy that the user brought stores several weight formats of a layer: it is built as it is."""
    columns = zip(*policy.assignments, strict=True)
    named = ([name for name in column if name is not None] for column in columns)
    changed = sum(len({format_named(name).weight for name in column}) > 1 for column in named)
    if changed:
        LOGGER.warning(
            "--policy changes the weight format of %d of %d layers between steps: it is built as it is, and each of "
            "these formats is stored; with --weights free this is not mentioned",
            changed,
            len(policy.layers),
        )


def _judge(
    context: Context,
    simulation: Simulation,
    proposals: list[Proposal],
    account: budget.Account,
    calls: int,
    folder: Path,
) -> SearchResult:
    """Choose, and keep how the errors of what is reported grow."""
    result = judging.Judging(context, simulation, account, folder, calls).result(proposals)
    if context.settings.held_out_samples:
        latents = read_tensors(_reference_file(context, folder))["latents"]
        _keep_trajectory_errors(context, simulation, latents, result, folder / TRAJECTORY_ERRORS)
    return result


def _keep_trajectory_errors(
    context: Context, simulation: Simulation, reference: Tensor, result: SearchResult, file: Path
) -> None:
    """Measure, on the calibration batch, how the errors of the chosen policy (the first) and its rivals grow."""
    names = {i: point.name for i, point in enumerate(result.points) if point.held_out_error is not None}
    static = {result.layer_only: "layer_only", result.time_only: "time_only", result.chosen: "chosen"}
    names = dict(sorted((names | {i: name for i, name in static.items() if i is not None}).items()))
    policies = [indices_of(result.points[i].formats, context.settings.formats) for i in names]
    latents = simulation.trajectories(context.calibration, policies)
    errors = {name: row_errors(own, reference) for name, own in zip(names.values(), latents, strict=True)}
    write_tensors(file, errors)
