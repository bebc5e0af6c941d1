"""Memory that TensorRT-RTX needs by itself to compile weights: compiler.json, and a line for a document.

    python -m benchmarks.size.compiler [--work FOLDER] [--document benchmarks/README.md]

Chains of bfloat16 products, 2,048 wide and as random as weights are, go from an ONNX file with external data to a plan.
A process for each does nothing but call the library, and notes its resident memory. What grows with the weights is the
compiler's own need; the slope over the sizes leaves out what the libraries take at rest.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, TypeAdapter

from adatsq_trt.files import write_json_model
from adatsq_trt.stages.meter import resident_bytes
from benchmarks.document import replace_marked

RESULTS = Path(__file__).with_name("compiler.json")
WIDTH, LAYERS, COMPUTE_CAPABILITY = 2048, (40, 80, 160), 89


class Row(BaseModel):
    """A compilation.

    Attributes:
        weight_bytes: of the graph.
        plan_bytes: of the plan.
        parsed_bytes: resident after the graph was read, less what was before.
        peak_bytes: largest resident memory of the compilation, less what was before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight_bytes: int
    plan_bytes: int
    parsed_bytes: int
    peak_bytes: int


class Results(BaseModel):
    """Content of compiler.json.

    Attributes:
        version: of TensorRT-RTX.
        rows: by size.
        of_weights: growth of the peak over growth of the weights, from the first row to the last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    version: str
    rows: tuple[Row, ...]
    of_weights: float


def save_graph(path: Path, layers: int) -> int:
    """A chain of products; returns the bytes of its weights."""
    rng, dtype = np.random.default_rng(0), ir.DataType.BFLOAT16
    x = ir.val("x", dtype, [1, WIDTH])
    value, nodes, weights = x, [], []
    for layer in range(layers):
        drawn = rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(WIDTH**0.5)
        weight = ir.Value(name=f"w{layer}", const_value=ir.tensor(drawn.astype(dtype.numpy()), name=f"w{layer}"))
        weights.append(weight)
        nodes.append(ir.node("MatMul", [value, weight]))
        value = nodes[-1].outputs[0]
        value.name, value.dtype, value.shape = f"y{layer}", dtype, ir.Shape([1, WIDTH])
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="chain")
    ir.save(ir.Model(graph, ir_version=10), path, external_data="weights.bin")
    return layers * WIDTH * WIDTH * 2


def compile_alone(path: Path, weight_bytes: int) -> Row:
    """The library's calls and nothing else."""
    import tensorrt_rtx as library

    logger = library.Logger(library.Logger.ERROR)
    builder = library.Builder(logger)
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, logger)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(library.ComputeCapability.__members__[f"SM{COMPUTE_CAPABILITY}"], 0)
    before = resident_bytes()
    assert parser.parse_from_file(str(path))
    parsed = resident_bytes()
    plan = builder.build_serialized_network(network, config)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Row(
        weight_bytes=weight_bytes, plan_bytes=plan.nbytes, parsed_bytes=parsed - before, peak_bytes=peak - before
    )


def measure(work: Path, layers: int) -> Row:
    """Compile a chain in a process of its own."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        graph = Path(folder) / "chain.onnx"
        size = save_graph(graph, layers)
        command = [sys.executable, "-m", "benchmarks.size.compiler", "--graph", str(graph), "--bytes", str(size)]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return TypeAdapter(Row).validate_json(ended.stdout.splitlines()[-1])


def main() -> None:
    """Measure, write compiler.json, print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--document", type=Path, help="file with the markers that the line goes between")
    parser.add_argument("--graph", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.graph is not None:
        sys.stdout.write(f"{compile_alone(options.graph, options.bytes).model_dump_json()}\n")
        return
    import tensorrt_rtx

    options.work.mkdir(parents=True, exist_ok=True)
    rows = tuple(measure(options.work, layers) for layers in LAYERS)
    first, last = rows[0], rows[-1]
    slope = (last.peak_bytes - first.peak_bytes) / (last.weight_bytes - first.weight_bytes)
    results = Results(version=tensorrt_rtx.__version__, rows=rows, of_weights=slope)
    write_json_model(RESULTS, results)
    line = line_of(results)
    sys.stdout.write(line)
    if options.document is not None:
        replace_marked(options.document, "compiler", line)


def line_of(results: Results) -> str:
    """Markdown."""
    figures = ", ".join(f"{row.weight_bytes / 1e9:.2f} GB: {row.peak_bytes / 1e9:.2f} GB" for row in results.rows)
    return (
        f"TensorRT-RTX {results.version} by itself takes {results.of_weights:.2f} × the weights ({figures}; what its "
        "libraries take at rest is left out).\n"
    )


if __name__ == "__main__":
    main()
