"""Step-level batching on the double of a GPU: the loop of `Bundle.denoise`, and nothing crosses the border."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adatsq_trt.engines.bundle import Layout
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.triton_server import batching
from adatsq_trt.engines.triton_server.batching import Generation, StepBatcher
from tests.doubles.host_device import DeviceTensor, HostDevice, Transfers
from tests.doubles.tensorrt_on_onnxruntime import Library
from tests.engines.conftest import STEP_ASSIGNMENTS
from tests.engines.gpu_runtime.conftest import LAYOUTS

STEPS = len(STEP_ASSIGNMENTS)


def start(bundle: Bundle, seeds: list[int], guidance: float = 2.0) -> Generation:
    prompts = [seed % 3 for seed in seeds]
    return Generation(bundle.schedule.begin(bundle.noise(seeds)), bundle.conditioning(prompts), guidance)


def crossed_by_each_call(batcher: StepBatcher, running: list[Generation]) -> list[tuple[int, int]]:
    """Bytes to the device and back of every call until all have finished."""
    crossed = []
    while left := [generation for generation in running if generation.step < STEPS]:
        with Transfers() as transfers:
            batcher.advance(batcher.choose(left))
        crossed.append((transfers.to_device, transfers.to_host))
    return crossed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_crosses_after_a_requests_first_step(
    planned: Callable[[Layout], Path], library: Library, layout: Layout
) -> None:
    with Bundle.open(planned(layout)) as bundle:
        batcher = StepBatcher(bundle, 4)
        first, second = start(bundle, [5, 6]), start(bundle, [7], guidance=0.5)
        batcher.advance([first])
        # The second catches up alone, and then both share each call.
        crossed = crossed_by_each_call(batcher, [first, second])
        assert crossed[0][0] > 0
        assert crossed[1:] == [(0, 0)] * (STEPS - 1)
        assert len(library.log.runs) == STEPS + 1
        for generation, seeds, guidance in ((first, [5, 6], 2.0), (second, [7], 0.5)):
            assert isinstance(generation.loop.latent, DeviceTensor)
            prompts = bundle.conditioning([seed % 3 for seed in seeds])
            wanted = bundle.denoise(bundle.noise(seeds), prompts, guidance=guidance)
            np.testing.assert_array_equal(generation.latents, wanted)


def test_a_planted_transfer_is_counted(
    planned: Callable[[Layout], Path], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before, when every step went through NumPy."""
    advance = StepBatcher.advance

    def through_numpy(self: StepBatcher, chosen: list[Generation]) -> None:
        advance(self, chosen)
        for generation in chosen:
            batching.as_array(generation.loop.latent)

    monkeypatch.setattr(StepBatcher, "advance", through_numpy)
    with Bundle.open(planned("embedded")) as bundle:
        generation = start(bundle, [5])
        crossed = crossed_by_each_call(StepBatcher(bundle, 4), [generation])
    assert [to_host for _, to_host in crossed] == [generation.latents.nbytes] * STEPS


def test_a_server_that_is_killed_has_kept_its_kernels(
    planned: Callable[[Layout], Path], library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits or closes before that."""
    monkeypatch.setattr("adatsq_trt.engines.backends.rtx_steps.cache_file", lambda files, gpu: tmp_path / "kernels.bin")
    bundle = Bundle.open(planned("embedded"))
    crossed_by_each_call(StepBatcher(bundle, 4), [start(bundle, [5])])
    assert (tmp_path / "kernels.bin").read_bytes() == b"kernels of %d runs" % STEPS
    bundle.close()


def test_the_loop_waits_for_nothing(planned: Callable[[Layout], Path], library: Library, device: HostDevice) -> None:
    with Bundle.open(planned("embedded")) as bundle:
        crossed_by_each_call(StepBatcher(bundle, 4), [start(bundle, [5])])
        assert device.synchronizations == 0
