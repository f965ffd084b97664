"""The documentation: generated parts are current, links have targets, the site builds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from markdown.extensions.toc import slugify

from tests.support import layers_picture, states_picture
from tests.support.protocol_page import PAGE, page
from vlm_collab.errors import ErrorCode
from vlm_collab.protocol import messages
from vlm_collab.protocol.table import TRANSITIONS

ROOT = Path(__file__).resolve().parents[1]

_spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
hooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hooks)


def test_the_generated_parts_of_the_protocol_page_are_current():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run `python -m tests.support.protocol_page`"


def test_the_protocol_page_names_every_message_transition_and_error():
    text = PAGE.read_text(encoding="utf-8")
    for union in (messages.UpMessage, messages.DownMessage):
        for kind in typing.get_args(union):
            assert f"`{kind.__name__}`" in text
    for code in ErrorCode:
        assert f"| {code.value} | `{code.name}` |" in text
    assert text.count(" --> ") == len(TRANSITIONS)


def test_the_layers_picture_is_current():
    text = layers_picture.PICTURE.read_text(encoding="utf-8")
    assert layers_picture.picture() == text, "run `python -m tests.support.layers_picture`"


def test_the_picture_of_the_states_is_the_transition_table():
    text = states_picture.PICTURE.read_text(encoding="utf-8")
    assert states_picture.picture() == text, "run `python -m tests.support.protocol_page`"


def _pages() -> list[Path]:
    own = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "examples/README.md"]
    return sorted(page for page in own if page.name != "CHANGELOG.md")


def _anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {slugify(title, "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", _pages(), ids=lambda page: page.name)
def test_links_have_targets(page: Path):
    """Also on pages outside docs/: `make docs` rewrites their links before it checks them."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if page.parent.name == "docs" and name.endswith(".md") and not target.exists():
            # A page that the site takes from outside docs/.
            target = ROOT / {page: source for source, page in hooks.PAGES.items()}[name]
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link


@pytest.mark.parametrize("page", _pages(), ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path):
    names = re.findall(
        r"`((?:vlm_collab|edge_client|server_plugin|eval|tests|configs|examples|demo|docs)/[\w./-]+)`",
        page.read_text(encoding="utf-8"),
    )
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_moved_names_lead_to_modules_that_exist():
    text = (ROOT / "docs/moved-names.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `[a-z_]+\.[\w.]+` \| `([a-z_]+\.[\w.]+)` \|(.*)\|$", text, re.MULTILINE)
    elsewhere = [part for _, cell in rows for part in cell.split("; ") if ": " in part]
    assert len(rows) > 100
    assert elsewhere
    for module, _ in rows:
        _module_text(module)
    for part in elsewhere:
        names, module = part.split(": ")
        for name in re.findall(r"\w+", names):
            found = rf"^(?:class |(?:async )?def )?{name}\b"
            assert re.search(found, _module_text(module.strip("` ")), re.MULTILINE), part


def _module_text(module: str) -> str:
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert file.is_file(), module
    return file.read_text(encoding="utf-8")


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    for source in [*(ROOT / "docs").glob("*.md"), *map(Path, hooks.PAGES.values())]:
        assert (tmp_path / f"{source.stem}.html").is_file()
    for built in tmp_path.rglob("*.html"):
        text = built.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?([^\s\">]+)", text)
        loaded += re.findall(r"<link\b[^>]*\bhref=\"?([^\s\">]+)", text)
        assert [one for one in loaded if one.startswith(("http", "//"))] == []
