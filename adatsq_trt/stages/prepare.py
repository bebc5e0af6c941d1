"""A request that was checked, with all that running it takes; nothing is written before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from adatsq_trt.config import BuildConfig
from adatsq_trt.execution import Executor
from adatsq_trt.files import write_json_model
from adatsq_trt.progress import Reporter
from adatsq_trt.report.numbers import size
from adatsq_trt.settings import SETTINGS_NAME, Settings
from adatsq_trt.stages import search
from adatsq_trt.stages.context import Context, Memory
from adatsq_trt.stages.disk import disk_bytes, warn_when_full
from adatsq_trt.stages.graph import Build
from adatsq_trt.stages.lora_slots import weight_sentence
from adatsq_trt.stages.memory import plan_memory
from adatsq_trt.stages.models import OpenedModel
from adatsq_trt.stages.resolve import choose_executor, open_and_resolve
from adatsq_trt.stages.run_directory import RunDirectory


@dataclass(frozen=True)
class Prepared:
    """Request that was checked and can be run.

    Attributes:
        settings: all of them, defaults filled in.
        opened: the model.
        memory: limit and needs.
        disk: stage → bytes of its large files, of the stages that are to run.
        executor: who is going to compute.
    """

    settings: Settings
    opened: OpenedModel
    memory: Memory
    disk: Mapping[str, int]
    executor: AbstractContextManager[Executor]

    @property
    def needs(self) -> str:
        """Memory and disk that the run takes, estimated from shapes, and what slots for LoRAs weigh."""
        rank = self.settings.lora_slots
        slots = "" if rank is None else f"\n{weight_sentence(rank, self.opened.outline.adapter)}"
        largest, written = (max(needs, key=lambda name: needs[name]) for needs in (self.memory.needs, self.disk))
        return (
            f"memory: {size(self.memory.needs[largest])} at least, in stage '{largest}'; up to "
            f"{size(self.memory.limit_bytes)} are used where that saves time (--memory-limit)\n"
            f"disk: about {size(sum(self.disk.values()))}, of which '{written}' writes {size(self.disk[written])}; "
            f"both are estimates from the model's shapes{slots}"
        )

    @contextmanager
    def run(self, folder: Path, progress: Reporter) -> Iterator[Build]:
        """Hold the run directory and the workers, and write down the settings.

        Args:
            folder: the run directory.
            progress: who is told how it goes on.

        Raises:
            OutputError: the folder cannot be written, is in use, or holds something else.
        """
        with self.executor as executor, RunDirectory.open(folder) as run:
            warn_when_full(sum(self.disk.values()), run.path)
            write_json_model(run.path / SETTINGS_NAME, self.settings)
            context = Context(
                run,
                self.settings,
                self.opened.outline,
                memory=self.memory,
                executor=executor,
                progress=progress,
                pipeline=self.opened.pipeline,
            )
            yield Build(context, self.opened)


def prepare(model: object, config: BuildConfig, last: str) -> Prepared:
    """Check a request.

    Args:
        model: name of a model of the zoo, path, hub id, or a pipeline or transformer in memory.
        config: choices of the build.
        last: the last stage that is to run.

    Raises:
        UserError: parts that do not go together, are not there or do not suit the model.
    """
    executor = choose_executor(config)
    opened, settings = open_and_resolve(model, config, last)
    search.require_possible(settings, opened.outline)
    memory = plan_memory(config.limit_bytes, settings, opened.outline, opened.pipeline, last)
    disk = disk_bytes(settings, opened.outline.adapter)
    wanted = {name: size for name, size in disk.items() if name in memory.needs}
    return Prepared(settings, opened, memory, wanted, executor)
