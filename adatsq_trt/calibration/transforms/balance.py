"""Static-dynamic channel balancing (Zhao et al. 2025, "ViDiT-Q", section 4.2).

How unlike the channels of an input are has a part that is the same at all timesteps and a part that changes with them.
The first is scaled away as in SmoothQuant, with the mean over steps of each channel's largest magnitude in the place of
the largest of all; what is left, which no fixed scale fits, is spread by a rotation.
"""

from __future__ import annotations

from adatsq_trt.calibration.transforms.graph_form import GraphForm
from adatsq_trt.calibration.transforms.hadamard import with_rotation
from adatsq_trt.calibration.transforms.smooth import divisor
from adatsq_trt.calibration.transforms.statistics import LayerGroup
from adatsq_trt.transforms import InputMap


def balance(group: LayerGroup, form: GraphForm | None = None) -> InputMap:
    """Scales from the static part, then the rotation."""
    scale = divisor(group.largest.mean(dim=0), group.largest_weight)
    return with_rotation(scale if form is None else form.rounded(scale), group, form)
