"""The rules for the source tree hold: no import circles, layers, names, plain citations."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.support import commit_message, structure
from tests.support.structure import PACKAGES, ROOT, Structure


@pytest.fixture(scope="module")
def tree() -> Structure:
    return structure.structure()


def test_no_modules_import_each_other(tree: Structure) -> None:
    assert tree.module_circles == []


def test_no_rooms_of_a_package_import_each_other(tree: Structure) -> None:
    assert tree.room_circles == []


def test_no_layer_imports_a_higher_one(tree: Structure) -> None:
    assert tree.against_layers == []


def test_every_room_of_a_package_is_in_a_layer(tree: Structure) -> None:
    listed = {module for package in structure.layers() for layer in package for module in layer}
    rooms = {structure.room_of(path.removesuffix(".py").replace("/", ".")) for path in tree.lines}
    assert sorted(rooms - listed - {f"{package}.__init__" for package in PACKAGES}) == []


def test_a_class_name_stands_in_one_module(tree: Structure) -> None:
    assert tree.shared_class_names == {}


def test_a_circle_would_be_found() -> None:
    arrows = [("a.x.1", "a.y"), ("a.y", "a.x.2"), ("a.x.1", "b.z"), ("b.z", "a.x.1")]
    assert structure.circles(arrows) == [["a.x.1", "b.z"]]
    assert structure.room_circles(arrows) == [["a.x", "a.y"]]


def test_an_arrow_against_the_layers_would_be_found() -> None:
    down = ("vlm_collab.protocol.messages", "vlm_collab.geometry")
    up = ("vlm_collab.geometry", "vlm_collab.protocol.messages")
    assert structure.against_layers([down, up]) == [up]


def test_papers_are_cited_by_title() -> None:
    """No file names or numbers of papers that only this project's authors know."""
    riddle = re.compile(r"00[0-3]_[0-9a-f]{16}|(?<!\d )(?<![\w.,-])00[0-3](?!\w|[.,]\d)")
    tracked = subprocess.run(
        ["git", "grep", "-lI", "00[0-3]", "--", "*.py", "*.md", "*.yaml", "*.toml", "Makefile"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout.split()
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in tracked
        if not name.endswith("test_structure.py")
        for number, line in enumerate((ROOT / name).read_text("utf-8").splitlines(), 1)
        if riddle.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ("Refuse views of no pixels\n\nThey cannot be drawn.\n", None),
        ("x" * 72 + "\n\nWhy.", None),
        ("x" * 73 + "\n\nWhy.", "73 characters, at most 72"),
        ("Refuse views.\n\nWhy.", "full stop"),
        ("Refuse views\nof no pixels", "empty line"),
        ("# only a comment\n", "no subject"),
        ("Refuse views\n", "no body"),
        ("Refuse views\n\n# Please enter the message\n", "no body"),
        (f"Refuse views\n\n# {'-' * 24} >8 {'-' * 24}\n# below\ndiff --git a/x b/x\n", "no body"),
        ("Merge branch 'names'\n", None),
        ("fixup! Refuse views\n", None),
    ],
)
def test_the_commit_hook_checks_the_message(message: str, fault: str | None) -> None:
    found = commit_message.faults(message)
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]
