"""Contact sheets and the summary file."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adatsq_trt.errors import OutputError
from adatsq_trt.report.contact_sheet import grid, write_contact_sheet, write_panel


@given(st.integers(1, 25), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3]), st.integers(1, 12))
def test_every_image_has_its_place_and_a_white_frame(
    count: int, height: int, width: int, channels: int, columns: int
) -> None:
    images = np.random.default_rng(0).uniform(0, 0.9, (count, height, width, channels)).astype(np.float32)
    sheet = grid(images, columns)
    across = min(columns, count)
    rows = -(-count // across)
    assert sheet.shape == (rows * (height + 1) + 1, across * (width + 1) + 1, 3)
    assert sheet.dtype == np.float32
    covered = np.zeros(sheet.shape[:2], bool)
    for index, image in enumerate(images):
        top, left = (index // across) * (height + 1) + 1, (index % across) * (width + 1) + 1
        place = np.s_[top : top + height, left : left + width]
        assert np.array_equal(sheet[place], np.broadcast_to(image, (height, width, 3)))
        covered[place] = True
    assert (sheet[~covered] == 1).all()


def test_a_sheet_is_a_png_with_a_panel_per_model(tmp_path: Path) -> None:
    black, grey = np.zeros((20, 8, 8, 1), np.float32), np.full((20, 8, 8, 1), 0.5, np.float32)
    file = tmp_path / "run" / "samples.png"
    write_contact_sheet(file, {"quantized": black, "full precision": grey}, ["latent MSE 0.01", ""])
    with Image.open(file) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[1] >= 800
    # The first panel is black and lies above the grey one.
    black_rows, grey_rows = ((np.abs(pixels - level) < 3).mean(axis=1) > 0.5 for level in (0.0, 127.0))
    assert black_rows.any()
    assert grey_rows.any()
    assert np.flatnonzero(black_rows).max() < np.flatnonzero(grey_rows).min()
    assert list(file.parent.iterdir()) == [file]


def test_as_many_samples_as_generate_draws(tmp_path: Path) -> None:
    many = np.zeros((10_000, 2, 2, 1), np.float32)
    write_contact_sheet(tmp_path / "s.png", {"quantized": many, "full precision": many}, ["", ""])
    with Image.open(tmp_path / "s.png") as image:
        assert image.height < 3 * image.width


def test_each_panel_has_a_note(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        write_contact_sheet(tmp_path / "s.png", {"a": np.zeros((1, 2, 2, 1), np.float32)}, [])


@pytest.mark.parametrize("frames", [None, 3])
def test_a_panel_is_what_was_drawn_and_videos_move(tmp_path: Path, frames: int | None) -> None:
    shape = (3, 8, 6, 3) if frames is None else (3, frames, 8, 6, 3)
    images = (np.random.default_rng(0).integers(0, 256, shape) / 255).astype(np.float32)
    write_panel(tmp_path / "panel.webp", images)
    with Image.open(tmp_path / "panel.webp") as panel:
        assert getattr(panel, "n_frames", 1) == (frames or 1)
        for frame in range(frames or 1):
            panel.seek(frame)
            drawn = np.asarray(panel.convert("RGB"), np.float32) / 255
            expected = grid(images if frames is None else images[:, frame])
            assert np.abs(drawn - expected).max() < 1e-6


def test_a_panel_shows_as_many_samples_as_it_has_room_for(tmp_path: Path) -> None:
    write_panel(tmp_path / "large.webp", np.zeros((5, 900, 1200, 1), np.float32))
    with Image.open(tmp_path / "large.webp") as panel:
        assert panel.size == (1202, 1803)  # one beside, two below each other


def test_a_full_disk_leaves_nothing(tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]) -> None:
    images = np.random.default_rng(0).random((20, 8, 8, 3), np.float32)
    with pytest.raises(OutputError, match=r"samples\.png"), full_disk():
        write_contact_sheet(tmp_path / "samples.png", {"noise": images}, [""])
    assert not list(tmp_path.iterdir())


def test_a_video_is_a_strip_of_its_frames() -> None:
    videos = np.random.default_rng(0).uniform(0, 0.9, (3, 4, 2, 5, 3)).astype(np.float32)
    sheet = grid(videos, columns=10)
    assert sheet.shape == (2 * 3 + 1, 2 * 21 + 1, 3)  # two videos of 20 pixels beside each other
    assert np.array_equal(sheet[1:3, 22 + 5 : 22 + 10], videos[1, 1])
    assert np.array_equal(sheet[4:6, 1:6], videos[2, 0])
    assert grid(videos, columns=3).shape == (3 * 3 + 1, 21 + 1, 3)
