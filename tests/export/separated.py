"""Each layer of a cpu graph by itself, as `check` compares it, so that a value near a tie changes nothing behind it."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from adatsq_trt.engines.accuracy.comparison import compare, run_in_onnxruntime
from adatsq_trt.engines.accuracy.references import OUTPUT_SUFFIX
from adatsq_trt.engines.accuracy.separate_layers import chosen_outputs, given_inputs, write_separated
from adatsq_trt.engines.accuracy.tolerances import FLOAT32, layer_tolerance
from adatsq_trt.formats import Format

Arrays = Mapping[str, np.ndarray]


def require_equal_layers(
    graph: Path, feed: Arrays, layers: Arrays, output: tuple[str, np.ndarray], formats: Mapping[str, tuple[Format, int]]
) -> None:
    """Hold every layer, and what lies behind the last one, to the limits of `check`.

    Args:
        graph: of the cpu variant.
        feed: its inputs.
        layers: module path → PyTorch's output [..., N].
        output: name of the graph's output, and PyTorch's.
        formats: module path → format and in_features.
    """
    # Not beside the graph: other tests list that folder.
    with TemporaryDirectory() as scratch:
        separated = Path(scratch) / graph.name
        write_separated(graph, layers, output[0], separated)
        (got,) = run_in_onnxruntime(separated, [{**feed, **given_inputs(layers)}])
    expected = chosen_outputs(layers) | dict([output])
    limits = {output[0]: FLOAT32}
    for layer, (fmt, width) in formats.items():
        value = f"{layer}{OUTPUT_SUFFIX}"
        limits[value] = layer_tolerance(fmt.activation, len(expected[value]), width)
    for name, figures in compare({name: got[name] for name in expected}, expected, limits).items():
        assert figures.passed, (name, figures, limits[name])
