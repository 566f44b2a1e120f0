"""ID registers for migration: what is true on every host."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm2.abi import sysreg_fields, sysregs
from kvm2.lab.common_registers import _safe, safe_registers
from kvm2.softkvm import profile
from kvm2.softkvm.sysregs_fields import fields, first_unsafe

ALL = (1 << 64) - 1


def get(name: str, field: str, value: int) -> int:
    return sysreg_fields.get(name, field, value)


@pytest.mark.parametrize(
    ("register", "field", "values", "common"),
    [
        ("ID_AA64MMFR0_EL1", "PARange", (5, 2), 2),
        ("ID_AA64PFR0_EL1", "AdvSIMD", (-1, 1), -1),  # signed: not there is less than there
        ("ID_AA64PFR0_EL1", "FP", (0, 1), 0),
        ("ID_AA64MMFR0_EL1", "TGran4", (-1, 1), -1),
        ("ID_AA64MMFR0_EL1", "TGran64", (0, -1), -1),
        ("ID_AA64MMFR0_EL1", "TGran4_2", (3, 2), 1),  # equal or none
        ("ID_AA64ISAR1_EL1", "APA", (1, 3), 0),
        ("ID_AA64MMFR1_EL1", "SpecSEI", (0, 1), 1),  # what may happen is more
        ("CTR_EL0", "DminLine", (4, 5), 4),
        ("CTR_EL0", "CWG", (4, 5), 5),
        ("CTR_EL0", "CWG", (0, 5), 0),
        ("CTR_EL0", "L1Ip", (2, 3), 2),
        ("ID_AA64DFR0_EL1", "DoubleLock", (0, -1), -1),
    ],
)
def test_the_rule_of_each_kind_of_field(register: str, field: str, values: tuple[int, int], common: int) -> None:
    enc, place = sysregs.SYSREGS[register], sysreg_fields.field(register, field)
    for order in itertools.permutations(values):
        value, conflicts = _safe(enc, [place.set(0, one) for one in order])
        assert conflicts == () and place.get(value) == common


@given(st.sampled_from(("ID_AA64MMFR0_EL1", "ID_AA64PFR0_EL1", "CTR_EL0", "ID_AA64ISAR1_EL1", "MVFR1_EL1")), st.data())
def test_the_common_value_promises_no_host_too_much(name: str, data: st.DataObject) -> None:
    """The kernel's own check of a written register (arm64_check_features) takes it on every host."""
    enc = sysregs.SYSREGS[name]
    known = sum(field.mask for field in fields(enc) or ())
    values = [value & known for value in data.draw(st.lists(st.integers(0, ALL), min_size=2, max_size=4))]
    common, conflicts = _safe(enc, values)
    assert not conflicts
    for value in values:
        assert first_unsafe(enc, common, value, ALL) is None
    assert _safe(enc, [values[0], values[0]]) == (values[0], ())


def test_two_cores() -> None:
    safe = {one.name: one for one in safe_registers([profile.load("cortex-a53-4k"), profile.load("cortex-a72-4k")])}
    mmfr0 = safe["ID_AA64MMFR0_EL1"]
    assert (mmfr0.value & 0xF, mmfr0.give.keys(), mmfr0.stays) == (2, {"cortex-a72-4k"}, {})
    assert safe["CTR_EL0"].fields_that_stay("cortex-a72-4k") == ["CTR_EL0.L1Ip"]
    assert safe["MIDR_EL1"].conflicts and not safe["MIDR_EL1"].give
    assert get("ID_AA64PFR0_EL1", "CSV2", safe["ID_AA64PFR0_EL1"].value) == 0


def test_a_kernel_that_lets_nobody_change_anything(tmp_path: Path) -> None:
    safe = safe_registers([profile.load("max-4k-6.1"), profile.load("graviton3")])
    assert not any(one.give.get("max-4k-6.1") for one in safe if not one.name.startswith("ID_AA64PFR0"))
    assert any(one.stays.get("max-4k-6.1") for one in safe)


def test_hosts_of_another_architecture_have_none() -> None:
    assert safe_registers([profile.load("x86-64"), profile.load("apple-m1")]) == []
