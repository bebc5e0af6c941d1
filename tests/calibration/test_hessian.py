"""Second moments."""

import torch

from adatsq_trt.calibration.hessian import second_moment


def test_second_moment_is_the_mean_outer_product() -> None:
    inputs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = sum(torch.outer(row, row) for row in inputs.reshape(-1, 3)) / 10
    torch.testing.assert_close(second_moment(inputs), expected)


def test_second_moment_does_not_depend_on_how_often_a_row_is_seen() -> None:
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(second_moment(torch.cat([inputs] * 3)), second_moment(inputs))
