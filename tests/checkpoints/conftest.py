"""Small pipelines that diffusers saved."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from tests.tiny_checkpoints import (
    make_fill_pipeline,
    make_flux_pipeline,
    make_kontext_pipeline,
    make_wan_image_pipeline,
    make_wan_pipeline,
    make_z_image_pipeline,
)
from tests.tiny_chroma import make_chroma_pipeline
from tests.tiny_flux_2 import make_flux_2_pipeline, make_klein_pipeline
from tests.tiny_hunyuan_video import make_hunyuan_video_pipeline
from tests.tiny_ltx import make_ltx_pipeline
from tests.tiny_qwen_image import make_qwen_image_pipeline
from tests.tiny_qwen_image_edit import make_edit_pipeline, make_edit_plus_pipeline
from tests.tiny_stable_diffusion_3 import make_stable_diffusion_3_pipeline

Saved = Callable[[Callable[[], DiffusionPipeline], str], Path]


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Writes what a function makes into a folder of that name, for reading."""

    def write(make: Callable[[], DiffusionPipeline], name: str) -> Path:
        folder = tmp_path_factory.mktemp("checkpoints") / name
        make().save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def saved_flux(save: Saved) -> Path:
    return save(make_flux_pipeline, "tiny-flux")


@pytest.fixture(scope="session")
def saved_kontext(save: Saved) -> Path:
    return save(make_kontext_pipeline, "tiny-kontext")


@pytest.fixture(scope="session")
def saved_fill(save: Saved) -> Path:
    return save(make_fill_pipeline, "tiny-fill")


@pytest.fixture(scope="session")
def saved_wan_image(save: Saved) -> Path:
    return save(make_wan_image_pipeline, "tiny-wan-image")


@pytest.fixture(scope="session")
def saved_wan_frame(save: Saved) -> Path:
    """Without the embedding of the image."""
    return save(partial(make_wan_image_pipeline, embedded=False), "tiny-wan-frame")


@pytest.fixture(scope="session")
def saved_z_image(save: Saved) -> Path:
    return save(make_z_image_pipeline, "tiny-z-image")


@pytest.fixture(scope="session")
def saved_wan(save: Saved) -> Path:
    return save(make_wan_pipeline, "tiny-wan")


@pytest.fixture(scope="session")
def saved_qwen_image(save: Saved) -> Path:
    return save(make_qwen_image_pipeline, "tiny-qwen-image")


@pytest.fixture(scope="session")
def saved_edit(save: Saved) -> Path:
    return save(make_edit_pipeline, "tiny-edit")


@pytest.fixture(scope="session")
def saved_edit_plus(save: Saved) -> Path:
    return save(make_edit_plus_pipeline, "tiny-edit-plus")


@pytest.fixture(scope="session")
def saved_stable_diffusion_3(save: Saved) -> Path:
    return save(make_stable_diffusion_3_pipeline, "tiny-stable-diffusion-3")


@pytest.fixture(scope="session")
def saved_flux_2(save: Saved) -> Path:
    return save(make_flux_2_pipeline, "tiny-flux-2")


@pytest.fixture(scope="session")
def saved_flux_2_klein(save: Saved) -> Path:
    return save(make_klein_pipeline, "tiny-klein")


@pytest.fixture(scope="session")
def saved_chroma(save: Saved) -> Path:
    return save(make_chroma_pipeline, "tiny-chroma")


@pytest.fixture(scope="session")
def saved_ltx(save: Saved) -> Path:
    return save(make_ltx_pipeline, "tiny-ltx")


@pytest.fixture(scope="session")
def saved_hunyuan_video(save: Saved) -> Path:
    return save(make_hunyuan_video_pipeline, "tiny-hunyuan-video")


@pytest.fixture
def own_flux(saved_flux: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(saved_flux, tmp_path / "tiny-flux"))
