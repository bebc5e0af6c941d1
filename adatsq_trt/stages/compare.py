"""The same policy with weights from different solvers, all measured on the held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from adatsq_trt.calibration.gptq import gptq
from adatsq_trt.calibration.trajectory import final_latents, latent_mse
from adatsq_trt.errors import MissingFileError
from adatsq_trt.files import read_tensors
from adatsq_trt.formats import Element, Format, Granularity, Grid, format_named
from adatsq_trt.models.format_store import SCALES_NAME, CandidateWeights
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import QuantizedWeight, quantize_nearest
from adatsq_trt.settings import SETTINGS_NAME
from adatsq_trt.stages import calibrate, quantize, search
from adatsq_trt.stages.context import Context
from adatsq_trt.transforms import IDENTITY

Solver = Callable[[str, Tensor, Format], QuantizedWeight]
_WEIGHTED, _UNWEIGHTED = "GPTQ, Fisher-weighted Hessian", "GPTQ, unweighted Hessian"


@dataclass(frozen=True)
class Case:
    """One row of the comparison.

    Attributes:
        subject: quantized policy: "policy", or "uniform" and a format.
        solver_name: how the weights were found.
        formats_at: step → module path → format.
        solver: rounds a layer's (transformed) weight to a format.
    """

    subject: str
    solver_name: str
    formats_at: Callable[[int], dict[str, Format]]
    solver: Solver


def solver_errors(context: Context) -> dict[str, dict[str, float]]:
    """Subject → solver → latent MSE on the run's held-out samples.

    The policy with GPTQ under the run's and under unweighted Hessians and rounded to nearest; and every uniform policy
    of a grouped integer format with GPTQ and rounded to nearest with one scale per channel.

    Raises:
        MissingFileError: the run has no finished search for its settings.
    """
    if not _searched(context):
        raise MissingFileError(
            f"'{context.run.path}' has no finished search for the settings in its {SETTINGS_NAME}; "
            "run 'adatsq-trt search' with this folder as --output first"
        )
    cases = [*_policy_cases(context), *_uniform_cases(context)]
    reference = final_latents(context.held_out)
    errors: dict[str, dict[str, float]] = {}
    with context.progress("compare", len(cases)) as advance:
        for case in cases:
            errors.setdefault(case.subject, {})[case.solver_name] = _error(context, case, reference)
            advance()
    return errors


def _searched(context: Context) -> bool:
    """Whether the search is done; a stage before it that never ran has no files to name it by."""
    try:
        return search.stage(context).done
    except MissingFileError:
        return False


def _policy_cases(context: Context) -> list[Case]:
    policy = Policy.load(search.stage(context).folder / search.POLICY)
    solvers = {
        _own_solver(context): _with_hessian(context, calibrate.load_hessians(context)),
        _UNWEIGHTED: _with_hessian(context, calibrate.load_hessians(context, calibrate.PLAIN_HESSIANS)),
        "round to nearest": _nearest,
    }
    return [Case("policy", name, policy.formats_at, solver) for name, solver in solvers.items()]


def _own_solver(context: Context) -> str:
    """GPTQ with the run's own Hessians."""
    return _UNWEIGHTED if context.settings.hessian == "plain" else _WEIGHTED


def _uniform_cases(context: Context) -> list[Case]:
    weighted = _with_hessian(context, calibrate.load_hessians(context))
    cases = []
    for fmt in context.formats:
        if fmt.weight.element is Element.INT and fmt.weight.granularity is Granularity.GROUP:
            everywhere = _everywhere(dict.fromkeys(context.layers, fmt))
            for name, solver in (
                (_own_solver(context), weighted),
                ("round to nearest per channel", _nearest_per_channel),
            ):
                cases.append(Case(f"uniform {fmt.name}", name, everywhere, solver))
    return cases


def _everywhere(formats: dict[str, Format]) -> Callable[[int], dict[str, Format]]:
    return lambda _step: formats


def _with_hessian(context: Context, hessians: Mapping[str, Tensor]) -> Solver:
    damping = context.settings.damping
    transforms = quantize.load_layer_transforms(context)

    def solve(name: str, weight: Tensor, fmt: Format) -> QuantizedWeight:
        moment = transforms.get(name, IDENTITY).input_map.second_moment(hessians[name])
        return gptq(weight, moment, fmt, damping=damping)

    return solve


def _nearest(_name: str, weight: Tensor, fmt: Format) -> QuantizedWeight:
    return quantize_nearest(weight, fmt)


def _nearest_per_channel(_name: str, weight: Tensor, fmt: Format) -> QuantizedWeight:
    grid = Grid(Element.INT, fmt.weight.bits, Granularity.CHANNEL, scale_bits=fmt.weight.scale_bits)
    return quantize_nearest(weight, replace(fmt, weight=grid))


def _error(context: Context, case: Case, reference: Tensor) -> float:
    """Quantize the layers in the formats that the case uses, and generate."""
    transforms = quantize.load_layer_transforms(context)
    rounded = {
        name: transforms.get(name, IDENTITY).rounded_weight(linear.weight.detach())
        for name, linear in context.adapter.quantizable_layers().items()
    }
    used = {f.name for step in range(context.settings.steps) for f in case.formats_at(step).values()}
    weights = {
        fmt: {name: case.solver(name, weight, format_named(fmt)) for name, weight in rounded.items()}
        for fmt in sorted(used)
    }
    store = CandidateWeights(weights, read_tensors(quantize.stage(context).folder / SCALES_NAME), transforms)
    with context.simulated(store).installed() as model:
        latents = final_latents(context.held_out, lambda step: model.assign(case.formats_at(step), step))
    return latent_mse(latents, reference)
