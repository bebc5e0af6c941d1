"""What a release says of itself, and the check of what it holds."""

import re
import tarfile
import zipfile
from datetime import date
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from adatsq_trt import __version__
from scripts.check_package import faults

ROOT = Path(__file__).parents[2]
UNRELEASED = "Unreleased"


def headings(changelog: str) -> list[str]:
    """Versions of a changelog, the newest first."""
    return re.findall(r"^## (.*)$", changelog, flags=re.MULTILINE)


def changelog_faults(changelog: str, version: str) -> list[str]:
    """How a changelog does not fit a version of the package."""
    first, *released = headings(changelog)
    if first == UNRELEASED:
        found = [] if Version(version).is_devrelease else [f"{version} is released, its changes are not"]
    else:
        released = [first, *released]
        found = [] if first.startswith(f"{version} - ") else [f"the newest is '{first}', the package is {version}"]
    versions = []
    for heading in released:
        name, _, day = heading.partition(" - ")
        versions.append(Version(name))
        date.fromisoformat(day)
    return found + ([] if versions == sorted(versions, reverse=True) else ["the newest version is not the first"])


def test_the_changelog_begins_with_this_version() -> None:
    assert changelog_faults((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), __version__) == []


@pytest.mark.parametrize(
    ("changelog", "version", "fault"),
    [
        ("## Unreleased\n\n## 0.1.0 - 2026-11-22\n", "0.3.0", "0.3.0 is released, its changes are not"),
        ("## 0.3.0 - 2026-12-01\n", "0.2.0.dev0", "the newest is '0.3.0 - 2026-12-01', the package is 0.2.0.dev0"),
        ("## 0.1.0 - 2026-11-22\n## 0.3.0 - 2026-12-01\n", "0.1.0", "the newest version is not the first"),
    ],
)
def test_a_changelog_of_another_version_is_found(changelog: str, version: str, fault: str) -> None:
    assert changelog_faults(changelog, version) == [fault]


@pytest.mark.parametrize(
    ("changelog", "version"),
    [
        ("## 0.3.0 - 2026-12-01\n\n## 0.1.0 - 2026-11-22\n", "0.3.0"),
        ("## Unreleased\n\n## 0.3.0 - 2026-12-01\n", "0.4.0.dev0"),
    ],
)
def test_a_release_and_what_follows_it_fit(changelog: str, version: str) -> None:
    assert changelog_faults(changelog, version) == []


def test_what_is_cited_is_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__


def test_files_that_are_not_in_a_release_are_found(tmp_path: Path) -> None:
    settings = '[tool.setuptools.package-dir]\n"adatsq_trt" = "adatsq_trt"\n"adatsq_trt.export" = "export"\n'
    files = {"pyproject.toml": settings, "adatsq_trt/a.py": "a", "export/b.py": "b", "export/c.json": "c"}
    checkout, dist = tmp_path / "checkout", tmp_path / "dist"
    for name, text in files.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    dist.mkdir()
    with zipfile.ZipFile(dist / "one.whl", "w") as wheel:
        for name, text in (("adatsq_trt/a.py", "a"), ("adatsq_trt/export/b.py", "!"), ("one.dist-info/RECORD", "")):
            wheel.writestr(name, text)
    (checkout / "tests").mkdir()
    (checkout / "tests" / "test_a.py").touch()
    with tarfile.open(dist / "one.tar.gz", "w:gz") as sdist:
        sdist.add(checkout, "one")
    assert faults(dist, checkout) == [
        "wheel: adatsq_trt/export/c.json is missing",
        "wheel: adatsq_trt/export/b.py is another file",
        "sdist: tests/test_a.py is not in the checkout",
    ]
