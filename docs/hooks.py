"""Hooks of MkDocs: pages whose source lies outside docs/, and no Mermaid.

The site cannot draw Mermaid without a script from another host; pictures stand in its place.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, with links as they are inside docs/."""
    root = Path(config.config_file_path).parent
    for source, page in PAGES.items():
        text = (root / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_moved(text)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave out folded Mermaid diagrams."""
    folded = r"<details>\n<summary>[^\n]*</summary>\n\n```mermaid\n.*?```\n\n</details>\n"
    return re.sub(folded, "", markdown, flags=re.DOTALL)


def _moved(text: str) -> str:
    """Links to pages of the site, rewritten; links to other files of the repository, as code."""
    text = re.sub(r"\]\((?:\.\./)?docs/", "](", text)
    for source, page in PAGES.items():
        text = text.replace(f"]({source}", f"]({page}")
    # A link to a file that is not a page: `name` alone is left, which says what it is.
    return re.sub(r"\[(`[^`]+`)\]\((?!https?:)[^)#]+\.(?:py|ipynb)\)", r"\1", text)
