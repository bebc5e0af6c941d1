"""Which of two transformers denoises which step, and which layers run then."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from adatsq_trt.errors import UserError
from adatsq_trt.models.experts import ExpertsAdapter
from adatsq_trt.schedule import EXPERTS
from tests.tiny_wan import make_tiny_wan


def make_experts(boundary_ratio: float = 0.875) -> ExpertsAdapter:
    """Of one architecture, with different weights; UniPC's timesteps are whole numbers."""
    one, other = make_tiny_wan(), make_tiny_wan()
    with torch.no_grad():
        for parameter in other.transformer.parameters():
            parameter.mul_(1.25)
    one.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return ExpertsAdapter(dict(zip(EXPERTS, (one, other), strict=True)), boundary_ratio)


def test_the_boundary_belongs_to_the_first_expert() -> None:
    """As in the pipeline, whose condition is t >= boundary."""
    adapter = make_experts()
    timesteps = adapter.schedule(8).timesteps
    on_the_boundary = make_experts(timesteps[3] / 1000)
    assert on_the_boundary.schedule(8).experts == ("transformer",) * 4 + ("transformer_2",) * 4


def test_a_layer_runs_at_its_own_experts_steps() -> None:
    adapter = make_experts()
    schedule = adapter.schedule(6)
    active, layers = adapter.active(schedule), list(adapter.quantizable_layers())
    assert active.shape == (6, len(layers)) == (6, 40)
    for step, expert in enumerate(schedule.experts):
        assert [layer.partition(".")[0] == expert for layer in layers] == active[step].tolist()
    assert (active.sum(axis=1) == 20).all()


def test_a_loop_in_which_an_expert_has_no_step_is_refused() -> None:
    with pytest.raises(UserError, match="none of 4 steps is of the expert 'transformer_2'"):
        make_experts(0.01).schedule(4)


def test_excluded_layers_are_those_of_the_named_expert() -> None:
    adapter = make_experts()
    adapter.excluded = frozenset({"transformer_2.blocks.0.attn1.to_q"})
    left = list(adapter.quantizable_layers())
    assert "transformer.blocks.0.attn1.to_q" in left
    assert "transformer_2.blocks.0.attn1.to_q" not in left
