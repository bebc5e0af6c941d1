"""Result of a check: `check.json`, and the same as JUnit XML for continuous integration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from pydantic import BaseModel, ConfigDict

from adatsq_trt.files import write_bytes, write_json_model

REPORT_NAME = "check.json"
Variant = Literal["cpu", "target", "reference", "plan"]
# Libraries colour their messages with what XML 1.0 cannot hold.
_NOT_XML = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckRow(_Record):
    """One comparison of one output.

    Attributes:
        bucket: index into the policy's buckets.
        step: the step whose inputs and scales were fed.
        assignment: index into the policy's assignments.
        variant: graph that is checked; "reference" is the full-precision one, "plan" the plan compiled from the target
            graph.
        block: module path of the piece that was cut out, a block or a module outside of the blocks; "model" for nodes
            of no module; None for the whole graph.
        separated: whether every layer was given what the reference computed before it.
        layer: module path of the layer whose output is compared; None for the output of the graph or block.
        format: the layer's format by the policy; None likewise.
        computed_by: name of the library that ran the checked graph.
        reference: name of the computation that it was compared with.
        median_error: median |got - expected| over the elements, in units of the expected output's root mean square;
            None when the outputs have other shapes, are not finite or were not computed.
        median_tolerance: its limit; None where the median says nothing.
        relative_error: |got - expected| / |got|, Euclidean norms over all elements; None likewise.
        relative_tolerance: its limit.
        passed: both limits hold, and the layer is written in the policy's format.
        failure: reason that nothing was computed, or that a layer is written in another format; None otherwise.
        command: repeats the figures when run in the report's folder; exit code 0 if the limits hold.
    """

    bucket: int
    step: int
    assignment: int
    variant: Variant
    block: str | None
    separated: bool = False
    layer: str | None
    format: str | None
    computed_by: str
    reference: str
    median_error: float | None
    median_tolerance: float | None
    relative_error: float | None
    relative_tolerance: float
    passed: bool
    failure: str | None
    command: str

    @property
    def subject(self) -> str:
        """Description of the compared output, for people."""
        part = self.layer or self.block or ("behind the last layer" if self.separated else "")
        graph = "plan" if self.variant == "plan" else f"{self.variant} graph"
        own = "full-precision graph" if self.variant == "reference" else f"{graph} of assignment"
        number = "" if self.variant == "reference" else f" {self.assignment}"
        return f"step {self.step}, {own}{number}" + (f", {part}" if part else "")

    @property
    def finding(self) -> str:
        """The figures beside their limits, or why there are none."""
        if self.failure is not None:
            return self.failure
        relative = f"relative {figure(self.relative_error)} (limit {figure(self.relative_tolerance)})"
        if self.median_tolerance is None:
            return relative
        return f"median {figure(self.median_error)} (limit {figure(self.median_tolerance)}), {relative}"


class LoopRow(_Record):
    """The latent after one step of the whole loop, which runs on its own latents.

    Attributes:
        step: index of the step that made it.
        error: |got - expected| / |got| against the fake-quantized PyTorch model's loop; None when not finite.
        tolerance: its limit.
        quantization_error: the same against the full-precision loop: change of the latent by quantization.
        passed: the limit holds.
    """

    step: int
    error: float | None
    tolerance: float
    quantization_error: float | None
    passed: bool


class LoopReport(_Record):
    """The loop's rows and what they amount to.

    Attributes:
        rows: one for every step.
        fail_above: the user's limit for the quantization error after the last step; None for no limit.
        passed: all rows pass and the user's limit holds.
        failure: reason that the loop could not run; None when it ran.
        command: compares the saved latents again when run in the report's folder.
    """

    rows: tuple[LoopRow, ...]
    fail_above: float | None
    passed: bool
    failure: str | None
    command: str


class ExactRow(_Record):
    """Something of the bundle that must be what the exporter had, bit for bit.

    Attributes:
        subject: its name.
        passed: whether it is the same.
        failure: the first difference; None where there is none.
    """

    subject: str
    passed: bool
    failure: str | None


class FirstLayer(_Record):
    """The first layer, in the order of execution, whose output leaves the tolerance.

    Attributes:
        step: index in the loop.
        assignment: index into the policy's assignments.
        variant: of the graph.
        layer: module path.
        format: by the policy.
        graph_format: by the graph, where that is another.
        activation_scale: static scale that the step feeds; None for formats without one.
    """

    step: int
    assignment: int
    variant: Variant
    layer: str
    format: str
    graph_format: str | None
    activation_scale: float | None

    @property
    def sentence(self) -> str:
        """One line for people."""
        scale = "no static activation scale" if self.activation_scale is None else f"scale {self.activation_scale:.6g}"
        graph = f", but {self.graph_format} in the graph" if self.graph_format is not None else ""
        return (
            f"step {self.step}, {self.variant} graph of assignment {self.assignment}: first wrong at layer "
            f"'{self.layer}', format {self.format}{graph}, {scale}"
        )


class CheckReport(_Record):
    """All comparisons of a bundle.

    Attributes:
        model: the bundle's model.
        manifest_sha256: of the bundle's manifest, which hashes every other file: the bundle that was checked.
        passed: every row and the loop pass.
        exact: parts that are compared bit for bit.
        buckets: first and last step of each bucket.
        rows: by bucket; cpu graphs before target graphs, layers in the order of execution.
        loop: the whole denoising loop, of the cpu graphs.
        backend: name of the backend that ran plans; None where none were run.
        plan_loop: the loop of the plans, where they were run.
        first_layers: the first wrong layer of each wrong graph; filled by `bisect`.
    """

    schema_version: Literal[5] = 5
    model: str
    manifest_sha256: str
    passed: bool
    buckets: tuple[tuple[int, int], ...]
    rows: tuple[CheckRow, ...]
    exact: tuple[ExactRow, ...]
    loop: LoopReport
    backend: str | None = None
    plan_loop: LoopReport | None = None
    first_layers: tuple[FirstLayer, ...] = ()


def figure(value: float | None) -> str:
    """An error or a limit, for people."""
    return "none" if value is None else f"{value:.1e}"


def write_report(folder: Path, report: CheckReport) -> None:
    """Write `check.json`.

    Raises:
        OutputError: the folder cannot be written.
    """
    write_json_model(folder / REPORT_NAME, report)


def write_junit(path: Path, report: CheckReport) -> None:
    """Write a report as JUnit XML: a test suite for each bucket, one for the loop, one for what is exact.

    Raises:
        OutputError: the file cannot be written.
    """
    root = ElementTree.Element("testsuites", name=f"adatsq-trt check {report.model}")
    for index, (first, last) in enumerate(report.buckets):
        suite = _suite(root, f"bucket {index}: steps {first} to {last}")
        for row in (row for row in report.rows if row.bucket == index):
            advice = f"{row.finding}\nrepeat it in the report's folder: {row.command}"
            _case(suite, row.variant, row.subject, None if row.passed else row.finding, advice)
    suite = _suite(root, "bit for bit")
    for same in report.exact:
        _case(suite, "exact", same.subject, same.failure, same.failure or "")
    _loop_suite(root, "denoising loop", "loop", report.loop)
    if report.plan_loop is not None:
        _loop_suite(root, "denoising loop of the plans", "plan_loop", report.plan_loop)
    for suite in root:
        suite.set("tests", str(len(suite)))
        suite.set("failures", str(len(suite.findall("testcase/failure"))))
    ElementTree.indent(root)
    write_bytes(path, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")


def _loop_suite(root: ElementTree.Element, name: str, kind: str, loop: LoopReport) -> None:
    suite = _suite(root, name)
    for step in loop.rows:
        finding = f"relative {figure(step.error)} (limit {figure(step.tolerance)})"
        _case(suite, kind, f"latent after step {step.step}", None if step.passed else finding, loop.command)
    if loop.failure is not None or loop.fail_above is not None:
        reason = loop.failure or f"above --fail-above {loop.fail_above}"
        _case(suite, kind, "quantization error", None if loop.passed else reason, loop.command)


def _suite(root: ElementTree.Element, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(root, "testsuite", name=name)


def _case(suite: ElementTree.Element, kind: str, name: str, failure: str | None, details: str) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=f"adatsq_trt.check.{kind}", name=name)
    if failure is not None:
        message, text = (_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", part) for part in (failure, details))
        ElementTree.SubElement(case, "failure", message=message).text = text
