"""The vGIC's attributes on live arm64 kernels, in every state of a VM: as the software KVM of the same machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvm2.lab.oracle.inside import PYTHON
from kvm2.lab.oracle.machine import Job, open_machine
from kvm2.lab.oracle.shapes import Shape

PROGRAM = Path(__file__).with_name("vgic_inside.py")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model"), [("max-4k-6.12", "v3"), ("max-4k-gicv2", "v2"), ("max-4k-6.1", "v3")])
def test_attributes_answer_the_same(built: Callable[[str], Shape], name: str, model: str) -> None:
    out, err = bytearray(), bytearray()
    words = ("python", "vgic.py", "/dev/kvm", model)
    with open_machine(built(name)) as machine:
        job = Job(PYTHON, words, files={"vgic.py": PROGRAM.read_bytes()})
        assert machine.run(job, None, out.extend, err.extend).code == 0, err.decode()
    live = json.loads(out)
    done = subprocess.run([sys.executable, PROGRAM, name, model], capture_output=True, text=True, check=True)
    described = json.loads(done.stdout)
    assert len(live) == len(described) > 10_000
    assert [(one, other) for one, other in zip(live, described, strict=True) if one != other] == []
