"""Bytes and time that a run's transform adds to every policy: they are the same in all formats."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adatsq_trt.calibration.transforms.graph_form import GraphForm
from adatsq_trt.calibration.transforms.low_rank import rank_of
from adatsq_trt.calibration.transforms.make import TRANSFORMS, Transform
from adatsq_trt.calibration.transforms.statistics import sharing_layers
from adatsq_trt.costs import TransformCosts
from adatsq_trt.models.capture import captured
from adatsq_trt.policy import LayerShape
from adatsq_trt.search.costs import TimeModel
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.quantize import graph_form


@torch.no_grad()
def transform_costs(context: Context, shapes: Sequence[LayerShape], model: TimeModel | None) -> TransformCosts | None:
    """Those of a run's transform; None where it has none.

    Layers that are given the same tensor share what is done to it. A divisor counts as a product of its own, also where
    the graph folds it into a norm.

    Args:
        context: of a run whose calibration is done.
        shapes: of its layers.
        model: of times.
    """
    if context.settings.transform is None:
        return None
    name, steps = context.settings.transform, context.settings.steps
    transform, form = TRANSFORMS[name], graph_form(context)
    linears, one = context.adapter.quantizable_layers(), context.calibration.part(slice(0, 1))
    with captured(linears) as capture:
        one.velocity(one.noise().to(context.adapter.device), 0)
    by_name = {shape.name: shape for shape in shapes}
    inputs = [by_name[names[0]] for names in sharing_layers(linears, capture.inputs)]
    blocks = {_block(form, shape) for shape in inputs} if transform.rotates else set()
    size = branch_bytes(transform, shapes) + sum(2 * block**2 for block in blocks)
    size += sum(2 * shape.in_features for shape in inputs) if transform.divides else 0
    ms = None if model is None else steps * _ms(transform, form, inputs, shapes, model)
    return TransformCosts(name=name, bytes=size, ms=ms)


def branch_bytes(transform: Transform, shapes: Sequence[LayerShape]) -> int:
    """Of the branches' matrices alone."""
    if not transform.low_rank:
        return 0
    return sum(2 * _rank(shape) * (shape.in_features + shape.out_features) for shape in shapes)


def _ms(
    transform: Transform,
    form: GraphForm | None,
    inputs: Sequence[LayerShape],
    shapes: Sequence[LayerShape],
    model: TimeModel,
) -> float:
    """Milliseconds of one step: inputs once for all layers that are given them, branches layer by layer."""
    total = 0.0
    for shape in inputs:
        if transform.divides:
            total += model.pointwise_ms(2 * shape.tokens * shape.in_features)
        if transform.rotates:
            block = _block(form, shape)
            total += model.product_ms(shape.tokens * shape.in_features // block, block, block)
    if transform.low_rank:
        for shape in shapes:
            total += model.product_ms(shape.tokens, shape.in_features, _rank(shape))
            total += model.product_ms(shape.tokens, _rank(shape), shape.out_features)
            total += model.pointwise_ms(3 * shape.tokens * shape.out_features)
    return total


def _block(form: GraphForm | None, shape: LayerShape) -> int:
    """Channels that a rotation turns together."""
    return shape.in_features if form is None else form.block_of(shape.in_features)


def _rank(shape: LayerShape) -> int:
    return rank_of(shape.in_features, shape.out_features)
