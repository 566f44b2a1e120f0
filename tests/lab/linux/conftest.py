"""Debian's kernels, where this computer can have them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable

import pytest

from kvm2.errors import EnvironmentFault
from kvm2.lab.linux import LinuxFiles, linux_files


@pytest.fixture(scope="session")
def debian() -> Callable[[str], LinuxFiles]:
    """The files of a flavour; skips where apt and dpkg are missing or Debian's packages cannot be had."""

    def have(flavour: str) -> LinuxFiles:
        missing = [program for program in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(program) is None]
        if sys.platform != "linux" or missing:
            pytest.skip(f"needs {', '.join(missing) or 'Linux'}")
        try:
            return linux_files(flavour)
        except EnvironmentFault as error:
            pytest.skip(f"Debian's arm64 packages cannot be had: {error}")

    return have
