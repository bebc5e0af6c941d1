"""`adatsq-trt calibrate`: the stages up to `calibrate`."""

from __future__ import annotations

from adatsq_trt.cli.options import StageName, until

calibrate = until(StageName.CALIBRATE, "Measure trajectories, Fisher information and Hessians of a model.")
