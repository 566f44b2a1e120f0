"""Cache registers: CLIDR_EL1 and the CCSIDR of each cache.

6.12 makes them up from CTR_EL0 (`reset_clidr`, `get_ccsidr`); with the quirk `hardware-caches` (6.1) they are the
machine's and cannot be changed.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi.sysregs import CLIDR_EL1, CTR_EL0
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.softkvm.vcpu import Vcpu

CSSELR_MAX: Final = 14
IND = 1
IDC, DIC = 1 << 28, 1 << 29
CLIDR_RES0 = ~((1 << 47) - 1) & (1 << 64) - 1
LOUIS, LOC, LOUU = 21, 24, 27
_SEPARATE_BITS = {"instruction": 1, "data": 2, "unified": 4}
TTYPE = 33


def fabricated(vcpu: Vcpu) -> bool:
    """Whether KVM makes up the cache registers (6.12), or shows the machine's (6.1)."""
    return "hardware-caches" not in vcpu.vm.profile.quirks


def hardware_ctr(vcpu: Vcpu) -> int:
    """CTR_EL0 as the machine has it, which a guest reads where KVM does not trap it (6.1).

    The kernel's own value has IDC wherever CLIDR_EL1 says that nothing need be cleaned to the point of unification
    (`read_cpuid_effective_cachetype`); the machine's is taken to have it not, there.
    """
    arm = vcpu.vm.arm
    level, inner, unified = (arm.host_register(CLIDR_EL1) >> lsb & 7 for lsb in (LOC, LOUIS, LOUU))
    made_up = not level or not (inner or unified)
    return arm.host_register(CTR_EL0) & ~(IDC if made_up else 0)


def clidr(ctr: int, mte: bool) -> int:
    """`reset_clidr`: one or two levels that look right for CTR_EL0.

    >>> hex(clidr(0x9444C004, False))
    '0x2000021'
    """
    dic, idc = bool(ctr & DIC), bool(ctr & IDC)
    if idc:
        loc = 1 if dic else 2
        value = _SEPARATE_BITS["unified"] << 3 * (loc - 1)
    else:
        loc = 1
        value = 1 << LOUU | 1 << LOUIS | _SEPARATE_BITS["data"]
    if not dic:
        value |= _SEPARATE_BITS["instruction"]
    value |= loc << LOC
    return value | 2 << TTYPE + 2 * (loc - 1) if mte else value


def check_clidr(vcpu: Vcpu, value: int) -> None:
    """`set_clidr`: EINVAL for reserved bits, or for no cleaning to the point of unification where the host needs it."""
    level, inner, unified = value >> LOC & 7, value >> LOUIS & 7, value >> LOUU & 7
    needs_none = not level or not (inner or unified)
    if value & CLIDR_RES0 or (needs_none and not vcpu.vm.arm.host_register(CTR_EL0) & IDC):
        raise KvmError(
            errno.EINVAL, f"CLIDR_EL1 = {value:#x}: reserved bits, or levels that CTR_EL0.IDC = 0 does not allow"
        )


def _line_size(vcpu: Vcpu, instruction: bool) -> int:
    """log2 of the smallest line in bytes."""
    ctr = vcpu.vm.arm.host_register(CTR_EL0)
    return ((ctr if instruction else ctr >> 16) & 0xF) + 2


def indices(vcpu: Vcpu) -> list[int]:
    """The CSSELR values that have a CCSIDR register."""
    return list(range(CSSELR_MAX)) if fabricated(vcpu) else sorted(vcpu.vm.profile.ccsidr)


def ccsidr(vcpu: Vcpu, csselr: int) -> int:
    """CCSIDR for a value of CSSELR: one set, one way, the smallest line; or what was written."""
    if not fabricated(vcpu):
        return vcpu.vm.profile.ccsidr.get(csselr, 0)
    if vcpu.ccsidr is not None:
        return vcpu.ccsidr[csselr]
    return _line_size(vcpu, bool(csselr & IND)) - 4 & 7


def _index(vcpu: Vcpu, id_: int) -> int:
    if id_ & 0xF000_0000 or (id_ & 0xFF00) or (id_ >> 52 & 0xF) != 2:
        raise KvmError(errno.ENOENT, f"register {id_:#x}: CCSIDR registers are 4 bytes, index in bits 7:0")
    csselr = id_ & 0xFF
    if csselr not in indices(vcpu):
        raise KvmError(errno.ENOENT, f"CCSIDR {csselr}: this host has {indices(vcpu)}")
    return csselr


def get(vcpu: Vcpu, id_: int) -> bytes:
    """KVM_GET_ONE_REG of a KVM_REG_ARM_DEMUX id (demux_c15_get)."""
    return ccsidr(vcpu, _index(vcpu, id_)).to_bytes(4, "little")


def put(vcpu: Vcpu, id_: int, fetch: Callable[[int], bytes]) -> None:
    """KVM_SET_ONE_REG of a KVM_REG_ARM_DEMUX id (demux_c15_set, set_ccsidr)."""
    csselr = _index(vcpu, id_)
    value, current = int.from_bytes(fetch(4), "little"), ccsidr(vcpu, csselr)
    if not fabricated(vcpu):
        if value != current:
            raise KvmError(errno.EINVAL, f"CCSIDR {csselr} is the machine's ({current:#x}) and cannot be {value:#x}")
        return
    smallest = _line_size(vcpu, bool(csselr & IND))
    if (value & 7) + 4 < smallest:
        raise KvmError(
            errno.EINVAL, f"CCSIDR {csselr} = {value:#x}: lines below the host's smallest, {1 << smallest} bytes"
        )
    if vcpu.ccsidr is None:
        if value == current:
            return
        vcpu.ccsidr = [ccsidr(vcpu, index) for index in range(CSSELR_MAX)]
    vcpu.ccsidr[csselr] = value
