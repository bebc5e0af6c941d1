"""How many roundings of activations add up in each value of a block: what a `target` graph's limits grow with."""

from __future__ import annotations

from collections.abc import Collection

from adatsq_trt.engines.accuracy.block_cut import GraphView
from adatsq_trt.engines.accuracy.references import OUTPUT_SUFFIX

# A factor that passes these, beside a constant, keeps its relative error about as it is.
_ELEMENT_WISE = frozenset({"Add", "Cast", "Div", "Erf", "Gelu", "Mul", "Pow", "Relu", "Sigmoid", "Sub", "Tanh"})


def count_rounded_layers(target: GraphView, layers: Collection[str]) -> dict[str, int]:
    """Layers whose inputs were rounded on the way to a value, each as often as its error counts there.

    A layer adds one to what its input has. Where branches meet, the largest counts; but a product of two layers'
    outputs, a gate, has the relative errors of both, so there they add up. What both share counts twice: each branch
    turns it by weights of its own.

    Args:
        target: graph in the order of execution.
        layers: module paths of a block's quantized layers; what lies before the block counts as zero.

    Returns:
        Value → count; values that no layer stands before are left out.
    """
    names = {f"{layer}{OUTPUT_SUFFIX}" for layer in layers}
    counts: dict[str, int] = {}
    factors: dict[str, frozenset[str]] = {}  # value → layers whose outputs it is a product of
    for node in target.graph.node:
        varying = [name for name in dict.fromkeys(node.input) if name in target.varying]
        sides = [factors.get(name, frozenset()) for name in varying]
        count = max((counts.get(name, 0) for name in varying), default=0)
        if node.op_type == "Mul" and len(sides) == 2 and all(sides) and sides[0].isdisjoint(sides[1]):
            count = sum(counts[name] for name in varying)
        kept = node.op_type in _ELEMENT_WISE and (len(varying) == 1 or node.op_type == "Mul")
        for name in node.output:
            layer = name in names
            if layer or count:
                counts[name] = count + layer
            if layer or kept:
                factors[name] = frozenset({name}) if layer else frozenset[str]().union(*sides)
    return counts
