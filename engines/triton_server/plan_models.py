"""Models for Triton server's own TensorRT backend: one for each assignment, one call of the denoiser each.

Only self-contained plans of TensorRT itself can be served so: those of TensorRT-RTX are of another kind, and a stock
model cannot keep the inputs bound through which layout `shared` gets its weights. No server with TensorRT has loaded
these models yet.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from adatsq_trt import __version__
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.triton_server.writing import dims, fill, require_names, whole_folder
from adatsq_trt.errors import UserError
from adatsq_trt.formats import TARGETS
from adatsq_trt.graph_index import TensorSignature

_LIBRARY = "tensorrt"
_TYPES = {"float": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16"}


def write_plan_repository(bundles: Sequence[tuple[str, BundleFiles]], output: Path) -> None:
    """Write a model repository whole or not at all.

    Args:
        bundles: beginning of the names of a bundle's models, and the bundle; at least one.
        output: a folder that does not exist.

    Raises:
        UserError: a bundle whose plans the server's TensorRT backend cannot serve, or of another version of TensorRT
            than the rest; names that the server does not take.
        OutputError: the folder exists or cannot be written.
    """
    require_names([name for name, _ in bundles])
    for _, files in bundles:
        _require_stock(files)
    versions = sorted({files.manifest.versions[_LIBRARY] for _, files in bundles})
    if len(versions) > 1:
        raise UserError(
            f"the bundles' plans are of TensorRT {' and '.join(versions)}, a server has one; deploy them into "
            "repositories of their own, or build them again"
        )
    rows = []
    with whole_folder(output) as scratch:
        for name, files in bundles:
            for assignment in range(len(files.policy.assignments)):
                model = f"{name}_{assignment:03d}"
                _write_model(scratch / model, assignment, files)
                rows.append(f"| `{model}` | {files.manifest.model}, assignment {assignment} |")
        values = {"version": __version__, "models": "\n".join(rows), "tensorrt": versions[0]}
        (scratch / "README.md").write_text(fill("README.plans.md", values), encoding="utf-8")


def _require_stock(files: BundleFiles) -> None:
    manifest = files.manifest
    if manifest.backend != _LIBRARY or not manifest.plans:
        what = f"plans of {manifest.backend}" if manifest.plans else "no plans"
        raise UserError(
            f"'{files.folder}' has {what}, the server's TensorRT backend runs those of {_LIBRARY} only; deploy it with "
            "--backend rtx or --backend onnxruntime"
        )
    if manifest.layout != "embedded":
        raise UserError(
            f"'{files.folder}' has layout {manifest.layout}, the server's TensorRT backend runs embedded only; build "
            "it again with --layout embedded"
        )
    if manifest.shapes:
        raise UserError(
            f"'{files.folder}' has several sizes, whose positions a stock model does not know; build it again without "
            "--shapes, or deploy it with --backend onnxruntime"
        )
    if manifest.lora_slots is not None:
        raise UserError(
            f"'{files.folder}' has slots for LoRAs, which a stock model would be given anew at every call; build it "
            "again without --lora-slots, or deploy it with --backend onnxruntime"
        )
    if _LIBRARY not in manifest.versions:
        raise UserError(
            f"the manifest of '{files.folder}' does not say which version of {_LIBRARY} compiled its plans; build it "
            "again"
        )


def _write_model(folder: Path, assignment: int, files: BundleFiles) -> None:
    """One assignment: its config.pbtxt, and a plan for each target."""
    graph = files.graph("target", assignment)
    plans = {plan.target: plan.path for plan in files.manifest.plans if plan.assignment == assignment}
    (folder / "1").mkdir(parents=True)
    for target, path in plans.items():
        shutil.copyfile(files.folder / path, folder / "1" / f"{target}.plan")
    values = {
        "name": folder.name,
        "model": files.manifest.model,
        "assignment": assignment,
        "version": __version__,
        "inputs": ",\n".join(map(_tensor, [*graph.inputs, *graph.scale_inputs.values()])),
        "outputs": ",\n".join(map(_tensor, graph.outputs)),
        "default_plan": f"{next(iter(plans))}.plan",
        "plans": ",\n".join(f'  {{ key: "{_capability(target)}" value: "{target}.plan" }}' for target in plans),
    }
    (folder / "config.pbtxt").write_text(fill("plan.pbtxt", values), encoding="utf-8")


def _tensor(signature: TensorSignature) -> str:
    """An entry of config.pbtxt, which has no scalars: these are reshaped."""
    shape = f"dims: [ {dims(signature.shape)} ]" if signature.shape else "dims: [ 1 ] reshape { shape: [ ] }"
    return f'  {{ name: "{signature.name}" data_type: {_TYPES[signature.dtype]} {shape} }}'


def _capability(target: str) -> str:
    """A target's compute capability as config.pbtxt has it: "8.9"."""
    return "{}.{}".format(*divmod(TARGETS[target].compute_capability or 0, 10))
