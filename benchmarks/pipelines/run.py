"""The loop in full precision against the pipelines themselves: tiny random ones, with their own and other schedulers.

    make bench-pipelines

For every case the folder of a pipeline is saved with its scheduler and opened as any checkpoint is. The pipeline and
the loop start from the same noise and have the same weights, in float32 with guidance. Writes results.json beside this
file and the table in docs/adapters.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.checkpoints.loading import OpenedPipeline, open_pipeline, silence
from adatsq_trt.files import write_json_model
from adatsq_trt.models.family import Canvas
from adatsq_trt.schedule import DPM, EULER, HEUN, UNIPC, Spacing, calls_per_step
from adatsq_trt.settings import PipelineSettings
from adatsq_trt.solver import Denoising, Solver, euler_updates
from benchmarks.document import replace_marked
from tests import tiny_ltx
from tests.tiny_checkpoints import (
    HEIGHT,
    WIDTH,
    make_fill_pipeline,
    make_flux_pipeline,
    make_kontext_pipeline,
    make_wan_image_pipeline,
    make_wan_pipeline,
    make_z_image_pipeline,
)
from tests.tiny_chroma import make_chroma_pipeline
from tests.tiny_flux_2 import (
    make_distilled_klein_pipeline,
    make_flux_2_pipeline,
    make_klein_pipeline,
    tokens_of_klein,
)
from tests.tiny_hunyuan_video import make_hunyuan_video_pipeline
from tests.tiny_qwen_image import make_qwen_image_pipeline
from tests.tiny_qwen_image_edit import SIDE, make_edit_pipeline, make_edit_plus_pipeline
from tests.tiny_stable_diffusion_3 import make_stable_diffusion_3_pipeline
from tests.tiny_wan_experts import make_wan_experts_pipeline, make_wan_image_experts_pipeline

RESULTS = Path(__file__).with_name("results.json")
PROMPTS, NEGATIVE = ("a red", "three green and seven"), 'a "green" seven'
FRAMES = 5
LIMIT = 1e-4

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """A pipeline with a scheduler.

    Attributes:
        make: the pipeline, with the scheduler that it comes with.
        steps: `num_inference_steps`.
        scheduler: class of another scheduler; None for its own.
        options: of that one.
        guidance: as the package counts it.
        pipeline_guidance: as the pipeline does.
        guidance_2: of a second transformer, where there is one.
        sigmas: that are passed in the place of the steps; as many as these.
        negative: prompt of the second branch.
    """

    make: Callable[[], DiffusionPipeline]
    steps: int
    scheduler: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    guidance: float = 4.0
    pipeline_guidance: float = 4.0
    guidance_2: float | None = None
    sigmas: tuple[float, ...] = ()
    negative: str = ""

    @property
    def canvas(self) -> Canvas:
        """Size of the picture or video."""
        if self.make is tiny_ltx.make_ltx_pipeline:
            return Canvas(tiny_ltx.HEIGHT, tiny_ltx.WIDTH, tiny_ltx.FRAMES)
        height, width = (SIDE, SIDE) if self.make in EDIT_PIPELINES else (HEIGHT, WIDTH)
        return Canvas(height, width, FRAMES if self.make in VIDEO_PIPELINES else None)

    @property
    def prompts(self) -> tuple[int, ...]:
        """One for each sample; a pipeline that takes an image takes one at a time."""
        return (1,) if self.make in IMAGE_PIPELINES else (1, 0)

    @property
    def request(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that other pipelines do not take."""
        if self.make in (make_qwen_image_pipeline, *EDIT_PIPELINES):
            return {"true_cfg_scale": self.pipeline_guidance, "negative_prompt": [""] * len(self.prompts)}
        if self.make is make_hunyuan_video_pipeline:  # whose guider has the scale
            return {"negative_prompt": [self.negative] * len(PROMPTS), "num_frames": FRAMES}
        second = {} if self.guidance_2 is None else {"guidance_scale_2": self.guidance_2}
        frames = {} if self.canvas.frames is None else {"num_frames": self.canvas.frames}
        return {"guidance_scale": self.pipeline_guidance, **second, **frames}


EDIT_PIPELINES = (make_edit_pipeline, make_edit_plus_pipeline)  # of about a megapixel
IMAGE_PIPELINES = (
    *EDIT_PIPELINES,
    make_kontext_pipeline,
    make_fill_pipeline,
    make_wan_image_pipeline,
    make_wan_image_experts_pipeline,
)
FLUX_2_PIPELINES = (make_flux_2_pipeline, make_klein_pipeline, make_distilled_klein_pipeline)
VIDEO_PIPELINES = (
    make_wan_pipeline,
    make_wan_experts_pipeline,
    make_wan_image_pipeline,
    make_wan_image_experts_pipeline,
    make_hunyuan_video_pipeline,
)
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SHIFTED = {**FLOW, "flow_shift": 3.0}
Z_IMAGE: dict[str, Any] = {"guidance": 6.0, "pipeline_guidance": 5.0}
FILL: dict[str, Any] = {"guidance": 30.0, "pipeline_guidance": 30.0}
SIGMAS = (1.0, 0.85, 0.6, 0.15)  # no pipeline's own
CASES = {
    "Flux, its own": Case(make_flux_pipeline, 8),
    "Flux, Euler at shift 5": Case(make_flux_pipeline, 8, EULER, {"shift": 5.0}),
    "Flux, UniPC": Case(make_flux_pipeline, 8, UNIPC, SHIFTED),
    "Flux, UniPC with dynamic shift": Case(make_flux_pipeline, 8, UNIPC, {**FLOW, "use_dynamic_shifting": True}),
    "Flux, DPM-Solver++ with dynamic shift": Case(
        make_flux_pipeline, 8, DPM, {**FLOW, "use_dynamic_shifting": True, "time_shift_type": "exponential"}
    ),
    "Z-Image, its own": Case(make_z_image_pipeline, 8, **Z_IMAGE),
    "Z-Image, Euler with dynamic shift": Case(
        make_z_image_pipeline, 8, EULER, {"use_dynamic_shifting": True}, **Z_IMAGE
    ),
    "Wan, its own": Case(make_wan_pipeline, 8),
    "Wan, its own, 25 steps": Case(make_wan_pipeline, 25),
    "Wan, UniPC at shift 12, order 3": Case(
        make_wan_pipeline, 8, UNIPC, {**FLOW, "flow_shift": 12.0, "solver_order": 3}
    ),
    "Wan, DPM-Solver++": Case(make_wan_pipeline, 8, DPM, SHIFTED),
    "Wan, DPM-Solver++ of order 3": Case(make_wan_pipeline, 25, DPM, {**SHIFTED, "solver_order": 3}),
    "Wan, Heun": Case(make_wan_pipeline, 8, HEUN, {"shift": 3.0}),
    "Wan, Euler": Case(make_wan_pipeline, 8, EULER, {"shift": 3.0}),
    "Wan 2.2, its own": Case(make_wan_experts_pipeline, 8, guidance_2=2.5),
    "Wan 2.2, Heun": Case(make_wan_experts_pipeline, 8, HEUN, {"shift": 3.0}, guidance_2=2.5),
    "Qwen-Image, its own": Case(make_qwen_image_pipeline, 8),
    "Qwen-Image, Euler without dynamic shift": Case(make_qwen_image_pipeline, 8, EULER, {"shift": 3.0}),
    "Stable Diffusion 3.5, its own": Case(make_stable_diffusion_3_pipeline, 8),
    "Stable Diffusion 3.5, UniPC": Case(make_stable_diffusion_3_pipeline, 8, UNIPC, SHIFTED),
    "Stable Diffusion 3.5, DPM-Solver++": Case(make_stable_diffusion_3_pipeline, 8, DPM, SHIFTED),
    "Chroma, its own": Case(make_chroma_pipeline, 8),
    "Chroma, Euler with beta sigmas": Case(make_chroma_pipeline, 8, EULER, {"use_beta_sigmas": True}),
    "LTX-Video, its own": Case(tiny_ltx.make_ltx_pipeline, 8),
    "LTX-Video, Euler without dynamic shift": Case(tiny_ltx.make_ltx_pipeline, 8, EULER, {"shift": 3.0}),
    "HunyuanVideo-1.5, its own": Case(make_hunyuan_video_pipeline, 8, negative=NEGATIVE),
    "Flux Kontext, its own": Case(make_kontext_pipeline, 8),
    "Flux Kontext, UniPC": Case(make_kontext_pipeline, 8, UNIPC, SHIFTED),
    "Flux Fill, its own": Case(make_fill_pipeline, 8, **FILL),
    "Wan image to video, its own": Case(make_wan_image_pipeline, 8),
    "Wan 2.2 image to video, its own": Case(make_wan_image_experts_pipeline, 8, guidance_2=2.5),
    "Qwen-Image-Edit, its own": Case(make_edit_pipeline, 8),
    "Qwen-Image-Edit-Plus, its own": Case(make_edit_plus_pipeline, 8),
    "Flux, sigmas of a list": Case(make_flux_pipeline, 4, sigmas=SIGMAS),
    "Z-Image, sigmas of a list": Case(make_z_image_pipeline, 4, sigmas=SIGMAS, **Z_IMAGE),
    "Qwen-Image, sigmas of a list": Case(make_qwen_image_pipeline, 4, sigmas=SIGMAS),
    "Stable Diffusion 3.5, sigmas of a list": Case(make_stable_diffusion_3_pipeline, 4, sigmas=SIGMAS),
    "Stable Diffusion 3.5, UniPC, sigmas of a list": Case(
        make_stable_diffusion_3_pipeline, 4, UNIPC, SHIFTED, sigmas=SIGMAS
    ),
    "Flux Kontext, UniPC, sigmas of a list": Case(make_kontext_pipeline, 4, UNIPC, SHIFTED, sigmas=SIGMAS),
    "Flux Fill, sigmas of a list": Case(make_fill_pipeline, 4, sigmas=SIGMAS, **FILL),
    "FLUX.2, its own": Case(make_flux_2_pipeline, 8),
    "FLUX.2, Euler at shift 5": Case(make_flux_2_pipeline, 8, EULER, {"shift": 5.0}),
    "FLUX.2 klein, its own": Case(make_klein_pipeline, 8),
    "FLUX.2 klein, distilled, its own": Case(make_distilled_klein_pipeline, 4),
}


class Row(BaseModel):
    """A case.

    Attributes:
        case: its name.
        pipeline: class.
        scheduler: class.
        steps: of the pipeline.
        calls: of the model.
        difference: of the loop's last latents from the pipeline's, relative to these.
        of_euler: of Euler's latents at the same noise levels from the pipeline's, likewise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    case: str
    pipeline: str
    scheduler: str
    steps: int
    calls: int
    difference: float
    of_euler: float


class Results(BaseModel):
    """All cases.

    Attributes:
        diffusers: version.
        rows: a case each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    diffusers: str
    rows: tuple[Row, ...]


def measure(name: str) -> Row:
    """Run a case: the pipeline, the loop, and Euler's method at the same noise levels."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        pipe = case.make()
        if case.scheduler is not None:
            pipe.scheduler = getattr(diffusers, case.scheduler)(**case.options)
        pipe.save_pretrained(folder)
        samples, shown = _samples(case, Path(folder), type(pipe.scheduler).__name__)
        wanted = _pipelines_latents(case, pipe, samples, shown)
        schedule = samples.schedule
        euler = Denoising(Solver(euler_updates(schedule.sigmas), schedule.sigmas), samples.noise())
        *_, of_euler = euler.run(samples.velocity)
        return Row(
            case=name,
            pipeline=type(pipe).__name__,
            scheduler=type(pipe.scheduler).__name__,
            steps=case.steps,
            calls=schedule.steps,
            difference=_distance(trajectory(samples)[-1], wanted),
            of_euler=_distance(of_euler, wanted),
        )


def _samples(case: Case, folder: Path, scheduler: str) -> tuple[Samples, dict[str, Any]]:
    """Samples of the saved pipeline, as a run would calibrate on them, and the image that the pipeline is shown."""
    settings = PipelineSettings(path=str(folder), **asdict(case.canvas), prompts=PROMPTS, negative_prompt=case.negative)
    opened = open_pipeline(settings)
    adapter = opened.load(opened.encode(lambda: None)).adapter
    calls = calls_per_step(scheduler)
    steps = Spacing("sigmas", case.sigmas) if case.sigmas else calls * case.steps - (calls - 1)
    schedule = adapter.schedule(steps)
    seeds = (4, 5)[: len(case.prompts)]
    samples = Samples(adapter, schedule, case.guidance, case.prompts, seeds, case.guidance_2)
    return samples, _shown(case, opened)


def _shown(case: Case, opened: OpenedPipeline) -> dict[str, Any]:
    """The image that goes with the first sample's prompt, as arguments of the pipeline's call."""
    condition = opened.source.family.image_condition
    if condition is None:
        return {}
    image, mask = list(opened.images.pictures(len(PROMPTS), case.canvas, condition.masked))[case.prompts[0]]
    own = {"_auto_resize": False, "max_area": HEIGHT * WIDTH} if case.make is make_kontext_pipeline else {}
    # A VAE whose latents are drawn is asked with this seed.
    drawn = {} if mask is None else {"mask_image": mask, "generator": torch.Generator().manual_seed(0)}
    return {"image": image, **own, **drawn}


def _pipelines_latents(case: Case, pipe: DiffusionPipeline, samples: Samples, shown: dict[str, Any]) -> Tensor:
    """Latents that the pipeline itself ends with."""
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    result: Tensor = pipe(
        prompt=[PROMPTS[index] for index in samples.prompts],
        height=case.canvas.height,
        width=case.canvas.width,
        latents=_noise(case, samples),
        output_type="latent",
        return_dict=False,
        **_pipelines_steps(case),
        **case.request,
        **shown,
    )[0]
    return tokens_of_klein(pipe, result) if isinstance(pipe, Flux2KleinPipeline) else result


def _noise(case: Case, samples: Samples) -> Tensor:
    """The first latents as the pipeline takes them: FLUX.2's packs its own, out of planes."""
    noise = samples.noise()
    return noise.mT.unflatten(-1, samples.adapter.image.grid) if case.make in FLUX_2_PIPELINES else noise


def _pipelines_steps(case: Case) -> dict[str, Any]:
    """The argument of the pipeline's call; UniPC multiplies its sigmas, so they are an array."""
    return {"sigmas": np.array(case.sigmas)} if case.sigmas else {"num_inference_steps": case.steps}


def _distance(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.double() - wanted.double()).norm() / wanted.double().norm())


def table(rows: tuple[Row, ...]) -> str:
    """Markdown."""
    lines = [
        "| pipeline, scheduler | class of the scheduler | steps | calls of the model | difference | of Euler's steps |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = f"{row.steps} | {row.calls} | {row.difference:.1e} | {row.of_euler:.1e}"
        lines.append(f"| {row.case} | {row.scheduler} | {figures} |")
    return "\n".join(lines)


def main() -> int:
    """Run all cases; the exit code is 1 when one is off by more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", type=Path, help="Markdown with the markers bench-pipelines")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    silence()
    rows = tuple(measure(name) for name in CASES)
    write_json_model(RESULTS, Results(diffusers=diffusers.__version__, rows=rows))
    text = table(rows)
    sys.stdout.write(f"{text}\n")
    if arguments.document is not None:
        replace_marked(arguments.document, "bench-pipelines", text)
    return int(any(row.difference > LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
