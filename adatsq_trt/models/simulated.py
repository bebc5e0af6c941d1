"""The fake-quantized model: the transformer with its linear layers rounded as an assignment says.

This is what the search measures and what exported graphs are checked against. Weights of every format are held
dequantized, so changing an assignment only changes references; where they are too large for that, a layer's weight is
dequantized whenever the layer is called, and nothing of it stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from adatsq_trt.formats import Format, Grid, format_named
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.format_store import CandidateWeights
from adatsq_trt.models.rounding import round_input, stored_weight
from adatsq_trt.transforms import IDENTITY, InputMap, LayerTransform


class SharedRounding:
    """The latest layer input and what it was rounded to, since several layers (q, k, v) are given the same tensor."""

    def __init__(self) -> None:
        """Nothing rounded yet."""
        self._input: Tensor | None = None
        self._version = 0
        self._mapped: dict[InputMap, Tensor] = {}
        self._rounded: dict[tuple[InputMap, Grid, float | None], Tensor] = {}

    def __reduce__(self) -> tuple[type[SharedRounding], tuple[()]]:
        """Another process begins with nothing rounded, and is sent none of it."""
        return SharedRounding, ()

    def map(self, x: Tensor, input_map: InputMap) -> Tensor:
        """`InputMap.inputs`, once for every distinct map of one input.

        Args:
            x: float32 [..., K]; layers that share it are called one after another with the same object.
            input_map: of the calling layer.
        """
        if x is not self._input or x._version != self._version:
            self._input, self._version, self._mapped, self._rounded = x, x._version, {}, {}
        if input_map not in self._mapped:
            self._mapped[input_map] = input_map.inputs(x)
        return self._mapped[input_map]

    def round(self, x: Tensor, grid: Grid, scale: Tensor | None, input_map: InputMap = IDENTITY.input_map) -> Tensor:
        """`round_input` of the mapped input, once for every distinct (map, grid, scale).

        Args:
            x: as in `map`.
            grid: of the calling layer's activations.
            scale: its static scale or clipping ratio, float32 [], or None.
            input_map: of the calling layer.
        """
        mapped = self.map(x, input_map)
        key = (input_map, grid, None if scale is None else float(scale))
        if key not in self._rounded:
            self._rounded[key] = round_input(mapped, grid, scale)
        return self._rounded[key]


class SimulatedLinear(nn.Module):
    """A linear layer whose format can be changed between calls.

    Attributes:
        original: the full-precision layer.
        weights: format name → dequantized weight, float32 [N, K]; may be made at every lookup.
        active: the format in use, or None for full precision.
        scale: the active format's activation scale or clip ratio at this step (`Format.scaled_activation`), float32 [].
    """

    def __init__(
        self, original: nn.Linear, weights: Mapping[str, Tensor], shared: SharedRounding, transform: LayerTransform
    ) -> None:
        """Wrap a layer in full precision.

        Args:
            original: the layer.
            weights: format name → dequantized weight, float32 [N, K].
            shared: of all layers of the model.
            transform: the one that the weights were made for.
        """
        super().__init__()
        self._shared, self._transform = shared, transform
        self.original = original
        self.weights = weights
        self.active: Format | None = None
        self.scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Y = Q(x) Q(W)ᵀ + b, or what the transform makes of it; x is [..., K], y is [..., N]."""
        if self.active is None:
            return self.original(x)  # type: ignore[no-any-return]
        mapped, rounded = self.inputs(x)
        output = functional.linear(rounded, self.weights[self.active.name], self.original.bias)
        branch = self._transform.branch
        if branch is None:
            return output
        return output + functional.linear(functional.linear(mapped, branch.down), branch.up)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The transformed input and what it is rounded to in the active format; both [..., K]."""
        assert self.active is not None, "in full precision nothing is rounded"
        input_map = self._transform.input_map
        return self._shared.map(x, input_map), self._shared.round(x, self.active.activation, self.scale, input_map)


class SimulatedModel:
    """An adapter's transformer with switchable formats.

    Attributes:
        adapter: the model; its transformer is changed in place while `installed` is open.
        layers: module paths in the order of assignments' entries.
    """

    def __init__(self, adapter: ModelAdapter, store: CandidateWeights, most_bytes: float = math.inf) -> None:
        """Dequantize every format of every layer once, or leave that to the calls.

        Args:
            adapter: the model.
            store: its weights.
            most_bytes: of dequantized weights that may be held.
        """
        originals = adapter.quantizable_layers()
        size = sum(linear.in_features * linear.out_features for linear in originals.values())
        held = 4 * len(store.weights) * size <= most_bytes
        self.adapter = adapter
        self.layers = tuple(originals)
        self._store = store
        formats, shared = {name: format_named(name) for name in store.weights}, SharedRounding()
        self._linears = {
            layer: SimulatedLinear(
                linear,
                dict(_Dequantized(store, layer, formats)) if held else _Dequantized(store, layer, formats),
                shared,
                store.transform(layer),
            )
            for layer, linear in originals.items()
        }

    @contextmanager
    def installed(self) -> Iterator[SimulatedModel]:
        """Swap the simulated layers in, and the original ones back at the end."""
        try:
            for layer, linear in self._linears.items():
                _replace(self.adapter.transformer, layer, linear)
            yield self
        finally:
            for layer, linear in self._linears.items():
                _replace(self.adapter.transformer, layer, linear.original)

    @contextmanager
    def input_noise(self, level: float, seed: int) -> Iterator[None]:
        """Add noise to every layer's input, to see how far small differences spread.

        The noise differs by feature and is the same for all tokens, so that equal tokens stay equal. Layers that share
        an input share its noise.

        Args:
            level: standard deviation, relative to the token's root mean square.
            seed: of the noise.
        """
        noise = _Noise(level, torch.Generator().manual_seed(seed))
        handles = [linear.register_forward_pre_hook(noise) for linear in self._linears.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def assign(self, formats: Mapping[str, Format] | None, step: int) -> None:
        """Choose the formats of the next calls.

        Args:
            formats: module path → format, or None for full precision.
            step: index in the loop; decides static scales and clipping ratios.
        """
        for index, (layer, linear) in enumerate(self._linears.items()):
            linear.active = None if formats is None else formats.get(layer)  # none of a layer that does not run
            linear.scale = None if linear.active is None else self._store.scale(linear.active, step, index)


class _Dequantized(Mapping[str, Tensor]):
    """Format name → a layer's weight [N, K], made from the store at every lookup.

    It is float32, or what autocast would make of that.
    """

    def __init__(self, store: CandidateWeights, layer: str, formats: Mapping[str, Format]) -> None:
        self._store, self._layer, self._formats = store, layer, formats

    def __getitem__(self, name: str) -> Tensor:
        return stored_weight(self._store.weights[name][self._layer], self._formats[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)


class _Noise:
    """A hook before a layer's forward, the same for all layers of a model."""

    def __init__(self, level: float, generator: torch.Generator) -> None:
        self._level, self._generator = level, generator
        self._given: Tensor | None = None
        self._with_input_noise: Tensor | None = None

    def __call__(self, _layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """The layer's input [..., K] with noise."""
        (x,) = inputs
        if x is not self._given or self._with_input_noise is None:
            size = x.square().mean(dim=-1, keepdim=True).sqrt()
            noise = torch.randn(x.shape[-1], generator=self._generator).to(x.device)  # the same on every device
            self._given, self._with_input_noise = x, x + self._level * size * noise
        return (self._with_input_noise,)


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
