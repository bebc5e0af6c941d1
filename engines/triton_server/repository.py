"""Write a model repository for Triton server from bundles."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adatsq_trt import __version__
from adatsq_trt.engines.backends.selection import BackendName
from adatsq_trt.engines.bundle import MANIFEST_NAME, BundleFiles, Manifest
from adatsq_trt.engines.runtime import TIME_INPUT
from adatsq_trt.engines.triton_server.pipeline import PIPELINE_NAME, place_pipeline, require_pipeline
from adatsq_trt.engines.triton_server.requests import MAX_GUIDANCE
from adatsq_trt.engines.triton_server.writing import dims, fill, require_names, whole_folder
from adatsq_trt.errors import UserError
from adatsq_trt.files import sha256

IMAGE = "nvcr.io/nvidia/tritonserver:25.10-py3"
MAX_SAMPLES = 32
_REQUIREMENTS = "numpy nvidia-ml-py onnxruntime-gpu pillow pydantic safetensors"
_VAE_REQUIREMENTS = "accelerate diffusers"
_PIPELINE_REQUIREMENTS = f"{_VAE_REQUIREMENTS} transformers"
_RTX_LIBRARY = "tensorrt-rtx"
_PROBE = Path(__file__).with_name("probe.py")
_ALL_GPUS = "{ driver: nvidia, count: all, capabilities: [gpu] }"
_GPUS = f"    deploy: {{ resources: {{ reservations: {{ devices: [{_ALL_GPUS}] }} }} }}\n"
_ON_GPU = "kind: KIND_GPU gpus: [ 0 ]"
_INSTANCES: dict[BackendName, str] = {
    "auto": "kind: KIND_AUTO",
    "rtx": _ON_GPU,
    "tensorrt": _ON_GPU,
    "cuda": _ON_GPU,
    "onnxruntime": "kind: KIND_CPU",
}
_QUEUE_DELAY_US = 200
_TEXT = 'Its parameter "text" is the prompt in words, the same for all samples, and then there is no input "prompt".'
_STORED = 'Its parameter "text" may be the text of a prompt that the bundle holds; then there is no input "prompt".'


@dataclass(frozen=True)
class Deployment:
    """A bundle and how it is served.

    Attributes:
        name: of the loop model.
        files: the bundle.
        step_model: also write a model for single steps, `name` + "_step"; it holds the weights once more.
        max_samples: most samples of one call of the denoiser.
        backend: the one that runs it, as for `Bundle.open`; "auto" is decided on the machine that serves.
        pipeline: folder of the diffusers pipeline that the bundle was built from; its text encoders are served with it.
    """

    name: str
    files: BundleFiles
    step_model: bool = False
    max_samples: int = MAX_SAMPLES
    backend: BackendName = "auto"
    pipeline: Path | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """Names of its models."""
        return (self.name, f"{self.name}_step") if self.step_model else (self.name,)

    @property
    def rtx_version(self) -> str | None:
        """Version of TensorRT-RTX that the server needs; None where it runs no plans of it."""
        manifest = self.files.manifest
        runs_plans = self.backend == "rtx" or (self.backend == "auto" and bool(manifest.plans))
        return manifest.versions.get(_RTX_LIBRARY) if runs_plans else None

    @property
    def on_gpu(self) -> bool:
        """Whether its container is given the GPUs."""
        return _INSTANCES[self.backend] == _ON_GPU or self.rtx_version is not None

    def require_plans(self) -> None:
        """Refuse what its plans cannot do.

        Raises:
            UserError: there are no plans, nobody knows what compiled them, or they take fewer rows.
        """
        manifest = self.files.manifest
        own = manifest.profiles_of(manifest.shape())
        rows = min((plan.rows_at(own) for plan in manifest.plans), default=0)
        if self.backend == "rtx" and not rows:
            raise UserError(
                f"'{self.files.folder}' has no plans for --backend rtx; build it with a GPU as --target, or deploy it "
                "with --backend onnxruntime"
            )
        if self.backend == "rtx" and _RTX_LIBRARY not in self.files.manifest.versions:
            raise UserError(
                f"the manifest of '{self.files.folder}' does not say which version of {_RTX_LIBRARY} compiled its "
                "plans; build it again"
            )
        if self.backend == "rtx" and 2 * self.max_samples > rows:
            raise UserError(
                f"--max-samples {self.max_samples}: with both branches of guidance these are {2 * self.max_samples} "
                f"rows, the plans take {rows}; pass --max-samples {rows // 2}"
            )


def write_repository(deployments: Sequence[Deployment], output: Path, link: bool = False) -> None:
    """Write a model repository whole or not at all.

    Args:
        deployments: at least one.
        output: a folder that does not exist.
        link: link to the bundles and pipelines instead of copying them.

    Raises:
        UserError: names that the server does not take, or that are given twice; a backend or a pipeline that a bundle
            is not for.
        OutputError: the folder exists or cannot be written.
    """
    require_names([name for deployment in deployments for name in deployment.models])
    for deployment in deployments:
        if (call := deployment.files.manifest.image_call) is not None:
            raise no_images_served(deployment.files.folder, call.pipeline)
        deployment.require_plans()
        if deployment.pipeline is not None:
            require_pipeline(deployment.pipeline, deployment.files)
    requirements = _requirements(deployments)
    with whole_folder(output) as scratch:
        for deployment in deployments:
            _write_models(deployment, scratch, link)
        _write_documents(deployments, requirements, scratch)


def no_images_served(place: Path, pipeline: str) -> UserError:
    """Make the refusal of a model that takes an image beside the prompt, which requests cannot carry.

    Args:
        place: of the bundle or the pipeline.
        pipeline: its class.
    """
    return UserError(
        f"'{place}' is of a {pipeline}, which takes an image beside the prompt, and requests to the server carry none; "
        "run its bundle with 'adatsq-trt generate --image', or in the pipeline"
    )


def curl_line(name: str, address: str = "localhost:8000", text: bool = False) -> str:
    """A shell command that asks a loop model, with a text or with a prompt's number, and writes picture.png."""
    decode = "import json, sys; sys.stdout.buffer.write(bytes(json.load(sys.stdin)['png']))"
    body = '{"seed": 7, "parameters": {"text": "a red bicycle"}}' if text else '{"prompt": 0, "seed": 7}'
    ask = f"curl --silent --data '{body}' {address}/v2/models/{name}/generate"
    return f'{ask} | python3 -c "{decode}" > picture.png'


def _write_models(deployment: Deployment, repository: Path, link: bool) -> None:
    source, target = deployment.files.folder.resolve(), repository / deployment.name / "1" / "bundle"
    target.parent.mkdir(parents=True)
    if link:
        target.symlink_to(source, target_is_directory=True)
    else:
        for name in (MANIFEST_NAME, *deployment.files.manifest.files):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
    if deployment.pipeline is not None:
        place_pipeline(deployment.pipeline, deployment.files, target.parent, link)
    common = _values(deployment)
    _write_model(repository / deployment.name, "loop", common)
    if deployment.step_model:
        rows = 2 * deployment.max_samples
        own = {"inputs": _step_inputs(deployment.files), "max_rows": rows, "delay_us": _QUEUE_DELAY_US}
        loop, name = deployment.models
        _write_model(repository / name, "step", {**common, **own, "name": name, "loop_name": loop})


def _write_model(folder: Path, kind: str, values: dict[str, object]) -> None:
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(fill(f"{kind}.pbtxt", values), encoding="utf-8")
    module = f"adatsq_trt.engines.triton_server.{kind}_model"
    text = f'"""What Triton server loads."""\n\nfrom {module} import TritonPythonModel as TritonPythonModel\n'
    (folder / "1" / "model.py").write_text(text, encoding="utf-8")


def _values(deployment: Deployment) -> dict[str, object]:
    manifest, policy = deployment.files.manifest, deployment.files.policy
    axes = ["samples", *(["frames"] if manifest.image.frames else []), "height", "width", "channels"]
    return {
        "name": deployment.name,
        "model": manifest.model,
        "version": __version__,
        "steps": policy.steps,
        "buckets": len(policy.buckets),
        "last_prompt": manifest.prompts - 1,
        "guidance": f"{manifest.guidance:g}",
        "guidance_2": _second_scale(manifest),
        "max_guidance": f"{MAX_GUIDANCE:g}",
        "latent_dims": dims(manifest.latent_shape),
        "image_dims": dims(axes),
        "image_axes": f"[{', '.join(axes)}]",
        "manifest_sha256": sha256(deployment.files.folder / MANIFEST_NAME),
        "max_samples": deployment.max_samples,
        "backend": deployment.backend,
        "instances": _INSTANCES[deployment.backend],
        "text": _TEXT if deployment.pipeline is not None else _STORED,
        "pipeline": f"1/{PIPELINE_NAME}" if deployment.pipeline is not None else "",
    }


def _second_scale(manifest: Manifest) -> str:
    """Describe the input `guidance_2`."""
    if not manifest.schedule.experts:
        return "of a second transformer, which there is not: refused"
    return f"of the second transformer; guidance where that is given, else {manifest.second_guidance:g}"


def _step_inputs(bundle: BundleFiles) -> str:
    """The denoiser's inputs; its time follows from the step."""
    signatures = [s for s in bundle.row_inputs() if s.name != TIME_INPUT]
    lines = [f'  {{ name: "{s.name}" data_type: TYPE_FP32 dims: [ {dims(s.shape[1:])} ] }}' for s in signatures]
    return ",\n".join(lines)


def _write_documents(deployments: Sequence[Deployment], requirements: str, repository: Path) -> None:
    rows = []
    for deployment in deployments:
        manifest = deployment.files.manifest
        rows.append(f"| `{deployment.name}` | the denoising loop of {manifest.model} |")
        if deployment.step_model:
            rows.append(f"| `{deployment.name}_step` | one call of its denoiser, for clients that run the loop |")
    name, gpu = deployments[0].name, any(deployment.on_gpu for deployment in deployments)
    values = {
        "version": __version__,
        "models": "\n".join(rows),
        "name": name,
        "image": IMAGE,
        "curl": curl_line(name, text=deployments[0].pipeline is not None),
    }
    readme = fill("README.md", {**values, "gpus": "--gpus all " if gpu else ""})
    (repository / "README.md").write_text(readme, encoding="utf-8")
    compose = fill("compose.yaml", {"version": __version__, "gpus": _GPUS if gpu else ""})
    (repository / "compose.yaml").write_text(compose, encoding="utf-8")
    shutil.copyfile(_PROBE, repository / _PROBE.name)
    dockerfile = fill("Dockerfile", {"image": IMAGE, "requirements": requirements})
    (repository / "Dockerfile").write_text(dockerfile, encoding="utf-8")


def _requirements(deployments: Sequence[Deployment]) -> str:
    """List the packages that the image needs; plans want the very version of TensorRT-RTX that compiled them."""
    versions = {d.rtx_version for d in deployments if d.rtx_version is not None}
    if len(versions) > 1:
        raise UserError(
            f"the bundles' plans are of TensorRT-RTX {' and '.join(sorted(versions))}, one image holds one; "
            "deploy them into repositories of their own, or build them again"
        )
    needed = [_REQUIREMENTS, *(f"{_RTX_LIBRARY}=={version}" for version in versions)]
    diffusers = ""
    if any(deployment.pipeline is not None for deployment in deployments):
        calls = [deployment.files.manifest.text for deployment in deployments if deployment.pipeline is not None]
        libraries = {call.library for call in calls if call is not None and call.library is not None}
        diffusers = " ".join([_PIPELINE_REQUIREMENTS, *sorted(libraries)])
    elif any(deployment.files.manifest.image.vae for deployment in deployments):
        diffusers = _VAE_REQUIREMENTS
    torch = "torch" if diffusers or any(deployment.on_gpu for deployment in deployments) else ""
    return " ".join(filter(None, [*needed, torch, diffusers]))
