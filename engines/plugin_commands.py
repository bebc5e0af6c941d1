"""Layout `plugin`: its optimization profiles, and the command lines that compile its graph where TensorRT is.

Nothing here runs them: they are for machines with enterprise TensorRT and a GPU, but without this package.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from adatsq_trt.engines.backends.base import BatchRange
from adatsq_trt.engines.bundle import GRAPH_FOLDER
from adatsq_trt.files import write_bytes
from adatsq_trt.graph_index import GraphFile

COMMANDS_NAME = "build-plugin-engine.sh"
LIBRARY = "libadatsq_plugins.so"
PLAN = "plugin.plan"
# "Now prioritizes using plugins over local functions": changelog of TensorRT OSS, 10.7.0.
MINIMUM_PARSER = "10.7"
_Shapes = dict[str, tuple[int, ...]]

_SCRIPT = """\
#!/bin/sh
# Compiles this bundle's graph, in this folder and on the GPU that will run it. It needs enterprise TensorRT 10.13 to 11
# and the library that 'adatsq-trt build plugins' makes. One of:
#
#     sh {name} polygraphy
#     sh {name} trtexec
#
# {functions} is the same graph with local functions, for ONNX Runtime. TensorRT can read it too,
# but parsers before {minimum}, and all where the library is not loaded, take the functions without a word. What is
# compiled here has none, so it is refused then.
set -eu
case "${{1:-polygraphy}}" in
polygraphy)
    {polygraphy}
    ;;
trtexec)
    {trtexec}
    ;;
*)
    echo "got '$1', expected polygraphy or trtexec" >&2
    exit 2
    ;;
esac
"""


def plugin_profiles(graph: GraphFile, assignments: int, batch: BatchRange) -> BatchRange:
    """Optimization profiles for each assignment: those of the k-th pin the selector to [1, k].

    Args:
        graph: with plugin nodes.
        assignments: how many there are.
        batch: bounds of the dynamic axes of the other inputs; with several sizes every assignment has all of them.
    """
    assert graph.selector_input is not None
    selector = graph.selector_input.name
    return BatchRange.of_sizes(
        [
            replace(own, shapes=(*own.shapes, (selector, (1, extent))))
            for extent in range(1, assignments + 1)
            for own in batch.sizes or (batch.whole,)
        ]
    )


def optimization_profiles(graph: GraphFile, assignments: int, batch: BatchRange) -> list[tuple[_Shapes, ...]]:
    """Minimum, optimum and maximum shapes of the inputs in each of `plugin_profiles`, whose arguments these are."""
    inputs = (*graph.inputs, *graph.position_inputs, *filter(None, [graph.selector_input]))
    dynamic = [s for s in inputs if any(isinstance(size, str) for size in s.shape)]
    profiles = []
    for own in plugin_profiles(graph, assignments, batch).profiles:
        shapes = {signature.name: own.inputs(signature.name, signature.shape) for signature in dynamic}
        profiles.append(tuple({name: kinds[i] for name, kinds in shapes.items()} for i in range(3)))
    return profiles


def polygraphy_command(graph: GraphFile, profiles: Iterable[Sequence[_Shapes]]) -> list[str]:
    """The words of `polygraphy convert`, to be run in the bundle's folder."""
    words = ["polygraphy", "convert", f"{GRAPH_FOLDER}/{graph.plain_path}", "--convert-to", "trt", "--strongly-typed"]
    words += ["--plugins", f"./{LIBRARY}"]
    for shapes in profiles:
        for kind, own in zip(("min", "opt", "max"), shapes, strict=True):
            words.append(f"--trt-{kind}-shapes")
            words += [f"{name}:[{','.join(map(str, shape))}]" for name, shape in own.items()]
    return [*words, "--output", PLAN]


def trtexec_command(graph: GraphFile, profiles: Iterable[Sequence[_Shapes]]) -> list[str]:
    """The words of `trtexec`, to be run in the bundle's folder."""
    words = ["trtexec", f"--onnx={GRAPH_FOLDER}/{graph.plain_path}", "--stronglyTyped", f"--dynamicPlugins=./{LIBRARY}"]
    for index, shapes in enumerate(profiles):
        words.append(f"--profile={index}")
        for kind, own in zip(("min", "opt", "max"), shapes, strict=True):
            listed = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in own.items())
            words.append(f"--{kind}Shapes={listed}")
    return [*words, f"--saveEngine={PLAN}", "--skipInference"]


def write_commands(folder: Path, graph: GraphFile, assignments: int, batch: BatchRange) -> Path:
    """Write both command lines as a script into a bundle.

    Args:
        folder: the bundle's.
        graph: its target graph.
        assignments: how many there are.
        batch: rows of an optimization profile.

    Raises:
        OutputError: the folder cannot be written.
    """
    profiles = optimization_profiles(graph, assignments, batch)
    path = folder / COMMANDS_NAME
    text = _SCRIPT.format(
        name=COMMANDS_NAME,
        functions=f"{GRAPH_FOLDER}/{graph.path}",
        minimum=MINIMUM_PARSER,
        polygraphy=shlex.join(polygraphy_command(graph, profiles)),
        trtexec=shlex.join(trtexec_command(graph, profiles)),
    )
    write_bytes(path, text.encode())
    return path
