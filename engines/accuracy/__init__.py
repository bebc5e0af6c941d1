"""Check that a bundle's graphs compute what PyTorch computes with the fake-quantized model.

Polygraphy compares what is computed:

1. Every layer of every bucket, and the output of every step: ONNX Runtime on the `cpu` graph, on calibration inputs,
   against PyTorch. So is every step's output of the full-precision graph.
2. Every layer and block of every `target` graph, and the modules outside of the blocks: onnx's reference evaluator
   against the `cpu` graph, piece by piece.
3. The denoising loop on its own latents: every latent against the fake-quantized PyTorch model's loop.

What must be as exported is compared bit for bit (`exact`): policy, guidance, sigmas, scales, prompts, every constant;
and graphs of all assignments with those of each.
"""

from adatsq_trt.engines.accuracy.first_layer import LayerReference, bisect
from adatsq_trt.engines.accuracy.report import REPORT_NAME, CheckReport, CheckRow, FirstLayer, write_junit, write_report
from adatsq_trt.engines.accuracy.rows import check, passed_before, work_units

__all__ = [
    "REPORT_NAME",
    "CheckReport",
    "CheckRow",
    "FirstLayer",
    "LayerReference",
    "bisect",
    "check",
    "passed_before",
    "work_units",
    "write_junit",
    "write_report",
]
