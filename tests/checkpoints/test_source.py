"""Where a checkpoint lies, and what it is called."""

import os
import shutil
from pathlib import Path

import pytest

from adatsq_trt.checkpoints.source import find_source

HASH = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def cache(saved_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub's cache with one repository, laid out as huggingface_hub does: blobs, a reference, a snapshot of links."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--some-one--Tiny.Flux-dev"
    snapshot = repository / "snapshots" / HASH
    for number, file in enumerate(path for path in sorted(saved_flux.rglob("*")) if path.is_file()):
        blob, link = repository / "blobs" / f"{number:040x}", snapshot / file.relative_to(saved_flux)
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(HASH)
    return cache


def test_a_snapshot_of_the_hub_is_called_by_its_repository(cache: Path) -> None:
    snapshot = cache / "models--some-one--Tiny.Flux-dev" / "snapshots" / HASH
    assert find_source(str(snapshot), None).name == "Tiny.Flux-dev"
    assert find_source(str(snapshot / "transformer"), str(snapshot)).name == "transformer"


def test_a_hub_id_is_found_in_the_cache_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    found = find_source("some-one/Tiny.Flux-dev", None)
    assert (found.name, found.folder.name) == ("Tiny.Flux-dev", HASH)


def test_other_folders_keep_their_own_name(saved_flux: Path, tmp_path: Path) -> None:
    for name in ("snapshots/models--a--b", "models--a--b/x"):
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(saved_flux)
        assert find_source(str(place), None).name == place.name
