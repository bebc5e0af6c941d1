"""Units of work: what a stage is going to compute, counted from the numbers that its loops go by.

Where measurements decide how much there is to do, as in the choice between policies, it is what there can be of it.

    call         a sample at a step, in full precision
    rounded      a sample at a step, fake-quantized
    pair         two samples at a step together, fake-quantized or not
    moments      a sample at a step, adding up second moments of the layers' inputs
    fisher       a sample at a step backwards, with the squared gradients of all weights
    gradients    the same with the gradients of weights that all steps share
    clips        the same with the errors of all ratios that clip
    sensitivity  the same with the errors of all formats
    layer        a layer, solved in all formats
    trace        a trace of the model
    graph        a graph, written
    plan         a plan, compiled
"""

from __future__ import annotations

from collections import Counter
from typing import TypeAlias

Work: TypeAlias = Counter[str]  # by the names above
