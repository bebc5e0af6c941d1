"""Tests mirror the package: a module has a test file at the mirrored place, or is listed here with the one it has."""

from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Folder of the package → folder of its tests.
FOLDERS = {"adatsq_trt": "tests", "engines": "tests/engines", "export": "tests/export", "plugins": "tests/plugins"}
# Modules that are tested with what uses them: reason → module → its test.
ELSEWHERE: Mapping[str, Mapping[str, str]] = {
    "parts of one operation, tested as it is called": {
        **{
            f"adatsq_trt/calibration/transforms/{name}.py": "tests/calibration/test_transforms.py"
            for name in ("balance", "graph_form", "hadamard", "low_rank", "make", "smooth", "statistics")
        },
        "adatsq_trt/checkpoints/lora_file.py": "tests/checkpoints/test_lora.py",
        "adatsq_trt/checkpoints/lora_strength.py": "tests/checkpoints/test_lora.py",
        "adatsq_trt/checkpoints/tracing.py": "tests/checkpoints/test_families.py",
        "adatsq_trt/checkpoints/weights.py": "tests/checkpoints/test_loading.py",
        "adatsq_trt/checkpoints/requirements.py": "tests/checkpoints/test_loading.py",
        "adatsq_trt/execution/precision.py": "tests/stages/test_search_options.py",
        "adatsq_trt/models/blocks.py": "tests/calibration/test_units.py",
        "adatsq_trt/models/masked.py": "tests/models/test_qwen_image.py",
        "adatsq_trt/models/rotary.py": "tests/models/test_z_image.py",
        "adatsq_trt/models/rounding.py": "tests/models/test_simulated.py",
        "adatsq_trt/transforms.py": "tests/calibration/test_transforms.py",
        "adatsq_trt/report/charts.py": "tests/report/test_page.py",
        "adatsq_trt/report/maps.py": "tests/report/test_page.py",
        "adatsq_trt/report/theme.py": "tests/report/test_page.py",
        "adatsq_trt/zoo/scenes/video_scores.py": "tests/zoo/scenes/test_clips.py",
        "engines/accuracy/blocks.py": "tests/engines/accuracy/test_block_cut.py",
        **{
            f"engines/accuracy/{name}.py": "tests/engines/accuracy/test_check.py"
            for name in ("comparison", "computations", "references", "rows")
        },
        "engines/accuracy/constants.py": "tests/engines/accuracy/test_exact.py",
        "engines/accuracy/first_layer.py": "tests/engines/accuracy/test_separate_layers.py",
        "engines/accuracy/written_formats.py": "tests/engines/accuracy/test_exact.py",
        "engines/backends/selection.py": "tests/engines/test_runtime.py",
        "engines/generation.py": "tests/engines/test_runtime.py",
        "engines/step_clock.py": "tests/engines/test_transformer_pipelines.py",
        "engines/processor.py": "tests/engines/backends/test_int8.py",
        "engines/vae.py": "tests/checkpoints/test_loading.py",
        **{
            f"engines/triton_server/{name}.py": "tests/engines/triton_server/test_repository.py"
            for name in ("parameters", "writing")
        },
        "engines/triton_server/image_api.py": "tests/serving/test_image_api.py",
        "engines/triton_server/step_model.py": "tests/engines/triton_server/test_python_backend.py",
        "engines/triton_server/supervisor.py": "tests/serving/test_dead_models.py",
        "export/constant_hashes.py": "tests/engines/accuracy/test_exact.py",
        "export/emitter.py": "tests/export/test_insert_qdq.py",
        **{f"export/{name}.py": "tests/export/test_insert_transforms.py" for name in ("encode_transform", "fold_rows")},
        **{
            f"export/{name}.py": "tests/export/test_plugin_graphs.py"
            for name in ("insert_plugin", "plugin_function", "plugin_operands")
        },
        "plugins/benchmark.py": "tests/plugins/kernels/test_benchmark.py",
        "plugins/tune.py": "tests/plugins/kernels/test_tune.py",
        **{
            f"plugins/kernels/{name}.py": "tests/plugins/kernels/test_gemms.py"
            for name in ("gemm_float", "gemm_int4", "gemm_int8", "tile")
        },
    },
    "commands and what they print, tested by what a user is promised": {
        "adatsq_trt/cli/backends.py": "tests/cli/test_benchmark.py",
        "adatsq_trt/cli/build_plugins.py": "tests/cli/test_plugins.py",
        "adatsq_trt/cli/check.py": "tests/cli/test_build.py",
        "adatsq_trt/cli/compare.py": "tests/cli/test_build.py",
        "adatsq_trt/cli/generate.py": "tests/cli/test_build.py",
        "adatsq_trt/cli/inspect.py": "tests/cli/test_build.py",
        "adatsq_trt/cli/progress.py": "tests/test_progress.py",
        "adatsq_trt/cli/tables.py": "tests/cli/test_build.py",
    },
    "data, interfaces and tables of names, tested by those who hold them": {
        "adatsq_trt/checkpoints/objects.py": "tests/test_api.py",
        "adatsq_trt/config.py": "tests/cli/test_help.py",
        "adatsq_trt/costs.py": "tests/search/test_dominance.py",
        "adatsq_trt/evaluation/methods.py": "tests/stages/test_evaluate.py",
        "adatsq_trt/graph_index.py": "tests/export/test_graphs.py",
        "adatsq_trt/image_call.py": "tests/stages/test_images.py",
        "adatsq_trt/models/adapter.py": "tests/test_adapter_guide.py",
        "adatsq_trt/models/family.py": "tests/checkpoints/test_families.py",
        "adatsq_trt/models/flux_images.py": "tests/checkpoints/test_images.py",
        "adatsq_trt/models/image_condition.py": "tests/checkpoints/test_images.py",
        "adatsq_trt/models/prompted.py": "tests/models/test_prompts.py",
        "adatsq_trt/report/data.py": "tests/report/test_page.py",
        "adatsq_trt/results.py": "tests/test_api.py",
        "adatsq_trt/settings.py": "tests/stages/test_resolve.py",
        "adatsq_trt/timed_kernels.py": "tests/search/test_costs.py",
        "engines/backends/base.py": "tests/engines/test_build.py",
        "engines/backends/network.py": "tests/engines/backends/test_rtx.py",
        "engines/exported.py": "tests/stages/test_export.py",
        "engines/manifest.py": "tests/engines/test_bundle.py",
        "plugins/catalog.py": "tests/plugins/test_aot.py",
        "plugins/kernels/cases.py": "tests/plugins/kernels/test_gemms.py",
        "plugins/kernels/reference.py": "tests/plugins/kernels/test_gemms.py",
    },
    "calls of a GPU, tested on a stand-in": {
        **{
            f"engines/backends/{name}.py": f"tests/engines/{test}.py"
            for name, test in (
                ("cuda_device", "gpu_runtime/test_stand_in"),
                ("device_steps", "gpu_runtime/test_plan_steps"),
                ("execution_context", "gpu_runtime/test_plan_steps"),
                ("onnxruntime_gpu", "gpu_runtime/test_onnxruntime_gpu"),
                ("plan_controls", "gpu_runtime/test_plan_steps"),
                ("plan_steps", "gpu_runtime/test_plan_steps"),
                ("tensorrt_steps", "backends/test_tensorrt"),
            )
        },
        "adatsq_trt/cli/doctor_gpu.py": "tests/engines/gpu_runtime/test_commands.py",
        "engines/comparison_plans.py": "tests/engines/gpu_runtime/test_commands.py",
        "engines/gpu_report.py": "tests/engines/gpu_runtime/test_commands.py",
    },
}


def listed(elsewhere: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Module → its test."""
    return {module: test for modules in elsewhere.values() for module, test in modules.items()}


def mirrored(module: str) -> str:
    """Where the tests of a module belong."""
    folder, _, rest = module.partition("/")
    place = Path(FOLDERS[folder], rest)
    return (place.parent / f"test_{place.name}").as_posix()


def breaches(root: Path, elsewhere: Mapping[str, str]) -> Iterator[str]:
    """Modules without tests, and entries of the list that are needless or wrong."""
    files = (path for folder in FOLDERS for path in (root / folder).rglob("*.py") if path.name != "__init__.py")
    modules = sorted(path.relative_to(root).as_posix() for path in files)
    for module in modules:
        if not (root / mirrored(module)).is_file() and module not in elsewhere:
            yield f"{module}: no {mirrored(module)}"
    for module, test in elsewhere.items():
        if module not in modules:
            yield f"{module}: does not exist"
        elif (root / mirrored(module)).is_file():
            yield f"{module}: has {mirrored(module)}"
        if not (root / test).is_file():
            yield f"{module}: no {test}"


def test_every_module_has_its_tests() -> None:
    assert list(breaches(ROOT, listed(ELSEWHERE))) == []


def test_every_module_of_the_stages_has_its_own() -> None:
    assert not [module for module in listed(ELSEWHERE) if module.startswith("adatsq_trt/stages/")]


def test_breaches_are_found(tmp_path: Path) -> None:
    for name in ("adatsq_trt/a.py", "export/b.py", "engines/deep/c.py", "tests/test_a.py", "tests/other.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    elsewhere = {
        "adatsq_trt/a.py": "tests/other.py",
        "export/b.py": "tests/gone.py",
        "plugins/gone.py": "tests/other.py",
    }
    assert list(breaches(tmp_path, elsewhere)) == [
        "engines/deep/c.py: no tests/engines/deep/test_c.py",
        "adatsq_trt/a.py: has tests/test_a.py",
        "export/b.py: no tests/gone.py",
        "plugins/gone.py: does not exist",
    ]
