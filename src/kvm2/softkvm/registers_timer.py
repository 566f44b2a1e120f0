"""The timer registers of KVM_GET_ONE_REG and KVM_SET_ONE_REG (arch/arm64/kvm/arch_timer.c).

Counters are the host's counter minus an offset that the vCPUs of a VM share. Two ids are swapped by an accident that is
ABI: KVM_REG_ARM_TIMER_CVAL has the encoding of CNTVCT_EL0, and KVM_REG_ARM_TIMER_CNT that of CNTV_CVAL_EL0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvm2.abi import onereg
from kvm2.abi.sysregs import CNTP_CTL_EL0, CNTP_CVAL_EL0, CNTV_CTL_EL0, CNTV_CVAL_EL0

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.softkvm.vcpu import Vcpu

U64 = (1 << 64) - 1
CTL_ISTATUS = 4
_VIRTUAL = (onereg.KVM_REG_ARM_TIMER_CTL, onereg.KVM_REG_ARM_TIMER_CNT, onereg.KVM_REG_ARM_TIMER_CVAL)
_PHYSICAL = (onereg.KVM_REG_ARM_PTIMER_CTL, onereg.KVM_REG_ARM_PTIMER_CNT, onereg.KVM_REG_ARM_PTIMER_CVAL)
_COUNTS: Final = {onereg.KVM_REG_ARM_TIMER_CNT: False, onereg.KVM_REG_ARM_PTIMER_CNT: True}
_CONTROLS: Final = {
    onereg.KVM_REG_ARM_TIMER_CTL: (CNTV_CTL_EL0, CNTV_CVAL_EL0, False),
    onereg.KVM_REG_ARM_PTIMER_CTL: (CNTP_CTL_EL0, CNTP_CVAL_EL0, True),
}
_COMPARES: Final = {onereg.KVM_REG_ARM_TIMER_CVAL: CNTV_CVAL_EL0, onereg.KVM_REG_ARM_PTIMER_CVAL: CNTP_CVAL_EL0}


def ids(kernel: str) -> tuple[int, ...]:
    """The ids in the order of KVM_GET_REG_LIST; 6.1 has the virtual timer only."""
    return _VIRTUAL if kernel == "6.1" else _VIRTUAL + _PHYSICAL


def count(vcpu: Vcpu, physical: bool) -> int:
    """The counter that the guest sees."""
    arm = vcpu.vm.arm
    return vcpu.physical_counter() - (arm.poffset if physical else arm.voffset) & U64


def get(vcpu: Vcpu, id_: int) -> bytes:
    """The register's 8 bytes. CTL has ISTATUS whenever the compare value has passed, enabled or not."""
    state = vcpu.state.sys
    if id_ in _COUNTS:
        value = count(vcpu, _COUNTS[id_])
    elif id_ in _CONTROLS:
        control, compare, physical = _CONTROLS[id_]
        passed = state.get(compare, 0) <= count(vcpu, physical)
        value = state.get(control, 0) & ~CTL_ISTATUS | (CTL_ISTATUS if passed else 0)
    else:
        value = state.get(_COMPARES[id_], 0)
    return value.to_bytes(8, "little")


def put(vcpu: Vcpu, id_: int, fetch: Callable[[int], bytes]) -> None:
    """Writing a count moves the offset of all vCPUs, unless KVM_ARM_SET_COUNTER_OFFSET was used: then it is ignored."""
    value, arm = int.from_bytes(fetch(8), "little"), vcpu.vm.arm
    if id_ in _COUNTS:
        if arm.counter_offset_set:
            return
        offset = vcpu.physical_counter() - value & U64
        if _COUNTS[id_]:
            arm.poffset = offset
        else:
            arm.voffset = offset
    elif id_ in _CONTROLS:
        vcpu.state.sys[_CONTROLS[id_][0]] = value & 0xFFFFFFFF & ~CTL_ISTATUS
    else:
        vcpu.state.sys[_COMPARES[id_]] = value
