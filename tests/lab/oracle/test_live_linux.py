"""The Linux machine on a live arm64 KVM: only the handles are used, so the board there is the board here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvm2.errors import EnvironmentFault
from kvm2.lab.linux.files import linux_files
from kvm2.lab.oracle.inside import PYTHON
from kvm2.lab.oracle.machine import Job, Machine, open_machine
from kvm2.lab.oracle.shapes import Shape

HERE = Path(__file__).parent


def inside(machine: Machine, script: str, *words: str, files: dict[str, bytes] | None = None) -> str:
    out, err = bytearray(), bytearray()
    given = {script: (HERE / script).read_bytes(), **(files or {})}
    code = machine.run(Job(PYTHON, ("python", script, *words), files=given), None, out.extend, err.extend).code
    assert code == 0, err.decode()
    return out.decode()


@pytest.mark.parametrize("name", ["neoverse-n1-4k", pytest.param("max-4k-gicv2", marks=pytest.mark.slow)])
def test_a_small_guest_sees_the_same_machine(built: Callable[[str], Shape], name: str) -> None:
    with open_machine(built(name)) as machine:
        live = json.loads(inside(machine, "guest_inside.py", "/dev/kvm"))
    done = subprocess.run(
        [sys.executable, HERE / "guest_inside.py", name], capture_output=True, text=True, check=True, timeout=120
    )
    assert live == json.loads(done.stdout)
    assert live[:2] == ["shutdown", "d00dfeed04"] and live[3] == (2 if name.endswith("gicv2") else 3)


@pytest.mark.slow
def test_linux_boots_on_a_live_kernel_and_writes_a_disk(machine: Machine) -> None:
    try:
        files = linux_files()
    except EnvironmentFault as error:
        pytest.skip(f"Debian's packages cannot be had: {error}")
    given = {"k": files.kernel.read_bytes(), "i": files.initrd.read_bytes()}
    told = json.loads(inside(machine, "linux_inside.py", "k", "i", files=given).splitlines()[-1])
    assert told["ended"] == "shutdown", told["reason"] + told["console"]
    assert told["disk"] == "made by the guest" and told["ipa_bits"] == 41
    assert "uart-pl011" in told["console"] and "virtio0" in told["console"] and "\r\n2\r\n" in told["console"]
