"""Bytes that flow through a model, from shapes, against the bytes that do."""

import pytest
import torch

from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.capture import captured_outputs
from adatsq_trt.models.flow import count_operations, measure_flow, operation_counter
from tests.tiny_flux import make_tiny_flux
from tests.tiny_wan import make_tiny_wan
from tests.tiny_z_image import make_tiny_z_image, make_z_image_of_several_lengths

MAKERS = [lambda: make_tiny_flux(64, 4), make_tiny_wan, make_tiny_z_image, make_z_image_of_several_lengths]


@pytest.mark.parametrize("make", MAKERS)
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


@pytest.mark.parametrize("make", MAKERS)
def test_a_processors_attention_is_counted(make) -> None:
    """As without numbers, where attention is two products. PyTorch's counter alone counts nothing for it."""
    adapter: ModelAdapter = make()
    schedule = adapter.schedule(2)
    latent, conditioning = torch.zeros(1, *adapter.latent_shape), adapter.encode([0])
    with operation_counter() as counter, torch.no_grad():
        adapter.velocity(latent, schedule.model_time(0), conditioning, 2.0)
    assert counter.get_total_flops() == count_operations(adapter, schedule, 2.0)


def test_attention_is_two_products() -> None:
    query, key = torch.zeros(2, 4, 64, 32), torch.zeros(2, 4, 48, 32)
    with operation_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, key, key)
    assert counter.get_total_flops() == 2 * (2 * 4 * 64 * 48 * 32) * 2
