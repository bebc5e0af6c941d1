"""Sizes of layouts, and the cost of switching formats in ONNX Runtime: results.json.

    python benchmarks/engines/run.py            # about 15 minutes on two cores, 6 GB of disk in --work

Two models are Flux with the block shapes of Flux-dev, scaled: heads of 128, feed-forward of 4 times the width, twice as
many single as double blocks. Their weights are random, so nothing here says anything about pictures. The layouts of
scenes-flux-dev are weighed too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn

from adatsq_trt.base_type import BaseName
from adatsq_trt.engines.backends.fold import fold, weight_file_bytes
from adatsq_trt.engines.benchmark import benchmark_bundles
from adatsq_trt.engines.build import build_plans
from adatsq_trt.engines.bundle import (
    GRAPH_FOLDER,
    POLICY_NAME,
    PROMPTS_NAME,
    SCALES_NAME,
    BundleFiles,
    ImageSpec,
    Manifest,
    ScheduleRecord,
    write_manifest,
)
from adatsq_trt.engines.sizes import LAYOUTS, size_report
from adatsq_trt.export import export_graphs, trace
from adatsq_trt.files import write_bytes, write_tensors
from adatsq_trt.formats import FORMATS, TARGETS
from adatsq_trt.models.adapter import ImageShape, ModelAdapter
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.models.prompts import ClassEncoder
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import quantize_nearest
from adatsq_trt.zoo.loading import load_model

STEPS, TARGET, MAX_ROWS, PATCHES = 12, "sm120", 8, 16
# Eight buckets over four assignments.
STEP_ASSIGNMENTS = (0, 0, 1, 1, 2, 2, 1, 3, 3, 2, 0, 1)
SHARES = {"nvfp4": 0.5, "fp8": 0.45, "bf16": 0.05}
CPU_FORMATS = ("w8a8s", "fp32")
PARTS = ("layouts", "memory", "switching", "speed")
MODELS = {
    # width, double blocks, single blocks: 19 M and 161 M parameters
    "flux-small": (512, 1, 2),
    "flux-mid": (1024, 2, 5),
}
TRAINED, PROMPTS = "scenes-flux-dev", 5


def make_adapter(name: str) -> ModelAdapter:
    torch.manual_seed(0)
    if name == TRAINED:
        return load_model(name).adapter
    width, double, single = MODELS[name]
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=128,
        num_attention_heads=width // 128,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        guidance_embeds=False,
        axes_dims_rope=(16, 56, 56),
    )
    encoder, image = ClassEncoder(nn.Embedding(PROMPTS, width)), ImageShape(PATCHES, channels=16)
    return FluxAdapter(transformer, encoder, FlowMatchEulerDiscreteScheduler(), image)


def random_rows(layers: int) -> list[list[str]]:
    """Formats of every step: eight buckets over four random assignments of the GPU's formats."""
    dice = random.Random(0)
    rows = [dice.choices(list(SHARES), list(SHARES.values()), k=layers) for _ in range(max(STEP_ASSIGNMENTS) + 1)]
    return [rows[i] for i in STEP_ASSIGNMENTS]


def uniform_rows(layers: int) -> list[list[str]]:
    """Formats of every step: one of the CPU's two formats everywhere, in turns."""
    return [[CPU_FORMATS[step % len(CPU_FORMATS)]] * layers for step in range(STEPS)]


def make_bundle(name: str, folder: Path, cpu: bool = False) -> BundleFiles:
    """Export a random model, with a random policy for a GPU or uniform ones for the CPU; reused when it is there."""
    if (folder / "manifest.json").exists():
        return BundleFiles.open(folder, verify=False)
    adapter = make_adapter(name)
    layers = adapter.quantizable_layers()
    rows, formats = (uniform_rows(len(layers)), CPU_FORMATS) if cpu else (random_rows(len(layers)), tuple(SHARES))
    policy = Policy.from_steps(name, "0" * 64, list(layers), rows)
    with torch.no_grad():
        weights = {
            name: {layer: quantize_nearest(linear.weight.detach(), FORMATS[name]) for layer, linear in layers.items()}
            for name in formats
        }
        encoded = adapter.encode(range(PROMPTS))
        inputs = adapter.guided_inputs(torch.randn(PROMPTS, *adapter.latent_shape), 0.5, encoded, 2.0)
        base, variants = ("float32", ("cpu",)) if cpu else ("bfloat16", ("target", "cpu"))
        traced = trace(adapter.trace_module(), inputs, "velocity", getattr(torch, base))
        index = export_graphs(traced, policy, weights, folder / GRAPH_FOLDER, base, adapter.blocks(), variants)
    policy.save(folder / POLICY_NAME)
    scale = torch.full((STEPS, len(layers)), 1 / 16)
    write_tensors(folder / SCALES_NAME, {"fp8": scale, "nvfp4": scale / 64, "w8a8s": scale.clone()})
    prompts = {f"conditional.{name}": value.detach().clone() for name, value in encoded.conditional.items()}
    write_tensors(folder / PROMPTS_NAME, prompts)
    write_manifest(folder, make_manifest(name, adapter, formats, index.base_type, "cpu" if cpu else TARGET))
    return BundleFiles.open(folder)


def make_manifest(name: str, adapter: ModelAdapter, formats: tuple[str, ...], base: BaseName, target: str) -> Manifest:
    return Manifest(
        model=name,
        architecture=adapter.architecture,
        backend="onnxruntime" if target == "cpu" else "rtx",
        targets=(target,),
        base_type=base,
        formats=formats,
        schedule=ScheduleRecord.of(adapter.schedule(STEPS)),
        guidance=1.0,
        latent_shape=adapter.latent_shape,
        image=ImageSpec(**asdict(adapter.image)),
        prompts=PROMPTS,
        call=adapter.pipeline_call(),
        plans=(),
        versions={},
    )


def layout_rows(files: BundleFiles) -> list[dict[str, Any]]:
    """Build every layout and weigh it."""
    rows: list[dict[str, Any]] = []
    for layout in LAYOUTS:
        began = time.monotonic()
        plans = build_plans(files.folder, files.index, [TARGETS[TARGET]], MAX_ROWS, layout=layout)
        seconds = time.monotonic() - began
        manifest = files.manifest.model_copy(update={"plans": plans, "layout": layout})
        write_manifest(files.folder, manifest)
        built = BundleFiles.open(files.folder, verify=False)
        report = size_report(built)
        assert report is not None
        row = next(row for row in report.layouts if row.layout == layout)
        overhead = row.plan_overhead_bytes[TARGET]
        rows.append(
            {
                "model": files.manifest.model,
                "layout": layout,
                "target": TARGET,
                "assignments": len(files.policy.assignments),
                "buckets": len(files.policy.buckets),
                "engines": row.engines,
                "bytes_total": row.weight_bytes + overhead,
                "weight_bytes": row.weight_bytes,
                "plan_overhead_bytes": overhead,
                "floor_bytes": report.floor_bytes,
                "of_floor": round((row.weight_bytes + overhead) / report.floor_bytes, 4),
                "unpacked_plan_bytes": sum(plan.unpacked_bytes or plan.bytes for plan in plans),
                "build_seconds": round(seconds, 1),
            }
        )
        sys.stderr.write(json.dumps(rows[-1]) + "\n")
    return rows


_MEMORY = """
import json, sys, psutil, threading, time
from pathlib import Path
import onnxruntime
from adatsq_trt.engines.backends.onnxruntime import OnnxRuntimeBackend
from adatsq_trt.engines.backends import fold
process, peak, done = psutil.Process(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)
before = process.memory_info().rss
thread = threading.Thread(target=watch); thread.start()
began = time.monotonic()
sessions = [OnnxRuntimeBackend().load(Path(path)) for path in sys.argv[1:]]
seconds = time.monotonic() - began
done = True; thread.join()
resident = process.memory_info().rss - before
print(json.dumps({"peak_bytes": peak - before, "resident_bytes": resident, "load_seconds": round(seconds, 1)}))
"""


def memory_rows(files: BundleFiles) -> list[dict[str, Any]]:
    """Memory of ONNX Runtime as the runtime loads it, each arrangement in a process of its own.

    `limit_bytes` is what the arrangement of all assignments is held against: the largest peak of an assignment alone,
    and the float32 weights that the others add.
    """
    own = [files.graph_path(files.graph("cpu", i)) for i in range(len(files.policy.assignments))]
    together = files.graph_path(files.graph("cpu", None))
    cases = {f"assignment {i} alone": [path] for i, path in enumerate(own)}
    cases |= {"a session per assignment": own, "one session, all assignments": [together]}
    rows: list[dict[str, Any]] = []
    for name, paths in cases.items():
        command = [sys.executable, "-c", _MEMORY, *map(str, paths)]
        figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append({"model": files.manifest.model, "sessions": name, **figures})
        sys.stderr.write(json.dumps(rows[-1]) + "\n")
    alone = max(row["peak_bytes"] for row in rows[: len(own)])
    added = folded_bytes(together) - max(map(folded_bytes, own))
    peak = rows[-1]["peak_bytes"]
    rows[-1] |= {"limit_bytes": alone + added, "of_limit": round(peak / (alone + added), 4)}
    return rows


def folded_bytes(path: Path) -> int:
    """Bytes of a graph's weights as ONNX Runtime gets them."""
    with tempfile.TemporaryDirectory() as scratch:
        return weight_file_bytes(fold(path, Path(scratch)))


def speed_rows(folder: Path, rounds: int) -> dict[str, Any]:
    """Steps per second of both uniform assignments of the CPU's formats and of full precision, in turns."""
    result = benchmark_bundles([folder], "onnxruntime", 1, rounds)
    for timing in result.timings:
        sys.stderr.write(timing.model_dump_json() + "\n")
    content = result.model_dump(mode="json")
    for row in content["timings"]:
        row["bundle"] = folder.name
    return content


def switching_rows(files: BundleFiles, repetitions: int) -> list[dict[str, Any]]:
    """Milliseconds of a call that changes the assignment and of one that does not, in turns, in one session."""
    from adatsq_trt.engines.runtime import Bundle

    with Bundle(files) as bundle:
        latents, condition = bundle.noise([0]), bundle.conditioning([0]).conditional
        inputs = {bundle.latent_input: latents, "timestep": np.full(1, 0.5, np.float32), **condition}
        firsts = [files.policy.step_assignments.index(i) for i in range(len(files.policy.assignments))]
        for step in firsts:
            bundle.predict(step, inputs)
        changed, same = [], []
        for turn in range(repetitions):
            step = firsts[turn % len(firsts)]
            for record in (changed, same, same):
                began = time.perf_counter()
                bundle.predict(step, inputs)
                record.append(1e3 * (time.perf_counter() - began))
    return [
        {
            "model": files.manifest.model,
            "changed_ms": round(statistics.median(changed), 3),
            "same_ms": round(statistics.median(same), 3),
            "cost": round(statistics.median(changed) / statistics.median(same) - 1, 4),
            "calls": 3 * repetitions,
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-engines"))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.json"))
    parser.add_argument("--models", nargs="+", default=[*MODELS, TRAINED], choices=[*MODELS, TRAINED])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="others are left as they are")
    arguments = parser.parse_args()
    old = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    result: dict[str, Any] = {part: old.get(part, []) for part in PARTS}
    for part in arguments.parts:
        result[part] = [row for row in result[part] if row["model"] not in arguments.models]
    for name in arguments.models:
        for part in arguments.parts:
            result[part] += measure(part, name, arguments.work)
            write_bytes(arguments.output, (json.dumps(result, indent=2) + "\n").encode())


def measure(part: str, name: str, work: Path) -> list[dict[str, Any]]:
    if name == TRAINED and part != "layouts":
        return []
    if part == "speed":
        make_bundle(name, work / f"{name}-cpu", cpu=True)
        return [{"model": name, **speed_rows(work / f"{name}-cpu", 12)}]
    files = make_bundle(name, work / name)
    if part == "memory":
        return memory_rows(files)
    return switching_rows(files, 40) if part == "switching" else layout_rows(files)


if __name__ == "__main__":
    main()
