"""`--shapes` of `build engine`, on a real run, and `generate --size`."""

from pathlib import Path

import numpy as np
import pytest

from adatsq_trt.calibration.trajectory import Samples, trajectory
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.errors import UserError
from adatsq_trt.stages.models import open_run
from adatsq_trt.stages.shapes import parse_shapes, parse_size

SHAPES = ("--shapes", "2x12x16,4x8x8")


def test_a_run_of_several_sizes(cli, copy: Path) -> None:
    """The policy of before, exported for both sizes; full precision at the second is PyTorch's own loop there."""
    ended = cli(*cli.build, *SHAPES, "--layout", "switch", "--max-assignments", "4", "--output", copy)
    assert ended.code == 0, ended.err
    # What is measured and searched is of the model's own size, and stays.
    assert ["'export'" in line or "'bundle'" in line for line in ended.warnings] == [True, True]
    bundle = Bundle.open(copy)
    assert [(shape.size, shape.batches) for shape in bundle.manifest.shapes] == [((8, 8), (4,)), ((12, 16), (2,))]
    (plan,) = bundle.manifest.plans
    assert plan.profile_rows == (8, 4)  # guidance has two branches
    model = open_run(copy).sizes[12, 16]
    noise = bundle.noise([1, 2], (12, 16))
    samples = Samples(model, open_run(copy).schedule, bundle.manifest.guidance, (3, 4), (1, 2))
    got = bundle.denoise(noise, bundle.conditioning([3, 4]), quantized=False, size=(12, 16))
    wanted = trajectory(samples)[-1].numpy()
    assert np.linalg.norm(got - wanted) < 2e-2 * np.linalg.norm(wanted - noise)
    assert "8x8 by 4; 12x16 by 2; policy and check are of 8x8" in cli("inspect", copy).out
    assert cli("generate", copy, "--samples", "2", "--size", "12x16").code == 0
    refused = cli("generate", copy, "--size", "16x16")
    assert "size 16x16: the bundle has 8x8, 12x16; choose among these" in refused.refusal


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ("2x12x16", "expected the size at which the policy is searched among them; add 1x8x8"),
        ("1x8x8,1x9x8", "size 9x8: expected sides that are multiples of 2 pixels"),
        ("1x8x8,1x3x8x8", "size 3x8x8: model 'digits-flux' draws pictures, expected HEIGHTxWIDTH"),
        ("1x8x8,1x30000x30000", "the most is 67108864; choose a smaller size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(cli, built: Path, shapes: str, message: str) -> None:
    before = cli.state(built)
    assert message in cli(*cli.build, "--shapes", shapes, "--output", built).refusal
    assert cli.state(built) == before


def test_shapes_and_batch_exclude_each_other(cli) -> None:
    assert "--batch: --shapes says how many samples" in cli(*cli.build, *SHAPES, "--batch", "4").refusal


def test_batches_of_the_models_own_size_need_no_open_size(cli, tmp_path: Path) -> None:
    ended = cli("calibrate", *cli.build[2:], "--shapes", "8x8x8,1x8x8", "--output", tmp_path)
    assert ended.code == 0, ended.err
    settings = open_run(tmp_path).settings
    assert (settings.batch, settings.shapes) == ((1, 8), ())


@pytest.mark.parametrize("text", ["", "1", "8x8", "1x8x8,", "0x8x8", "1x8x-8", "1x8x8x8x8", "1X8X8", "٣x8x8"])
def test_shapes_are_written_one_way(text: str) -> None:
    with pytest.raises(UserError, match=r"--shapes '.*': expected SAMPLESxHEIGHTxWIDTH"):
        parse_shapes(text)


def test_numbers_have_limits() -> None:
    assert parse_shapes("1x1024x1024, 4x512x512") == ((1, 1024, 1024), (4, 512, 512))
    assert parse_size("9x64x64", "--size") == (9, 64, 64)
    for text in ("99999x8x8", "1x99999x8"):
        with pytest.raises(UserError, match="expected at most 4096 samples and 32768 pixels along a side"):
            parse_shapes(text)
