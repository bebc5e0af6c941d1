"""Second moments and their weighted sum."""

import torch

from adatsq_trt.calibration.hessian import second_moment, weighted_hessian


def test_second_moment_is_the_mean_outer_product() -> None:
    inputs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = sum(torch.outer(row, row) for row in inputs.reshape(-1, 3)) / 10
    torch.testing.assert_close(second_moment(inputs), expected)


def test_second_moment_does_not_depend_on_how_often_a_row_is_seen() -> None:
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(second_moment(torch.cat([inputs] * 3)), second_moment(inputs))


def test_equal_weights_give_the_moment_of_all_steps_together() -> None:
    inputs = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0))
    moments = torch.stack([second_moment(step) for step in inputs])
    torch.testing.assert_close(weighted_hessian(moments, torch.full((4,), 0.25)), second_moment(inputs))


def test_all_weight_on_one_step_gives_its_moment() -> None:
    moments = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weighted_hessian(moments, torch.tensor([0.0, 1.0, 0.0])), moments[1])
