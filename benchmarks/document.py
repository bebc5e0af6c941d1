"""Documents that hold tables which benchmarks write."""

from __future__ import annotations

from pathlib import Path

from adatsq_trt.errors import MismatchError
from adatsq_trt.files import write_bytes


def replace_marked(document: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of a name, whole or not at all.

    Args:
        document: Markdown.
        name: in the markers, `<!-- name:begin -->` and `<!-- name:end -->`.
        text: the replacement.

    Raises:
        MismatchError: the markers are not there.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise MismatchError(f"'{document}': got no markers, expected a line '{begin}' and a later '{end}'; add them")
    write_bytes(document, f"{before}{begin}\n{text.rstrip()}\n{end}{after}".encode())
