"""Contents of a bundle, and the part of it that runs on this machine."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from adatsq_trt.engines.backends import rtx_steps, tensorrt_steps
from adatsq_trt.engines.backends.onnxruntime import OnnxRuntimeBackend
from adatsq_trt.engines.bundle import BundleFiles, Manifest
from adatsq_trt.engines.sizes import SizeReport, size_report
from adatsq_trt.errors import UserError
from adatsq_trt.formats import format_named
from adatsq_trt.policy import Policy


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BucketRow(_Record):
    """A bucket and what runs it.

    Attributes:
        first: its first step.
        last: its last step, inclusive.
        assignment: index into the policy's assignments.
        formats: format → layers that have it.
        plans: files that run it, relative to the bundle.
    """

    first: int
    last: int
    assignment: int
    formats: dict[str, int]
    plans: tuple[str, ...]


class Inspection(_Record):
    """Everything that `inspect` shows.

    Attributes:
        manifest: the bundle's.
        mean_bits: of the policy.
        buckets: runs of steps with one assignment.
        bits: block → for each step the mean of its layers' nominal bits.
        kinds: layer kind (its path with * for numbers) → format → share of the (step, layer) pairs.
        sizes: of all layouts; None without target graphs.
        here: backend → None if it runs the bundle on this machine, otherwise why not.
    """

    manifest: Manifest
    mean_bits: float
    buckets: tuple[BucketRow, ...]
    bits: dict[str, tuple[float, ...]]
    kinds: dict[str, dict[str, float]]
    sizes: SizeReport | None
    here: dict[str, str | None]


def inspect_bundle(files: BundleFiles) -> Inspection:
    """Look at an opened bundle and at this machine; nothing is deserialized."""
    policy, manifest = files.policy, files.manifest
    return Inspection(
        manifest=manifest,
        mean_bits=policy.mean_bits,
        buckets=tuple(
            BucketRow(
                first=bucket.first,
                last=bucket.last,
                assignment=bucket.assignment,
                formats=dict(sorted(Counter(policy.rows[bucket.assignment].values()).items())),
                plans=tuple(plan.path for plan in manifest.plans if plan.assignment in (None, bucket.assignment)),
            )
            for bucket in policy.buckets
        ),
        bits={block: _block_bits(policy, block) for block in files.index.blocks},
        kinds=_kinds(policy),
        sizes=size_report(files),
        here={"onnxruntime": _onnxruntime_here(), **_plans_here(manifest)},
    )


def _block_bits(policy: Policy, block: str) -> tuple[float, ...]:
    members = [layer for layer in policy.layers if layer.startswith(f"{block}.")]
    own = ([format_named(row[layer]).bits for layer in members if layer in row] for row in policy.rows)
    means = [sum(bits) / max(len(bits), 1) for bits in own]
    return tuple(means[assignment] for assignment in policy.step_assignments)


def _kinds(policy: Policy) -> dict[str, dict[str, float]]:
    counts: dict[str, Counter[str]] = {}
    for assignment in policy.step_assignments:
        for layer, name in policy.rows[assignment].items():
            counts.setdefault(re.sub(r"\.\d+\.", ".*.", layer), Counter())[name] += 1
    return {kind: _shares(counter) for kind, counter in counts.items()}


def _shares(counter: Mapping[str, int]) -> dict[str, float]:
    total = sum(counter.values())
    return {name: count / total for name, count in sorted(counter.items())}


def _onnxruntime_here() -> str | None:
    try:
        OnnxRuntimeBackend().require()
    except UserError as error:
        return str(error)
    return None


def _plans_here(manifest: Manifest) -> dict[str, str | None]:
    """The backend that compiled the plans; without plans TensorRT-RTX, which says what would be needed."""
    name, backend = ("tensorrt", tensorrt_steps) if manifest.backend == "tensorrt" else ("rtx", rtx_steps)
    try:
        backend.plans_here(manifest)
    except UserError as error:
        return {name: str(error)}
    return {name: None}
