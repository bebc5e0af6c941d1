"""What a bundle holds, counted by hand on the tiny one."""

import pytest
import torch

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.inspection import inspect_bundle


def test_policy_by_bucket_block_and_kind(tiny_bundle: BundleFiles) -> None:
    seen = inspect_bundle(tiny_bundle)
    assert [(row.first, row.last, row.assignment) for row in seen.buckets] == [
        (0, 0, 0),
        (1, 1, 1),
        (2, 2, 2),
        (3, 3, 0),
    ]
    assert seen.buckets[2].formats == {"bf16": 1, "fp8": 1}
    assert seen.bits == {"blocks.0": (8, 8, 16, 8), "blocks.1": (8, 8, 8, 8)}
    assert seen.kinds == {"blocks.*.linear": {"bf16": 1 / 8, "fp8": 4 / 8, "w8a8s": 3 / 8}}
    assert seen.mean_bits == 9


def test_plans_of_a_bucket(tiny_bundle: BundleFiles) -> None:
    record = {"target": "sm120", "bytes": 1, "max_rows": 8}
    plans = [{"assignment": 0, "path": "a", **record}, {"assignment": 2, "path": "c", **record}]
    manifest = type(tiny_bundle.manifest).model_validate({**tiny_bundle.manifest.model_dump(), "plans": plans})
    files = BundleFiles(tiny_bundle.folder, manifest, tiny_bundle.policy, tiny_bundle.index)
    assert [row.plans for row in inspect_bundle(files).buckets] == [("a",), (), ("c",), ("a",)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_what_runs_here(tiny_bundle: BundleFiles) -> None:
    here = inspect_bundle(tiny_bundle).here
    assert here["onnxruntime"] is None
    assert "PyTorch sees none" in str(here["rtx"])
