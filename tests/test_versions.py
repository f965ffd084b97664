"""`constraints/` against the requirements of `pyproject.toml` and of the installed packages."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import versions
from tests.support.lmms_env import LIGHT
from tests.support.vllm_cpu.environment import VLLM

MAIN = versions.pins(versions.FOLDER / "main.txt")


def build_requirements() -> list[Requirement]:
    return [Requirement(text) for text in versions.build_requirements()]


WANTED = {
    "main.txt": [
        *versions.requirements(["dev"]),
        *versions.requirements(["gateway"]),
        *build_requirements(),
    ],
    "lmms.txt": [*versions.requirements(["eval"]), *map(Requirement, LIGHT), *build_requirements()],
    "vllm.txt": [*versions.requirements(["server"]), Requirement(VLLM), *build_requirements()],
}


@pytest.mark.parametrize("name", WANTED)
def test_the_constraints_pin_the_requirements_of_this_package(name: str) -> None:
    pinned = versions.pins(versions.FOLDER / name)
    for wanted in WANTED[name]:
        package = canonicalize_name(wanted.name)
        if not versions.is_left_out(package):
            assert package in pinned, f"{name} lacks {package}: make constraints"
            assert wanted.specifier.contains(pinned[package]), f"{wanted} is not {pinned[package]}"


def below(wanted: Requirement, seen: set[str]) -> Iterator[str]:
    """Names of all packages that a requirement needs here, its own included."""
    name = canonicalize_name(wanted.name)
    if name in seen or (versions.is_left_out(name) and name != "torch"):
        return
    seen.add(name)
    yield name
    try:
        further = [Requirement(text) for text in requires(name) or ()]
    except PackageNotFoundError:
        return  # for another system, or newer than this environment
    for one in further:
        if one.marker is None or any(
            one.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)
        ):
            yield from below(one, seen)


@pytest.mark.skipif(
    os.environ.get("CONSTRAINTS", "constraints") != "constraints",
    reason="other versions are installed here, which may ask for other packages",
)
def test_the_constraints_pin_all_indirect_requirements() -> None:
    seen: set[str] = set()
    needed = {name for one in WANTED["main.txt"] for name in below(one, seen)}
    assert {"jinja2", "mpmath", "tokenizers"} <= needed  # torch's too
    assert needed - MAIN.keys() == {"torch"}


def test_torch_is_in_no_file() -> None:
    for name in WANTED:
        pinned = versions.pins(versions.FOLDER / name)
        assert not [package for package in pinned if versions.is_left_out(package)]


def test_the_oldest_versions_are_the_lower_bounds_of_the_project(tmp_path) -> None:
    versions.oldest(tmp_path)
    lowest = versions.pins(tmp_path / "main.txt")
    assert lowest["transformers"] == "5.18"
    assert lowest["filelock"] == "4"
    assert "torch" not in lowest
    bounded = [one for one in WANTED["main.txt"] if one.specifier and one.name != "torch"]
    assert {canonicalize_name(one.name) for one in bounded} == lowest.keys()
