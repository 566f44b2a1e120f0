"""A vCPU's registers by name, over KVM_GET/SET_ONE_REG.

>>> hex(register_id("pc")), hex(register_id("ID_AA64MMFR0_EL1")), onereg.size_of(register_id("v0"))
('0x6030000000100040', '0x603000000013c038', 16)
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast, overload

from kvm2.abi import onereg, sysregs
from kvm2.errors import UsageError

if TYPE_CHECKING:
    from kvm2.vcpu import Vcpu

# The short names that the Arm ARM and debuggers use, for the C names of `struct kvm_regs`.
_IDS = {
    **{f"x{n}": onereg.core(f"regs.regs[{n}]") for n in range(31)},
    **{f"v{n}": onereg.core(f"fp_regs.vregs[{n}]") for n in range(32)},
    **{name: onereg.core(f"regs.{name}") for name in ("sp", "pc", "pstate")},
    **{f"spsr_{name}": onereg.core(f"spsr[{n}]") for n, name in enumerate(("el1", "abt", "und", "irq", "fiq"))},
    "sp_el0": onereg.core("regs.sp"),
    "sp_el1": onereg.core("sp_el1"),
    "elr_el1": onereg.core("elr_el1"),
    "fp": onereg.core("regs.regs[29]"),
    "lr": onereg.core("regs.regs[30]"),
    "fpsr": onereg.core("fp_regs.fpsr"),
    "fpcr": onereg.core("fp_regs.fpcr"),
    **{f"z{n}": onereg.sve_z(n) for n in range(onereg.KVM_ARM64_SVE_NUM_ZREGS)},
    **{f"p{n}": onereg.sve_p(n) for n in range(onereg.KVM_ARM64_SVE_NUM_PREGS)},
    "ffr": onereg.sve_ffr(),
    "sve_vls": onereg.KVM_REG_ARM64_SVE_VLS,
}


def register_id(register: int | str) -> int:
    """The 64-bit id of a register by name; numbers and "0x6030..." are taken as ids."""
    if isinstance(register, int):
        return register
    found = _IDS.get(register.lower())
    if found is not None:
        return found
    if re.fullmatch(r"0x[0-9a-fA-F]{1,16}", register):
        return int(register, 16)
    named = getattr(onereg, register, None)
    if register.startswith("KVM_REG_ARM") and isinstance(named, int):
        return named
    try:
        return onereg.sysreg(sysregs.by_name(register))
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"{register!r} is not a register: allowed are x0..x30, sp, pc, pstate, v0..v31, z0..z31, p0..p15, ffr, "
            f"fpsr, fpcr, sve_vls, spsr_*, and system registers by the Arm ARM's names ({error})"
        ) from None


class _Word:
    """One 64-bit core register as an attribute of `Registers`."""

    def __init__(self, name: str) -> None:
        self._id = _IDS[name]

    @overload
    def __get__(self, owner: None, kind: type) -> _Word: ...
    @overload
    def __get__(self, owner: Registers, kind: type) -> int: ...
    def __get__(self, owner: Registers | None, kind: type) -> _Word | int:
        return self if owner is None else cast("int", owner._vcpu.get_reg(self._id))

    def __set__(self, owner: Registers, value: int) -> None:
        owner._vcpu.set_reg(self._id, value)


class _File:
    """x[0..30] or v[0..31]: a register file by number."""

    __slots__ = ("_prefix", "_vcpu")

    def __init__(self, vcpu: Vcpu, prefix: str) -> None:
        self._vcpu, self._prefix = vcpu, prefix

    def _id(self, number: int) -> int:
        try:
            return _IDS[f"{self._prefix}{number}"]
        except KeyError:
            raise IndexError(f"there is no register {self._prefix}{number}") from None

    def __getitem__(self, number: int) -> int:
        value = self._vcpu.get_reg(self._id(number))
        return value if isinstance(value, int) else int.from_bytes(value, "little")

    def __setitem__(self, number: int, value: int) -> None:
        self._vcpu.set_reg(self._id(number), value)


class Registers:
    """`vcpu.regs`: core registers as attributes, `x[0]` and `v[0]` by number, everything by name in brackets.

    Values are numbers; Z, P and FFR in brackets are bytes. Each access is one ioctl: KvmError where KVM refuses it.
    """

    __slots__ = ("_vcpu", "v", "x")

    pc = _Word("pc")
    sp = _Word("sp")
    sp_el0 = _Word("sp_el0")
    sp_el1 = _Word("sp_el1")
    pstate = _Word("pstate")
    elr_el1 = _Word("elr_el1")
    spsr_el1 = _Word("spsr_el1")
    lr = _Word("lr")
    x0, x1, x2, x3 = _Word("x0"), _Word("x1"), _Word("x2"), _Word("x3")
    x4, x5, x6, x7 = _Word("x4"), _Word("x5"), _Word("x6"), _Word("x7")
    x8, x9, x10, x11 = _Word("x8"), _Word("x9"), _Word("x10"), _Word("x11")
    x12, x13, x14, x15 = _Word("x12"), _Word("x13"), _Word("x14"), _Word("x15")
    x16, x17, x18, x19 = _Word("x16"), _Word("x17"), _Word("x18"), _Word("x19")
    x20, x21, x22, x23 = _Word("x20"), _Word("x21"), _Word("x22"), _Word("x23")
    x24, x25, x26, x27 = _Word("x24"), _Word("x25"), _Word("x26"), _Word("x27")
    x28, x29, x30 = _Word("x28"), _Word("x29"), _Word("x30")

    def __init__(self, vcpu: Vcpu) -> None:
        self._vcpu = vcpu
        self.x = _File(vcpu, "x")
        self.v = _File(vcpu, "v")

    def __getitem__(self, register: str | int) -> int | bytes:
        return self._vcpu.get_reg(register)

    def __setitem__(self, register: str | int, value: int | bytes) -> None:
        self._vcpu.set_reg(register, value)
