"""What a name or a number of the KVM API means: ioctls, capabilities, exits, registers, attributes.

>>> [m.kind + " " + m.name for m in lookup("0x4010ae0c")]
['ioctl KVM_CREATE_VM2']
>>> lookup("kvm_cap_arm_vm_ipa_size")[0].number, lookup("pstate")[0].name, lookup("SCTLR_EL1")[0].kind
(165, 'regs.pstate', 'register')
>>> lookup("KVM_NO_SUCH")
[]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from kvm2.abi import caps, exits, ioctls, onereg, sysregs, vm2

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Meaning:
    """One meaning. `kind` is ioctl, capability, exit, register or attribute; `note` says the rest in words."""

    kind: str
    name: str
    number: int
    note: str


def _ioctls() -> Iterator[Meaning]:
    for row in ioctls.ioctls():
        on = ", ".join({"system": "/dev/kvm"}.get(kind, kind) for kind in row.on)
        yield Meaning("ioctl", row.name, row.number, f"on {on}; {', '.join(row.arches)}; {row.doc}")


def _registers() -> Iterator[Meaning]:
    for core in onereg.CORE_REGS:
        yield Meaning("register", core.name, core.id, f"core register, {core.size} bytes")
    for name, value in vars(onereg).items():
        if (
            isinstance(value, int)
            and value >> 56 == onereg.KVM_REG_ARM64 >> 56
            and value & onereg.KVM_REG_ARM_COPROC_MASK
        ):
            yield Meaning("register", name, value, f"{onereg.parse(value).kind}, {onereg.size_of(value)} bytes")
    for name, value in sysregs.SYSREGS.items():
        yield Meaning("register", name, onereg.sysreg(value), f"system register, encoding {value:#06x}")


@cache
def _all() -> tuple[Meaning, ...]:
    found = [*_ioctls(), *_registers()]
    found += [
        Meaning("capability", name, number, caps.MEANINGS.get(number, "")) for name, number in caps.CAPABILITIES.items()
    ]
    found += [Meaning("exit", row.name, row.number, row.doc) for row in exits.EXITS.values()]
    found += [Meaning("attribute", row.constant, row.type, row.doc) for row in vm2.ATTRIBUTES.values()]
    return tuple(found)


def lookup(text: str) -> list[Meaning]:
    """Every meaning of a name (in any case, with or without KVM_ and the like before it) or number; [] where none."""
    try:
        return list(_by_number(int(text, 0)))
    except ValueError:
        word = text.upper()
    exact = [one for one in _all() if one.name.upper() == word]
    return exact or [one for one in _all() if one.name.upper().endswith(("_" + word, "." + word))]


def _by_number(number: int) -> Iterator[Meaning]:
    yield from (one for one in _all() if one.number == number)
    if number >> 56 == onereg.KVM_REG_ARM64 >> 56 and not any(one.number == number for one in _all()):
        reg = onereg.parse(number)
        yield Meaning("register", reg.name, number, f"{reg.kind}, {reg.size} bytes")
