"""Compare a wheel and an sdist with the checkout that they were built from: all three hold the same package.

Usage: `python -m scripts.check_package DIST CHECKOUT`
"""

from __future__ import annotations

import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

# What an sdist has beside the package.
_BESIDE = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
_METADATA = (".dist-info", ".egg-info")


def package_folders(checkout: Path) -> dict[str, str]:
    """Read where the folders of a checkout lie once they are installed."""
    settings = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))
    packages = settings["tool"]["setuptools"]["package-dir"]
    return {folder: package.replace(".", "/") for package, folder in packages.items()}


def checkout_files(checkout: Path) -> dict[str, bytes]:
    """Read the files of the package in a checkout, by their path once they are installed."""
    return {
        f"{installed}/{file.relative_to(checkout / folder).as_posix()}": file.read_bytes()
        for folder, installed in package_folders(checkout).items()
        for file in (checkout / folder).rglob("*")
        if file.is_file()
    }


def wheel_files(wheel: Path) -> dict[str, bytes]:
    """Read the files of a wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not _is_metadata(name)}


def sdist_files(sdist: Path, folders: Mapping[str, str]) -> dict[str, bytes]:
    """Read the files of an sdist, likewise, without its metadata and what belongs beside the package."""
    found = {}
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            name = PurePosixPath(member.name).relative_to(PurePosixPath(member.name).parts[0]).as_posix()
            if not member.isfile() or name in _BESIDE or _is_metadata(name):
                continue
            content = archive.extractfile(member)
            assert content is not None, "it is a file"
            folder, _, inside = name.partition("/")
            found[f"{folders.get(folder, folder)}/{inside}"] = content.read()
    return found


def differences(built: Mapping[str, bytes], source: Mapping[str, bytes]) -> Iterator[str]:
    """Say what is missing, what is too much and what is another file."""
    yield from (f"{name} is missing" for name in sorted(source.keys() - built.keys()))
    yield from (f"{name} is not in the checkout" for name in sorted(built.keys() - source.keys()))
    yield from (f"{name} is another file" for name in sorted(built.keys() & source) if built[name] != source[name])


def faults(dist: Path, checkout: Path) -> list[str]:
    """List how a folder with one wheel and one sdist differs from its checkout."""
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    source = checkout_files(checkout)
    built = {"wheel": wheel_files(wheel), "sdist": sdist_files(sdist, package_folders(checkout))}
    return [f"{kind}: {fault}" for kind, files in built.items() for fault in differences(files, source)]


def _is_metadata(name: str) -> bool:
    return any(part.endswith(_METADATA) for part in name.split("/"))


if __name__ == "__main__":
    sys.exit("\n".join(faults(Path(sys.argv[1]), Path(sys.argv[2]))) or None)
