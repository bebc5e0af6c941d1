"""Bytes that flow through a model, from shapes, against the bytes that do."""

import pytest
import torch

from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.capture import captured_outputs
from adatsq_trt.models.flow import measure_flow
from tests.tiny_flux import make_tiny_flux
from tests.tiny_wan import make_tiny_wan
from tests.tiny_z_image import make_tiny_z_image, make_z_image_of_several_lengths


@pytest.mark.parametrize(
    "make", [lambda: make_tiny_flux(64, 4), make_tiny_wan, make_tiny_z_image, make_z_image_of_several_lengths]
)
def test_layers_give_as_many_bytes_as_told(make) -> None:
    adapter: ModelAdapter = make()
    schedule = adapter.schedule(2)
    flow = measure_flow(adapter, schedule, 2.0)
    with captured_outputs(adapter.quantizable_layers()) as outputs, torch.no_grad():
        latent, conditioning = torch.zeros(1, *adapter.latent_shape), adapter.encode([0])
        adapter.velocity(latent, schedule.model_time(0), conditioning, 2.0)
    sizes = [output.nbytes for output in outputs.values()]
    assert flow.layers_bytes == sum(sizes)
    assert max(sizes) <= flow.largest_bytes < flow.outputs_bytes
