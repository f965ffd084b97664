"""Exact versions for the environments that the Makefile and the tests build.

`constraints/` holds one file for each environment: what `make` installs, and what comes into the
environments with lmms-eval and with vLLM. `make constraints` renews all of them. Without them, a
release of any of some hundred packages could break `make test` for whoever installs that day.

torch is in none: which build is right depends on the machine (`TORCH`, see the Makefile).

    python -m tests.support.versions write          # the newest that pyproject.toml allows
    python -m tests.support.versions drift          # what has come out since; if any, exit code 1
    python -m tests.support.versions oldest FOLDER  # main.txt with the lowest that it allows
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
_LEFT_OUT_TOO = ("nvidia-", "cuda-")
"""Beginnings of names; these come with a torch for CUDA, each in the version that it names."""


def project() -> dict[str, object]:
    """The contents of `pyproject.toml`."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def build_requirements() -> list[str]:
    """What pip installs to build this package, editable builds included."""
    return [*project()["build-system"]["requires"], "editables"]  # type: ignore[index]


def _checkout(extra: str) -> list[str]:
    """Arguments of `pip install` for this repository's distributions, with an extra."""
    return ["--editable", f"{ROOT}[{extra}]", "--editable", str(ROOT / "demo")]


def environments() -> dict[str, list[str]]:
    """For each file of constraints, what pip is asked for."""
    return {
        "main.txt": [*_checkout("dev"), "pip", *build_requirements()],
        "lmms.txt": [*_checkout("eval"), *lmms_env.LIGHT, *build_requirements()],
        "vllm.txt": [*_checkout("server"), vllm_env.VLLM, *build_requirements()],
    }


def asked_for(extras: Iterable[str] = ()) -> Iterator[Requirement]:
    """The requirements of this package on others' packages, with those of some extras."""
    data = project()["project"]
    lists = [data["dependencies"]]  # type: ignore[index]
    lists += [data["optional-dependencies"][extra] for extra in extras]  # type: ignore[index]
    for text in (text for one in lists for text in one):
        wanted = Requirement(text)
        name = canonicalize_name(wanted.name)
        if name == "vlm-collab":
            yield from asked_for(wanted.extras)
        elif name not in OWN:
            yield wanted


def pins(path: Path) -> dict[str, str]:
    """Versions by canonical name that a file of constraints holds."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def is_left_out(name: str) -> bool:
    """Whether no file holds this package, because it comes with torch's build."""
    return name in _LEFT_OUT or name.startswith(_LEFT_OUT_TOO)


def newest(wanted: list[str]) -> dict[str, str]:
    """What pip would install today into an empty environment. Asks the package index.

    Raises:
        SystemExit: it finds no versions that agree, or nobody answers.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        install = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        done = subprocess.run(
            [*install, "--dry-run", "--ignore-installed", "--report", str(report), TORCH, *wanted],
            stdout=sys.stderr,
        )
        if done.returncode:
            print("no versions were found; what pip says stands above", file=sys.stderr)
            raise SystemExit(2)
        items = json.loads(report.read_text(encoding="utf-8"))["install"]
    found = {canonicalize_name(i["metadata"]["name"]): i["metadata"]["version"] for i in items}
    return {name: found[name] for name in sorted(found.keys() - OWN) if not is_left_out(name)}


def write() -> None:
    """Renew all files."""
    for name, wanted in environments().items():
        lines = [f"{package}=={version}\n" for package, version in newest(wanted).items()]
        head = "# Made by `make constraints`. Without torch, whose build depends on the machine.\n"
        (FOLDER / name).write_text(head + "".join(lines), encoding="utf-8")
        print(f"{FOLDER.name}/{name}: {len(lines)} packages")


def drift() -> int:
    """Print what is newer today than in `main.txt`; returns 1 if anything is."""
    held, today = pins(FOLDER / "main.txt"), newest(environments()["main.txt"])
    changed = [name for name in sorted(held | today) if held.get(name) != today.get(name)]
    for name in changed:
        print(f"{name}: {held.get(name, 'nothing')} -> {today.get(name, 'nothing')}")
    return bool(changed)


def oldest(folder: Path) -> None:
    """Write a `main.txt` of every lower bound in `pyproject.toml`, torch's left out."""
    wanted = [*asked_for(["dev"]), *asked_for(["gateway"])]
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
