"""The bundle: a folder with graphs, plans, scales and prompts, and a manifest that vouches for every file.

The manifest is written last: without it there is no bundle. Nothing is deserialized before its hash is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from adatsq_trt.engines.manifest import ImageSpec as ImageSpec
from adatsq_trt.engines.manifest import Layout as Layout
from adatsq_trt.engines.manifest import Manifest as Manifest
from adatsq_trt.engines.manifest import PlanFile as PlanFile
from adatsq_trt.engines.manifest import ScheduleRecord as ScheduleRecord
from adatsq_trt.engines.manifest import ShapeRecord as ShapeRecord
from adatsq_trt.errors import DamagedFileError, MissingFileError, UserError
from adatsq_trt.files import read_json_model, sha256, write_json_model
from adatsq_trt.formats import PLUGIN_LAYOUT, Target
from adatsq_trt.graph_index import INDEX_NAME, GraphFile, GraphIndex, TensorSignature
from adatsq_trt.policy import Policy
from adatsq_trt.schedule import Schedule

MANIFEST_NAME = "manifest.json"
BUNDLE_NAME = "bundle"
POLICY_NAME = "policy.json"
GRAPH_FOLDER = "onnx"
PLAN_FOLDER = "plans"
PLUGIN_LIBRARY = f"{PLAN_FOLDER}/libadatsq_plugins.so"
PACKED_SUFFIX = ".xz"
SCALES_NAME = "activation_scales.safetensors"
PROMPTS_NAME = "prompts.safetensors"
POSITIONS_NAME = "positions.safetensors"
VAE_FOLDER = "vae"
REFERENCE_NAME = "check/reference.safetensors"
CONDITIONAL, UNCONDITIONAL = "conditional.", "unconditional."  # what the names of stored prompts start with

# The next step that messages name.
REBUILD = "run 'adatsq-trt build engine' again"


def plan_path(target: Target, assignment: int | None, layout: Layout) -> str:
    """Where a plan lies, relative to the bundle; None stands for the plan of all assignments."""
    name = layout if assignment is None else f"assignment_{assignment:03d}"
    return f"{PLAN_FOLDER}/{target.name}/{name}.plan{PACKED_SUFFIX if layout == 'shared' else ''}"


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file of the bundle and write the manifest: the act that makes a folder a bundle.

    Args:
        folder: holds all other files already.
        manifest: its `files` are replaced.

    Raises:
        OutputError: the folder cannot be written.
    """
    complete = manifest.model_copy(update={"files": {name: sha256(folder / name) for name in _contents(folder)}})
    write_json_model(folder / MANIFEST_NAME, complete)
    return complete


def _contents(folder: Path) -> list[str]:
    """All files but the manifest and what an interrupted write left behind (hidden names)."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return sorted(name for name in names if name != MANIFEST_NAME)


@dataclass(frozen=True)
class BundleFiles:
    """An opened bundle.

    Attributes:
        folder: its folder.
        manifest: its description and its files.
        policy: assignments, and the one of each step.
        index: the ONNX graphs.
    """

    folder: Path
    manifest: Manifest
    policy: Policy
    index: GraphIndex

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> BundleFiles:
        """Open a bundle, or the bundle of a run directory.

        Args:
            path: a bundle or a folder that holds `bundle/`.
            verify: compare every file with its hash before anything but the manifest is read.

        Raises:
            MissingFileError: there is no bundle, or one of its files is gone.
            DamagedFileError: a file is not what the manifest says, or lies outside the bundle.
        """
        folder = _find(path)
        manifest = read_json_model(folder / MANIFEST_NAME, Manifest, REBUILD)
        _require_inside(folder, [*manifest.files, *(plan.path for plan in manifest.plans)])
        _require_listed(manifest, [POLICY_NAME, f"{GRAPH_FOLDER}/{INDEX_NAME}", *(p.path for p in manifest.plans)])
        if verify:
            _require_hashes(folder, manifest)
        index = read_json_model(folder / GRAPH_FOLDER / INDEX_NAME, GraphIndex, REBUILD)
        paths = [path for graph in index.graphs for path in (graph.path, graph.plain_path) if path is not None]
        _require_listed(manifest, [f"{GRAPH_FOLDER}/{name}" for name in (index.weights, *paths)])
        bundle = cls(folder, manifest, read_json_model(folder / POLICY_NAME, Policy, REBUILD), index)
        bundle._require_consistent()
        return bundle

    def _require_consistent(self) -> None:
        steps = self.policy.steps
        for record in (self.manifest.schedule, *(shape.schedule for shape in self.manifest.shapes)):
            if len(record.timesteps) != steps or len(record.sigmas) != steps + 1:
                raise DamagedFileError(
                    f"'{self.folder / MANIFEST_NAME}': the schedule has {len(record.timesteps)} timesteps and "
                    f"{len(record.sigmas)} sigmas, the policy has {steps} steps; {REBUILD}"
                )
        for plan in self.manifest.plans if self.manifest.layout == PLUGIN_LAYOUT else ():
            sizes = sum(len(shape.batches) for shape in self.manifest.shapes) or 1
            got, expected = len(plan.profile_rows) or 1, sizes * len(self.policy.assignments)
            if got != expected:
                raise DamagedFileError(
                    f"'{self.folder / MANIFEST_NAME}': '{plan.path}' has {got} optimization profiles, expected "
                    f"{expected}, {sizes} for each assignment; {REBUILD}"
                )
        self._require_experts()
        self._require_slots()
        for graph in self.index.graphs:
            strange = [f"a scale of layer '{layer}'" for layer in graph.scale_inputs if layer not in self.policy.layers]
            if graph.assignment not in (None, *range(len(self.policy.assignments))):
                strange.append(f"assignment {graph.assignment}")
            if strange:
                raise DamagedFileError(
                    f"'{self.folder / GRAPH_FOLDER / INDEX_NAME}': '{graph.path}' has {strange[0]}, which the policy "
                    f"does not have; {REBUILD}"
                )

    def _require_slots(self) -> None:
        """Refuse a graph with other inputs for LoRAs than the manifest's."""
        for graph in self.index.graphs:
            got = {signature.name: signature.shape for signature in graph.lora_inputs}
            if got != {name: value.shape for name, value in self._empty_slots.items()}:
                raise DamagedFileError(
                    f"'{self.folder / GRAPH_FOLDER / INDEX_NAME}': '{graph.path}' has other slots for LoRAs than the "
                    f"manifest says; {REBUILD}"
                )

    def _require_experts(self) -> None:
        """Refuse a step whose assignment has formats for layers of another expert than the step's."""
        for step, expert in enumerate(self.manifest.schedule.experts):
            graphs = [g for g in self.index.graphs if g.assignment == self.policy.step_assignments[step]]
            names = [*self.policy.formats_at(step), *(f"{graph.expert}." for graph in graphs)]
            if not names or not all(name.startswith(f"{expert}.") for name in names):
                raise DamagedFileError(
                    f"'{self.folder / MANIFEST_NAME}': step {step} is of '{expert}', and its assignment of another "
                    f"transformer; {REBUILD}"
                )

    def schedule(self, size: Sequence[int] | None = None) -> Schedule:
        """The denoising schedule of a size; None stands for the one that the policy was searched at.

        Raises:
            MismatchError: the bundle does not have that size.
        """
        return self.manifest.shape(size).schedule.read()

    def graph(self, variant: str, assignment: int | None, expert: str | None = None) -> GraphFile:
        """A graph's entry in the index; `expert` as in `GraphIndex.find`.

        Raises:
            DamagedFileError: the index has no such graph.
        """
        try:
            return self.index.find(variant, assignment, expert)
        except KeyError as error:
            raise DamagedFileError(
                f"'{self.folder / GRAPH_FOLDER / INDEX_NAME}' has {error.args[0]}; {REBUILD}"
            ) from error

    @property
    def experts(self) -> tuple[str, ...]:
        """The transformers that it computes, in the order of their steps; "" for the one that most bundles have."""
        return tuple(dict.fromkeys(self.manifest.schedule.experts)) or ("",)

    def expert(self, step: int) -> str:
        """The one that computes a step."""
        return self.manifest.schedule.experts[step] if self.manifest.schedule.experts else ""

    def steps_of(self, expert: str) -> list[int]:
        """The steps of one."""
        return [step for step in range(self.policy.steps) if self.expert(step) == expert]

    def cpu_graph(self, step: int) -> GraphFile:
        """The cpu graph that runs a step.

        Raises:
            DamagedFileError: the index has no such graph.
        """
        return self.assignment_graph("cpu", self.policy.step_assignments[step])

    def assignment_graph(self, variant: str, assignment: int) -> GraphFile:
        """The graph that computes an assignment: its own, or that of all assignments where there is no other.

        Raises:
            DamagedFileError: the index has no such graph.
        """
        together = self.manifest.layout == "plugin"
        return self.graph(variant, None if together else assignment)

    def graph_path(self, graph: GraphFile) -> Path:
        """Where a graph's file lies."""
        return self.folder / GRAPH_FOLDER / graph.path

    def file(self, name: str) -> Path:
        """Where a file lies.

        Args:
            name: relative to the bundle.

        Raises:
            DamagedFileError: the manifest does not vouch for it.
        """
        _require_listed(self.manifest, [name])
        return self.folder / name

    def scales(self, step: int) -> dict[str, np.ndarray]:
        """Activation scales that a step's formats need.

        Returns:
            Input name → float32 [].

        Raises:
            DamagedFileError: a scale that the graph needs is missing or not a positive number.
        """
        formats = self.policy.formats_at(step)
        return {
            signature.name: self._scale(formats[layer].name, step, layer)
            for layer, signature in self.cpu_graph(step).scale_inputs.items()
            if formats[layer].scaled_activation
        }

    def controls(self, graph: GraphFile, step: int, size: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Make a graph's inputs beside rows: positions, a step's formats, and scales; those that nothing reads are 1.

        Slots for LoRAs are empty.

        Args:
            graph: of the step's assignment or of all; the reference takes positions only.
            step: index in the loop.
            size: as `schedule`.

        Raises:
            DamagedFileError: as `scales`.
        """
        controls = {signature.name: np.ones((), np.float32) for signature in graph.scale_inputs.values()}
        if controls:
            controls |= self.scales(step)
        controls |= self.positions(graph, size)
        controls |= {signature.name: self._empty_slots[signature.name] for signature in graph.lora_inputs}
        assignment = self.policy.step_assignments[step] - graph.first_assignment
        if graph.assignment_input is not None:
            controls[graph.assignment_input.name] = np.asarray(assignment, np.int32)
        if graph.selector_input is not None:
            controls[graph.selector_input.name] = np.zeros((1, assignment + 1), np.int32)
        return controls

    def positions(self, graph: GraphFile, size: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Read the inputs that tell a graph for several sizes which it is: input name → float32, without rows.

        Args:
            graph: of any variant.
            size: as `schedule`.

        Raises:
            MismatchError: the bundle does not have that size.
            DamagedFileError: the stored positions are missing or of another shape.
        """
        name = self.manifest.shape(size).name
        return {s.name: self._position(f"{name}.{s.name}", s) for s in graph.position_inputs}

    def _position(self, stored: str, signature: TensorSignature) -> np.ndarray:
        value = self._positions.get(stored)
        fixed = [(axis, n) for axis, n in enumerate(signature.shape) if isinstance(n, int)]
        if (
            value is None
            or value.dtype != np.float32
            or value.ndim != len(signature.shape)
            or any(value.shape[axis] != n for axis, n in fixed)
            or not np.isfinite(value).all()
        ):
            got = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
            raise DamagedFileError(
                f"'{self.folder / POSITIONS_NAME}', '{stored}': got {got}, expected finite float32 "
                f"{list(signature.shape)}; {REBUILD}"
            )
        return value

    @cached_property
    def _empty_slots(self) -> dict[str, np.ndarray]:
        """Zeros for every slot: the same arrays for all steps."""
        slots = self.manifest.lora_slots
        return {} if slots is None else {name: np.zeros(shape, np.float32) for name, shape in slots.shapes.items()}

    @cached_property
    def _positions(self) -> dict[str, np.ndarray]:
        return read_arrays(self.file(POSITIONS_NAME))

    def row_inputs(self, size: Sequence[int] | None = None) -> tuple[TensorSignature, ...]:
        """The denoiser's inputs at a size; a string stands for the number of rows.

        Raises:
            MismatchError: the bundle does not have that size.
        """
        latent = self.manifest.shape(size).latent_shape
        inputs = self.graph("cpu", None).inputs
        return tuple(s.model_copy(update={"shape": (s.shape[0], *latent)}) if _is_open(s) else s for s in inputs)

    def _scale(self, format_name: str, step: int, layer: str) -> np.ndarray:
        table = self._scale_tables.get(format_name)
        shape = (self.policy.steps, len(self.policy.layers))
        if table is None or table.shape != shape or table.dtype != np.float32:
            got = "nothing" if table is None else f"{table.dtype} {list(table.shape)}"
            raise DamagedFileError(
                f"'{self.folder / SCALES_NAME}', format '{format_name}': got {got}, expected float32 {list(shape)}; "
                f"{REBUILD}"
            )
        value = table[step, self.policy.layers.index(layer)]
        if not (np.isfinite(value) and value > 0):
            raise DamagedFileError(
                f"'{self.folder / SCALES_NAME}', format '{format_name}', step {step}, layer '{layer}': got {value}, "
                f"expected a positive number; {REBUILD}"
            )
        return np.asarray(value, dtype=np.float32)

    @cached_property
    def _scale_tables(self) -> dict[str, np.ndarray]:
        return read_arrays(self.file(SCALES_NAME))

    @cached_property
    def prompts(self) -> dict[str, np.ndarray]:
        """Stored conditioning: "conditional.<input>" [prompts, ...], "unconditional.<input>" [1, ...], float32.

        A text that sees its image has a row for each prompt in the unguided branch too.

        Raises:
            DamagedFileError: another number of rows, or numbers that are not finite.
        """
        prompts = read_arrays(self.file(PROMPTS_NAME))
        for name, value in prompts.items():
            shared = name.startswith(UNCONDITIONAL) and name[len(UNCONDITIONAL) :] not in self.manifest.image_texts
            rows = 1 if shared else self.manifest.prompts
            if value.shape[:1] != (rows,) or value.dtype != np.float32 or not np.isfinite(value).all():
                raise DamagedFileError(
                    f"'{self.folder / PROMPTS_NAME}', '{name}': got {value.dtype} {list(value.shape)}, expected {rows} "
                    f"rows of finite float32 numbers; {REBUILD}"
                )
        return prompts

    @property
    def two_branches(self) -> bool:
        """Whether guidance combines a prediction with the prompt and one without."""
        return any(name.startswith(UNCONDITIONAL) for name in self.prompts)

    @cached_property
    def reference(self) -> dict[str, np.ndarray]:
        """PyTorch's inputs and outputs: "step_003.input.<graph input>" and "step_003.output" for every step."""
        return read_arrays(self.file(REFERENCE_NAME))


def _is_open(signature: TensorSignature) -> bool:
    """Whether an input is the latent of a graph for several sizes: the one that grows with them."""
    return any(isinstance(size, str) for size in signature.shape[1:])


def _find(path: Path) -> Path:
    for folder in (path, path / BUNDLE_NAME):
        if (folder / MANIFEST_NAME).is_file():
            return folder
    raise MissingFileError(
        f"'{path}' is not a bundle and holds none: neither '{MANIFEST_NAME}' nor '{BUNDLE_NAME}/{MANIFEST_NAME}' "
        "is in it; run 'adatsq-trt build engine' with this folder as --output, or check the path"
    )


def _require_inside(folder: Path, names: Iterable[str]) -> None:
    """Refuse paths that lead out of the bundle, by `..`, by root or by link."""
    root = folder.resolve()
    for name in names:
        pure = PurePosixPath(name)
        escapes = pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts
        if escapes or not (root / pure).resolve().is_relative_to(root):
            raise DamagedFileError(
                f"'{folder / MANIFEST_NAME}': got path '{name}', expected a path inside the bundle; "
                "get the bundle from a source that you trust"
            )


def _require_listed(manifest: Manifest, names: Iterable[str]) -> None:
    for name in names:
        if name not in manifest.files:
            raise DamagedFileError(f"the bundle's manifest has no hash for '{name}', so it is not read; {REBUILD}")


def _require_hashes(folder: Path, manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise MissingFileError(f"the bundle's file '{path}' is gone; {REBUILD}")
        got = sha256(path)
        if got != expected:
            raise DamagedFileError(
                f"the bundle's file '{path}' was altered: got sha256 {got}, expected {expected}; {REBUILD}"
            )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read safetensors without loading PyTorch.

    Raises:
        MissingFileError: no such file.
        DamagedFileError: truncated or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise MissingFileError(f"the bundle's file '{path}' is gone; {REBUILD}")
    try:
        return load_file(path)
    # The last two where NumPy lacks the type of a tensor.
    except (SafetensorError, ValueError, OSError, AttributeError, TypeError) as error:
        raise DamagedFileError(f"'{path}' is not a complete safetensors file ({error}); {REBUILD}") from error


def prompt_number(bundle: BundleFiles, prompt: str) -> int:
    """The number of a prompt that is given by its text or by that number.

    Raises:
        UserError: the bundle holds no such prompt.
    """
    texts = bundle.manifest.prompt_texts
    if prompt in texts:
        return texts.index(prompt)
    try:
        number = int(prompt)
    except ValueError:
        raise UserError(
            f"prompt '{prompt}': not one of the {bundle.manifest.prompts} that the bundle holds; choose one of "
            f"\"prompt_texts\" in '{bundle.folder / MANIFEST_NAME}', or its number"
        ) from None
    require_prompts(bundle, [number])
    return number


def require_prompts(bundle: BundleFiles, prompts: Iterable[int]) -> None:
    """Refuse prompts that the bundle does not hold.

    Raises:
        UserError: says how many there are.
    """
    outside = [p for p in prompts if not 0 <= p < bundle.manifest.prompts]
    if outside:
        raise UserError(
            f"prompt {outside[0]}: the bundle holds prompts 0 to {bundle.manifest.prompts - 1}; choose among these"
        )
