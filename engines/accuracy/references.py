"""Reference that PyTorch computed when the bundle was made: inputs, outputs, layers and the whole loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adatsq_trt.engines.bundle import REFERENCE_NAME, BundleFiles
from adatsq_trt.engines.exported import SCALES_PREFIX
from adatsq_trt.errors import DamagedFileError
from adatsq_trt.graph_index import GraphFile

# What the exporter calls a layer's output after its module path, and what a 16-bit branch adds to it.
OUTPUT_SUFFIX, BRANCH_SUFFIX = ".output", ".branch"


@dataclass(frozen=True)
class Reference:
    """The stored arrays of a bundle, by what they are.

    Every method raises DamagedFileError where the bundle does not hold what is asked for.

    Attributes:
        bundle: opened.
    """

    bundle: BundleFiles

    def feed(self, step: int, rows: int | None = None, graph: GraphFile | None = None) -> dict[str, np.ndarray]:
        """A step's calibration inputs, activation scales and choice of formats, as a graph takes them.

        Args:
            step: index in the loop.
            rows: so many evenly spaced rows of the batch; None for all.
            graph: the step's cpu graph unless given.
        """
        graph = graph or self.bundle.cpu_graph(step)
        inputs = {s.name: self._array(f"step_{step:03d}.input.{s.name}") for s in graph.inputs}
        if rows is not None:
            inputs = {name: value[:: max(len(value) // rows, 1)] for name, value in inputs.items()}
        return {**inputs, **self.bundle.controls(graph, step)}

    def output(self, step: int, rows: int | None = None) -> np.ndarray:
        """The fake-quantized model's output for a step's inputs; `rows` as in `feed`."""
        output = self._array(f"step_{step:03d}.output")
        return output if rows is None else output[:: max(len(output) // rows, 1)]

    def full_precision(self, step: int) -> np.ndarray:
        """The unquantized model's output for the same inputs."""
        return self._array(f"step_{step:03d}.full_precision")

    def activation_scales(self) -> dict[str, np.ndarray]:
        """Format → static scales [steps, layers] that the fake-quantized model was given."""
        tables = {n: table for n, table in self.bundle.reference.items() if n.startswith(SCALES_PREFIX)}
        return {name.removeprefix(SCALES_PREFIX): table for name, table in tables.items()}

    def output_spread(self, step: int) -> float:
        """Relative error of a step's output under noise at every layer's input; the largest of the exporter's runs."""
        return float(self._numbers("spread.outputs", self.bundle.policy.steps)[step])

    def loop_spread(self) -> list[float]:
        """The same of the latent after every step of the loop."""
        return [float(error) for error in self._numbers("spread.loop", self.bundle.policy.steps)]

    def in_features(self, layer: str) -> int:
        """How many inputs a layer sums."""
        layers = self.bundle.policy.layers
        return int(self._numbers("in_features", len(layers))[layers.index(layer)])

    def layers(self, step: int) -> dict[str, np.ndarray]:
        """Module path → output of the layer, for the first sample of each guidance branch; first steps of buckets."""
        layers = self.bundle.policy.formats_at(step)
        return {layer: self._array(f"step_{step:03d}.layer.{layer}", axes=2) for layer in layers}

    def loop(self, name: str) -> np.ndarray:
        """Of the loop: "quantized" and "full_precision" latents [steps + 1, samples, ...], "prompts", "seeds"."""
        rows = self.bundle.policy.steps + 1 if name in ("quantized", "full_precision") else None
        return self._array(f"loop.{name}", rows=rows)

    def _numbers(self, name: str, count: int) -> np.ndarray:
        numbers = self._array(name)
        if numbers.shape != (count,) or not (np.isfinite(numbers) & (numbers >= 0)).all():
            raise DamagedFileError(
                f"'{self.bundle.folder / REFERENCE_NAME}': '{name}' must hold {count} numbers from 0, got "
                f"{numbers.tolist()!r:.80}; run 'adatsq-trt build engine' again"
            )
        return numbers

    def _array(self, name: str, axes: int = 1, rows: int | None = None) -> np.ndarray:
        """An array of at least so many axes that holds something, with so many rows where that is known."""
        file = self.bundle.folder / REFERENCE_NAME
        array = self.bundle.reference.get(name)
        if array is None:
            raise DamagedFileError(
                f"'{file}' has no '{name}', so the bundle cannot be checked; run 'adatsq-trt build engine' again"
            )
        if array.ndim < axes or not array.size or (rows is not None and len(array) != rows):
            wanted = "" if rows is None else f" of {rows} rows"
            raise DamagedFileError(
                f"'{file}': '{name}' must hold numbers in {axes} or more axes{wanted}, got the shape {array.shape}; "
                "run 'adatsq-trt build engine' again"
            )
        return array
