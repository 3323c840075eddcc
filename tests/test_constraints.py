"""The versions in constraints.txt and constraints-lowest.txt are what pyproject.toml says."""

import tomllib

import pytest
from helpers.tiny_run import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def requirements() -> dict[str, Requirement]:
    """What the package and its extras ask for, by name, without the package itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    found = {canonicalize_name(entry.name): entry for entry in map(Requirement, lines)}
    return {name: entry for name, entry in found.items() if name != "bridle-hf"}


def pins(file: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


# What no target installs, and what `make test-lowest` does not.
UNPINNED = {
    "constraints.txt": {"trackio"},
    "constraints-lowest.txt": {"trackio", "gradio", "selenium", "bitsandbytes", "torchao"},
}


@pytest.mark.parametrize("file", UNPINNED)
def test_pins_lie_in_the_ranges(file):
    versions = pins(file)
    wanted = {name: entry for name, entry in requirements().items() if name not in UNPINNED[file]}
    assert wanted.keys() <= versions.keys()
    wrong = [f"{entry} is {versions[name]}" for name, entry in wanted.items() if versions[name] not in entry.specifier]
    assert not wrong


def test_the_lowest_are_the_bounds():
    versions = pins("constraints-lowest.txt")
    for name, entry in requirements().items():
        if name == "torch" or name in UNPINNED["constraints-lowest.txt"]:  # of torch, the file says why
            continue
        (bound,) = (Version(part.version).release for part in entry.specifier if part.operator in (">=", "=="))
        # A bound of few digits is met by the first release that begins with them.
        assert versions[name].release[: len(bound)] == bound, f"{entry}, but the file has {versions[name]}"
