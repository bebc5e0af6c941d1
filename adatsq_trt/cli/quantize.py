"""`adatsq-trt quantize`: the stages up to `quantize`."""

from __future__ import annotations

from adatsq_trt.cli.build import StageName, until

quantize = until(StageName.QUANTIZE, "Quantize every layer in every candidate format.")
