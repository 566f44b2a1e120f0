"""DT_NEEDED, against what readelf says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvm2.lab.oracle.elf import needed

PROGRAMS = sorted(
    {Path(path).resolve() for path in (sys.executable, shutil.which("ls"), shutil.which("readelf")) if path}
)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf, of the package binutils")
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_as_readelf_says(path: Path) -> None:
    said = subprocess.run(["readelf", "-dW", str(path)], capture_output=True, text=True, check=True).stdout
    assert needed(path.read_bytes()) == re.findall(r"\(NEEDED\).*\[(.*)\]", said) != []


def test_what_is_not_elf() -> None:
    assert needed(b"") == [] and needed(b"#!/bin/sh\n") == [] and needed(b"\x7fELF\x01\x01" + bytes(60)) == []
    assert needed(b"\x7fELF\x02\x01" + bytes(60)) == []
