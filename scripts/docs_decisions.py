"""Usage: python -m scripts.docs_decisions: write docs/decisions/README.md, the list of records.

A record's title is its first line; it is superseded where it says so. Dates are those of the first commits.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "decisions"
_HEAD = """# Decisions

What the paper or the design leaves open, what was decided, and the evidence. Records are not rewritten: a later one
replaces them. This list is written by `python -m scripts.docs_decisions`.

Numbers are given out before the work, so that two people can write at a time. So some have no record: no commit has
ever held a 0019 or a 0020.

| number | decision | status | since |
|---|---|---|---|
"""


def rows(folder: Path) -> list[tuple[str, str, str]]:
    """File, title and status of every record."""
    found = []
    for record in sorted(folder.glob("[0-9]*.md")):
        text = record.read_text(encoding="utf-8")
        title = re.sub(r"^# \d{4}:? ", "", text.partition("\n")[0])
        later = re.search(r"^Superseded by \[(\d{4})\]", text, re.MULTILINE)
        found.append((record.name, title, "accepted" if later is None else f"superseded by {later[1]}"))
    return found


def _date(name: str) -> str:
    command = ["git", "log", "--follow", "--reverse", "--format=%as", "--", name]
    ended = subprocess.run(command, cwd=FOLDER, check=True, capture_output=True, text=True)
    return next(iter(ended.stdout.split()), "")


def main() -> None:
    """Write the list."""
    lines = [f"| {name[:4]} | [{title}]({name}) | {status} | {_date(name)} |" for name, title, status in rows(FOLDER)]
    (FOLDER / "README.md").write_text(_HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
