"""Size and time to expect of FLUX.1-dev, from shapes alone: a table for a document.

    python -m benchmarks.size.expected [--document README.md]

The real configuration on the meta device: nothing is computed, and nothing ran on a GPU. Bytes are those of
quantized weights with their scales, times a roofline: lower bounds that rank formats and that no card reaches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adatsq_trt.formats import format_named
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.policy import LayerShape
from adatsq_trt.search.budgets import CostModel
from adatsq_trt.search.costs import CARDS, TimeModel
from benchmarks.document import replace_marked
from benchmarks.search.flux_dev import BLOCKS, HEADS, Search, make_adapter

PIXELS, STEPS = 1024, 28
FORMATS = {"rtx-4090": ("fp8",), "rtx-5090": ("bf16", "nvfp4")}


def traced_shapes(adapter: FluxAdapter) -> tuple[list[LayerShape], float]:
    """Layers with the rows that one call sends through them, and its additions and multiplications."""
    shapes: list[LayerShape] = []

    def note(name: str, linear: nn.Linear, x: Tensor) -> None:
        shapes.append(LayerShape(name, linear.in_features, linear.out_features, x.numel() // x.shape[-1]))

    for name, linear in adapter.quantizable_layers().items():
        linear.register_forward_pre_hook(lambda module, inputs, name=name: note(name, module, inputs[0]))
    inputs = adapter.model_inputs(torch.zeros(1, *adapter.latent_shape), 1.0, adapter.encode([0]).conditional, 3.5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        adapter.trace_module()(*(value.to("meta") for value in inputs.values()))
    return shapes, float(counter.get_total_flops())


def table() -> str:
    """A row for each card and format."""
    search = Search(BLOCKS, HEADS, PIXELS, STEPS, "float32", None)
    adapter = make_adapter(torch.device("meta"), search)
    shapes, operations = traced_shapes(adapter)
    parameters = sum(parameter.numel() for parameter in adapter.transformer.parameters())
    unquantized = 2 * (parameters - sum(s.in_features * s.out_features for s in shapes))
    rest = operations - sum(2.0 * s.tokens * s.in_features * s.out_features for s in shapes)
    lines = [
        "| card | format | quantized weights, GB | with all others in 16 bits | s per picture |",
        "|---|---|---:|---:|---:|",
    ]
    for card, names in FORMATS.items():
        times, formats = TimeModel(card=CARDS[card]), [format_named(name) for name in names]
        model = CostModel.of(formats, shapes, 1, times.table_of(formats, shapes), times.rest_ms(rest))
        for index, name in enumerate(names):
            costs = model.costs([(index,) * len(shapes)])
            assert costs.ms is not None
            seconds = STEPS * costs.ms / 1000
            own, whole = costs.resident_bytes / 1e9, (costs.resident_bytes + unquantized) / 1e9
            title = CARDS[card].title.removeprefix("NVIDIA GeForce ")
            lines.append(f"| {title} | `{name}` | {own:.1f} | {whole:.1f} | {seconds:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it into a document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--document", type=Path, help="Markdown file with the markers that the table goes between")
    document = parser.parse_args().document
    text = table()
    print(text)
    if document is not None:
        replace_marked(document, "expected", text)


if __name__ == "__main__":
    main()
