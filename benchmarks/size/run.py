"""Seconds and peak memory of every stage on the real configuration of Wan2.1-1.3B: results.json.

    python -m benchmarks.size.run [--work FOLDER] [--blocks 30] [--memory-limit 16GB] [--layout embedded]
        [--results FILE] [--document benchmarks/README.md] [--marker size]

Weights are random and the video is tiny, so nothing here says anything about pictures; memory depends on the weights.
Every stage runs in a process of its own, whose record the system keeps. FOLDER, about 40 GB with all blocks, is left as
it is when a stage fails or is killed: the same command goes on there. It is removed at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from pydantic import BaseModel, ConfigDict
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from adatsq_trt.files import read_json_model, sha256, write_json_model
from adatsq_trt.models.wan import WanAdapter
from adatsq_trt.policy import Policy
from adatsq_trt.stages.run_directory import RunDirectory
from benchmarks.document import replace_marked

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
SCRIPT = Path(sys.executable).with_name("adatsq-trt")
TEXT_WIDTH, STEPS, BLOCKS = 4096, 2, 30
CONFIG = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
FORMATS, TARGET = ("fp8", "bf16"), "sm89"
SAMPLES = [f"--{name}-samples=1" for name in ("calibration", "selection", "held-out")]
VIDEO = ["--height", "64", "--width", "64", "--frames", "5", "--guidance", "1"]
COMMANDS = {
    "calibrate": ["calibrate"],
    "quantize": ["quantize"],
    "search": ["search"],
    "export": ["export"],
    "bundle": ["build", "engine"],
}


class Row(BaseModel):
    """A stage.

    Attributes:
        model: name of the model that ran.
        stage: its name.
        seconds: of the stage, all attempts together.
        peak_bytes: largest resident memory of the process that ran it, loading the model included.
        weight_bytes: of the model's checkpoint, in bfloat16.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    stage: str
    seconds: float
    peak_bytes: int
    weight_bytes: int


class Results(BaseModel):
    """Measurements, and the machine and options that they were made with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    cores: int
    threads: int
    memory_limit: str
    layout: str
    rows: tuple[Row, ...]


def main() -> None:
    """Measure, write results.json, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-size"))
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="fewer make another model, whose rows say so")
    parser.add_argument("--memory-limit", default="16GB")
    parser.add_argument("--layout", default="embedded")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="leave FOLDER as it is at the end too")
    parser.add_argument("--document", type=Path, help="file with the markers that the table goes between")
    parser.add_argument("--marker", default="size", help="of the table in the document")
    options = parser.parse_args()
    checkpoint, run = options.work / "wan", options.work / "run"
    make_once(checkpoint, lambda folder: save_checkpoint(folder, options.blocks))
    policy = options.work / "policy.json"
    weights = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    make_once(policy, lambda file: write_policy(file, weights))
    given = [checkpoint, "--policy", policy, "--output", run, "--memory-limit", options.memory_limit]
    given += ["--layout", options.layout, "--target", TARGET, "--formats", ",".join(FORMATS)]
    given += ["--steps", STEPS, "--batch", 1, *SAMPLES, *VIDEO]
    name = "Wan2.1-1.3B" if options.blocks == BLOCKS else f"Wan2.1-1.3B, {options.blocks} of {BLOCKS} blocks"
    rows = [measure(options.work, stage, name, weights, given) for stage in COMMANDS]
    limit, threads = options.memory_limit, torch.get_num_threads()
    cores = os.cpu_count() or 1
    results = Results(cores=cores, threads=threads, memory_limit=limit, layout=options.layout, rows=tuple(rows))
    write_json_model(options.results, results)
    table = table_of(results)
    sys.stdout.write(table)
    if options.document is not None:
        replace_marked(options.document, options.marker, table)
    if not options.keep:
        shutil.rmtree(options.work)


def measure(work: Path, stage: str, name: str, weights: Path, given: Sequence[object]) -> Row:
    """Run a stage in a process of its own, unless an earlier call did."""
    file = work / f"{stage}.json"
    if not file.is_file():
        peak = peak_bytes([str(part) for part in (SCRIPT, *COMMANDS[stage], *given)])
        record = RunDirectory.existing(work / "run").record(stage)
        most, size = max(peak, record.peak_bytes), weights.stat().st_size
        row = Row(model=name, stage=stage, seconds=record.seconds, peak_bytes=most, weight_bytes=size)
        write_json_model(file, row)
        sys.stdout.write(f"{row}\n")
    return read_json_model(file, Row)


def peak_bytes(command: Sequence[str]) -> int:
    """Run a command; the largest resident memory of its process, which Linux counts in kibibytes."""
    sys.stdout.write(f"{' '.join(command)}\n")
    sys.stdout.flush()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise SystemExit(code)
    return usage.ru_maxrss * 1024


def make_once(path: Path, make: Callable[[Path], None]) -> None:
    """Make a file or folder whole or not at all, unless it is there."""
    if not path.exists():
        part = path.with_name(f"{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(part)
        part.rename(path)


def save_checkpoint(folder: Path, blocks: int) -> None:
    """A WanPipeline with random bfloat16 weights; text encoder and VAE are as small as they may be."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    transformer = WanTransformer3DModel(**CONFIG, num_layers=blocks)
    torch.set_default_dtype(torch.float32)
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in ("a", "red", "green"))]
    tokenizer = T5TokenizerFast(vocab=words, extra_ids=0, model_max_length=512)
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=16, d_ff=32, num_heads=2, num_layers=1)
    )
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    WanPipeline(tokenizer, encoder, vae, scheduler, transformer).save_pretrained(folder, max_shard_size="10GB")


def write_policy(file: Path, weights: Path) -> None:
    """Two assignments: fp8 everywhere, then with attention in bf16."""
    with torch.device("meta"):
        outline = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(weights.parent))
    layers = [name for name, _ in outline.named_modules() if WanAdapter.quantizable.fullmatch(name)]
    rows = [["fp8"] * len(layers), ["fp8" if ".ffn." in layer else "bf16" for layer in layers]]
    Policy.from_steps("wan", sha256(weights), layers, rows).save(file)


def table_of(results: Results) -> str:
    """Markdown."""
    lines = ["| model | stage | seconds | peak, GB | of the weights |", "|---|---|---:|---:|---:|"]
    for row in results.rows:
        ratio = row.peak_bytes / row.weight_bytes
        lines.append(f"| {row.model} | {row.stage} | {row.seconds:.0f} | {row.peak_bytes / 1e9:.2f} | {ratio:.2f} × |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
