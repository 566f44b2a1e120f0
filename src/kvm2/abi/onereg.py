"""KVM_GET_ONE_REG ids of arm64: how they are made, read and named.

An id is `arch 63:56 | size 55:52 (log2 of bytes) | class 31:16 | index 15:0`. x86-64 has none in 6.12.

>>> hex(sysreg(sysregs.MPIDR_EL1)), hex(core("regs.pc")), hex(KVM_REG_ARM64_SVE_VLS)
('0x603000000013c005', '0x6030000000100040', '0x606000000015ffff')
>>> parse(0x6030000000100040).name, parse(sve_z(31)).size, parse(0x603000000013DF1A).name
('regs.pc', 256, 'KVM_REG_ARM_TIMER_CNT')
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

from kvm2.abi import sysregs
from kvm2.abi.layout import Array
from kvm2.abi.structs_arm64 import Regs

KVM_REG_ARCH_MASK: Final = 0xFF00000000000000
KVM_REG_ARM64: Final = 0x6000000000000000
KVM_REG_SIZE_SHIFT: Final = 52
KVM_REG_SIZE_MASK: Final = 0x00F0000000000000
KVM_REG_SIZE_U8: Final = 0x0000000000000000
KVM_REG_SIZE_U16: Final = 0x0010000000000000
KVM_REG_SIZE_U32: Final = 0x0020000000000000
KVM_REG_SIZE_U64: Final = 0x0030000000000000
KVM_REG_SIZE_U128: Final = 0x0040000000000000
KVM_REG_SIZE_U256: Final = 0x0050000000000000
KVM_REG_SIZE_U512: Final = 0x0060000000000000
KVM_REG_SIZE_U1024: Final = 0x0070000000000000
KVM_REG_SIZE_U2048: Final = 0x0080000000000000

KVM_REG_ARM_COPROC_MASK: Final = 0x000000000FFF0000
KVM_REG_ARM_COPROC_SHIFT: Final = 16
KVM_REG_ARM_CORE: Final = 0x0010 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM_DEMUX: Final = 0x0011 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM64_SYSREG: Final = 0x0013 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM_FW: Final = 0x0014 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM64_SVE: Final = 0x0015 << KVM_REG_ARM_COPROC_SHIFT
KVM_REG_ARM_FW_FEAT_BMAP: Final = 0x0016 << KVM_REG_ARM_COPROC_SHIFT

KVM_REG_ARM_DEMUX_ID_MASK: Final = 0xFF00
KVM_REG_ARM_DEMUX_ID_SHIFT: Final = 8
KVM_REG_ARM_DEMUX_ID_CCSIDR: Final = 0
KVM_REG_ARM_DEMUX_VAL_MASK: Final = 0x00FF

KVM_REG_ARM64_SVE_ZREG_BASE: Final = 0
KVM_REG_ARM64_SVE_PREG_BASE: Final = 0x400
KVM_REG_ARM64_SVE_FFR_BASE: Final = 0x600
KVM_ARM64_SVE_NUM_ZREGS: Final = 32
KVM_ARM64_SVE_NUM_PREGS: Final = 16
KVM_ARM64_SVE_MAX_SLICES: Final = 32
KVM_ARM64_SVE_VQ_MIN: Final = 1
KVM_ARM64_SVE_VQ_MAX: Final = 512
KVM_ARM64_SVE_VLS_WORDS: Final = (KVM_ARM64_SVE_VQ_MAX - KVM_ARM64_SVE_VQ_MIN) // 64 + 1
KVM_REG_ARM64_SVE_VLS: Final = KVM_REG_ARM64 | KVM_REG_ARM64_SVE | KVM_REG_SIZE_U512 | 0xFFFF


def sysreg(encoding: int) -> int:
    """The id of a system register (`ARM64_SYS_REG`): 8 bytes, its encoding in the low 16 bits."""
    if encoding >> 16:
        raise ValueError(f"{encoding:#x} is not the 16-bit encoding of a system register")
    return KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG | encoding


def fw(index: int) -> int:
    """The id of a firmware pseudo-register (`KVM_REG_ARM_FW_REG`)."""
    return KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_FW | _index(index, 0x10000)


def fw_feat_bmap(index: int) -> int:
    """The id of a register with one bit per hypercall service (`KVM_REG_ARM_FW_FEAT_BMAP_REG`)."""
    return KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_FW_FEAT_BMAP | _index(index, 0x10000)


def ccsidr(csselr: int) -> int:
    """The id of CCSIDR for one value of CSSELR; 4 bytes. KVM has CSSELR 0 to 13 (CSSELR_MAX is 14)."""
    return KVM_REG_ARM64 | KVM_REG_SIZE_U32 | KVM_REG_ARM_DEMUX | KVM_REG_ARM_DEMUX_ID_CCSIDR << 8 | _index(csselr, 256)


def sve_z(n: int, slice_: int = 0) -> int:
    """The id of Z<n>, 256 bytes a slice (`KVM_REG_ARM64_SVE_ZREG`)."""
    return _sve(KVM_REG_ARM64_SVE_ZREG_BASE, KVM_REG_SIZE_U2048, _index(n, KVM_ARM64_SVE_NUM_ZREGS), slice_)


def sve_p(n: int, slice_: int = 0) -> int:
    """The id of P<n>, 32 bytes a slice (`KVM_REG_ARM64_SVE_PREG`)."""
    return _sve(KVM_REG_ARM64_SVE_PREG_BASE, KVM_REG_SIZE_U256, _index(n, KVM_ARM64_SVE_NUM_PREGS), slice_)


def sve_ffr(slice_: int = 0) -> int:
    """The id of FFR, 32 bytes a slice (`KVM_REG_ARM64_SVE_FFR`)."""
    return _sve(KVM_REG_ARM64_SVE_FFR_BASE, KVM_REG_SIZE_U256, 0, slice_)


def _sve(base: int, size: int, n: int, slice_: int) -> int:
    return KVM_REG_ARM64 | KVM_REG_ARM64_SVE | size | base | n << 5 | _index(slice_, KVM_ARM64_SVE_MAX_SLICES)


def _index(value: int, limit: int) -> int:
    if not 0 <= value < limit:
        raise ValueError(f"register index {value}: 0 to {limit - 1} are possible")
    return value


KVM_REG_ARM_PTIMER_CTL: Final = sysreg(sysregs.CNTP_CTL_EL0)
KVM_REG_ARM_PTIMER_CVAL: Final = sysreg(sysregs.CNTP_CVAL_EL0)
KVM_REG_ARM_PTIMER_CNT: Final = sysreg(sysregs.CNTPCT_EL0)
KVM_REG_ARM_TIMER_CTL: Final = sysreg(sysregs.CNTV_CTL_EL0)
# The kernel swapped these two by accident, and now they are ABI.
KVM_REG_ARM_TIMER_CVAL: Final = sysreg(sysregs.CNTVCT_EL0)
KVM_REG_ARM_TIMER_CNT: Final = sysreg(sysregs.CNTV_CVAL_EL0)

KVM_REG_ARM_PSCI_VERSION: Final = fw(0)
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1: Final = fw(1)
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2: Final = fw(2)
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_3: Final = fw(3)
KVM_REG_ARM_STD_BMAP: Final = fw_feat_bmap(0)
KVM_REG_ARM_STD_HYP_BMAP: Final = fw_feat_bmap(1)
KVM_REG_ARM_VENDOR_HYP_BMAP: Final = fw_feat_bmap(2)

KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1_NOT_AVAIL: Final = 0
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1_AVAIL: Final = 1
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1_NOT_REQUIRED: Final = 2
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2_NOT_AVAIL: Final = 0
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2_UNKNOWN: Final = 1
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2_AVAIL: Final = 2
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2_NOT_REQUIRED: Final = 3
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2_ENABLED: Final = 1 << 4
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_3_NOT_AVAIL: Final = 0
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_3_AVAIL: Final = 1
KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_3_NOT_REQUIRED: Final = 2
KVM_REG_ARM_STD_BIT_TRNG_V1_0: Final = 0
KVM_REG_ARM_STD_HYP_BIT_PV_TIME: Final = 0
KVM_REG_ARM_VENDOR_HYP_BIT_FUNC_FEAT: Final = 0
KVM_REG_ARM_VENDOR_HYP_BIT_PTP: Final = 1


@dataclass(frozen=True)
class CoreReg:
    """A core register: its name as KVM_REG_ARM_CORE_REG() takes it, its id, its size in bytes."""

    name: str
    id: int
    size: int


def _core_regs() -> tuple[CoreReg, ...]:
    found = []
    for path, leaf in Regs.walk():
        if leaf.c_name == "__reserved":
            continue
        count = leaf.type.count if isinstance(leaf.type, Array) else 1
        size = leaf.size // count
        for i in range(count):
            name = path if count == 1 else f"{path}[{i}]"
            index = (leaf.offset + i * size) // 4
            bits = (size.bit_length() - 1) << KVM_REG_SIZE_SHIFT
            found.append(CoreReg(name, KVM_REG_ARM64 | bits | KVM_REG_ARM_CORE | index, size))
    return tuple(found)


CORE_REGS: Final = _core_regs()
"""Every core register in the order of `struct kvm_regs`; the V registers are not there on a vCPU with SVE."""

_CORE_BY_NAME: Final = {reg.name: reg.id for reg in CORE_REGS}


def core(name: str) -> int:
    """The id of a core register by its C name, such as "regs.pc", "spsr[0]", "fp_regs.fpsr"; KeyError: no such."""
    return _CORE_BY_NAME[name]


@dataclass(frozen=True)
class Reg:
    """An id taken apart.

    `kind` is "core", "demux", "sysreg", "fw", "sve", "fw_feat_bmap" or "unknown"; `index` the low 16 bits; `size` in
    bytes; `name` a readable one, whether or not a vCPU has such a register.
    """

    id: int
    kind: str
    size: int
    index: int
    name: str


_KINDS: Final = {0x10: "core", 0x11: "demux", 0x13: "sysreg", 0x14: "fw", 0x15: "sve", 0x16: "fw_feat_bmap"}


@cache
def _named() -> dict[int, str]:
    ids = {value: name for name, value in globals().items() if isinstance(value, int) and value >> 56 == 0x60}
    ids.pop(KVM_REG_ARM64)
    return ids | {reg.id: reg.name for reg in CORE_REGS}


def parse(reg_id: int) -> Reg:
    """What an id means; never fails: of an id that KVM has not, `kind` is "unknown" or `name` is its number."""
    size = 1 << (reg_id >> KVM_REG_SIZE_SHIFT & 15)
    kind = _KINDS.get(reg_id >> KVM_REG_ARM_COPROC_SHIFT & 0xFFF, "unknown")
    # Bits between the size and the class mean nothing: KVM refuses an id that has one.
    if reg_id >> 56 != KVM_REG_ARM64 >> 56 or reg_id & 0x000FFFFFF0000000:
        kind = "unknown"
    index = reg_id & 0xFFFF
    return Reg(reg_id, kind, size, index, _named().get(reg_id) or _name(reg_id, kind, index))


def _name(reg_id: int, kind: str, index: int) -> str:
    if kind == "sysreg" and reg_id & KVM_REG_SIZE_MASK == KVM_REG_SIZE_U64:
        return sysregs.name_of(index)
    if kind == "demux" and index < 256:
        return f"CCSIDR_EL1[{index}]"
    if kind == "sve":
        n, part = index >> 5 & 31, f"[{index & 31}]" if index & 31 else ""
        if reg_id == sve_z(n, index & 31):
            return f"Z{n}{part}"
        if n < KVM_ARM64_SVE_NUM_PREGS and reg_id == sve_p(n, index & 31):
            return f"P{n}{part}"
        if reg_id == sve_ffr(index & 31):
            return f"FFR{part}"
    return f"{reg_id:#018x}"


def size_of(reg_id: int) -> int:
    """Bytes of the value (`KVM_REG_SIZE`)."""
    return 1 << (reg_id >> KVM_REG_SIZE_SHIFT & 15)
