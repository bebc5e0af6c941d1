"""A Flux pipeline that diffusers saved."""

import shutil
from pathlib import Path

import pytest

from tests.tiny_checkpoints import make_flux_pipeline, make_wan_pipeline, make_z_image_pipeline
from tests.tiny_qwen_image import make_qwen_image_pipeline
from tests.tiny_stable_diffusion_3 import make_stable_diffusion_3_pipeline


@pytest.fixture(scope="session")
def saved_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For reading."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-flux"
    make_flux_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For reading."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-z-image"
    make_z_image_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For reading."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-wan"
    make_wan_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_qwen_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For reading."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-qwen-image"
    make_qwen_image_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_stable_diffusion_3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For reading."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-stable-diffusion-3"
    make_stable_diffusion_3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def own_flux(saved_flux: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(saved_flux, tmp_path / "tiny-flux"))
