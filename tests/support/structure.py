"""Measure the structure of the source tree: size, import circles, layers, duplicates.

::

    make structure                                        # the working tree
    make structure REVISION=a32fb50                       # beside an earlier revision
    python -m tests.support.structure --revision a32fb50  # the same
    python -m tests.support.structure --list              # name every finding

Imports are those that grimp finds; imports under `TYPE_CHECKING` count. The layers are the
`layers` contracts in `pyproject.toml`. Duplicate code is what pylint's `duplicate-code` reports
with `DUPLICATE_LINES` lines or more, without imports, docstrings, comments and signatures.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import grimp
import networkx

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("vlm_collab", "edge_client", "server_plugin", "eval")
DUPLICATE_LINES = 6
SUBJECT_CHARACTERS = 72
LONG_FILE_LINES = 500

Import = tuple[str, str]
"""(module that imports, module that is imported)"""


@dataclass(frozen=True, slots=True)
class Structure:
    """Findings about one tree.

    Attributes:
        lines: Python lines of each file, by its path in the tree.
        module_circles: groups of modules that import each other, directly or through others.
        room_circles: the same for rooms, which are the direct children of a package.
        against_layers: imports of a higher layer by a lower one.
        shared_class_names: modules that define a class of the same name, by that name.
        duplicates: pairs of places that hold the same code; None where it was not looked for.
    """

    lines: dict[str, int]
    module_circles: list[list[str]]
    room_circles: list[list[str]]
    against_layers: list[Import]
    shared_class_names: dict[str, list[str]]
    duplicates: list[list[str]] | None = None


def imports() -> list[Import]:
    """All imports inside and between the four packages, as Python finds these."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    return [
        (module, imported)
        for module in sorted(graph.modules)
        for imported in sorted(graph.find_modules_directly_imported_by(module))
    ]


def circles(arrows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Groups of two or more nodes that reach each other."""
    groups = networkx.strongly_connected_components(networkx.DiGraph(list(arrows)))
    return sorted(sorted(group) for group in groups if len(group) > 1)


def room_of(module: str) -> str:
    """The package's direct child that a module belongs to."""
    return ".".join(module.split(".")[:2])


def room_circles(arrows: Iterable[Import]) -> list[list[str]]:
    """Circles between rooms of the same package."""
    between = [(room_of(one), room_of(other)) for one, other in arrows]
    return circles(
        (one, other)
        for one, other in between
        if one != other and one.partition(".")[0] == other.partition(".")[0]
    )


def layers(root: Path = ROOT) -> Iterator[list[list[str]]]:
    """The layers of each package, lowest first; a layer is a list of modules."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    for contract in settings["tool"]["importlinter"]["contracts"]:
        if contract["type"] == "layers":
            yield [
                [f"{container}.{name}" for name in re.split(r"[\s|:()]+", layer) if name]
                for container in contract["containers"]
                for layer in reversed(contract["layers"])
            ]


def against_layers(arrows: Iterable[Import]) -> list[Import]:
    """Imports of a higher layer by a lower one."""
    height = {
        module: number
        for package in layers()
        for number, layer in enumerate(package)
        for module in layer
    }
    return [
        (one, other)
        for one, other in arrows
        if one.partition(".")[0] == other.partition(".")[0]
        and room_of(one) in height
        and room_of(other) in height
        and height[room_of(one)] < height[room_of(other)]
    ]


def sources(root: Path) -> list[Path]:
    """The Python files of the four packages."""
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def shared_class_names(root: Path) -> dict[str, list[str]]:
    """Names of top-level classes that more than one module defines."""
    homes: dict[str, list[str]] = defaultdict(list)
    for path in sources(root):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(str(path.relative_to(root)))
    return {name: where for name, where in sorted(homes.items()) if len(where) > 1}


def duplicates(root: Path) -> list[list[str]]:
    """Pairs of places with the same code, by pylint."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pylint", "--disable=all", "--enable=duplicate-code"),
            f"--min-similarity-lines={DUPLICATE_LINES}",
            *(f"--ignore-{what}=yes" for what in ("imports", "docstrings", "comments")),
            *("--ignore-signatures=yes", "--output-format=json", "--rcfile=", *PACKAGES),
        ],
        capture_output=True,
        text=True,
        cwd=root,
    )
    if not done.stdout:
        sys.exit(done.stderr)
    pairs: list[list[str]] = []
    for message in json.loads(done.stdout):
        places = re.findall(r"^==(\S+):\[(\d+):(\d+)\]$", message["message"], re.MULTILINE)
        named = [f"{module}:{int(first) + 1}-{last}" for module, first, last in places]
        pairs += [list(pair) for pair in itertools.combinations(named, 2)]
    return sorted(pairs)


def structure(root: Path = ROOT, *, with_duplicates: bool = False) -> Structure:
    """Measure a tree whose packages are the first that Python finds."""
    arrows = imports()
    return Structure(
        lines={
            str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines())
            for path in sources(root)
        },
        module_circles=circles(arrows),
        room_circles=room_circles(arrows),
        against_layers=against_layers(arrows),
        shared_class_names=shared_class_names(root),
        duplicates=duplicates(root) if with_duplicates else None,
    )


def _measured(root: Path) -> Structure:
    """Measure a tree in a process of its own, which finds that tree's packages."""
    done = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).resolve()), "--json", str(root)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    return Structure(**json.loads(done.stdout))


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout


def of_revision(revision: str) -> Structure:
    """Measure a revision, from a copy in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        archive = _git("archive", revision, *PACKAGES)
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        return _measured(Path(folder).resolve())


def subjects(revision: str) -> list[str]:
    """Subjects of all commits up to a revision."""
    return _git("log", "--format=%s", revision).decode().splitlines()


def table(columns: dict[str, tuple[Structure, list[str]]]) -> str:
    """A Markdown table with a column for each tree and its commit subjects."""
    rows: dict[str, list[str]] = {}

    def row(title: str, value: object) -> None:
        rows.setdefault(title, []).append(f"{value:,}" if isinstance(value, int) else str(value))

    for it, commits in columns.values():
        long = sum(len(subject) > SUBJECT_CHARACTERS for subject in commits)
        row("Python files", len(it.lines))
        for package in PACKAGES:
            own = [lines for path, lines in it.lines.items() if path.startswith(f"{package}/")]
            row(f"lines in `{package}/`", sum(own))
        row(
            f"files over {LONG_FILE_LINES} lines",
            sum(n > LONG_FILE_LINES for n in it.lines.values()),
        )
        row("circles of modules", len(it.module_circles))
        row("modules in circles", sum(map(len, it.module_circles)))
        row("circles of rooms", len(it.room_circles))
        row("imports against the layers", len(it.against_layers))
        row("class names in more than one module", len(it.shared_class_names))
        row(f"duplicate pairs of {DUPLICATE_LINES} lines or more", len(it.duplicates or ()))
        row(f"commit subjects over {SUBJECT_CHARACTERS} characters", f"{long} of {len(commits)}")
    head = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*head, *(f"| {title} | {' | '.join(v)} |" for title, v in rows.items())])


def findings(it: Structure) -> Iterator[str]:
    """One line for each thing that breaks a rule."""
    yield from (f"circle of modules: {', '.join(group)}" for group in it.module_circles)
    yield from (f"circle of rooms: {', '.join(group)}" for group in it.room_circles)
    yield from (f"against the layers: {one} imports {other}" for one, other in it.against_layers)
    for name, modules in it.shared_class_names.items():
        yield f"class {name} in {', '.join(modules)}"
    yield from (f"duplicate code: {one} and {other}" for one, other in it.duplicates or ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--revision", action="append", default=[], help="compare with a revision")
    parser.add_argument("--list", action="store_true", help="name every finding of the tree")
    parser.add_argument("--json", type=Path, metavar="TREE", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.json:
        print(json.dumps(asdict(structure(given.json, with_duplicates=True))))
        return
    columns = {one: (of_revision(one), subjects(one)) for one in given.revision}
    now = _measured(ROOT)
    columns["working tree"] = (now, subjects("HEAD"))
    print(table(columns))
    if given.list:
        print(*("", *findings(now)), sep="\n")


if __name__ == "__main__":
    main()
