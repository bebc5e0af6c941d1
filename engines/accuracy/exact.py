"""Parts of a bundle that must be right bit for bit: those that the exporter had, and those that two files share.

A change of a hundredth in the guidance, or of the lowest bit in one scale, is smaller than what two correct
computations of a quantized loop may differ by. So nothing is computed here: numbers and bytes are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from adatsq_trt.engines.accuracy.block_cut import load_graph
from adatsq_trt.engines.accuracy.computations import first_difference
from adatsq_trt.engines.accuracy.constants import constants_difference
from adatsq_trt.engines.accuracy.references import Reference
from adatsq_trt.engines.accuracy.report import ExactRow
from adatsq_trt.engines.bundle import (
    GRAPH_FOLDER,
    PLAN_FOLDER,
    REBUILD,
    SCALES_NAME,
    BundleFiles,
    Manifest,
    ScheduleRecord,
    read_arrays,
)
from adatsq_trt.engines.exported import EXPORTED_NAME, Exported, array_hash
from adatsq_trt.engines.plan_weights import STORE_NAME, name_all_weights, store_difference
from adatsq_trt.errors import UserError
from adatsq_trt.files import read_json_model
from adatsq_trt.graph_index import CONSTANTS_NAME, ConstantHashes, GraphFile

# Gives the first difference as a sentence; None where there is none.
_Comparison = Callable[[], str | None]


def check_exactly(bundle: BundleFiles) -> tuple[ExactRow, ...]:
    """Compare what has to be the same.

    Args:
        bundle: opened.

    Raises:
        DamagedFileError: the bundle does not hold what the exporter noted down.
    """
    rows = []
    for subject, comparison in _comparisons(bundle):
        # onnx documents no common base for what is wrong with a graph.
        try:
            failure = comparison()
        except UserError:
            raise
        except Exception as error:
            failure = f"cannot be compared: {error}"
        rows.append(ExactRow(subject=subject, passed=failure is None, failure=failure))
    return tuple(rows)


def _comparisons(bundle: BundleFiles) -> Iterator[tuple[str, _Comparison]]:
    """Yield the name and the comparison of every part."""
    manifest, reference = bundle.manifest, Reference(bundle)
    exported = read_json_model(bundle.file(EXPORTED_NAME), Exported, REBUILD)
    yield "policy", lambda: _policy_difference(bundle, exported)
    yield "guidance", lambda: _guidance_difference(manifest, exported)
    yield "schedule", lambda: _schedule_difference(manifest.schedule, exported.schedule)
    yield "sizes", lambda: _sizes_difference(bundle, exported)
    yield "prompts' texts", lambda: _differ("prompts", manifest.prompt_texts, exported.prompt_texts)
    yield "activation scales", lambda: _scales_difference(bundle, reference)
    for file in exported.arrays:
        yield file, lambda file=file: _arrays_difference(bundle, file, exported)  # type: ignore[misc]
    hashes = read_json_model(bundle.file(f"{GRAPH_FOLDER}/{CONSTANTS_NAME}"), ConstantHashes, REBUILD)
    for variant in hashes.variants:
        subject = f"constants of the {variant} graphs"
        yield subject, lambda variant=variant: constants_difference(bundle, variant, hashes)  # type: ignore[misc]
    for graph in bundle.index.graphs:
        if graph.plain_path is not None:
            yield graph.plain_path, lambda graph=graph: _plain_difference(bundle, graph.path, graph.plain_path)  # type: ignore[misc]
        elif graph.assignment is None and graph.variant != "reference":
            yield graph.path, lambda graph=graph: _assignments_difference(bundle, graph)  # type: ignore[misc]
    if manifest.layout == "shared":
        yield f"{PLAN_FOLDER}/{STORE_NAME}", lambda: _store_difference(bundle)


def _differ(what: str, got: object, expected: object) -> str | None:
    return None if got == expected else f"{what}: got {got!r:.80}, the exporter had {expected!r:.80}"


def _guidance_difference(manifest: Manifest, exported: Exported) -> str | None:
    names = ("guidance", "guidance_2", "rescaled_guidance")
    found = (_differ(name, getattr(manifest, name), getattr(exported, name)) for name in names)
    return next((difference for difference in found if difference is not None), None)


def _policy_difference(bundle: BundleFiles, exported: Exported) -> str | None:
    got, expected = bundle.policy, exported.policy
    if got == expected:
        return None
    if (got.layers, got.steps) == (expected.layers, expected.steps):
        for step in range(got.steps):
            own, other = got.formats_at(step), expected.formats_at(step)
            for layer in got.layers:
                if own.get(layer) != other.get(layer):
                    names = (None if fmt is None else fmt.name for fmt in (own.get(layer), other.get(layer)))
                    return _differ(f"step {step}, layer '{layer}'", *names)
    return "the policy is for another model, other layers or another order of assignments than the exporter had"


def _schedule_difference(got: ScheduleRecord, expected: ScheduleRecord) -> str | None:
    for name in ("sigmas", "timesteps", "updates"):
        own, other = getattr(got, name), getattr(expected, name)
        if len(own) != len(other):
            return _differ(f"length of {name}", len(own), len(other))
        for step, pair in enumerate(zip(own, other, strict=True)):
            if pair[0] != pair[1]:
                return _differ(f"{name}, step {step}", *pair)
    experts = _differ("experts", got.experts, expected.experts)
    return experts or _differ("configuration of the scheduler", got.scheduler_config, expected.scheduler_config)


def _sizes_difference(bundle: BundleFiles, exported: Exported) -> str | None:
    got = {shape.name: shape.schedule for shape in bundle.manifest.shapes}
    if got.keys() != exported.shapes.keys():
        return _differ("sizes", sorted(got), sorted(exported.shapes))
    pairs = ((name, _schedule_difference(schedule, exported.shapes[name])) for name, schedule in got.items())
    return next((f"{name}: {difference}" for name, difference in pairs if difference is not None), None)


def _scales_difference(bundle: BundleFiles, reference: Reference) -> str | None:
    got, expected = read_arrays(bundle.file(SCALES_NAME)), reference.activation_scales()
    if got.keys() != expected.keys():
        return _differ("formats with scales", sorted(got), sorted(expected))
    for name, table in expected.items():
        own = got[name]
        if (own.shape, own.dtype) != (table.shape, table.dtype):
            return _differ(f"format {name}", f"{own.dtype} {own.shape}", f"{table.dtype} {table.shape}")
        for place in np.argwhere((own != table) & ~(np.isnan(own) & np.isnan(table))):
            where = _place(bundle, place.tolist())
            return _differ(f"format {name}, {where}", own[tuple(place)].item(), table[tuple(place)].item())
    return None


def _place(bundle: BundleFiles, place: Sequence[int]) -> str:
    step, layer = place
    return f"step {step}, layer '{bundle.policy.layers[layer]}'"


def _arrays_difference(bundle: BundleFiles, file: str, exported: Exported) -> str | None:
    got = {name: array_hash(array) for name, array in read_arrays(bundle.file(file)).items()}
    expected = exported.arrays[file]
    if got.keys() != expected.keys():
        return _differ("tensors", sorted(got), sorted(expected))
    return next((f"'{name}' is not what the exporter had" for name in got if got[name] != expected[name]), None)


def _plain_difference(bundle: BundleFiles, path: str, plain: str) -> str | None:
    """Of a graph with local functions and the same without them."""
    own, other = (load_graph(bundle.folder / GRAPH_FOLDER / name) for name in (plain, path))
    module = first_difference(own, other, 0)
    return None if module is None else f"'{plain}' computes '{module}' otherwise than '{path}'"


def _assignments_difference(bundle: BundleFiles, graph: GraphFile) -> str | None:
    """Of the graph of all assignments and the graphs of each, which are compared with PyTorch."""
    if bundle.manifest.layout == "plugin":
        return None
    together = load_graph(bundle.graph_path(graph))
    for own in bundle.index.graphs:
        if own.assignment is None or (own.variant, own.expert) != (graph.variant, graph.expert):
            continue
        place = own.assignment - graph.first_assignment
        module = first_difference(together, load_graph(bundle.graph_path(own)), place)
        if module is not None:
            return f"assignment {own.assignment}: '{module}' is computed otherwise than in '{own.path}'"
    return None


def _store_difference(bundle: BundleFiles) -> str | None:
    names = name_all_weights(bundle.folder / GRAPH_FOLDER, bundle.index)
    store, weights = bundle.folder / PLAN_FOLDER / STORE_NAME, bundle.folder / GRAPH_FOLDER / bundle.index.weights
    return store_difference(store, weights, names)
