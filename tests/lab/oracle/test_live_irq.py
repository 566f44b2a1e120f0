"""Every ioctl about interrupts on live arm64 kernels: the answers that the software KVM is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvm2.lab.oracle.inside import PYTHON
from kvm2.lab.oracle.machine import Job, open_machine
from kvm2.lab.oracle.shapes import Shape

TESTS = Path(__file__).parents[2]
PROGRAM = TESTS / "softkvm" / "irq_calls.py"
RECORDED = TESTS / "data" / "irq" / "calls.txt"
PRINT = '\nprint("\\n".join(answers("/dev/kvm")))\n'


@pytest.mark.slow
@pytest.mark.parametrize("name", ["max-4k-6.12", "max-16k-6.12", "max-4k-6.1"])
def test_the_recorded_answers_are_the_kernels(built: Callable[[str], Shape], name: str) -> None:
    out, err = bytearray(), bytearray()
    with open_machine(built(name)) as machine:
        job = Job(PYTHON, ("python", "calls.py"), files={"calls.py": (PROGRAM.read_text() + PRINT).encode()})
        assert machine.run(job, None, out.extend, err.extend).code == 0, err.decode()
    assert out.decode().splitlines() == RECORDED.read_text().splitlines()
