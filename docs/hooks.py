"""Hook of MkDocs that adds pages whose source lies outside docs/, such as CONTRIBUTING.md."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

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


def _moved(text: str) -> str:
    """Links to pages of the site, rewritten; links to other files of the repository, as code."""
    text = re.sub(r"\]\((?:\.\./)?docs/", "](", text)
    for source, page in PAGES.items():
        text = text.replace(f"]({source}", f"]({page}")
    # A link to a file that is not a page: `name` alone is left, which says what it is.
    return re.sub(r"\[(`[^`]+`)\]\((?!https?:)[^)#]+\.(?:py|ipynb)\)", r"\1", text)
