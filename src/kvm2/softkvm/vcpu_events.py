"""KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS: SErrors that are pending, external aborts to inject.

After `__kvm_arm_vcpu_get_events` and `_set_events` of arch/arm64/kvm/guest.c, `inject_abt64` and `enter_exception64`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi.structs_arm64 import VcpuEvents, VcpuEventsException
from kvm2.abi.sysregs import ESR_EL1, FAR_EL1, ID_AA64PFR0_EL1, SCTLR_EL1, VBAR_EL1
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from kvm2.softkvm.vcpu import Vcpu

RAS_LSB = 28
ISS_MASK: Final = (1 << 25) - 1
ESR_ISV, ESR_IL = 1 << 24, 1 << 25
EC_DABT_LOW, EC_DABT_CUR, FSC_EXTABT = 0x24, 0x25, 0x10
MODE_EL0T, MODE_EL1T, MODE_EL1H, MODE_AA32 = 0x0, 0x4, 0x5, 0x10
DAIF = 0x3C0
# Vector offsets of synchronous exceptions: from the current EL with SP_EL0 and SP_ELx, from a lower EL.
_VECTOR: Final = {MODE_EL1T: 0x000, MODE_EL1H: 0x200}
_FROM_LOWER, _FROM_LOWER_32 = 0x400, 0x600
_KEPT_PSTATE = 0xF0000000 | 1 << 24 | 1 << 22  # NZCV, DIT, PAN
_SSBS, _PAN, _TCO = 1 << 12, 1 << 22, 1 << 25
_SCTLR_SPAN, _SCTLR_DSSBS = 1 << 23, 1 << 44


def has_ras(vcpu: Vcpu) -> bool:
    """Whether the host has the RAS extension, and SErrors have a syndrome."""
    return bool(vcpu.vm.arm.host_register(ID_AA64PFR0_EL1) >> RAS_LSB & 0xF)


def get(vcpu: Vcpu, arg: int) -> int:
    """KVM_GET_VCPU_EVENTS."""
    vcpu.check_initialized()
    ras = has_ras(vcpu)
    exception = VcpuEventsException(
        serror_pending=int(vcpu.serror_pending),
        serror_has_esr=int(ras),
        serror_esr=vcpu.serror_esr if vcpu.serror_pending and ras else 0,
    )
    vcpu.vm.memory.write(arg, VcpuEvents(exception=exception).pack())
    return 0


def put(vcpu: Vcpu, arg: int) -> int:
    """KVM_SET_VCPU_EVENTS. EINVAL: reserved bytes set, a syndrome that is too long or that this host cannot have."""
    vcpu.check_initialized()
    events = VcpuEvents.unpack(vcpu.vm.memory.read(arg, VcpuEvents.SIZE))
    wanted = events.exception
    if any(events.reserved) or any(wanted.pad):
        raise KvmError(errno.EINVAL, "kvm_vcpu_events: reserved and pad must be zero")
    if wanted.serror_pending:
        if wanted.serror_has_esr:
            if not has_ras(vcpu):
                raise KvmError(
                    errno.EINVAL, "serror_has_esr: this host has no RAS extension (KVM_CAP_ARM_INJECT_SERROR_ESR)"
                )
            if wanted.serror_esr & ~ISS_MASK:
                raise KvmError(errno.EINVAL, f"serror_esr {wanted.serror_esr:#x}: a syndrome's ISS has 25 bits")
        vcpu.serror_pending = True
        vcpu.serror_esr = wanted.serror_esr if wanted.serror_has_esr else ESR_ISV
    if wanted.ext_dabt_pending:
        _inject_data_abort(vcpu)
    return 0


def _inject_data_abort(vcpu: Vcpu) -> None:
    """A synchronous external data abort about the address of the last exit: syndrome now, entry when it next runs."""
    vcpu.pull()
    state = vcpu.state
    from_el0 = bool(state.pstate & MODE_AA32) or state.pstate & 0xF == MODE_EL0T
    esr = (EC_DABT_LOW if from_el0 else EC_DABT_CUR) << 26 | FSC_EXTABT | vcpu.fault_esr & ESR_IL
    state.sys[ESR_EL1], state.sys[FAR_EL1] = esr, vcpu.fault_address
    vcpu.exception_pending = vcpu.dirty = True


def enter_el1(vcpu: Vcpu) -> None:
    """The entry to EL1's synchronous exception vector, in `vcpu.state` (`enter_exception64`)."""
    state, old = vcpu.state, vcpu.state.pstate
    if old & MODE_AA32:
        offset = _FROM_LOWER_32
    else:
        offset = _VECTOR.get(old & 0xF, _FROM_LOWER)
    sctlr = state.sys.get(SCTLR_EL1, 0)
    new = old & _KEPT_PSTATE | DAIF | MODE_EL1H
    if not sctlr & _SCTLR_SPAN:
        new |= _PAN
    if sctlr & _SCTLR_DSSBS:
        new |= _SSBS
    if vcpu.vm.arm.mte:
        new |= _TCO
    state.elr_el1, state.spsr[0], state.pstate = state.pc, old, new
    state.pc = state.sys.get(VBAR_EL1, 0) + offset
    vcpu.dirty = True
