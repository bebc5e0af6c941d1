"""The report: one HTML file that needs no network, and its figures as files."""

from __future__ import annotations

import base64
import json
import math
import shlex
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import jinja2
import matplotlib
from markupsafe import Markup

from adatsq_trt.config import BuildConfig
from adatsq_trt.errors import UserError
from adatsq_trt.files import write_bytes
from adatsq_trt.report.charts import along_steps, check_chart, error_by_memory, error_by_time, pareto, stages_chart
from adatsq_trt.report.data import Check, Comparison, EngineFile, Pictures, ReportData
from adatsq_trt.report.maps import policy_map, sensitivity_map
from adatsq_trt.report.numbers import ratio, scientific, size
from adatsq_trt.report.summary import remarks
from adatsq_trt.report.theme import STYLE, Chart, RenderedChart, format_colors, render
from adatsq_trt.settings import IN_MEMORY, PipelineSettings, Settings

FIGURES_FOLDER = "report"
_MOST_COMPARISONS = 60
_OPTIONS = (
    *("budget_bits", "layout", "steps", "guidance", "guidance_2", "seed", "lora_slots"),
    *("beam", "candidates", "expansions", "search_precision", "weights"),
    *("calibration_samples", "selection_samples", "held_out_samples", "hessian"),
)


@dataclass(frozen=True)
class BucketRow:
    """A bucket as its row in the page.

    Attributes:
        steps: "4" or "4-7".
        assignment: index into the policy's assignments.
        shares: (format, layers that have it), cheapest first.
        engine_bytes: of the assignment's own plans on all targets; 0 when there are none.
    """

    steps: str
    assignment: int
    shares: tuple[tuple[str, int], ...]
    engine_bytes: int


@dataclass(frozen=True)
class EngineRow:
    """A plan as its row in the page.

    Attributes:
        target: GPU that it was compiled for.
        assignment: the one that it holds; None for all.
        steps: that it runs: "0-3, 7".
        bytes: of the file.
    """

    target: str
    assignment: int | None
    steps: str
    bytes: int


@dataclass(frozen=True)
class Written:
    """Files of a report: the page, and its figures as SVG and PNG."""

    page: Path
    figures: tuple[Path, ...]


def write_report(data: ReportData, file: Path, figures_folder: Path) -> Written:
    """Write the page and its figures, each whole or not at all.

    Args:
        data: the run.
        file: path of the page, with the suffix .html.
        figures_folder: receives NAME.svg and NAME.png of every figure.

    Raises:
        UserError: the file's name does not end in .html.
        OutputError: a folder cannot be written.
    """
    if file.suffix != ".html":
        raise UserError(f"--output '{file}': got '{file.suffix}', expected a name that ends in .html")
    charts = draw(data)
    figures = []
    for chart in charts.values():
        for suffix, content in ((".svg", chart.svg), (".png", chart.png)):
            figures.append(figures_folder / f"{chart.name}{suffix}")
            write_bytes(figures[-1], content)
    write_bytes(file, page(data, charts).encode())
    return Written(file, tuple(figures))


def draw(data: ReportData) -> dict[str, RenderedChart]:
    """All figures that the run has the data for, by name."""
    with matplotlib.rc_context(STYLE):
        charts: list[Chart] = [
            policy_map(data),
            sensitivity_map(data),
            error_by_memory(data),
            error_by_time(data),
            pareto(data),
        ]
        if data.trajectory_errors:
            charts.append(along_steps(data))
        if data.check is not None and data.check.comparisons:
            charts.append(check_chart(data.check))
        charts.append(stages_chart(data))
        return {chart.name: render(chart) for chart in charts}


def page(data: ReportData, charts: dict[str, RenderedChart]) -> str:
    """The HTML page, with styles, script, figures and pictures inside."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("adatsq_trt.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(ratio=ratio, scientific=scientific, size=size)
    source = {name: Markup(_resource(environment, name)) for name in ("page.css", "page.js")}
    return environment.get_template("page.html").render(
        data=data,
        summary=data.summary,
        remarks=remarks(data.summary),
        charts={name: (chart, Markup(chart.inline)) for name, chart in charts.items()},
        css=source["page.css"],
        js=source["page.js"],
        map_data=_for_script(_map_data(data)),
        colors=format_colors(data.settings.formats),
        buckets=bucket_rows(data),
        engine_sizes=_by_target(data.engines),
        engines=engine_rows(data),
        closest=_closest(data.check),
        commands=commands(data),
        pictures=_webp(data.pictures),
    )


def _webp(pictures: Pictures | None) -> dict[str, str] | None:
    """Sources of the two pictures."""
    if pictures is None:
        return None
    sides = {"quantized": pictures.quantized, "full": pictures.full_precision}
    return {name: f"data:image/webp;base64,{base64.b64encode(content).decode()}" for name, content in sides.items()}


def _resource(environment: jinja2.Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _for_script(content: dict[str, object]) -> Markup:
    """JSON that cannot end the script element that holds it."""
    return Markup(json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"))


def _map_data(data: ReportData) -> dict[str, object]:
    """Collect the page's data about the places of the maps."""
    values = data.information[None] if data.sensitivity is None else data.sensitivity
    return {
        "layers": data.policy.layers,
        "formats": data.settings.formats,
        "measure": "Fisher information" if data.sensitivity is None else "latent MSE alone",
        "chosen": data.format_indices().tolist(),
        "values": [[[float(f"{value:.2e}") for value in row] for row in rows] for rows in values],
        "sigmas": [round(sigma, 4) for sigma in data.sigmas],
    }


def bucket_rows(data: ReportData) -> list[BucketRow]:
    """The buckets in the order of the steps."""
    plans: Counter[int | None] = Counter()
    for engine in data.engines:
        plans[engine.assignment] += engine.bytes
    rows = []
    for bucket in data.policy.buckets:
        counts = Counter(data.policy.rows[bucket.assignment].values())
        shares = tuple((name, counts[name]) for name in data.settings.formats if counts[name])
        rows.append(BucketRow(_span(bucket.first, bucket.last), bucket.assignment, shares, plans[bucket.assignment]))
    return rows


def engine_rows(data: ReportData) -> list[EngineRow]:
    """The compiled plans, by target."""
    rows = []
    for engine in sorted(data.engines, key=lambda engine: engine.target):
        served = [bucket for bucket in data.policy.buckets if engine.assignment in (None, bucket.assignment)]
        steps = ", ".join(_span(bucket.first, bucket.last) for bucket in served)
        if engine.assignment is None:
            steps = _span(0, data.policy.steps - 1)
        rows.append(EngineRow(engine.target, engine.assignment, steps, engine.bytes))
    return rows


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _closest(check: Check | None) -> list[Comparison]:
    """The comparisons that people want to see: what failed or came close to its limit first."""

    def distance(row: Comparison) -> tuple[bool, float]:
        return row.passed, -math.inf if row.of_limit is None else -row.of_limit

    return sorted(check.comparisons, key=distance)[:_MOST_COMPARISONS] if check is not None else []


def _by_target(engines: tuple[EngineFile, ...]) -> list[tuple[str, int, int]]:
    """(target, plans, bytes)."""
    groups = groupby(sorted(engines, key=lambda engine: engine.target), key=lambda engine: engine.target)
    members = [(target, list(group)) for target, group in groups]
    return [(target, len(group), sum(engine.bytes for engine in group)) for target, group in members]


def commands(data: ReportData) -> list[list[str]]:
    """The words of the commands that make the run and this page again, defaults written out."""
    settings, run = data.settings, f"runs/{data.run_name}"
    pipeline = settings.pipeline
    # A model that was an object in memory has to be saved first; the page cannot say where.
    model = settings.model if pipeline is None else pipeline.path.replace(IN_MEMORY, "FOLDER-OF-")
    build = ["adatsq-trt", "build", "engine", model]
    build += _checkpoint_options(pipeline) if pipeline is not None else []
    for target in settings.targets:
        build += ["--target", target]
    if settings.batch != Settings.model_fields["batch"].default:
        build += [word for samples in settings.batch for word in ("--batch", str(samples))]
    if settings.shapes:
        build += ["--shapes", ",".join("x".join(map(str, shape)) for shape in settings.shapes)]
    if settings.backend != "rtx":
        build += ["--backend", settings.backend, "--hardware-compatibility", settings.hardware_compatibility]
        build += ["--version-compatible"] if settings.version_compatible else []
        build += ["--weight-streaming"] if settings.weight_streaming else []
        build += [] if settings.plugins is None else ["--plugins", settings.plugins]
    build += ["--simulate"] if settings.simulate else []
    build += ["--formats", settings.format_set]
    build += ["--transform", settings.transform] if settings.transform is not None else []
    build += ["--clips", settings.clips] if settings.clips != BuildConfig.clips else []
    build += ["--refine"] if settings.refine else []
    build += [word for layer in settings.excluded for word in ("--exclude", layer)]
    for layer, names in settings.formats_for.items():
        build += ["--formats-for", f"{layer}={','.join(names)}"]
    for name in _OPTIONS:
        value = getattr(settings, name)
        build += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    for name in ("sigmas", "timesteps"):
        values = getattr(settings, name)
        build += [f"--{name}", ",".join(map(repr, values))] if values else []
    build += _budget_options(settings)
    if settings.times is not None:
        # Of a measured table the settings hold the text; the page cannot say where the file lay.
        build += ["--gpu", "times.json" if settings.times.startswith("{") else settings.times]
    build += ["--max-assignments", str(settings.max_assignments)] if settings.max_assignments is not None else []
    build += ["--policy", "policy.json"] if settings.policy is not None else []
    build += ["--output", run]
    others = [["adatsq-trt", name, run] for name in ("check", "generate", "report")]
    return [[shlex.quote(word) for word in command] for command in (build, *others)]


def _budget_options(settings: Settings) -> list[str]:
    """In bytes and milliseconds; a speed beside 16 bits as it was given."""
    options = [] if settings.budget_bytes is None else ["--budget-size", f"{settings.budget_bytes:.0f}"]
    if settings.budget_speedup is not None:
        options += ["--budget-speed", f"{settings.budget_speedup!r}x"]
    return options if settings.budget_ms is None else [*options, "--budget-speed", f"{settings.budget_ms!r}ms"]


def _checkpoint_options(pipeline: PipelineSettings) -> list[str]:
    """Where a checkpoint of the user's comes from and what it draws; its prompts lie in a file of the user's."""
    said = ["--prompts", "prompts.txt"] if pipeline.encodings is None else ["--encodings", pipeline.encodings]
    options = [*said, "--height", str(pipeline.height), "--width", str(pipeline.width)]
    options += ["--frames", str(pipeline.frames)] if pipeline.frames is not None else []
    options += ["--base", pipeline.base] if pipeline.base is not None else []
    options += ["--negative-prompt", pipeline.negative_prompt] if pipeline.negative_prompt else []
    options += ["--images", pipeline.images] if pipeline.images is not None else []
    return [*options, *(word for lora in pipeline.loras for word in ("--lora", lora))]
