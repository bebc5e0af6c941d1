"""The verbs: what the command line does, from Python.

A model is the name of one of the zoo, a folder or file, a hub id, or a diffusers pipeline or transformer that is loaded
already and is never changed. Options are the fields of `adatsq_trt.config.BuildConfig`, as keyword arguments or as one
`config`. Without `output` the run directory is a temporary one, which goes with the result.

Every verb takes `progress`, which is called with `Progress` objects, and `cancel`, a `threading.Event`; an exception of
the callback ends the work too. What was finished stays in the run directory, and the same call goes on there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING, Any

from adatsq_trt.config import BuildConfig
from adatsq_trt.progress import Callback, Reporter

if TYPE_CHECKING:
    from adatsq_trt.engines.accuracy import CheckReport
    from adatsq_trt.engines.backends.selection import BackendName, Offload
    from adatsq_trt.report.summary import StageFigures
    from adatsq_trt.results import Bundle, Calibration, ExportedGraphs, QuantizedWeights, SearchedPolicy
    from adatsq_trt.settings import Settings
    from adatsq_trt.stages.graph import Build
    from adatsq_trt.stages.prepare import Prepared


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A request that was checked; nothing is written before it runs.

    Attributes:
        last: the last stage that is to run.
        prepared: the model and the settings.
    """

    last: str
    prepared: Prepared

    @property
    def settings(self) -> Settings:
        """All settings, defaults filled in."""
        return self.prepared.settings

    def run(
        self,
        output: Path | str | None = None,
        progress: Callback | None = None,
        cancel: Event | None = None,
        on_begin: Callable[[Build], None] | None = None,
    ) -> Any:
        """Run the stages; what is done in the run directory is reused.

        Args:
            output: the run directory; None for a temporary one.
            progress: is called as the work goes on.
            cancel: ends the work once it is set.
            on_begin: is called when the run directory is held, before anything is computed.

        Returns:
            Result of the verb of the last stage.

        Raises:
            CancelledError: the event is set.
            OutputError: the folder cannot be written, is in use, or holds something else.
        """
        from adatsq_trt.stages import summary

        temporary = TemporaryDirectory(prefix="adatsq-") if output is None else None
        folder = Path(temporary.name if temporary is not None else str(output)).absolute()
        with self.prepared.run(folder, Reporter(progress, cancel)) as build:
            if on_begin is not None:
                on_begin(build)
            build.run(self.last)
            if self.last == "bundle":
                summary.write(build.outline)
            return _result(self.last, build, folder, temporary)


def prepare(model: object, last: str, config: BuildConfig | None = None, **options: Any) -> Job:
    """Check a request without writing anything.

    Args:
        model: see the module.
        last: the last stage that is to run: "calibrate", "quantize", "search", "export" or "bundle".
        config: options together; `options` replace some of them.
        **options: fields of `BuildConfig`.

    Raises:
        UserError: says what does not go together, is not there or does not suit the model.
    """
    asked = BuildConfig.of(options) if config is None else replace(config, **options)
    from adatsq_trt.stages.models import require_model

    require_model(model, asked)  # a mistyped name is told at once, without seconds of imports before
    from adatsq_trt.stages.prepare import prepare as check_request

    return Job(last, check_request(model, asked, last))


def build(
    model: object,
    *,
    output: Path | str | None = None,
    config: BuildConfig | None = None,
    progress: Callback | None = None,
    cancel: Event | None = None,
    **options: Any,
) -> Bundle:
    """Run all stages: from a model to a bundle of graphs and engines.

    Args:
        model: see the module.
        output: the run directory; None for a temporary one.
        config: options together; `options` replace some of them.
        progress: is called as the work goes on.
        cancel: ends the work once it is set.
        **options: fields of `BuildConfig`, such as `target="sm120"`.

    Returns:
        The bundle, with the figures of the build in `summary`.

    Raises:
        UserError: says what does not go together, is not there or does not suit the model.
        CancelledError: the event is set.
    """
    bundle: Bundle = prepare(model, "bundle", config, **options).run(output, progress, cancel)
    return bundle


def calibrate(
    model: object,
    *,
    output: Path | str | None = None,
    config: BuildConfig | None = None,
    progress: Callback | None = None,
    cancel: Event | None = None,
    **options: Any,
) -> Calibration:
    """Measure a model: trajectories, Fisher information, Hessians. Arguments and errors as of `build`."""
    calibration: Calibration = prepare(model, "calibrate", config, **options).run(output, progress, cancel)
    return calibration


def quantize(
    model: object,
    *,
    output: Path | str | None = None,
    config: BuildConfig | None = None,
    progress: Callback | None = None,
    cancel: Event | None = None,
    **options: Any,
) -> QuantizedWeights:
    """Round every layer to every candidate format, with GPTQ and weighted Hessians. Arguments as of `build`."""
    weights: QuantizedWeights = prepare(model, "quantize", config, **options).run(output, progress, cancel)
    return weights


def search_policy(
    model: object,
    *,
    output: Path | str | None = None,
    config: BuildConfig | None = None,
    progress: Callback | None = None,
    cancel: Event | None = None,
    **options: Any,
) -> SearchedPolicy:
    """Find a format for every step and layer.

    Arguments and errors as of `build`; without a target formats need no accelerated path.

    Returns:
        The policy, with the figures of its search.
    """
    asked = BuildConfig.of(options) if config is None else replace(config, **options)
    if not asked.targets:
        asked = replace(asked, simulate=True)
    policy: SearchedPolicy = prepare(model, "search", asked).run(output, progress, cancel)
    return policy


def export_onnx(
    model: object,
    *,
    output: Path | str | None = None,
    config: BuildConfig | None = None,
    progress: Callback | None = None,
    cancel: Event | None = None,
    **options: Any,
) -> ExportedGraphs:
    """Write Q/DQ graphs of a policy, searched or given as `policy`. Arguments and errors as of `build`."""
    graphs: ExportedGraphs = prepare(model, "export", config, **options).run(output, progress, cancel)
    return graphs


def load(path: Path | str, backend: BackendName = "auto", offload: Offload = "none") -> Bundle:
    """Open a bundle, or the bundle of a run directory; every file is compared with its hash.

    Args:
        path: of the bundle.
        backend: name of the backend, as for `adatsq_trt.engines.runtime.Bundle.open`; "auto" for the best one here.
        offload: "expert" holds the one of two transformers that is in use, as for `Bundle.open`.

    Raises:
        MissingFileError: there is no bundle, or one of its files is gone.
        DamagedFileError: a file is not what the manifest says, or lies outside the bundle.
        DependencyError: plans without their library or a GPU.
        MismatchError: no plans for this GPU and this version of the library.
        UserError: offloading of a bundle of one transformer.
    """
    from adatsq_trt.results import Bundle

    return Bundle.open(path, backend, offload)


def check(
    bundle: Bundle | Path | str,
    *,
    output: Path | str | None = None,
    fail_above: float | None = None,
    bisect: bool = False,
    again: bool = True,
    progress: Callback | None = None,
    cancel: Event | None = None,
) -> CheckReport:
    """Compare a bundle's graphs with the fake-quantized PyTorch model.

    Args:
        bundle: opened, or the path of a bundle or run directory; plans that it runs are compared with the cpu graphs.
        output: folder for the report and its arrays; None for `check/` beside the bundle.
        fail_above: largest relative error of the last latent against full precision; None for no limit.
        bisect: name the first layer at which a wrong graph leaves the tolerance.
        again: compare also where this very bundle has passed before.
        progress: is called as the work goes on.
        cancel: ends the work once it is set.

    Returns:
        The comparisons; `passed` says whether all is well.

    Raises:
        UserError: there is no bundle, or it is damaged.
    """
    from adatsq_trt.engines import accuracy
    from adatsq_trt.engines.bundle import BundleFiles

    files = BundleFiles.open(Path(bundle)) if isinstance(bundle, str | Path) else bundle.files
    folder = Path(output) if output is not None else files.folder.parent / "check"
    backend = "auto" if isinstance(bundle, str | Path) else bundle.choice.name
    report = None if again else accuracy.passed_before(files, folder, fail_above, backend)
    if report is not None:
        log.info("this bundle has passed before and is unchanged; pass --again to compare anew")
    else:
        with Reporter(progress, cancel)("check", accuracy.work_units(files)) as advance:
            report = accuracy.check(files, folder, fail_above, advance, backend)
    if bisect and not report.passed:
        report = accuracy.bisect(files, report, folder, _layer_reference(files.folder.parent, files.policy))
    return report


def _layer_reference(folder: Path, policy: Any) -> Any:
    """Layers of any step, computed by PyTorch's model, where the bundle lies in the run that made it."""
    from adatsq_trt.errors import UserError
    from adatsq_trt.stages import export, summary
    from adatsq_trt.stages.models import open_run

    try:
        context = open_run(folder)
        summary.read(context.run)
    except UserError:
        return None  # a bundle alone, which holds the layers of each bucket's first step; or stages of another run
    return lambda step: {n: t.numpy() for n, t in export.layer_reference(context, policy, step).items()}


def _result(last: str, build: Build, folder: Path, temporary: TemporaryDirectory[str] | None) -> Any:
    """The object over what was written."""
    from adatsq_trt import results
    from adatsq_trt.files import read_json_model
    from adatsq_trt.policy import Policy
    from adatsq_trt.search.select import SearchResult
    from adatsq_trt.stages import search

    if last == "bundle":
        return results.Bundle.built(folder, temporary)
    outline = build.outline
    about = (folder, outline.settings, outline.layers, _figures(build, last), temporary)
    if last == "search":
        stage = folder / search.NAME
        policy = Policy.load(stage / search.POLICY)
        result = read_json_model(stage / search.RESULT, SearchResult)
        return results.SearchedPolicy(**policy.model_dump(), result=result, run=results.Run(*about))
    kinds = {
        "calibrate": results.Calibration,
        "quantize": results.QuantizedWeights,
        "export": results.ExportedGraphs,
    }
    return kinds[last](*about)


def _figures(build: Build, last: str) -> Mapping[str, StageFigures]:
    """Read the seconds and peak memory of each stage."""
    from adatsq_trt.report.summary import StageFigures
    from adatsq_trt.stages.graph import stages_of

    run = build.outline.run
    records = {name: run.record(name) for name in stages_of(build.outline, last)}
    return {name: StageFigures(seconds=r.seconds, peak_bytes=r.peak_bytes) for name, r in records.items()}
