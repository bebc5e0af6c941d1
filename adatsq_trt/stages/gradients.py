"""The part of stage `calibrate` that makes Hessians from the gradients of weights that all steps share.

calibrate/gradients/BLOCK.safetensors   sums over the parts of the batch that are done; gone when the Hessians are there
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from adatsq_trt.calibration.fisher import projections
from adatsq_trt.calibration.shared_gradients import GradientSums, gradient_sums, sample_bytes, sums_bytes
from adatsq_trt.calibration.units import SAMPLES_PER_BACKWARD, Measured, parts
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.stages.context import Context
from adatsq_trt.stages.run_directory import Stage

COHERENT = "coherent"
FORMS = frozenset({COHERENT, "row"})  # of `--hessian`
FOLDER = "gradients"
PROJECTIONS = 1  # per sample; four are no better (decision 0045)
_PARTS = "parts"


@dataclass(frozen=True)
class Pass:
    """Blocks whose sums are in memory together.

    Attributes:
        blocks: module paths.
        at_once: samples whose gradients are; if a part of the batch has more, the sweep is repeated for them.
        by_block: whether backward passes go block by block.
    """

    blocks: list[str]
    at_once: int
    by_block: bool

    def swept(self, samples: int) -> int:
        """Count the samples of all its sweeps: a part of the batch is swept as often as its gradients need."""
        sizes = [part.stop - part.start for part in parts(samples)]
        return sum(size * -(-size // self.at_once) for size in sizes)


def write_hessians(context: Context, this: Stage, latents: Tensor, files: Mapping[str, Path]) -> None:
    """Write the Hessians of every block that has none yet.

    Args:
        context: of the run; the model is where units are computed.
        this: the stage.
        latents: full-precision trajectory, float32 [steps + 1, samples, *latent_shape].
        files: block → file.
    """
    sums = {block: this.unit(f"{FOLDER}/{block}.safetensors") for block in files}
    done = {block: _parts_done(sums[block]) for block, file in files.items() if not file.is_file()}
    # Blocks that were interrupted after as many parts go on together.
    passes = [
        (first, one)
        for first, blocks in groupby(done, key=done.__getitem__)
        for one in gradient_passes(context, list(blocks))
    ]
    count = len(parts(latents.shape[1]))
    with context.progress("calibrate: shared gradients", sum(count - first for first, _ in passes)) as advance:
        for first, one in passes:
            totals = _read_sums(sums[block] for block in one.blocks if first)
            for number, found in enumerate(_sums_of_parts(context, one, latents, first), first + 1):
                for layer in list(found):
                    own = found.pop(layer)
                    if layer in totals:
                        totals[layer].add(own)
                    else:
                        totals[layer] = own
                if number < count:
                    for block in one.blocks:
                        _write_sums(sums[block], _of_block(context, block, totals), number)
                advance()
            for block in one.blocks:
                _write_block(context, files[block], _of_block(context, block, totals))
                sums[block].unlink(missing_ok=True)


def _sums_of_parts(context: Context, one: Pass, latents: Tensor, first: int) -> Iterable[dict[str, GradientSums]]:
    samples, coherent = context.calibration, context.settings.hessian == COHERENT
    start = projections(len(samples.seeds), context.adapter.latent_shape, PROJECTIONS, context.settings.seed)
    blocks = context.adapter.layers_by_block()
    layers = [layer for block in one.blocks for layer in blocks[block]]
    common = context.executor.share(Measured(samples, coherent, one.by_block))
    return gradient_sums(context.executor, common, latents, start, layers, one.at_once, first)


def gradient_passes(context: Context, blocks: Sequence[str]) -> list[Pass]:
    """Group consecutive blocks, so that memory holds the gradients of a part's samples in all layers of a group.

    A group has at least one block, and of one that is too large the gradients of some samples at a time. Each group,
    and each of these times, takes a sweep over the trajectory.
    """
    room, samples = context.room_bytes, min(SAMPLES_PER_BACKWARD, len(context.calibration.seeds))
    sizes = {block: _block_bytes(context, block) for block in blocks}
    needed = sum(sums + samples * each for sums, each in sizes.values())
    if context.memory.backward_bytes_of(PROJECTIONS) + needed <= room:
        return [Pass(list(blocks), samples, by_block=False)] if blocks else []
    room, passes, free = room - context.memory.block_bytes, list[Pass](), 0
    for block, (sums, each) in sizes.items():
        if passes and sums + samples * each <= free:
            passes[-1].blocks.append(block)
        else:
            at_once = (room - sums) // each
            passes.append(Pass([block], max(1, min(samples, at_once)), by_block=True))
            free = room
        free -= sums + samples * each
    return passes


def _block_bytes(context: Context, block: str) -> tuple[int, int]:
    """Of its layers' sums, and of their gradients for each sample."""
    linears = context.adapter.quantizable_layers()
    layers = context.adapter.layers_by_block()[block]
    shapes = [(linears[layer].in_features, linears[layer].out_features) for layer in layers]
    coherent = context.settings.hessian == COHERENT
    return sums_bytes([k for k, _ in shapes]), sum(sample_bytes(shape, PROJECTIONS, coherent) for shape in shapes)


def _of_block(context: Context, block: str, totals: Mapping[str, GradientSums]) -> dict[str, GradientSums]:
    return {layer: totals[layer] for layer in context.adapter.layers_by_block()[block]}


def _write_block(context: Context, file: Path, totals: Mapping[str, GradientSums]) -> None:
    coherent = context.settings.hessian == COHERENT
    write_tensors(file, {layer: own.hessian() if coherent else own.row / own.count for layer, own in totals.items()})


def _write_sums(file: Path, totals: Mapping[str, GradientSums], count: int) -> None:
    named = {
        f"{layer}.{field.name}": getattr(own, field.name) for layer, own in totals.items() for field in fields(own)
    }
    write_tensors(file, named | {_PARTS: torch.tensor(count)})


def _read_sums(files: Iterable[Path]) -> dict[str, GradientSums]:
    totals = {}
    for file in files:
        tensors = read_tensors(file)
        layers = dict.fromkeys(name.rpartition(".")[0] for name in tensors if name != _PARTS)
        for layer in layers:
            totals[layer] = GradientSums(*(tensors[f"{layer}.{field.name}"] for field in fields(GradientSums)))
    return totals


def _parts_done(file: Path) -> int:
    return int(read_tensors(file)[_PARTS]) if file.is_file() else 0
