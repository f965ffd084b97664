"""Exact versions for the environments that the Makefile and the tests build.

`constraints/` has one file for each environment: the main one, and those with lmms-eval and with
vLLM. `make constraints` renews all of them. Without them, a new release of any of about a hundred
packages could break `make test`.

None of them contains torch, because the right build depends on the machine (`TORCH`, see the
Makefile).

    python -m tests.support.versions write          # the newest that pyproject.toml allows
    python -m tests.support.versions drift          # lists newer versions; exit code 1 if any
    python -m tests.support.versions oldest FOLDER  # main.txt with the lowest versions allowed
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import lmms_env
from tests.support.vllm_cpu import environment as vllm_env

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "constraints"
TORCH = os.environ.get("TORCH", "torch==2.13.0")

OWN = {"vlm-collab", "vlm-collab-demo"}
"""The distributions of this repository. They are installed from the checkout, not from an index."""

_LEFT_OUT = ("torch", "triton")
_LEFT_OUT_PREFIXES = ("nvidia-", "cuda-")
"""Prefixes of packages that a CUDA build of torch requires in exact versions."""


def project() -> dict[str, object]:
    """The contents of `pyproject.toml`."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def build_requirements() -> list[str]:
    """Packages that pip needs to build this package, editable builds included."""
    return [*project()["build-system"]["requires"], "editables"]  # type: ignore[index]


def _checkout(extra: str) -> list[str]:
    """Arguments of `pip install` for this repository's distributions, with an extra."""
    return ["--editable", f"{ROOT}[{extra}]", "--editable", str(ROOT / "demo")]


def environments() -> dict[str, list[str]]:
    """Arguments of `pip install` behind each constraints file."""
    return {
        "main.txt": [*_checkout("dev"), "pip", *build_requirements()],
        "lmms.txt": [*_checkout("eval"), *lmms_env.LIGHT, *build_requirements()],
        "vllm.txt": [*_checkout("server"), vllm_env.VLLM, *build_requirements()],
    }


def requirements(extras: Iterable[str] = ()) -> Iterator[Requirement]:
    """The requirements of this package on others' packages, with those of some extras."""
    data = project()["project"]
    lists = [data["dependencies"]]  # type: ignore[index]
    lists += [data["optional-dependencies"][extra] for extra in extras]  # type: ignore[index]
    for text in (text for one in lists for text in one):
        wanted = Requirement(text)
        name = canonicalize_name(wanted.name)
        if name == "vlm-collab":
            yield from requirements(wanted.extras)
        elif name not in OWN:
            yield wanted


def pins(path: Path) -> dict[str, str]:
    """Read a constraints file: versions by canonical name."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def is_left_out(name: str) -> bool:
    """Whether the files omit this package, because it depends on torch's build."""
    return name in _LEFT_OUT or name.startswith(_LEFT_OUT_PREFIXES)


def newest(wanted: list[str]) -> dict[str, str]:
    """Versions that pip would install today into an empty environment, from the package index.

    Raises:
        SystemExit: there are no compatible versions, or the index cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        install = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        done = subprocess.run(
            [*install, "--dry-run", "--ignore-installed", "--report", str(report), TORCH, *wanted],
            stdout=sys.stderr,
        )
        if done.returncode:
            print("no versions were found; see pip's output above", file=sys.stderr)
            raise SystemExit(2)
        items = json.loads(report.read_text(encoding="utf-8"))["install"]
    found = {canonicalize_name(i["metadata"]["name"]): i["metadata"]["version"] for i in items}
    return {name: found[name] for name in sorted(found.keys() - OWN) if not is_left_out(name)}


def write() -> None:
    """Renew all constraints files."""
    for name, wanted in environments().items():
        lines = [f"{package}=={version}\n" for package, version in newest(wanted).items()]
        head = "# Made by `make constraints`. Without torch, whose build depends on the machine.\n"
        (FOLDER / name).write_text(head + "".join(lines), encoding="utf-8")
        print(f"{FOLDER.name}/{name}: {len(lines)} packages")


def drift() -> int:
    """Print packages whose version is not that of `main.txt`; return 1 if there are any."""
    pinned, today = pins(FOLDER / "main.txt"), newest(environments()["main.txt"])
    changed = [name for name in sorted(pinned | today) if pinned.get(name) != today.get(name)]
    for name in changed:
        print(f"{name}: {pinned.get(name, 'nothing')} -> {today.get(name, 'nothing')}")
    return bool(changed)


def oldest(folder: Path) -> None:
    """Write a `main.txt` with every lower bound in `pyproject.toml` except torch's."""
    wanted = [*requirements(["dev"]), *requirements(["gateway"])]
    wanted += [Requirement(text) for text in build_requirements()]
    lines = set()
    for one in wanted:
        for part in one.specifier:
            if part.operator in (">=", "==") and not is_left_out(canonicalize_name(one.name)):
                lines.add(f"{one.name}=={part.version}\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "main.txt").write_text("".join(sorted(lines)), encoding="utf-8")


def main(arguments: list[str]) -> int:
    match arguments:
        case ["write"]:
            write()
        case ["drift"]:
            return drift()
        case ["oldest", folder]:
            oldest(Path(folder))
        case _:
            sys.exit(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
