"""The loop of a bundle against PyTorch's: what only the whole loop shows, and the user's own limit."""

from pathlib import Path

import pytest

from adatsq_trt.engines.accuracy import check, passed_before
from adatsq_trt.engines.accuracy.loop import check_loop
from adatsq_trt.engines.bundle import MANIFEST_NAME, BundleFiles
from adatsq_trt.files import write_json_model


def test_agrees_with_pytorch_and_differs_from_full_precision(tiny_bundle: BundleFiles, tmp_path: Path) -> None:
    report = check_loop(tiny_bundle, tmp_path, None)
    assert report.passed
    for row in report.rows:
        assert row.error is not None
        assert row.quantization_error is not None
        # Either side rounds in float32 at every step, which is no error of the format.
        assert row.error < min(row.tolerance, 1e-3 * row.quantization_error)


@pytest.mark.parametrize("change", ["guidance", "sigmas"])
def test_a_loop_that_steps_otherwise(own_bundle: BundleFiles, tmp_path: Path, change: str) -> None:
    """Every step by itself is right."""
    schedule = own_bundle.manifest.schedule
    sigmas = (*schedule.sigmas[:2], 0.1, *schedule.sigmas[3:])
    update = {"guidance": {"guidance": 8.0}, "sigmas": {"schedule": schedule.model_copy(update={"sigmas": sigmas})}}
    write_json_model(own_bundle.folder / MANIFEST_NAME, own_bundle.manifest.model_copy(update=update[change]))
    report = check(BundleFiles.open(own_bundle.folder), tmp_path)
    assert all(row.passed for row in report.rows)
    assert not report.loop.passed
    assert not report.passed


def test_fail_above_limits_the_last_latent(tiny_bundle: BundleFiles, tmp_path: Path) -> None:
    error = check_loop(tiny_bundle, tmp_path, None).rows[-1].quantization_error
    assert error is not None
    assert check_loop(tiny_bundle, tmp_path, error * 1.01).passed
    assert not check_loop(tiny_bundle, tmp_path, error * 0.99).passed
    report = check(tiny_bundle, tmp_path, fail_above=error * 1.01)
    assert passed_before(tiny_bundle, tmp_path, error * 1.01) == report
    assert passed_before(tiny_bundle, tmp_path, error * 0.99) is None
    assert passed_before(tiny_bundle, tmp_path) is None
