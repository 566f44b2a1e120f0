"""What a guest is shown of its host's ID registers: all of it, or what the emulated core executes of it too.

The description says what userspace reads (KVM_GET_ONE_REG), always. An operating system that believed it would use
what Unicorn's core does not have, and end in an undefined instruction; under the policy "core" each field that it reads
is the lesser of the host's and of the core's own ID registers. Fields that say nothing about execution stay the host's.

>>> from kvm2.softkvm.profile import load
>>> [str(entry) for entry in lowered(load("graviton3"), "max")][:2]
['ID_AA64PFR0_EL1.EL0 2 -> 1', 'ID_AA64PFR0_EL1.RAS 2 -> 0']
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple

from kvm2.abi import sysreg_fields
from kvm2.abi import sysregs as sr
from kvm2.errors import UsageError

if TYPE_CHECKING:
    from kvm2.softkvm.profile import Profile

PROFILE, CORE = "profile", "core"
POLICIES: Final = (PROFILE, CORE)

# About security, caches, the interrupt controller, the PMU, higher exception levels: not the core's to execute.
_HOSTS: Final = frozenset(
    {
        *("ID_AA64PFR0_EL1.EL2", "ID_AA64PFR0_EL1.EL3", "ID_AA64PFR0_EL1.GIC", "ID_AA64PFR0_EL1.CSV3"),
        *("ID_AA64PFR1_EL1.CSV2_frac", "ID_AA64MMFR1_EL1.ECBHB", "ID_AA64MMFR2_EL1.CCIDX", "ID_AA64DFR0_EL1.PMUVer"),
    }
)
# What the core does, where its own registers say less or nothing: it walks tables of 16K pages too, and its physical
# addresses are set to 48 bits; AArch32 it has in name only. Pointer authentication is the first version, by whichever
# algorithm the host names.
_OTHERWISE: Final = {
    "ID_AA64MMFR0_EL1.PARange": 5,
    "ID_AA64MMFR0_EL1.TGran16": 1,
    "ID_AA64PFR0_EL1.EL0": 1,
    "ID_AA64PFR0_EL1.EL1": 1,
    "ID_AA64PFR0_EL1.CSV2": 1,
}
_SIGNING: Final = frozenset(
    {
        *(f"ID_AA64ISAR1_EL1.{field}" for field in ("APA", "API", "GPA", "GPI")),
        *(f"ID_AA64ISAR2_EL1.{field}" for field in ("APA3", "GPA3")),
    }
)
# The AArch64 ID registers: op0 3, op1 0, CRn 0, CRm 4 to 7.
_FIRST, _LAST = sr.ID_AA64PFR0_EL1, sr.ID_AA64PFR0_EL1 | 0x1F
_CTR_DIC: Final = 1 << 29  # instruction caches need no maintenance: translated code does


def checked(policy: str) -> str:
    """The policy, where it is one; UsageError otherwise."""
    if policy not in POLICIES:
        raise UsageError(
            f"guest_ids = {policy!r}: guests are shown the host's ID registers (profile) or the core's (core)"
        )
    return policy


class Lowered(NamedTuple):
    """A field of which a guest is shown less than its host has."""

    register: str
    field: str
    host: int
    guest: int

    def __str__(self) -> str:
        return f"{self.register}.{self.field} {self.host} -> {self.guest}"


@cache
def _core(model: str) -> dict[str, int]:
    """The core's own ID registers, by name."""
    from kvm2.softkvm.cpu.instance import Instance

    instance = Instance(model)
    try:
        names = [name for name in sysreg_fields.REGISTERS if _FIRST <= (sr.SYSREGS.get(name) or 0) <= _LAST]
        return {name: instance.read_sys(sr.by_name(name)) for name in names}
    finally:
        instance.close()


def _fields(register: str, value: int, model: str) -> list[Lowered]:
    """The fields of which the core has less."""
    own = _core(model)[register]
    found = []
    for field in sysreg_fields.fields(register):
        path = f"{register}.{field.name}"
        if path in _HOSTS:
            continue
        host = field.get(value)
        limit = int(model == "max") if path in _SIGNING else _OTHERWISE.get(path, field.get(own))
        if host > limit:
            found.append(Lowered(register, field.name, host, limit))
    return found


@cache
def lower(enc: int, value: int, model: str) -> int:
    """What a guest is shown of `value`, the host's of ID register `enc`, by a core of `model`.

    >>> hex(lower(sr.ID_AA64MMFR0_EL1, 0x32310201126, "max"))
    '0x101125'
    """
    if enc == sr.CTR_EL0:
        return value & ~_CTR_DIC
    if not _FIRST <= enc <= _LAST:
        return value
    name = sr.name_of(enc)
    if name not in _core(model):
        return 0  # a register that is newer than everything that the core executes
    known = 0
    for field in sysreg_fields.fields(name):
        known |= (1 << field.width) - 1 << field.lsb
    value &= known
    for entry in _fields(name, value, model):
        value = sysreg_fields.field(name, entry.field).set(value, entry.guest)
    return value


def lowered(profile: Profile, model: str) -> list[Lowered]:
    """Every field of a host's ID registers that a guest under the policy "core" is shown less of."""
    found = []
    for enc, value in sorted(profile.registers.items()):
        name = sr.name_of(enc) if _FIRST <= enc <= _LAST else ""
        if name in _core(model):
            found += _fields(name, value, model)
    return found
