"""Machines for the tests, where this computer can have any."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator

import pytest

from kvm2.errors import EnvironmentFault
from kvm2.lab.oracle.initramfs import PYTHON
from kvm2.lab.oracle.machine import Machine, build, open_machine
from kvm2.lab.oracle.shapes import Shape, shape
from kvm2.lab.packages import INSTALL, Archive, cache_directory


def have(name: str) -> Shape:
    """The shape, built; skips where QEMU is missing or Debian's packages cannot be had."""
    missing = [f"{program} (package {package})" for program, package in INSTALL.items() if not shutil.which(program)]
    if sys.platform != "linux" or missing:
        pytest.skip(f"the oracle needs {', '.join(missing) or 'Linux'}")
    wanted = shape(name)
    archive = Archive(cache_directory())
    try:
        archive.kernel(wanted.kernel)
        for package in PYTHON:
            archive.package(package)
    except EnvironmentFault as error:
        pytest.skip(f"Debian's arm64 packages cannot be had: {error}")
    build(wanted)
    return wanted


@pytest.fixture(scope="session")
def built() -> Callable[[str], Shape]:
    """Builds a shape, or skips: see `have`."""
    return have


@pytest.fixture
def machine(built: Callable[[str], Shape]) -> Iterator[Machine]:
    """A machine with a quick processor: 48 bits, no SVE."""
    with open_machine(built("neoverse-n1-4k")) as machine:
        yield machine


@pytest.fixture
def sve_machine(built: Callable[[str], Shape]) -> Iterator[Machine]:
    """A machine with everything: 52 bits, SVE of all lengths."""
    with open_machine(built("max-4k-6.12")) as machine:
        yield machine
