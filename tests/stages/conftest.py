"""One finished run of the tiny model, for reading."""

from collections.abc import Iterator

import pytest

from adatsq_trt.files import write_json_model
from adatsq_trt.settings import SETTINGS_NAME
from adatsq_trt.stages import bundle, summary
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.graph import run_stages
from tests.doubles.gpu import book, device, library
from tests.stages.tiny_run import tiny_context
from tests.traces import trace_once

__all__ = ["book", "device", "finished", "library"]


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    """The tiny model of most runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adatsq_trt.stages.export.trace", trace_once)
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    """All stages and the summary."""
    with tiny_context(tmp_path_factory.mktemp("finished") / "run") as context:
        write_json_model(context.run.path / SETTINGS_NAME, context.settings)
        assert run_stages(context, bundle.NAME).done
        summary.write(context)
        yield context
