"""ICC_*_EL1 as userspace saves and restores them: KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS (vgic-sys-reg-v3.c).

Values are 8 bytes. What is written is kept as it is (`struct vgic_vmcr`): the interface itself, at the next KVM_RUN,
raises a binary point below its smallest one and clears what it does not implement.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi import sysregs as sr
from kvm2.errors import KvmError
from kvm2.softkvm.vgic import icc

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.softkvm.vgic.cpuif import CpuInterface
    from kvm2.softkvm.vgic.state import VgicCpu

U32: Final = 0xFFFFFFFF
PRIORITY_FIELD: Final = 0xFF
BPR_FIELD: Final = 7
CTLR_FIELD: Final = 7  # of PRIbits and IDbits
CTLR_SEIS, SRE_SRE = 1 << 14, 1 << 0


def _set_ctlr(face: CpuInterface, value: int) -> None:
    """set_gic_ctlr: what the VM was saved with must be no more than what this host's interface has."""
    priority_bits = (value >> icc.CTLR_PRIBITS_SHIFT & CTLR_FIELD) + 1
    id_bits = value >> icc.CTLR_IDBITS_SHIFT & CTLR_FIELD
    if priority_bits > face.priority_bits:
        raise _refusal(face, value, f"{priority_bits} bits of priority: this interface has {face.priority_bits}")
    face.priority_bits = priority_bits
    if id_bits > face.id_bits:
        raise _refusal(face, value, f"IDbits {id_bits}: this interface has {face.id_bits}")
    face.id_bits = id_bits
    if value & CTLR_SEIS:
        raise _refusal(face, value, "SEIS: this interface reports no SErrors")
    if not value & icc.CTLR_A3V:
        raise _refusal(face, value, "A3V (bit 15) is set on this host")
    face.cbpr, face.eoimode = bool(value & icc.CTLR_CBPR), bool(value & icc.CTLR_EOIMODE)


def _refusal(face: CpuInterface, value: int, why: str) -> KvmError:
    return KvmError(errno.EINVAL, f"ICC_CTLR_EL1 = {value:#x}: {why}")


def _set_bpr1(face: CpuInterface, value: int) -> None:
    if not face.cbpr:
        face.bpr1 = value & BPR_FIELD


def _set_sre(face: CpuInterface, value: int) -> None:
    if not value & SRE_SRE:
        raise KvmError(errno.EINVAL, f"ICC_SRE_EL1 = {value:#x}: SRE (bit 0) is always set in a GICv3 of KVM")


def _setter(name: str, mask: int) -> Callable[[CpuInterface, int], None]:
    def put(face: CpuInterface, value: int) -> None:
        setattr(face, name, value & mask)

    return put


def _flag(name: str) -> Callable[[CpuInterface, int], None]:
    def put(face: CpuInterface, value: int) -> None:
        setattr(face, name, bool(value & 1))

    return put


# AP<g>R1 to R3 exist as registers, and are refused: 5 bits of priority need one word.
_ABSENT: Final = frozenset(
    {
        sr.ICC_AP0R1_EL1,
        sr.ICC_AP0R2_EL1,
        sr.ICC_AP0R3_EL1,
        sr.ICC_AP1R1_EL1,
        sr.ICC_AP1R2_EL1,
        sr.ICC_AP1R3_EL1,
    }
)
_PUTS: Final[dict[int, Callable[[CpuInterface, int], None]]] = {
    sr.ICC_PMR_EL1: _setter("pmr", PRIORITY_FIELD),
    sr.ICC_BPR0_EL1: _setter("bpr0", BPR_FIELD),
    sr.ICC_BPR1_EL1: _set_bpr1,
    sr.ICC_AP0R0_EL1: _setter("ap0r", U32),
    sr.ICC_AP1R0_EL1: _setter("ap1r", U32),
    sr.ICC_CTLR_EL1: _set_ctlr,
    sr.ICC_SRE_EL1: _set_sre,
    sr.ICC_IGRPEN0_EL1: _flag("grpen0"),
    sr.ICC_IGRPEN1_EL1: _flag("grpen1"),
}
REGISTERS: Final = frozenset(_PUTS) | _ABSENT


def _check(enc: int) -> None:
    if enc not in REGISTERS:
        raise KvmError(errno.ENOENT, f"register {enc:#x} is none of a GICv3's CPU interface that can be saved")
    if enc in _ABSENT:
        raise KvmError(errno.EINVAL, f"{sr.name_of(enc)}: with 5 bits of priority there is only AP0R0 and AP1R0")


def get(cpu: VgicCpu, enc: int) -> int:
    """The register's value. KvmError: ENOENT for one that userspace cannot save, EINVAL for AP<g>R1 and up."""
    _check(enc)
    return icc.read(cpu, enc)


def put(cpu: VgicCpu, enc: int, value: int) -> None:
    """Restores the register. KvmError: ENOENT, and EINVAL for a value that this host's interface cannot have."""
    _check(enc)
    with cpu.vgic.lock:
        _PUTS[enc](cpu.interface, value)
        cpu.refresh()
