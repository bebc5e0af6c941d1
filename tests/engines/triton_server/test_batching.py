"""Who runs together, and that nobody can tell from the result."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.triton_server.batching import Generation, StepBatcher, interchangeable_steps

STEPS = 4


@pytest.fixture
def bundle(tiny_bundle: BundleFiles) -> Bundle:
    return Bundle.open(tiny_bundle.folder)


def start(bundle: Bundle, seeds: list[int], quantized: bool = True, guidance: float = 2.0) -> Generation:
    prompts = [seed % 3 for seed in seeds]
    return Generation(bundle.schedule.begin(bundle.noise(seeds)), bundle.conditioning(prompts), guidance, quantized)


def test_steps_are_interchangeable_when_assignment_and_scales_are_equal(bundle: Bundle) -> None:
    # Steps 0 and 3 have one assignment, but other scales.
    assert interchangeable_steps(bundle) == (0, 1, 2, 3)
    tables = bundle.files._scale_tables
    for table in tables.values():
        table[3] = table[0]
    assert interchangeable_steps(bundle) == (0, 1, 2, 0)


def test_requests_that_arrive_late_catch_up_and_join(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    predict = Bundle.predict
    monkeypatch.setattr(
        Bundle,
        "predict",
        lambda self, step, inputs, quantized=True: (
            calls.append((step, len(inputs["timestep"]))) or predict(self, step, inputs, quantized)
        ),
    )
    batcher = StepBatcher(bundle, max_samples=8)
    first, second = start(bundle, [1]), start(bundle, [2, 3])
    batcher.advance(batcher.choose([first]))
    running = [first, second]
    while any(g.step < STEPS for g in running):
        batcher.advance(batcher.choose(running))
    # Two guidance branches: the first alone, the second alone to catch up, then both.
    assert calls == [(0, 2), (0, 4), (1, 6), (2, 6), (3, 6)]


@pytest.mark.parametrize("rescaled", [False, True])
def test_results_are_those_of_a_loop_alone(bundle: Bundle, rescaled: bool) -> None:
    """In both ways to combine the branches of guidance."""
    manifest = bundle.files.manifest.model_copy(update={"rescaled_guidance": rescaled})
    plain, bundle = bundle, Bundle(replace(bundle.files, manifest=manifest))
    batcher = StepBatcher(bundle, max_samples=6)
    requests = [([1], True, 2.0), ([2, 3], True, 0.5), ([4], False, 2.0), ([5, 6, 7], True, 2.0), ([8], False, 3.0)]
    waiting = [start(bundle, *request) for request in requests]
    everyone, running = list(waiting), []
    for turn in count():
        if turn % 2 == 0 and waiting:
            running.append(waiting.pop())
        running = [g for g in running if g.step < STEPS]
        if not (waiting or running):
            break
        if running:
            batcher.advance(batcher.choose(running))
    for (seeds, quantized, guidance), got in zip(requests, everyone, strict=True):
        alone = start(bundle, seeds)
        expected = bundle.denoise(alone.latents, alone.conditioning, guidance=guidance, quantized=quantized)
        np.testing.assert_array_equal(got.latents, expected)
        same = plain.denoise(alone.latents, alone.conditioning, guidance=guidance, quantized=quantized)
        assert np.array_equal(same, expected) != rescaled


def test_full_precision_joins_at_any_step(bundle: Bundle) -> None:
    batcher = StepBatcher(bundle, max_samples=8)
    first, second, quantized = start(bundle, [1], False), start(bundle, [2], False), start(bundle, [3])
    first.loop.step = 2
    assert batcher.choose([first, second, quantized]) == [second, first]


def test_a_call_takes_no_more_samples_than_it_may(bundle: Bundle) -> None:
    batcher = StepBatcher(bundle, max_samples=4)
    three, two, one = start(bundle, [1, 2, 3]), start(bundle, [4, 5]), start(bundle, [6])
    assert batcher.choose([three, two, one]) == [three, one]
