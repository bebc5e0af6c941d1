"""`adatsq-trt export`: the stages up to `export`."""

from __future__ import annotations

from adatsq_trt.cli.build import StageName, until

export = until(StageName.EXPORT, "Write the policy's ONNX graphs.")
