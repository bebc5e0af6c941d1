"""Estimate of how long a run takes on this machine, from counts of its work and a short timing, before it starts."""

from __future__ import annotations

from collections.abc import Mapping

from adatsq_trt.execution import InProcess
from adatsq_trt.stages import embed
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.graph import STAGES, stages_of
from adatsq_trt.stages.meter import release_memory
from adatsq_trt.stages.timing import unit_seconds
from adatsq_trt.stages.work import Work

_UNITS = ((3600, "hour"), (60, "minute"), (1, "second"))


def remaining_work(context: Context, last: str) -> dict[str, Work]:
    """Stage → its units of work, of the stages that are not done.

    One that was interrupted counts as a whole; what follows one that is not done may turn out to be done.

    Args:
        context: of the run; of the model nothing but its outline is needed.
        last: the last stage that is to run.
    """
    names, found = list(stages_of(context, last)), dict[str, Work]()
    while names and STAGES[names[0]].module.stage(context).done:
        del names[0]
    for name in names:
        found[name] = STAGES[name].module.work(context)
    return found


def expected_seconds(context: Context, work: Mapping[str, Work]) -> dict[str, float]:
    """Stage → seconds on this machine's processors."""
    each = unit_seconds(context, sum(work.values(), start=Work()))
    release_memory()
    return {name: sum(count * each[unit] for unit, count in own.items()) for name, own in work.items()}


def time_needed(context: Context, last: str) -> str:
    """Say how long a run takes; a GPU and a cluster are not timed.

    Args:
        context: as of `remaining_work`.
        last: the last stage that is to run.
    """
    if not isinstance(context.executor, InProcess):
        return "time: not estimated, since other machines or a GPU compute; the bars tell it as soon as it is known"
    work = remaining_work(context, last)
    if not work:
        return "time: nothing is left to compute"
    seconds = expected_seconds(context, work)
    left_out = ", without encoding the prompts" if embed.NAME in work else ""
    return f"time: {in_words(seconds)} on this machine{left_out}; an estimate from counts of calls and a short timing"


def in_words(seconds: Mapping[str, float]) -> str:
    """Tell a sum in its largest unit, and its parts in the same: about 5 minutes (calibrate 1, search 3, export 1)."""
    total = sum(seconds.values())
    size, unit = next((pair for pair in _UNITS if total >= 1.5 * pair[0]), _UNITS[-1])
    shown = {name: _rounded(own / size) for name, own in seconds.items()}
    parts = ", ".join(f"{name} {count}" for name, count in shown.items() if count)
    count = _rounded(total / size) or 1
    return f"about {count} {unit}{'s' if count > 1 else ''}" + (f" ({parts})" if parts else "")


def _rounded(count: float) -> int:
    """To two digits at most."""
    step = 1 if count < 20 else 10 if count < 200 else 100
    return step * round(count / step)
