"""The whole denoising loop over a bundle's `cpu` graphs, switching graphs by bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np

from adatsq_trt.engines.backends.base import Runner
from adatsq_trt.engines.backends.onnxruntime import OnnxRuntimeBackend
from adatsq_trt.engines.bundle import PROMPTS_NAME, Bundle, ImageSpec, require_prompts
from adatsq_trt.errors import DamagedFileError, UserError
from adatsq_trt.graph_index import GraphFile
from adatsq_trt.schedule import initial_noise

TIME_INPUT = "timestep"
_CONDITIONAL, _UNCONDITIONAL = "conditional.", "unconditional."


def denoise(
    bundle: Bundle,
    prompts: Sequence[int],
    seeds: Sequence[int],
    quantized: bool = True,
    on_step: Callable[[int, int], None] | None = None,
    on_latent: Callable[[int, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Generate latents: x[t+1] = x[t] + (sigma[t+1] - sigma[t]) v(x[t], t).

    Args:
        bundle: any; its plans are not used.
        prompts: index of a stored prompt for every sample.
        seeds: of the initial noise, one per sample.
        quantized: follow the policy; otherwise run the full-precision graph at every step.
        on_step: called with (steps done, steps in all).
        on_latent: called with (step, the latent after it).

    Returns:
        float32 [samples, *latent_shape].

    Raises:
        UserError: no samples, as many prompts as seeds are missing, or a prompt that the bundle does not hold.
        DamagedFileError: graphs and prompts do not fit together.
    """
    if not seeds or len(prompts) != len(seeds):
        raise UserError(f"got {len(prompts)} prompts and {len(seeds)} seeds, expected one of each for every sample")
    require_prompts(bundle, prompts)
    schedule, condition = bundle.schedule(), _condition(bundle, prompts)
    latent = initial_noise(seeds, bundle.manifest.latent_shape)
    with _graph_runners(bundle, quantized) as runner_at:
        for step in range(schedule.steps):
            graph, runner = runner_at(step)
            inputs = _inputs(graph, latent, schedule.model_time(step), condition)
            scales = bundle.scales(step) if quantized else {}
            prediction = runner.run({**inputs, **scales})[graph.outputs[0].name]
            velocity = _guide(prediction, len(seeds), bundle.manifest.guidance)
            # Its arithmetic serves NumPy as well as the tensors that it is declared for.
            latent = schedule.advance(latent, velocity, step)  # type: ignore[arg-type, assignment]
            if on_latent is not None:
                on_latent(step, latent)
            if on_step is not None:
                on_step(step + 1, schedule.steps)
    return latent


@contextmanager
def _graph_runners(bundle: Bundle, quantized: bool) -> Iterator[Callable[[int], tuple[GraphFile, Runner]]]:
    """Step → its graph, loaded once for each assignment."""
    backend, loaded = OnnxRuntimeBackend(), dict[int | None, tuple[GraphFile, Runner]]()
    with ExitStack() as stack:

        def runner_at(step: int) -> tuple[GraphFile, Runner]:
            assignment = bundle.policy.step_assignments[step] if quantized else None
            if assignment not in loaded:
                graph = bundle.graph("cpu" if quantized else "reference", assignment)
                loaded[assignment] = (graph, stack.enter_context(backend.load(bundle.graph_path(graph))))
            return loaded[assignment]

        yield runner_at


def _condition(bundle: Bundle, prompts: Sequence[int]) -> dict[str, np.ndarray]:
    """Input name → [rows, ...] float32: the prompts and, for guidance, as many unguided rows after them."""
    stored = bundle.prompts
    condition = {
        name.removeprefix(_CONDITIONAL): value[list(prompts)]
        for name, value in stored.items()
        if name.startswith(_CONDITIONAL)
    }
    for name, value in stored.items():
        if name.startswith(_UNCONDITIONAL):
            key = name.removeprefix(_UNCONDITIONAL)
            condition[key] = np.concatenate([condition[key], np.repeat(value, len(prompts), axis=0)])
    if not condition:
        raise DamagedFileError(
            f"'{bundle.folder / PROMPTS_NAME}' holds {sorted(stored)}, expected names that start with "
            f"'{_CONDITIONAL}'; run 'adatsq-trt build engine' again"
        )
    return condition


def _inputs(
    graph: GraphFile, latent: np.ndarray, model_time: float, condition: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """A graph's inputs without the scales; what is neither time nor condition is the latent."""
    rows = len(next(iter(condition.values())))
    names = [signature.name for signature in graph.inputs]
    latent_names = [name for name in names if name != TIME_INPUT and name not in condition]
    if len(latent_names) != 1 or not set(condition) <= set(names):
        raise DamagedFileError(
            f"graph '{graph.path}' has inputs {names}, the stored prompts are for {sorted(condition)}: expected these, "
            f"'{TIME_INPUT}' and one for the latent; run 'adatsq-trt build engine' again"
        )
    time = np.full(rows, model_time, dtype=np.float32)
    given = {**condition, TIME_INPUT: time, latent_names[0]: np.concatenate([latent] * (rows // len(latent)))}
    return {name: given[name] for name in names}


def _guide(prediction: np.ndarray, samples: int, guidance: float) -> np.ndarray:
    """Combine the halves, conditional first, to v0 + guidance (v1 - v0); a single half is the velocity itself."""
    if len(prediction) == samples:
        return prediction
    conditional, unconditional = np.split(prediction, 2)
    guided: np.ndarray = unconditional + np.float32(guidance) * (conditional - unconditional)
    return guided


def decode_image(latent: np.ndarray, image: ImageSpec) -> np.ndarray:
    """Unpack 2x2 patches: [B, patches², 4c] in [-1, 1] → [B, 2 patches, 2 patches, c] in [0, 1], float32."""
    side, channels = image.patches, image.channels
    grid = latent.reshape(-1, side, side, channels, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return np.clip(grid.reshape(-1, 2 * side, 2 * side, channels) / 2 + 0.5, 0, 1)
