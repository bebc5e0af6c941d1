"""Enterprise TensorRT, which no machine of ours has.

The double stands in for its library: TensorRT-RTX's own bindings, whose names and calls are the same, under the other
name and version. What is configured is asked of the real configuration; what the plans are worth nobody knows.
"""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import tensorrt_rtx
import torch
from onnx import TensorProto, helper

from adatsq_trt.engines.backends.base import BatchRange
from adatsq_trt.engines.backends.tensorrt import (
    TensorRTBackend,
    TensorRTOptions,
    load_plugins,
    runs_capability,
    runs_version,
)
from adatsq_trt.engines.backends.tensorrt_steps import plans_here, runnable_plans
from adatsq_trt.engines.bundle import BundleFiles, Manifest, PlanFile
from adatsq_trt.engines.manifest import Compatibility
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.errors import AdatsqError, DependencyError, MismatchError, UserError
from adatsq_trt.formats import TARGETS

BATCH = BatchRange(1, 4, 8)
FLAGS = tensorrt_rtx.BuilderFlag
# TensorRT-RTX takes the timing cache of TensorRT and says that it does nothing with it.
pytestmark = pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")


class RecordedConfig:
    """TensorRT-RTX's configuration, and what was assigned to it: the real one forgets compatible hardware."""

    def __init__(self, real: tensorrt_rtx.IBuilderConfig) -> None:
        self.__dict__.update(real=real, assigned={})

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: object) -> None:
        self.assigned[name] = value
        setattr(self.real, name, value)


class TensorRTDouble(ModuleType):
    """TensorRT-RTX in the place of TensorRT; keeps the configurations and parsers that were made."""

    def __init__(self, version: str = "10.13.2.6") -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.configs: list[RecordedConfig] = []
        self.parsers: list[tensorrt_rtx.OnnxParser] = []
        double = self

        class Builder(tensorrt_rtx.Builder):
            def create_builder_config(self):
                config = super().create_builder_config()
                config.num_compute_capabilities = 1  # without it TensorRT-RTX looks for a GPU
                config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM120, 0)
                double.configs.append(RecordedConfig(config))
                return double.configs[-1]

            def build_serialized_network(self, network, config):
                return super().build_serialized_network(network, config.real)

        class OnnxParser(tensorrt_rtx.OnnxParser):
            def parse_from_file(self, path: str) -> bool:
                double.parsers.append(self)
                return super().parse_from_file(path)

        self.Builder, self.OnnxParser = Builder, OnnxParser

    def __getattr__(self, name: str) -> object:
        return getattr(tensorrt_rtx, name)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> TensorRTDouble:
    """A machine with TensorRT and a GPU of sm120, as far as the code can tell."""
    module = TensorRTDouble()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    return module


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    product = helper.make_graph(
        [helper.make_node("Mul", ["x", "scale"], ["y"])],
        "probe",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    path = tmp_path / "graph.onnx"
    path.write_bytes(onnx.helper.make_model(product, opset_imports=[helper.make_opsetid("", 21)]).SerializeToString())
    return path


def test_by_default_nothing_is_compatible_with_anything(double: TensorRTDouble, graph: Path) -> None:
    assert len(TensorRTBackend().build(graph, TARGETS["sm120"], BATCH)) > 1000
    (config,) = double.configs
    assert not config.get_flag(FLAGS.VERSION_COMPATIBLE)
    assert not config.get_flag(FLAGS.WEIGHT_STREAMING)
    assert config.assigned == {}
    assert config.num_optimization_profiles == 1
    # The parser that was used had the vendor's default flags.
    assert double.parsers[0].get_flag(tensorrt_rtx.OnnxParserFlag.NATIVE_INSTANCENORM)


@pytest.mark.parametrize("hardware", ["same_compute_capability", "ampere_plus"])
def test_other_gpus_and_streamed_weights(double: TensorRTDouble, graph: Path, hardware: str) -> None:
    options = TensorRTOptions(Compatibility(hardware=hardware), weight_streaming=True)
    assert len(TensorRTBackend(options).build(graph, TARGETS["sm120"], BATCH)) > 1000
    (config,) = double.configs
    level = getattr(tensorrt_rtx.HardwareCompatibilityLevel, hardware.upper())
    assert config.assigned == {"hardware_compatibility_level": level}
    assert config.get_flag(FLAGS.WEIGHT_STREAMING)


def test_every_batch_has_an_optimization_profile(double: TensorRTDouble, graph: Path) -> None:
    TensorRTBackend().build(graph, TARGETS["sm120"], BatchRange(1, 64, 64, smaller=(2, 16)))
    assert double.configs[0].num_optimization_profiles == 3


def test_other_versions(double: TensorRTDouble, graph: Path) -> None:
    """The double has no lean runtime to put into the plan, and says so in its own words."""
    backend = TensorRTBackend(TensorRTOptions(Compatibility(versions=True)))
    with pytest.raises(AdatsqError, match=r"TensorRT 10\.13\.2\.6 cannot compile .*libnvinfer_lean"):
        backend.build(graph, TARGETS["sm120"], BATCH)
    assert double.configs[0].get_flag(FLAGS.VERSION_COMPATIBLE)


def test_measured_kernels_are_kept_and_used(double: TensorRTDouble, graph: Path, tmp_path: Path) -> None:
    backend = TensorRTBackend(TensorRTOptions(timing_cache=tmp_path / "cache"))
    backend.build(graph, TARGETS["sm120"], BATCH)
    file = tmp_path / "cache" / "sm120.bin"
    kept = file.read_bytes()
    assert kept
    backend.build(graph, TARGETS["sm120"], BATCH)
    assert bytes(double.configs[1].get_timing_cache().serialize()) == kept


def test_a_cache_that_cannot_be_kept_costs_only_time(
    double: TensorRTDouble, graph: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    backend = TensorRTBackend(TensorRTOptions(timing_cache=tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        assert len(backend.build(graph, TARGETS["sm120"], BATCH)) > 1000
    assert "kernels will be measured again the next time" in caplog.text


def test_a_plugin_library_that_does_not_load_is_refused_before_a_graph_is_read(
    double: TensorRTDouble, graph: Path, tmp_path: Path
) -> None:
    """The registry is TensorRT-RTX's own."""
    library = tmp_path / "libadatsq_plugins.so"
    library.write_bytes(b"no library")
    with pytest.raises(UserError, match=r"cannot load the plugin library '.*libadatsq_plugins\.so'; build it with"):
        TensorRTBackend(TensorRTOptions(plugins=library)).build(graph, TARGETS["sm120"], BATCH)
    assert not double.parsers


def test_a_plugin_that_is_loaded_already_is_none_the_worse() -> None:
    class Registry:
        def load_library(self, path: str) -> None:
            return None

        def get_creator(self, name: str, version: str, namespace: str) -> object:
            return (name, version, namespace)

    load_plugins(Registry(), Path("libadatsq_plugins.so"))


def test_options_that_change_plans_are_part_of_their_key(tmp_path: Path) -> None:
    options = TensorRTOptions()
    libraries = [tmp_path / name for name in ("one.so", "other.so")]
    for library in libraries:
        library.write_bytes(library.name.encode())
    assert len({TensorRTBackend(TensorRTOptions(plugins=library)).settings for library in libraries}) == 2
    compatible = replace(options, compatibility=Compatibility(versions=True))
    streamed, cached = replace(options, weight_streaming=True), replace(options, timing_cache=Path("cache"))
    settings = {TensorRTBackend(o).settings for o in (options, compatible, streamed, cached)}
    assert len(settings) == 3


def test_a_target_that_is_not_here(double: TensorRTDouble, graph: Path) -> None:
    with pytest.raises(MismatchError, match=r"--target sm89: .*which is sm120; pass --target sm120"):
        TensorRTBackend().build(graph, TARGETS["sm89"], BATCH)
    with pytest.raises(MismatchError, match="--target cpu"):
        TensorRTBackend().require_target(TARGETS["cpu"])
    TensorRTBackend(TensorRTOptions(Compatibility(hardware="ampere_plus"))).require_target(TARGETS["sm89"])


def test_what_is_missing_is_said_with_the_next_step(double: TensorRTDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    TensorRTBackend().require()
    double.__version__ = "10.12.0.36"
    with pytest.raises(DependencyError, match=r"10\.12\.0\.36 is installed, expected 10\.13 or newer; run: pip"):
        TensorRTBackend().require()
    double.__version__ = "11.4.1.2"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DependencyError, match=r"PyTorch sees none; .*--backend rtx, which needs none"):
        TensorRTBackend().require()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DependencyError, match=r"pip install 'adatsq-trt\[tensorrt\]'.*--backend rtx"):
        TensorRTBackend().require()


# -------------------------------------------------------------------------------------------- which plans run


@pytest.fixture
def manifest(tiny_bundle: BundleFiles) -> Manifest:
    plans = tuple(
        PlanFile(target=target, assignment=i, path=f"{target}/{i}", bytes=1, max_rows=8)
        for target in ("sm86", "sm89")
        for i in range(2)
    )
    changes = {"backend": "tensorrt", "plans": plans, "versions": {"tensorrt": "10.13.2.6"}}
    return tiny_bundle.manifest.model_copy(update=changes)


def with_compatibility(manifest: Manifest, **fields: object) -> Manifest:
    return manifest.model_copy(update={"compatibility": Compatibility.model_validate(fields)})


def test_the_gpus_own_plans(manifest: Manifest) -> None:
    assert [plan.path for plan in runnable_plans(manifest, "10.13.2.6", 89)] == ["sm89/0", "sm89/1"]
    everywhere = with_compatibility(manifest, hardware="ampere_plus")
    assert [plan.path for plan in runnable_plans(everywhere, "10.13.2.6", 89)] == ["sm89/0", "sm89/1"]
    assert [plan.path for plan in runnable_plans(everywhere, "10.13.2.6", 120)] == ["sm86/0", "sm86/1"]


@pytest.mark.parametrize(
    ("version", "capability", "message"),
    [
        ("10.13.2.6", 120, r"GPU is sm120, the bundle has plans for sm86, sm89; .*--target sm120"),
        ("10.14.1.48", 89, r"of TensorRT 10\.13\.2\.6, 10\.14\.1\.48 is installed.*pip install tensorrt==10\.13\.2\.6"),
    ],
)
def test_plans_for_something_else(manifest: Manifest, version: str, capability: int, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        runnable_plans(manifest, version, capability)


def test_plans_of_another_library(tiny_bundle: BundleFiles) -> None:
    with pytest.raises(MismatchError, match="plans are of rtx, not of TensorRT; run it with backend 'rtx'"):
        runnable_plans(tiny_bundle.manifest, "10.13.2.6", 89)


@pytest.mark.parametrize(
    ("built", "installed", "versions", "runs"),
    [
        ("10.13.2.6", "10.13.2.6", False, True),
        ("10.13.2.6", "10.14.1.48", False, False),
        ("10.13.2.6", "10.14.1.48", True, True),
        ("10.14.1.48", "10.13.2.6", True, False),
        ("10.13.2.6", "11.0.0.1", True, False),
    ],
)
def test_versions(built: str, installed: str, versions: bool, runs: bool) -> None:
    assert runs_version(built, installed, Compatibility(versions=versions)) == runs


def test_capabilities() -> None:
    assert runs_capability(89, 89, Compatibility())
    assert not runs_capability(86, 89, Compatibility(hardware="same_compute_capability"))
    assert runs_capability(86, 120, Compatibility(hardware="ampere_plus"))
    assert not runs_capability(75, 89, Compatibility(hardware="ampere_plus"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
def test_plans_need_library_and_gpu(
    tiny_bundle: BundleFiles, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DependencyError, match="cannot be loaded"):
        plans_here(manifest)
    monkeypatch.setitem(sys.modules, "tensorrt", TensorRTDouble())
    with pytest.raises(DependencyError, match="PyTorch sees none"):
        Bundle.open(tiny_bundle.folder, "tensorrt")


# ------------------------------------------------------------------------------- with TensorRT itself, on a GPU


@pytest.mark.tensorrt
@pytest.mark.parametrize("layout", ["embedded", "shared", "switch"])
def test_plans_compute_what_the_cpu_graphs_do(own_bundle: BundleFiles, layout: str) -> None:
    import numpy as np

    from adatsq_trt.engines.build import build_plans
    from adatsq_trt.engines.bundle import write_manifest
    from adatsq_trt.formats import target_named

    backend = TensorRTBackend()
    backend.require()
    major, minor = torch.cuda.get_device_capability()
    target = target_named(f"sm{major}{minor}")
    plans = build_plans(own_bundle.folder, own_bundle.index, [target], 8, compiler=backend, layout=layout)
    changes = {"plans": plans, "layout": layout, "backend": "tensorrt", "versions": {"tensorrt": backend.version()}}
    write_manifest(own_bundle.folder, own_bundle.manifest.model_copy(update=changes))
    latents = []
    for name in ("tensorrt", "onnxruntime"):
        with Bundle.open(own_bundle.folder, name) as bundle:
            latents.append(bundle.denoise(bundle.noise([1, 2]), bundle.conditioning([0, 1])))
    assert np.linalg.norm(latents[0] - latents[1]) < 0.05 * np.linalg.norm(latents[1])
