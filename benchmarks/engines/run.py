"""What layouts weigh, and what switching formats costs in ONNX Runtime: results.json.

    python benchmarks/engines/run.py            # about 15 minutes on two cores, 6 GB of disk in --work

The model is a Flux with the block shapes of Flux-dev, scaled: heads of 128, feed-forward of 4 times the width, twice as
many single as double blocks. Weights are random, so nothing here says anything about pictures.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn

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
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.policy import Policy
from adatsq_trt.quantize import quantize_nearest

STEPS, TARGET, MAX_ROWS, PATCHES = 12, "sm120", 8, 16
# Eight buckets over four assignments.
STEP_ASSIGNMENTS = (0, 0, 1, 1, 2, 2, 1, 3, 3, 2, 0, 1)
SHARES = {"nvfp4": 0.5, "fp8": 0.45, "bf16": 0.05}
MODELS = {
    # width, double blocks, single blocks: 19 M and 161 M parameters
    "flux-small": (512, 1, 2),
    "flux-mid": (1024, 2, 5),
}


def make_adapter(name: str) -> FluxAdapter:
    width, double, single = MODELS[name]
    torch.manual_seed(0)
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
    return FluxAdapter(transformer, nn.Embedding(5, width), FlowMatchEulerDiscreteScheduler(), 2 * PATCHES)


def make_bundle(name: str, folder: Path) -> BundleFiles:
    """Export a random model with a random policy; reused when it is there."""
    if (folder / "manifest.json").exists():
        return BundleFiles.open(folder, verify=False)
    adapter = make_adapter(name)
    layers, dice = adapter.quantizable_layers(), random.Random(0)
    rows = [dice.choices(list(SHARES), list(SHARES.values()), k=len(layers)) for _ in range(max(STEP_ASSIGNMENTS) + 1)]
    policy = Policy.from_steps(name, "0" * 64, list(layers), [rows[i] for i in STEP_ASSIGNMENTS])
    with torch.no_grad():
        weights = {
            name: {layer: quantize_nearest(linear.weight.detach(), FORMATS[name]) for layer, linear in layers.items()}
            for name in SHARES
        }
        encoded = adapter.encode(range(len(adapter.prompts)))
        inputs = adapter.guided_inputs(torch.randn(len(adapter.prompts), *adapter.latent_shape), 0.5, encoded, 2.0)
        traced = trace(adapter.trace_module(), inputs, "velocity", torch.bfloat16)
        graphs = folder / GRAPH_FOLDER
        index = export_graphs(traced, policy, weights, graphs, "bfloat16", adapter.blocks(), ("target", "cpu"))
    policy.save(folder / POLICY_NAME)
    scale = torch.full((STEPS, len(layers)), 1 / 16)
    write_tensors(folder / SCALES_NAME, {"fp8": scale, "nvfp4": scale / 64})
    prompts = {f"conditional.{name}": value.detach().clone() for name, value in encoded.conditional.items()}
    write_tensors(folder / PROMPTS_NAME, prompts)
    schedule = adapter.schedule(STEPS)
    manifest = Manifest(
        model=name,
        architecture=adapter.architecture,
        backend="rtx",
        targets=(TARGET,),
        base_type=index.base_type,
        formats=tuple(SHARES),
        schedule=ScheduleRecord(
            sigmas=schedule.sigmas, timesteps=schedule.timesteps, scheduler_config=schedule.scheduler_config
        ),
        guidance=1.0,
        latent_shape=adapter.latent_shape,
        image=ImageSpec(patches=PATCHES, channels=adapter.image.channels),
        prompts=len(adapter.prompts),
        plans=(),
        versions={},
    )
    write_manifest(folder, manifest)
    return BundleFiles.open(folder)


def layout_rows(files: BundleFiles) -> list[dict[str, object]]:
    """Build every layout and weigh it."""
    rows: list[dict[str, object]] = []
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
                "build_seconds": round(seconds, 1),
            }
        )
        sys.stderr.write(json.dumps(rows[-1]) + "\n")
    return rows


_MEMORY = """
import ctypes, json, sys, psutil, threading, time
from pathlib import Path
import onnxruntime
process, peak, done = psutil.Process(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)
before = process.memory_info().rss
thread = threading.Thread(target=watch); thread.start()
sessions = []
for path in sys.argv[2:]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.add_session_config_entry("session.disable_prepacking", sys.argv[1])
    sessions.append(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
    ctypes.CDLL(None).malloc_trim(0)  # as the runtime does
done = True; thread.join()
print(json.dumps({"peak_bytes": peak - before, "resident_bytes": process.memory_info().rss - before}))
"""


def memory_rows(files: BundleFiles) -> list[dict[str, object]]:
    """Memory of ONNX Runtime, each arrangement in a process of its own."""
    own = [files.graph_path(files.graph("cpu", i)) for i in range(len(files.policy.assignments))]
    together = files.graph_path(files.graph("cpu", None))
    cases = {
        "one session, all assignments": ("0", [together]),
        "a session per assignment": ("0", own),
        "a session per assignment, not prepacked": ("1", own),
        **{f"assignment {i} alone": ("0", [path]) for i, path in enumerate(own)},
    }
    rows = []
    for name, (flag, paths) in cases.items():
        command = [sys.executable, "-c", _MEMORY, flag, *map(str, paths)]
        figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append({"model": files.manifest.model, "sessions": name, **figures})
        sys.stderr.write(json.dumps(rows[-1]) + "\n")
    return rows


def switching_rows(files: BundleFiles, repetitions: int) -> list[dict[str, object]]:
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
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    arguments = parser.parse_args()
    result: dict[str, list[dict[str, object]]] = {"layouts": [], "memory": [], "switching": []}
    for name in arguments.models:
        files = make_bundle(name, arguments.work / name)
        result["memory"] += memory_rows(files)
        result["switching"] += switching_rows(files, 40)
        result["layouts"] += layout_rows(files)
        write_bytes(arguments.output, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
