"""The command lines of layout `plugin`, read back by polygraphy's own parser."""

import argparse
import subprocess
from pathlib import Path

from polygraphy.common import TensorMetadata
from polygraphy.tools.args.backend.trt.config import parse_profile_shapes
from polygraphy.tools.convert.convert import Convert

from adatsq_trt.engines.backends.base import BatchRange
from adatsq_trt.engines.plugin_commands import (
    COMMANDS_NAME,
    optimization_profiles,
    polygraphy_command,
    trtexec_command,
    write_commands,
)
from adatsq_trt.graph_index import GraphFile, TensorSignature

GRAPH = GraphFile(
    path="plugin.target.onnx",
    variant="target",
    assignment=None,
    inputs=(
        TensorSignature(name="x", dtype="bfloat16", shape=("batch", 16, 4)),
        TensorSignature(name="ids", dtype="bfloat16", shape=(16, 3)),
    ),
    outputs=(TensorSignature(name="velocity", dtype="bfloat16", shape=("batch", 16, 4)),),
    scale_inputs={"ff": TensorSignature(name="ff.activation_scale", dtype="float", shape=())},
    selector_input=TensorSignature(name="selector", dtype="int32", shape=(1, "assignment")),
    plain_path="plugin.target.plain.onnx",
)
BATCH = BatchRange(1, 8, 64)


def test_every_assignment_pins_the_selector() -> None:
    profiles = optimization_profiles(GRAPH, 3, BATCH)
    assert [[shapes["selector"] for shapes in profile] for profile in profiles] == [[(1, k)] * 3 for k in (1, 2, 3)]
    assert [shapes["x"] for shapes in profiles[1]] == [(1, 16, 4), (8, 16, 4), (64, 16, 4)]
    assert all(set(shapes) == {"x", "selector"} for profile in profiles for shapes in profile)


def test_polygraphy_reads_the_optimization_profiles() -> None:
    """The parser of `polygraphy convert` takes the words, and its own function makes the same shapes of them."""
    profiles = optimization_profiles(GRAPH, 2, BATCH)
    words = polygraphy_command(GRAPH, profiles)
    parser = argparse.ArgumentParser()
    Convert().setup_parser(parser.add_subparsers())
    options = parser.parse_args(words[1:])
    assert (options.model_file, options.plugins) == ("onnx/plugin.target.plain.onnx", ["./libadatsq_plugins.so"])
    assert options.strongly_typed
    shapes = options.trt_min_shapes, options.trt_opt_shapes, options.trt_max_shapes
    got = [{n: tuple(map(tuple, s)) for n, s in p.items()} for p in parse_profile_shapes(TensorMetadata(), *shapes)]
    assert got == [{name: tuple(shapes[name] for shapes in profile) for name in profile[0]} for profile in profiles]


def test_trtexec_has_a_profile_for_every_assignment() -> None:
    words = trtexec_command(GRAPH, optimization_profiles(GRAPH, 2, BATCH))
    start = words.index("--profile=1")
    assert words[start : start + 4] == [
        "--profile=1",
        "--minShapes=x:1x16x4,selector:1x2",
        "--optShapes=x:8x16x4,selector:1x2",
        "--maxShapes=x:64x16x4,selector:1x2",
    ]
    assert "--dynamicPlugins=./libadatsq_plugins.so" in words


def test_the_script_runs_either_tool(tmp_path: Path) -> None:
    """Stand-ins for both tools write down what they are given."""
    script = write_commands(tmp_path, GRAPH, 2, BATCH)
    assert script == tmp_path / COMMANDS_NAME
    assert "onnx/plugin.target.onnx is the same graph with local functions" in script.read_text()
    tools, profiles = tmp_path / "tools", optimization_profiles(GRAPH, 2, BATCH)
    tools.mkdir()
    for tool, command in (("polygraphy", polygraphy_command), ("trtexec", trtexec_command)):
        (tools / tool).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tools / tool).chmod(0o755)
        ran = subprocess.run(
            ["sh", script, tool], env={"PATH": f"{tools}:/usr/bin:/bin"}, capture_output=True, text=True
        )
        assert ran.stdout.splitlines() == command(GRAPH, profiles)[1:], ran.stderr
