"""KVM_CREATE_VM2 on a live arm64 kernel, which has none: as the software KVM of the same machine, which has it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvm2.lab.catalogue.entries import pains
from kvm2.lab.catalogue.play import ok
from kvm2.lab.catalogue.play import run as play
from kvm2.lab.oracle.inside import KVM2, PYTHON
from kvm2.lab.oracle.machine import Job, Machine, open_machine
from kvm2.lab.oracle.shapes import Shape
from kvm2.softkvm import profile

CREATIONS = Path(__file__).with_name("creations.py")


def inside(machine: Machine, entry: str, *words: str, files: dict[str, bytes] | None = None) -> str:
    out, err = bytearray(), bytearray()
    code = machine.run(Job(entry, words, files=files or {}), None, out.extend, err.extend).code
    assert code == 0, err.decode()
    return out.decode()


@pytest.mark.parametrize("name", ["neoverse-n1-4k", "max-4k-6.12"])
def test_creations_come_to_the_same(built: Callable[[str], Shape], name: str) -> None:
    with open_machine(built(name)) as machine:
        live = json.loads(inside(machine, PYTHON, "python", "c.py", "/dev/kvm", files={"c.py": CREATIONS.read_bytes()}))
    done = subprocess.run([sys.executable, CREATIONS, name], capture_output=True, text=True, check=True)
    described = json.loads(done.stdout)
    assert len(live) == len(described) > 30
    assert [one for one, other in zip(live, described, strict=True) if one != other] == []


def test_the_live_kernel_is_probed_and_is_the_described_host(machine: Machine, tmp_path: Path) -> None:
    saved = tmp_path / "probed.toml"
    saved.write_text(inside(machine, KVM2, "kvm2", "probe", "--save", "-"))
    probed, described = profile.load(saved), profile.load("neoverse-n1-4k")
    assert (probed.ipa_limit, probed.granules, probed.sve_vqs, probed.gic) == (
        48,
        described.granules,
        (),
        ("v3", "its"),
    )
    same = {enc: value for enc, value in probed.registers.items() if described.registers.get(enc) == value}
    assert set(described.registers) == set(same)
    assert probed.features == described.features and probed.quirks == described.quirks
    assert dict(probed.caps) == dict(described.caps)


def test_the_catalogue_holds_on_the_live_kernel(built: Callable[[str], Shape]) -> None:
    outcomes = list(play(pains(), f"oracle:{built('neoverse-n1-4k').name}"))
    assert [(one.pain.name, s.brief, s.wrong) for one in outcomes for s in one.steps if s.wrong] == []
    assert ok(outcomes) and sum(one.applies for one in outcomes) >= 20
