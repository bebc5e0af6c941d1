"""`adatsq-trt calibrate`: the stages up to `calibrate`."""

from __future__ import annotations

from adatsq_trt.cli.build import StageName, until

calibrate = until(StageName.CALIBRATE, "Measure a model: trajectories, Fisher information, Hessians.")
