"""Write a model repository for Triton server from bundles."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from tempfile import mkdtemp

from adatsq_trt import __version__
from adatsq_trt.engines.bundle import MANIFEST_NAME, BundleFiles
from adatsq_trt.engines.runtime import TIME_INPUT
from adatsq_trt.errors import OutputError, UserError
from adatsq_trt.files import sha256

IMAGE = "nvcr.io/nvidia/tritonserver:25.10-py3"
MAX_SAMPLES = 32
_REQUIREMENTS = "numpy onnxruntime-gpu pillow pydantic safetensors"
_QUEUE_DELAY_US = 200
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Deployment:
    """A bundle and how it is served.

    Attributes:
        name: of the loop model.
        files: the bundle.
        step_model: also write a model for single steps, `name` + "_step"; it holds the weights once more.
        max_samples: most samples of one call of the denoiser.
    """

    name: str
    files: BundleFiles
    step_model: bool = False
    max_samples: int = MAX_SAMPLES


def write_repository(deployments: Sequence[Deployment], output: Path, link: bool = False) -> None:
    """Write a model repository whole or not at all.

    Args:
        deployments: at least one.
        output: a folder that does not exist.
        link: link to the bundles instead of copying them.

    Raises:
        UserError: names that the server does not take, or that are given twice.
        OutputError: the folder exists or cannot be written.
    """
    _require_names([deployment.name for deployment in deployments])
    if output.exists():
        raise OutputError(f"'{output}' exists; pass another --output, or remove it first")
    scratch = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        for deployment in deployments:
            _write_models(deployment, scratch, link)
        _write_documents(deployments, scratch)
        scratch.chmod(0o755)
        scratch.rename(output)
    except OSError as error:
        raise OutputError(
            f"cannot write '{output}': {error.strerror or error}; choose a folder that is writable and has room"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def curl_line(name: str, address: str = "localhost:8000") -> str:
    """A shell command that asks a loop model for a picture and writes picture.png."""
    decode = "import json, sys; sys.stdout.buffer.write(bytes(json.load(sys.stdin)['png']))"
    ask = f"""curl --silent --data '{{"prompt": 0, "seed": 7}}' {address}/v2/models/{name}/generate"""
    return f'{ask} | python3 -c "{decode}" > picture.png'


def _require_names(names: Sequence[str]) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(f"--name '{name}': expected letters, digits, '_', '.' and '-'; choose such a name")
        if names.count(name) > 1:
            raise UserError(f"two bundles would be served as '{name}'; give each a --name of its own")


def _write_models(deployment: Deployment, repository: Path, link: bool) -> None:
    source, target = deployment.files.folder.resolve(), repository / deployment.name / "1" / "bundle"
    target.parent.mkdir(parents=True)
    if link:
        target.symlink_to(source, target_is_directory=True)
    else:
        for name in (MANIFEST_NAME, *deployment.files.manifest.files):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
    common = _values(deployment)
    _write_model(repository / deployment.name, "loop", common)
    if deployment.step_model:
        rows = 2 * deployment.max_samples
        own = {"inputs": _step_inputs(deployment.files), "max_rows": rows, "delay_us": _QUEUE_DELAY_US}
        name = f"{deployment.name}_step"
        _write_model(repository / name, "step", {**common, **own, "name": name, "loop_name": deployment.name})


def _write_model(folder: Path, kind: str, values: dict[str, object]) -> None:
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(_fill(f"{kind}.pbtxt", values), encoding="utf-8")
    module = f"adatsq_trt.engines.triton_server.{kind}_model"
    text = f'"""Loaded by Triton server; the model is {module}."""\n\nfrom {module} import TritonPythonModel as TritonPythonModel\n'
    (folder / "1" / "model.py").write_text(text, encoding="utf-8")


def _values(deployment: Deployment) -> dict[str, object]:
    manifest, policy = deployment.files.manifest, deployment.files.policy
    return {
        "name": deployment.name,
        "model": manifest.model,
        "version": __version__,
        "steps": policy.steps,
        "buckets": len(policy.buckets),
        "last_prompt": manifest.prompts - 1,
        "guidance": f"{manifest.guidance:g}",
        "latent_dims": _dims((-1, *manifest.latent_shape)),
        "manifest_sha256": sha256(deployment.files.folder / MANIFEST_NAME),
        "max_samples": deployment.max_samples,
    }


def _step_inputs(bundle: BundleFiles) -> str:
    """The denoiser's inputs; its time follows from the step."""
    signatures = [s for s in bundle.graph("cpu", None).inputs if s.name != TIME_INPUT]
    lines = [f'  {{ name: "{s.name}" data_type: TYPE_FP32 dims: [ {_dims(s.shape[1:])} ] }}' for s in signatures]
    return ",\n".join(lines)


def _dims(shape: Sequence[int | str]) -> str:
    return ", ".join(map(str, shape))


def _write_documents(deployments: Sequence[Deployment], repository: Path) -> None:
    rows = []
    for deployment in deployments:
        manifest = deployment.files.manifest
        rows.append(f"| `{deployment.name}` | the denoising loop of {manifest.model} |")
        if deployment.step_model:
            rows.append(f"| `{deployment.name}_step` | one call of its denoiser, for clients that run the loop |")
    name = deployments[0].name
    values = {"version": __version__, "models": "\n".join(rows), "name": name, "curl": curl_line(name)}
    (repository / "README.md").write_text(_fill("README.md", values), encoding="utf-8")
    dockerfile = _fill("Dockerfile", {"image": IMAGE, "requirements": _REQUIREMENTS})
    (repository / "Dockerfile").write_text(dockerfile, encoding="utf-8")


def _fill(template: str, values: dict[str, object]) -> str:
    text = files("adatsq_trt.engines.triton_server").joinpath("templates", template).read_text(encoding="utf-8")
    return Template(text).substitute(values)
