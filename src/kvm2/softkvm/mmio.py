"""MMIO: a guest's access to no memory slot. Devices in the VM answer it (`vm.bus`), or userspace, at the next KVM_RUN.

After `io_mem_abort` and `kvm_handle_mmio_return` of arch/arm64/kvm/mmio.c. Field positions are those of
`struct kvm_run`.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvm2.abi import exits
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from kvm2.softkvm.cpu.core import Core
    from kvm2.softkvm.run import Execution

# ESR_ELx fields of a data abort (Arm ARM, ISS encoding for an exception from a Data Abort).
ISV, SSE, SF, CM, WNR = 1 << 24, 1 << 21, 1 << 15, 1 << 8, 1 << 6
FSC_MASK = 0x3F
BIG_ENDIAN = 1 << 25 | 1 << 24  # SCTLR_EL1.EE, E0E
MASK64 = (1 << 64) - 1

# Where the fields of the exit lie in `struct kvm_run`.
DATA = exits.UNION_OFFSET + exits.Mmio.LAYOUT.at("data").offset
LENGTH = exits.UNION_OFFSET + exits.Mmio.LAYOUT.at("len").offset
_ADDRESS = struct.Struct("=Q")
_WRITE = {size: struct.Struct(f"=Q{code}") for size, code in ((1, "B"), (2, "H"), (4, "I"), (8, "Q"))}  # and data
_LENGTH = struct.Struct("=IB")  # len, is_write
_NISV = struct.Struct("=QQ")  # esr_iss, fault_ipa

# What of the syndrome userspace gets when it is not valid (kvm_vcpu_dabt_iss_nisv_sanitized).
NISV_ISS = CM | WNR | FSC_MASK


def abort(ex: Execution, esr: int, ipa: int) -> bool:
    """A data abort outside every slot. True: a device of `vm.bus` answered, the guest goes on. False: the exit is
    prepared. KvmError(ENOSYS) for an access without a valid syndrome."""
    if not esr & ISV:
        return _without_syndrome(ex, esr, ipa)
    core, run, bus = ex.core, ex.run_area, ex.vm.bus
    size = 1 << (esr >> 22 & 3)  # SAS
    big = bool(core.sctlr.value & BIG_ENDIAN) and core.big_endian()
    if esr & WNR:
        target = esr >> 16 & 31
        value = core.x[target] & (1 << 8 * size) - 1 if target != 31 else 0
        if big:
            value = int.from_bytes(value.to_bytes(size, "big"), "little")
        if bus.devices and bus.write(ex.vcpu, ipa, size, value):
            core.advance()
            return True
        _WRITE[size].pack_into(run, exits.UNION_OFFSET, ipa, value)
        _LENGTH.pack_into(run, LENGTH, size, 1)
    else:
        answer = bus.read(ex.vcpu, ipa, size) if bus.devices else None
        if answer is not None:
            if big:
                answer = int.from_bytes(answer.to_bytes(size, "little"), "big")
            _load(core, esr, answer)
            core.advance()
            return True
        _ADDRESS.pack_into(run, exits.UNION_OFFSET, ipa)
        _LENGTH.pack_into(run, LENGTH, size, 0)
    ex.mmio_order = "big" if big else "little"
    ex.mmio_esr = esr
    ex.exit_reason = exits.KVM_EXIT_MMIO
    return False


def _without_syndrome(ex: Execution, esr: int, ipa: int) -> bool:
    if not ex.vm.return_nisv_to_user:
        raise KvmError(
            errno.ENOSYS,
            f"the access to IPA {ipa:#x}, outside every slot, has no valid syndrome (ESR_EL2 {esr:#x}: a pair, "
            "SIMD, exclusive or write-back form): map memory there, or enable KVM_CAP_ARM_NISV_TO_USER",
        )
    _NISV.pack_into(ex.run_area, exits.UNION_OFFSET, esr & NISV_ISS, ipa)
    ex.exit_reason = exits.KVM_EXIT_ARM_NISV
    return False


def _load(core: Core, esr: int, value: int) -> None:
    """The register of a load gets `value`, extended as the syndrome says."""
    target = esr >> 16 & 31
    if target == 31:
        return
    if esr & SSE:
        bits = 8 << (esr >> 22 & 3)
        if value >> bits - 1:
            value |= MASK64 << bits & MASK64
    core.x[target] = value if esr & SF else value & 0xFFFF_FFFF


def complete(ex: Execution) -> None:
    """Completes the access of the last MMIO exit: the register of a load gets the data, PC goes on."""
    esr = ex.mmio_esr
    ex.mmio_esr = 0
    if not esr & WNR:
        size = 1 << (esr >> 22 & 3)
        _load(ex.core, esr, int.from_bytes(ex.run_area[DATA : DATA + size], ex.mmio_order))
    ex.core.advance()
    ex.stale = True
