"""Stage `quantize`: GPTQ with the weighted Hessians, every layer in every candidate format, once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adatsq_trt.calibration.gptq import gptq
from adatsq_trt.cli.progress import progress
from adatsq_trt.cli.stages import calibrate
from adatsq_trt.cli.stages.context import Context
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.formats import Format
from adatsq_trt.models.format_store import SCALES_NAME, FormatStore, load_store, save_weights, weights_name
from adatsq_trt.quantize import QuantizedWeight, static_activation_scale
from adatsq_trt.run import Stage

NAME = "quantize"


def stage(context: Context) -> Stage:
    """The stage for these settings."""
    folder = calibrate.stage(context).folder
    files = [folder / calibrate.HESSIANS, folder / calibrate.STATISTICS]
    return context.run.stage(NAME, context.inputs(("weights_sha256", "formats", "damping")), files)


def run(context: Context) -> Stage:
    """Quantize, unless that is done."""
    calibrate.run(context)
    this = stage(context)
    if this.done:
        return this
    with this.run(), progress("quantize", len(context.formats)) as advance:
        hessians = read_tensors(calibrate.stage(context).folder / calibrate.HESSIANS)
        for fmt in context.formats:
            file = this.unit(weights_name(fmt.name))
            if not file.is_file():
                save_weights(file, solve(context, fmt, hessians))
            advance()
        write_tensors(this.unit(SCALES_NAME), activation_scales(context))
    return this


def solve(context: Context, fmt: Format, hessians: Mapping[str, Tensor]) -> dict[str, QuantizedWeight]:
    """One format of every layer."""
    return {
        name: gptq(linear.weight.detach(), hessians[name], fmt, damping=context.settings.damping)
        for name, linear in context.adapter.quantizable_layers().items()
    }


def activation_scales(context: Context) -> dict[str, Tensor]:
    """Static scales of the formats that have them: float32 [steps, layers]."""
    largest = read_tensors(calibrate.stage(context).folder / calibrate.STATISTICS)["largest"]
    scales = {f.name: static_activation_scale(largest, f.activation) for f in context.formats if f.static_activation}
    return scales or {"none": largest.new_zeros(0)}  # safetensors needs a tensor


def load(context: Context) -> FormatStore:
    """What the stage wrote."""
    return load_store(stage(context).folder, context.settings.formats, context.layers)
