"""A small made-up run."""

import io

import numpy as np
import pytest
from PIL import Image

from adatsq_trt.costs import Costs, Limits
from adatsq_trt.policy import Policy
from adatsq_trt.report.data import Check, Comparison, EngineFile, JudgedPolicy, Pictures, ReportData
from adatsq_trt.report.summary import PolicyFigures, StageFigures, StaticErrors, Summary
from adatsq_trt.settings import Settings

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff", "proj.$x$<b>")
FORMATS = ("nvfp4", "fp8", "bf16")
ROWS = (("nvfp4", "fp8", "nvfp4"), ("nvfp4", "fp8", "nvfp4"), ("fp8", "fp8", "bf16"), ("nvfp4", "nvfp4", "nvfp4"))


def figures(name: str, kind: str, bits: float, error: float) -> PolicyFigures:
    return PolicyFigures(
        name=name,
        kind=kind,
        assignments=1,
        mean_bits=bits,
        costs=Costs(resident_bytes=int(5e4 * bits), activation_bits=bits, ms=bits / 1000),
        resident_bits=bits,
        error=error,
        standard_error=error / 10,
        within_limits=bits <= 7,
    )


@pytest.fixture
def data() -> ReportData:
    settings = Settings(
        model="digits-flux",
        weights_sha256="a" * 64,
        model_sha256="b" * 64,
        format_set="nvfp4,fp8,bf16",
        formats=FORMATS,
        targets=("sm89", "sm120"),
        simulate=False,
        steps=4,
        guidance=2.0,
        budget_bits=7.0,
    )
    summary = Summary(
        settings_sha256="c" * 64,
        model="digits-flux",
        targets=("sm89", "sm120"),
        formats=FORMATS,
        simulate=False,
        steps=4,
        guidance=2.0,
        limits=Limits(bits=7.0),
        policies=(
            figures("chosen", "plan", 6.5, 1e-3),
            figures("best layer-only", "layer_only", 6.5, 2e-3),
            figures("uniform nvfp4", "uniform", 4.0, 4e-3),
            figures("uniform fp8", "uniform", 8.0, 5e-4),
            figures("uniform bf16", "uniform", 16.0, 1e-6),
        ),
        buckets=3,
        assignments=3,
        mean_bits=6.5,
        mean_weight_bits=6.4,
        mean_activation_bits=6.2,
        final_error=1e-3,
        final_standard_error=1e-4,
        chosen_kind="plan",
        uniform_errors={"nvfp4": 4e-3, "fp8": 5e-4, "bf16": 1e-6},
        static_errors=StaticErrors(layer_only=2e-3, time_only=None),
        held_out_samples=128,
        held_out_seeds=(2_000_000, 2_000_127),
        denoiser_calls=400,
        resident_weight_bytes=300_000,
        engines=3,
        onnx_bytes=1_000_000,
        weight_bytes=2_000_000,
        engine_bytes=30_000_000,
        stages={
            "search": StageFigures(seconds=90.0, peak_bytes=1 << 30),
            "export": StageFigures(seconds=9, peak_bytes=1),
        },
        versions={"adatsq-trt": "0.1.0", "torch": "2.13.0"},
    )
    judged = (
        JudgedPolicy("plan", "plan 0", 6.5, 1.1e-3, 1e-3, True, True),
        JudgedPolicy("beam", "beam 0", 6.4, 1.3e-3, None, False, False),
        JudgedPolicy("layer_only", "layer_only 0", 6.5, 2.1e-3, 2e-3, False, False),
        JudgedPolicy("uniform", "nvfp4", 4.0, 4.1e-3, 4e-3, True, False),
        JudgedPolicy("uniform", "fp8", 8.0, 5e-4, 5e-4, True, False),
        JudgedPolicy("uniform", "bf16", 16.0, 1e-6, 1e-6, True, False),
    )
    rng = np.random.default_rng(0)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "webp", lossless=True)
    return ReportData(
        run_name="demo",
        summary=summary,
        settings=settings,
        policy=Policy.from_steps("digits-flux", "a" * 64, LAYERS, ROWS),
        timesteps=(1000.0, 750.0, 500.0, 250.0),
        sigmas=(1.0, 0.75, 0.5, 0.25, 0.0),
        information=rng.uniform(1, 2, (4, 3)),
        sensitivity=rng.uniform(1e-6, 1e-5, (3, 4, 3)),
        judged=judged,
        trajectory_errors={name: np.linspace(0, 1e-3, 5) for name in ("chosen", "best layer-only", "nvfp4")},
        layout="embedded",
        engines=tuple(EngineFile(target, i, 5_000_000) for target in ("sm89", "sm120") for i in range(3)),
        check=Check(
            True, True, tuple(Comparison(step, "cpu", "PyTorch", 0.2, True, "polygraphy run") for step in (0, 1))
        ),
        pictures=Pictures(picture.getvalue(), picture.getvalue()),
    )
