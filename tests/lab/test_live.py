"""A live arm64 kernel, its probed model and the catalogue: `-m slow`, where QEMU and Debian's packages can be had."""

from __future__ import annotations

import shutil

import pytest

from kvm2.lab.catalogue.entries import pains
from kvm2.lab.catalogue.play import ok, run
from kvm2.lab.conform import Conform, Wanted
from kvm2.lab.oracle import qemu

PROGRAMS = (qemu.PROGRAM, "apt-get", "dpkg-deb")
MISSING = [program for program in PROGRAMS if not shutil.which(program)]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")]


@pytest.mark.parametrize("shape", ["cortex-a53-4k", "max-4k-6.12", "max-16k-6.12", "max-4k-6.1"])
def test_a_kernel_and_the_model_that_a_probe_makes_of_it(shape: str) -> None:
    done = Conform(Wanted(f"oracle:{shape}")).run()
    totals = done.report.totals()
    assert done.report.ok, done.json()["differences"]
    assert totals["equal"] >= 0.99 * totals["steps"] and totals["steps"] > 4900


@pytest.mark.parametrize("shape", ["max-4k-6.12", "max-4k-gicv2", "cortex-a53-4k", "max-4k-protected"])
def test_the_catalogue_on_a_live_kernel(shape: str) -> None:
    outcomes = list(run(pains(), f"oracle:{shape}"))
    wrong = [(one.pain.name, [(s.brief, s.wrong) for s in one.steps if s.wrong]) for one in outcomes]
    assert [row for row in wrong if row[1]] == []
    assert ok(outcomes)
