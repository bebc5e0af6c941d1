"""Checkpoints as users bring them go from a folder to engines with one command."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image

from adatsq_trt.checkpoints.prompts import default_prompts
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.models import stored
from tests.lora_dialects import READ
from tests.tiny_checkpoints import (
    HEIGHT,
    WIDTH,
    make_flux_pipeline,
    make_wan_pipeline,
    make_z_image_pipeline,
    save_lora,
)

PROMPTS = ("a red and green", "three", "seven red")
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


class Checkpoint:
    """A saved pipeline, a file of prompts, and the options of a small build."""

    def __init__(self, folder: Path, pipe: DiffusionPipeline, *options: str | Path) -> None:
        self.folder, self.prompts = folder / "tiny", folder / "prompts.txt"
        pipe.save_pretrained(self.folder)
        self.prompts.write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
        size = ("--height", str(HEIGHT), "--width", str(WIDTH), "--prompts", self.prompts)
        effort = ("--steps", "2", "--beam", "1", "--candidates", "1", "--calibration-samples", "2")
        judged = ("--selection-samples", "3", "--held-out-samples", "1")  # a sample for each prompt
        self.options = (*size, "--formats", "fp8,bf16", *effort, *judged, *options)

    def build(self, *more: str | Path) -> tuple[str | Path, ...]:
        """Arguments of the command that builds plans for Blackwell."""
        return ("build", "engine", self.folder, "--target", "sm120", *self.options, *more)


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("flux"), make_flux_pipeline())


@pytest.fixture(scope="session")
def flux_run(flux: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with a LoRA, and with slots for others."""
    from tests.cli.conftest import CommandLine

    folder = tmp_path_factory.mktemp("flux-run")
    lora = save_lora(folder / "style.safetensors")
    given = ("--lora", f"{lora}:0.5", "--lora-slots", "8", "--output", folder / "run")
    assert CommandLine.here(*flux.build(*given)) == 0
    return folder / "run"


def plans(run: Path) -> list[Path]:
    return [file for file in (run / "bundle" / "plans" / "sm120").glob("*.plan") if file.stat().st_size]


def test_a_flux_pipeline_with_a_lora_goes_from_folder_to_engines(cli, flux: Checkpoint, flux_run: Path) -> None:
    assert plans(flux_run)
    settings = json.loads((flux_run / "settings.json").read_text())
    assert (settings["model"], settings["pipeline"]["path"]) == ("tiny", str(flux.folder))
    assert settings["pipeline"]["loras"] == [f"{flux_run.parent / 'style.safetensors'}:0.5"]
    assert json.loads((flux_run / "summary.json").read_text())["stages"]["embed"]["seconds"] > 0
    manifest = BundleFiles.open(flux_run).manifest
    assert manifest.prompt_texts == PROMPTS
    assert {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"} <= set(manifest.files)


def test_pictures_are_decoded_by_the_vae(cli, flux: Checkpoint, flux_run: Path, tmp_path: Path) -> None:
    """The bundle's full-precision loop draws what the pipeline with its fused LoRA draws."""
    with Bundle.open(flux_run) as bundle:
        latents = bundle.denoise(bundle.noise([7]), bundle.conditioning([1]), quantized=False)
        image = bundle.decode(latents)[0]
        noise = bundle.noise([7])
    assert image.shape == (HEIGHT, WIDTH, 3)
    pipe = FluxPipeline.from_pretrained(flux.folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        size, loop = {"height": HEIGHT, "width": WIDTH}, {"num_inference_steps": 2, "guidance_scale": 3.5}
        return pipe(PROMPTS[1], **size, **loop, latents=torch.from_numpy(noise), output_type="np").images[0]

    without = draw()
    pipe.load_lora_weights(flux_run.parent, weight_name="style.safetensors", local_files_only=True)
    pipe.fuse_lora(lora_scale=0.5, components=["transformer"])
    expected = draw()
    assert np.abs(image - expected).max() < 0.01  # weights in bfloat16
    assert np.abs(image - expected).mean() < np.abs(image - without).mean() / 2

    sheet = tmp_path / "sheet.png"
    assert cli("generate", flux_run, "--samples", "2", "--prompt", PROMPTS[2], "--output", sheet).code == 0
    assert Image.open(sheet).size[0] > 0


def test_other_loras_are_loaded_when_pictures_are_drawn(cli, flux_run: Path, tmp_path: Path) -> None:
    """Beside the one that is fused: in what the policy draws and in full precision."""
    files = [save_lora(tmp_path / f"{seed}.safetensors", seed, rank=5) for seed in (1, 2)]
    sheets = {name: tmp_path / f"{name}.png" for name in ("without", "none", "with")}
    ask = ("generate", flux_run, "--samples", "1")
    assert cli(*ask, "--output", sheets["without"]).code == 0
    assert cli(*ask, "--lora", f"{files[0]}:0", "--output", sheets["none"]).code == 0
    ended = cli(*ask, "--lora", f"{files[0]}:8", "--output", sheets["with"])
    assert f"LoRA '{files[0]}': 6 of 6 keys applied to 3 layers, scale 8" in " ".join(ended.err.split())
    without, none, drawn = (np.asarray(Image.open(file)).astype(int) for file in sheets.values())
    np.testing.assert_array_equal(none, without)
    rows = np.abs(drawn - without).max(axis=(1, 2)).nonzero()[0]
    assert rows.min() < len(without) / 2 < rows.max(), "one picture above the other"
    ended = cli(*ask, "--lora", files[0], "--lora", files[1])
    assert ended.code == 2
    assert "together with 5 of those that are loaded, the bundle's slots have rank 8" in ended.err


def test_slots_compile_to_inputs_of_plans(flux_run: Path) -> None:
    """In 16 bits, of all layers; the check compares the graphs with empty slots."""
    files = BundleFiles.open(flux_run)
    slots, graph = files.manifest.lora_slots, files.graph("target", 0)
    assert slots is not None
    assert tuple(slots.layers) == files.policy.layers
    assert (slots.pipeline, slots.rank) == ("FluxPipeline", 8)
    assert {(s.name, s.shape) for s in graph.lora_inputs} == set(slots.shapes.items())
    assert {s.dtype for s in graph.lora_inputs} == {"bfloat16"}


@pytest.mark.slow
def test_the_check_compares_target_graphs_with_slots(cli, flux_run: Path) -> None:
    assert cli("check", flux_run).code == 0


def test_report_and_inspect_read_such_a_run(cli, flux_run: Path, tmp_path: Path) -> None:
    assert cli("report", flux_run, "--output", tmp_path / "report.html").code == 0
    assert "tiny" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert cli("inspect", flux_run).code == 0


def test_a_second_build_runs_no_stage(cli, flux: Checkpoint, flux_run: Path) -> None:
    before = cli.state(flux_run / "embed") | cli.state(flux_run / "bundle")
    lora = f"{flux_run.parent / 'style.safetensors'}:0.5"
    assert cli(*flux.build("--lora", lora, "--lora-slots", "8", "--output", flux_run)).warnings == []
    assert cli.state(flux_run / "embed") | cli.state(flux_run / "bundle") == before


@pytest.mark.parametrize(
    ("make", "dtype", "stage", "options"),
    [
        (make_flux_pipeline, torch.bfloat16, "export", ()),
        (make_flux_pipeline, torch.bfloat16, "search", ("--transform", "balance-low-rank")),
        # In a Wan some weights are float32 in a graph of 16 bits.
        (make_wan_pipeline, torch.float32, "export", ("--frames", "5", "--guidance", "1")),
    ],
)
def test_weights_that_stay_on_disk_give_the_same_bytes(
    cli, monkeypatch, make: Callable, dtype: torch.dtype, stage: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    pipe, written = make(), []
    pipe.transformer.to(dtype)
    checkpoint = Checkpoint(tmp_path, pipe, "--simulate", "--formats", "w4a4,w8a8", *options)
    for least in (1, 10**9):
        monkeypatch.setattr(stored, "LEAST_NUMBERS", least)
        run = tmp_path / f"run-{least}"
        assert cli(stage, checkpoint.folder, *checkpoint.options, "--output", run).code == 0
        files = [file for file in sorted(run.rglob("*")) if file.suffix in (".safetensors", ".onnx", ".data")]
        written.append({file.relative_to(run): file.read_bytes() for file in [*files, run / "search" / "policy.json"]})
    assert len(written[0]) > 20
    assert [name for name, content in written[0].items() if content != written[1].get(name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z-image", "wan"])
def test_other_pipelines_go_from_folder_to_engines(cli, name: str, tmp_path: Path) -> None:
    checkpoint = (
        Checkpoint(tmp_path, make_z_image_pipeline())
        if name == "z-image"
        else Checkpoint(tmp_path, make_wan_pipeline(), "--frames", "5")
    )
    run, lora = tmp_path / "run", tmp_path / "lora.safetensors"
    ended = cli(*checkpoint.build("--lora-slots", "4", "--output", run))
    assert ended.code == 0, ended.err
    assert plans(run)
    with Bundle.open(run) as bundle:
        images = bundle.decode(bundle.denoise(bundle.noise([1]), bundle.conditioning([0])))
    assert images.shape == ((1, HEIGHT, WIDTH, 3) if name == "z-image" else (1, 5, HEIGHT, WIDTH, 3))
    # One product for q, k and v beside a layer without a slot; and one of the authors' names.
    _, make = READ["ComfyUI, Z-Image" if name == "z-image" else "ComfyUI, Wan"]
    write_tensors(lora, make()[0])
    ended = cli("generate", run, "--samples", "1", "--lora", lora, *(["--lora-partial"] if name == "z-image" else []))
    said = "6 of 9 keys applied to 4 layers" if name == "z-image" else "3 of 3 keys applied to 1 layers"
    assert said in " ".join(ended.err.split())
    assert (run / "samples-with-lora.png").is_file()
    if name == "z-image":
        message = "3 of its 9 keys change what has no slot in the bundle, such as 'diffusion_model.x_embedder"
        assert message in cli("generate", run, "--lora", lora).refusal


# ------------------------------------------------------------------------------------------------ bad input


def test_options_of_checkpoints_are_refused_for_a_model_of_the_zoo(cli, tmp_path: Path) -> None:
    for option in (("--height", "64"), ("--lora", "x.safetensors"), ("--base", "x"), ("--frames", "5")):
        ended = cli(*cli.build, *option, "--output", tmp_path / "run")
        assert f"{option[0]}: model 'digits-flux' of the zoo is complete and takes none" in ended.refusal
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt; write one in each line"),
        (b" \n\n\t\n", "holds no prompt; write one in each line"),
        (b"a red\nf\xfcnf\n", "line 2: byte 0xfc is not UTF-8"),
        (None, "does not exist; give a text file"),
    ],
)
def test_prompt_files_that_cannot_work(
    cli, flux: Checkpoint, tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    ended = cli(*flux.build("--prompts", file, "--output", tmp_path / "run"))
    assert message in ended.refusal
    assert not (tmp_path / "run").exists()


def test_only_as_many_prompts_are_encoded_as_are_drawn(cli, flux: Checkpoint, tmp_path: Path) -> None:
    """The largest batch has three samples; ten thousand prompts would take minutes."""
    file, run = tmp_path / "prompts.txt", tmp_path / "run"
    file.write_text("".join(f"{name}\n" for name in (*PROMPTS, *(f"a red {i}" for i in range(10_000)))))
    samples = ("--calibration-samples", "2", "--selection-samples", "3", "--held-out-samples", "1")
    ended = cli("calibrate", *flux.build("--prompts", file, *samples, "--output", run)[2:])
    assert ended.code == 0, ended.err
    assert "the first 3 of 10003 prompts are drawn, encoded and in the bundle" in ended.err
    assert len(read_tensors(run / "embed" / "encodings.safetensors")["tokens"]) == 3 + 1
    assert json.loads((run / "settings.json").read_text())["pipeline"]["prompts"] == list(PROMPTS)


def test_damaged_weights_leave_no_run(cli, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, make_flux_pipeline())
    file = checkpoint.folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-9])
    assert "is not a complete safetensors file" in cli(*checkpoint.build("--output", tmp_path / "run")).refusal
    assert not (tmp_path / "run").exists()


def test_activations_that_are_not_finite_name_layer_and_step_and_the_run_goes_on(cli, tmp_path: Path) -> None:
    checkpoint, run = Checkpoint(tmp_path, make_flux_pipeline()), tmp_path / "run"
    file = checkpoint.folder / WEIGHTS
    whole, tensors = file.read_bytes(), read_tensors(file)
    tensors["single_transformer_blocks.0.attn.to_k.weight"] *= 1e30
    tensors["transformer_blocks.0.ff.net.2.weight"] *= 1e30
    write_tensors(file, tensors)
    message = cli("calibrate", *checkpoint.build("--output", run)[2:]).refusal
    assert "step 0: in full precision layer '" in message
    assert "gives NaN or infinite activations for the prompt 'a red and green'" in message
    assert not (run / "calibrate" / "trajectory.safetensors").exists()
    encodings = cli.state(run / "embed")
    file.write_bytes(whole)
    assert cli("calibrate", *checkpoint.build("--output", run)[2:]).code == 0
    assert cli.state(run / "embed") == encodings


def test_there_are_128_different_prompts() -> None:
    prompts = default_prompts()
    assert len(prompts) == len(set(prompts)) == 128
    assert all(prompt == prompt.strip() and prompt.isascii() for prompt in prompts)
    assert max(len(prompt.split()) for prompt in prompts) > 4 * min(len(prompt.split()) for prompt in prompts)
