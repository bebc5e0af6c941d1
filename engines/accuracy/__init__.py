"""Check that a bundle's graphs compute what PyTorch computes with the fake-quantized model.

All comparisons are polygraphy's:

1. Every layer of every bucket, and the output of every step: ONNX Runtime on the `cpu` graph, on calibration inputs,
   against PyTorch.
2. Every layer and block of every `target` graph: onnx's reference evaluator against the `cpu` graph, block by block.
3. The denoising loop on its own latents: every latent against the fake-quantized PyTorch model's loop.
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
