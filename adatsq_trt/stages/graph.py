"""The stages as a graph: which there are, what each reads of the others, and how they are run up to one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from adatsq_trt.stages import bundle, calibrate, embed, export, quantize, refine, search
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.meter import release_memory
from adatsq_trt.stages.models import OpenedModel
from adatsq_trt.stages.run_directory import Stage
from adatsq_trt.stages.work import Work


class StageModule(Protocol):
    """Interface of a stage's module."""

    def stage(self, context: Context) -> Stage:
        """The stage for the settings of a run; needs no weights of the model."""

    def run(self, context: Context) -> Stage:
        """Do its work, unless that is done; the stages that it reads are."""

    def work(self, context: Context) -> Work:
        """Count its work before it is done; needs no weights of the model either."""


@dataclass(frozen=True)
class Node:
    """A stage and what it depends on.

    Attributes:
        module: does the work.
        inputs: names of the stages whose files it reads.
        weights: whether it computes with the model's weights; the others need its outline only.
        require: refuses, before it runs, what it or a later stage cannot do.
    """

    module: StageModule
    inputs: tuple[str, ...]
    weights: bool = True
    require: Callable[[Context], None] | None = None

    def run(self, context: Context) -> Stage:
        """Run the stage, unless that is done."""
        this = self.module.stage(context)
        if this.done:
            return this
        if self.require is not None:
            self.require(context)
        return self.module.run(context)


# In an order in which they can be run.
STAGES: dict[str, Node] = {
    embed.NAME: Node(embed, (), weights=False),
    calibrate.NAME: Node(calibrate, (embed.NAME,)),
    quantize.NAME: Node(quantize, (calibrate.NAME,), require=search.require_affordable),
    search.NAME: Node(search, (calibrate.NAME, quantize.NAME), require=search.require_affordable),
    refine.NAME: Node(refine, (calibrate.NAME, quantize.NAME, search.NAME)),
    export.NAME: Node(export, (calibrate.NAME, quantize.NAME, search.NAME, refine.NAME)),
    bundle.NAME: Node(bundle, (search.NAME, export.NAME), weights=False),
}


def stages_up_to(last: str) -> tuple[str, ...]:
    """A stage and all that it depends on, in the order in which they are run."""
    needed, waiting = set[str](), [last]
    while waiting:
        name = waiting.pop()
        needed.add(name)
        waiting += STAGES[name].inputs
    return tuple(name for name in STAGES if name in needed)


def stages_of(context: Context, last: str) -> tuple[str, ...]:
    """The stages of a run up to one: without those that it has no use for."""
    unused = {embed.NAME: context.pipeline is None, refine.NAME: not context.settings.refine}
    return tuple(name for name in stages_up_to(last) if not unused.get(name))


def run_stages(context: Context, last: str) -> Stage:
    """Run the stages up to one with a model that is loaded."""
    names = [name for name in stages_of(context, last) if name != embed.NAME]
    return [STAGES[name].run(context) for name in names][-1]


@dataclass(frozen=True)
class Build:
    """A run whose model is loaded when a stage that is not done needs its weights.

    Attributes:
        outline: the run with the model's outline.
        opened: the model.
    """

    outline: Context
    opened: OpenedModel

    @cached_property
    def loaded(self) -> Context:
        """The run with the model's weights."""
        return replace(self.outline, model=self.opened.load(self.outline.run, self.outline.settings))

    def run(self, last: str) -> Stage:
        """Run the stages up to one, but for those that are done."""
        return [self._run(STAGES[name]) for name in stages_of(self.outline, last)][-1]

    def _run(self, node: Node) -> Stage:
        this = node.module.stage(self.outline)
        if this.done:
            return this
        if node.weights:
            return node.run(self.loaded)
        if "loaded" in self.__dict__:
            del self.__dict__["loaded"]
            release_memory()  # compilers need that of the weights
        return node.run(self.outline)
