"""The files of an installation, and the tools that judge them where they are installed."""

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def tool():
    """`tool("promtool")`: its path. Where it is missing, the test says so and is skipped."""

    def find(name):
        beside = [Path(sys.prefix) / "bin", Path(sys.prefix) / "prometheus/usr/bin"]
        path = os.pathsep.join([*map(str, beside), os.environ["PATH"]])
        found = shutil.which(name, path=path)
        return found or pytest.skip(f"{name} is not installed; `make tools` gets it where it can be had")

    return find


@pytest.fixture(scope="session")
def dockerfiles():
    """The recipe of each image, by its name."""
    return {
        path.name.removesuffix(".Dockerfile"): path.read_text()
        for path in (ROOT / "deploy/docker").glob("*.Dockerfile")
    }
