"""The same policy with weights from different solvers, all measured on the held-out samples."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from adatsq_trt.calibration.gptq import gptq
from adatsq_trt.calibration.trajectory import latent_mse, trajectory
from adatsq_trt.cli.progress import progress
from adatsq_trt.cli.stages import calibrate, quantize, search
from adatsq_trt.cli.stages.context import Context
from adatsq_trt.errors import MissingFileError
from adatsq_trt.files import read_tensors
from adatsq_trt.formats import Format, format_named
from adatsq_trt.models.format_store import FormatStore
from adatsq_trt.models.simulated import SimulatedModel
from adatsq_trt.policy import Policy
from adatsq_trt.quantize import QuantizedWeight, quantize_nearest
from adatsq_trt.settings import SETTINGS_NAME

Solver = Callable[[str, nn.Linear, Format], QuantizedWeight]


def solver_errors(context: Context) -> dict[str, float]:
    """Solver → latent MSE of the run's policy on its held-out samples.

    Raises:
        MissingFileError: the run has no finished search for its settings.
    """
    if not search.stage(context).done:
        raise MissingFileError(
            f"'{context.run.path}' has no finished search for the settings in its {SETTINGS_NAME}; "
            "run 'adatsq-trt search' with this folder as --output first"
        )
    policy = Policy.load(search.stage(context).folder / search.POLICY)
    solvers = _solvers(context)
    reference = trajectory(context.held_out)[-1]
    with progress("compare", len(solvers)) as advance:
        errors = {}
        for name, solver in solvers.items():
            errors[name] = _policy_error(context, policy, solver, reference)
            advance()
    return errors


def _solvers(context: Context) -> dict[str, Solver]:
    folder = calibrate.stage(context).folder
    weighted = read_tensors(folder / calibrate.HESSIANS)
    plain = read_tensors(folder / calibrate.PLAIN_HESSIANS)

    def with_hessian(hessians: dict[str, Tensor]) -> Solver:
        damping = context.settings.damping
        return lambda name, linear, fmt: gptq(linear.weight.detach(), hessians[name], fmt, damping=damping)

    return {
        "GPTQ, Fisher-weighted Hessian": with_hessian(weighted),
        "GPTQ, unweighted Hessian": with_hessian(plain),
        "round to nearest": lambda _name, linear, fmt: quantize_nearest(linear.weight.detach(), fmt),
    }


def _policy_error(context: Context, policy: Policy, solver: Solver, reference: Tensor) -> float:
    """Quantize the layers in the formats that the policy uses, and generate."""
    linears = context.adapter.quantizable_layers()
    used = sorted({name for row in policy.assignments for name in row})
    weights = {fmt: {name: solver(name, linear, format_named(fmt)) for name, linear in linears.items()} for fmt in used}
    store = FormatStore(weights, quantize.activation_scales(context))
    with SimulatedModel(context.adapter, store).installed() as model:
        latents = trajectory(context.held_out, lambda step: model.assign(policy.formats_at(step), step))
    return latent_mse(latents[-1], reference)
