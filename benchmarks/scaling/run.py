"""Cost of units of work and gain of a second worker, on digits-flux; results.json and the tables of a document.

    python -m benchmarks.scaling.run [--document docs/scaling.md]

Runs the same small search in this process, with one Ray worker and with two, each computing with one thread, and
compares every file that they write. Seconds are those of the stages' own accounts. Other programs may use the machine
meanwhile, so look at ratios within one run of this command. Units and the bytes that they carry are counted in a run
whose workers are this process. Writes results.json beside this file.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from adatsq_trt.execution import InProcess, Shared
from adatsq_trt.files import read_json_model, write_json_model
from adatsq_trt.search.select import SearchResult
from adatsq_trt.stages import search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.graph import run_stages
from adatsq_trt.stages.models import open_run
from adatsq_trt.stages.run_directory import RunDirectory, StageRecord
from benchmarks.document import replace_marked
from benchmarks.scaling.extrapolation import table

ROOT = Path(__file__).parents[2]
RUNS, RESULTS = ROOT / "runs" / "bench-scaling", Path(__file__).with_name("results.json")
SCRIPT = Path(sys.executable).with_name("adatsq-trt")
STAGES = ("calibrate", "quantize", "search")
WAYS: dict[str, tuple[str, ...]] = {
    "in process": ("--device", "cpu"),
    "1 worker": ("--ray", "local:1"),
    "2 workers": ("--ray", "local:2"),
}
OPTIONS = (
    "--simulate",
    "--weights",
    "free",
    "--formats",
    "paper-fine",
    "--steps",
    "8",
    "--selection-samples",
    "128",
    "--held-out-samples",
    "256",
)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Units(_Record):
    """Units of one kind.

    Attributes:
        count: how many there were.
        sent_bytes: sent to them, all together.
        returned_bytes: sent back by them.
        shared_bytes: read once by every worker.
        cpu_seconds: processor time of all of them, which other programs do not lengthen much.
    """

    count: int
    sent_bytes: int
    returned_bytes: int
    shared_bytes: int
    cpu_seconds: float


class Results(_Record):
    """Measurements of a search: times of each way, files, and units of work.

    Attributes:
        options: of the search.
        processors: of the machine.
        load: programs that wanted them when it began, by the system's average over the last minute.
        seconds: way → stage → wall-clock time.
        same_files: whether all ways wrote the same bytes.
        units: kind → figures.
        other_cpu_seconds: processor time of the same search outside of its units.
        screened: policies that were judged.
        shortlist: those that were rescored.
        reported: those that were measured on held-out samples.
    """

    schema_version: int = 1
    options: tuple[str, ...]
    processors: int
    load: float
    seconds: dict[str, dict[str, float]]
    same_files: bool
    units: dict[str, Units]
    other_cpu_seconds: float
    screened: int
    shortlist: int
    reported: int


NONE = Units(count=0, sent_bytes=0, returned_bytes=0, shared_bytes=0, cpu_seconds=0.0)


class Counting(InProcess):
    """This process, with an account of what workers would be sent."""

    def __init__(self) -> None:
        self.units: dict[str, Units] = {}
        self.counting_seconds = 0.0
        self._bytes: dict[int, int] = {}
        self._kept: list[object] = []  # so that no two values have the same identity

    def share(self, value: Any) -> Shared[Any]:
        self._kept.append(value)
        self._bytes[id(value)] = self._size(value)
        return Shared(value)

    def map(self, function: Callable[..., Any], common: Shared[Any], items: Iterable[Any]) -> Iterator[Any]:
        shared = self._bytes[id(common.content)]
        for item in items:
            # A backward sweep is given what it measures.
            measured = item[0] if isinstance(item, tuple) and callable(item[0]) else function
            name = measured.__name__.strip("_").replace("_", " ")
            start = time.process_time()
            result = function(common.content, item)
            seconds = time.process_time() - start
            before = self.units.get(name, NONE)
            self.units[name] = Units(
                count=before.count + 1,
                sent_bytes=before.sent_bytes + self._size(item),
                returned_bytes=before.returned_bytes + self._size(result),
                shared_bytes=max(before.shared_bytes, shared),
                cpu_seconds=before.cpu_seconds + seconds,
            )
            yield result

    def _size(self, value: object) -> int:
        """Bytes of a value as it travels between processes; the time that this takes is no part of the search."""
        start, buffer = time.process_time(), io.BytesIO()
        pickle.Pickler(buffer, protocol=5).dump(value)
        self.counting_seconds += time.process_time() - start
        return buffer.getbuffer().nbytes


def run(way: str) -> dict[str, float]:
    """Seconds of each stage, computed afresh."""
    folder = RUNS / way.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    command = [SCRIPT, "search", "digits-flux", *OPTIONS, *WAYS[way], "--output", folder]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
    return {stage: read_json_model(folder / "stages" / f"{stage}.json", StageRecord).seconds for stage in STAGES}


def files(way: str) -> dict[str, bytes]:
    """Read the files that the stages wrote."""
    folder = RUNS / way.replace(" ", "-")
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for stage in STAGES
        for file in sorted((folder / stage).rglob("*"))
        if file.is_file()
    }


def count_units() -> tuple[dict[str, Units], float]:
    """The units of the same search, and the processor time outside of them."""
    finished, counting, folder = open_run(RUNS / "in-process"), Counting(), RUNS / "counted"
    shutil.rmtree(folder, ignore_errors=True)
    with RunDirectory.open(folder) as directory:
        context = Context(directory, finished.settings, finished.model, executor=counting)
        start = time.process_time()
        run_stages(context, search.NAME)
        total = time.process_time() - start - counting.counting_seconds
    return counting.units, total - sum(units.cpu_seconds for units in counting.units.values())


def tables(results: Results) -> str:
    """Both tables, Markdown."""
    lines = ["| | " + " | ".join(STAGES) + " | of one worker |", "|---|" + "---:|" * (len(STAGES) + 1)]
    one = sum(results.seconds["1 worker"].values())
    for way, seconds in results.seconds.items():
        total = sum(seconds.values())
        lines.append(f"| {way} | " + " | ".join(f"{seconds[s]:.1f} s" for s in STAGES) + f" | {total / one:.2f} × |")
    total = results.other_cpu_seconds + sum(units.cpu_seconds for units in results.units.values())
    header = ("unit", "units", "sent with one", "returned by one", "read once by a worker", "processor time")
    lines += ["", f"| {' | '.join(header)} |", "|---" + "|---:" * 5 + "|"]
    for name, units in results.units.items():
        sent, returned = units.sent_bytes / units.count / 1e3, units.returned_bytes / units.count / 1e3
        row = f"| {name} | {units.count} | {sent:,.1f} kB | {returned:,.1f} kB | {units.shared_bytes / 1e6:.2f} MB "
        lines.append(f"{row}| {units.cpu_seconds / total:.1%} |")
    lines.append(f"| in no unit | | | | | {results.other_cpu_seconds / total:.1%} |")
    same = "All ways wrote the same bytes" if results.same_files else "**The ways wrote different bytes**"
    lines += [
        "",
        f"{same}. `{' '.join(results.options)}`; {results.processors} processors, where {results.load:g} other programs"
        " ran when it began; one thread in each process.",
    ]
    return "\n".join(lines)


def measure() -> Results:
    """All runs."""
    load = round(os.getloadavg()[0], 1)
    seconds = {way: run(way) for way in WAYS}
    first, *others = (files(way) for way in WAYS)
    points = read_json_model(RUNS / "in-process" / "search" / search.RESULT, SearchResult).points
    units, other = count_units()
    return Results(
        options=OPTIONS,
        processors=os.cpu_count() or 1,
        load=load,
        seconds=seconds,
        same_files=all(other == first for other in others),
        units=units,
        other_cpu_seconds=other,
        screened=len({point.formats for point in points}),
        shortlist=sum(point.finalist for point in points),
        reported=len({point.formats for point in points if point.held_out_error is not None}),
    )


def main() -> None:
    """Measure, write the JSON, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--document", type=Path, help="file whose marked part is replaced by the tables")
    parser.add_argument("--from-results", action="store_true", help="measure nothing, use results.json")
    arguments = parser.parse_args()
    if not arguments.from_results:
        write_json_model(RESULTS, measure())
    results = read_json_model(RESULTS, Results)
    measured, expected = tables(results), table(results.screened, results.shortlist, results.reported)
    print(measured, expected, sep="\n\n")
    if arguments.document is not None:
        replace_marked(arguments.document, "scaling", measured)
        replace_marked(arguments.document, "extrapolation", expected)


if __name__ == "__main__":
    main()
