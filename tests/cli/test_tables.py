"""Lines that a build prints before it begins and after it has ended."""

from adatsq_trt.cli.tables import beside_uniform, needs_text
from adatsq_trt.report.data import ReportData
from adatsq_trt.stages.context import Memory
from tests.report.conftest import data as data


def test_the_chosen_policy_is_told_beside_the_reference_format(data: ReportData) -> None:
    told = beside_uniform(data.summary)
    assert told == "beside uniform nvfp4: 1.62 times the bytes, 1.62 times the time, 0.25 times the error"
    # A paired ratio is the uniform policy's error in the chosen one's, so the ends change places.
    policies = [
        policy.model_copy(update={"ratio": (4.0, 2.0, 5.0)}) if policy.name == "uniform nvfp4" else policy
        for policy in data.summary.policies
    ]
    paired = data.summary.model_copy(update={"policies": tuple(policies)})
    assert beside_uniform(paired).endswith("0.25 (0.20 to 0.50) times the error")
    of_fp8 = beside_uniform(data.summary.model_copy(update={"reference": "fp8"}))
    assert of_fp8 == "beside uniform fp8: 0.81 times the bytes, 0.81 times the time, 2.00 times the error"


def test_without_a_uniform_policy_the_error_alone_is_told(data: ReportData) -> None:
    alone = data.summary.model_copy(update={"policies": data.summary.policies[:1]})
    assert beside_uniform(alone) == "error: 1.00e-03 on 128 held-out samples"


def test_memory_and_disk_are_told_with_the_stage_that_needs_most() -> None:
    memory = Memory(limit_bytes=16 * 10**9, needs={"calibrate": 2 * 10**9, "search": 3 * 10**9})
    told = needs_text(memory, {"calibrate": 5 * 10**9, "quantize": 10**9}).splitlines()
    assert told[0].startswith("memory: 3.0 GB at least, in stage 'search'; up to 16.0 GB")
    assert told[1].startswith("disk: about 6.0 GB, of which 'calibrate' writes 5.0 GB")
