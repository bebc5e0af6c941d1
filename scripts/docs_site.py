"""Pages of the documentation site that come from elsewhere, and links that are right in both places.

Documents are written to be read in the repository: a link names a file. In the site a document at the root of the
repository has another place, so its links, and the links to it, are changed while the site is built.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
# Document in the repository → page of the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
    **{
        path.relative_to(ROOT).as_posix(): f"{path.parent.name}.md"
        for path in sorted(ROOT.glob("adatsq_trt/zoo/weights/*/README.md"))
    },
}
PAGES = {**ELSEWHERE, "docs/decisions": "decisions/README.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents from outside docs/ and the help of every command."""
    for document, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / document).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between documents into links between pages."""
    place = page.file.src_uri
    document = {target: source for source, target in ELSEWHERE.items()}.get(place, f"{DOCS}{place}")
    return relink(markdown, document, place)


def relink(markdown: str, document: str, place: str) -> str:
    """Links as the site needs them; a link to a file that is no page becomes its text.

    Args:
        markdown: of the document.
        document: its path in the repository.
        place: its path in the site.
    """

    def target(link: re.Match[str]) -> str:
        text, path, anchor = link.group(1), link.group(2), link.group(3) or ""
        named = posixpath.normpath(posixpath.join(posixpath.dirname(document), path))
        page = PAGES.get(named) or (named.removeprefix(DOCS) if named.startswith(DOCS) else None)
        if page is None:
            return text
        return f"[{text}]({posixpath.relpath(page, posixpath.dirname(place) or '.')}{anchor})"

    return _LINK.sub(target, markdown)


def commands() -> str:
    """Render the output of `--help` for all commands."""
    import typer
    from typer.cli import get_docs_for_click

    from adatsq_trt.cli import app

    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="adatsq-trt")
    return get_docs_for_click(obj=command, ctx=context, name="adatsq-trt", title="Commands")
