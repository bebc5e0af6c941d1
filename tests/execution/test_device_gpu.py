"""`--device` on a CUDA GPU: what docs/scaling.md says of its numbers."""

from pathlib import Path

import pytest

from tests.execution.alike import assert_alike
from tests.execution.pretend_run import run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("model", ["flux", "wan", "z-image"])
def test_full_precision_agrees_and_errors_are_alike(model: str, tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        run(tmp_path / device, device, model, "search", "w4a4,w8a8", None)
    assert_alike(tmp_path / "cpu", tmp_path / "cuda", precision=1e-4)
