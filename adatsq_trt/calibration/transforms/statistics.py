"""Statistics for making transforms: the layers that share one input tensor, and the magnitudes of its channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.models.capture import captured
from adatsq_trt.transforms import LayerTransform

# Keeps channels that are always zero finite.
SMALLEST = 1e-5


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are given the same tensor, as q, k and v are.

    Attributes:
        weights: module path → weight, float32 [N, K].
        largest: largest magnitude of every input channel at every step, float32 [steps, K].
    """

    weights: Mapping[str, Tensor]
    largest: Tensor

    @property
    def width(self) -> int:
        """K."""
        return self.largest.shape[1]

    @property
    def largest_weight(self) -> Tensor:
        """Largest magnitude of every channel over all weights, float32 [K]."""
        return torch.stack([weight.abs().amax(dim=0) for weight in self.weights.values()]).amax(dim=0)


class _Weights(Mapping[str, Tensor]):
    """Module path → weight [N, K]; those that are not in memory are read at every lookup."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self._linears = linears

    def __getitem__(self, name: str) -> Tensor:
        return self._linears[name].weight.detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def __len__(self) -> int:
        return len(self._linears)


@torch.no_grad()
def measure_groups(samples: Samples, latents: Tensor) -> list[LayerGroup]:
    """Run the full-precision model once over a trajectory.

    Args:
        samples: the calibration batch.
        latents: its trajectory, float32 [steps + 1, samples, *latent_shape].
    """
    linears = samples.adapter.quantizable_layers()
    members: dict[tuple[str, ...], list[Tensor]] = {}
    for step in range(samples.schedule.steps):
        with captured(linears) as capture:
            samples.velocity(latents[step], step)
        for names in sharing_layers(linears, capture.inputs):
            members.setdefault(names, []).append(capture.inputs[names[0]].flatten(0, -2).abs().amax(dim=0))
    return [
        LayerGroup(_Weights({name: linears[name] for name in names}), torch.stack(largest))
        for names, largest in members.items()
    ]


@torch.no_grad()
def largest_inputs(samples: Samples, latents: Tensor, transforms: Mapping[str, LayerTransform]) -> Tensor:
    """Largest magnitude of every layer's transformed input, float32 [steps, layers].

    Args:
        samples: the calibration batch.
        latents: its full-precision trajectory, float32 [steps + 1, samples, *latent_shape].
        transforms: of all quantizable layers.
    """
    linears, rows = samples.adapter.quantizable_layers(), []
    for step in range(samples.schedule.steps):
        with captured(linears) as capture:
            samples.velocity(latents[step], step)
        mapped = [transforms[name].input_map.inputs(capture.inputs[name]) for name in linears]
        rows.append(torch.stack([value.abs().max() for value in mapped]))
    return torch.stack(rows)


def sharing_layers(linears: Iterable[str], inputs: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The layers by the memory that their input lies in.

    Args:
        linears: module paths.
        inputs: of theirs in one call of the model.
    """
    groups: dict[tuple[int, torch.Size], list[str]] = {}
    for name in linears:
        groups.setdefault((inputs[name].data_ptr(), inputs[name].shape), []).append(name)
    return [tuple(names) for names in groups.values()]
