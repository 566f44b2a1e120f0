"""The timer registers of KVM_GET_ONE_REG and KVM_SET_ONE_REG (arch/arm64/kvm/arch_timer.c).

Counters are the host's counter minus an offset that the vCPUs of a VM share. Two ids are swapped by an accident that is
ABI: KVM_REG_ARM_TIMER_CVAL has the encoding of CNTVCT_EL0, and KVM_REG_ARM_TIMER_CNT that of CNTV_CVAL_EL0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvm2.abi import onereg
from kvm2.softkvm.timers import PHYSICAL, U64, VIRTUAL, physical_count

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.softkvm.vcpu import Vcpu

_VIRTUAL = (onereg.KVM_REG_ARM_TIMER_CTL, onereg.KVM_REG_ARM_TIMER_CNT, onereg.KVM_REG_ARM_TIMER_CVAL)
_PHYSICAL = (onereg.KVM_REG_ARM_PTIMER_CTL, onereg.KVM_REG_ARM_PTIMER_CNT, onereg.KVM_REG_ARM_PTIMER_CVAL)
_COUNTS: Final = {onereg.KVM_REG_ARM_TIMER_CNT: VIRTUAL, onereg.KVM_REG_ARM_PTIMER_CNT: PHYSICAL}
_CONTROLS: Final = {onereg.KVM_REG_ARM_TIMER_CTL: VIRTUAL, onereg.KVM_REG_ARM_PTIMER_CTL: PHYSICAL}
_COMPARES: Final = {onereg.KVM_REG_ARM_TIMER_CVAL: VIRTUAL, onereg.KVM_REG_ARM_PTIMER_CVAL: PHYSICAL}


def ids(kernel: str) -> tuple[int, ...]:
    """The ids in the order of KVM_GET_REG_LIST; 6.1 has the virtual timer only."""
    return _VIRTUAL if kernel == "6.1" else _VIRTUAL + _PHYSICAL


def get(vcpu: Vcpu, id_: int) -> bytes:
    """The register's 8 bytes. CTL has ISTATUS whenever the compare value has passed, enabled or not."""
    timers = vcpu.timers
    if id_ in _COUNTS:
        value = timers[_COUNTS[id_]].count()
    elif id_ in _CONTROLS:
        value = timers[_CONTROLS[id_]].control
    else:
        value = timers[_COMPARES[id_]].compare
    return value.to_bytes(8, "little")


def put(vcpu: Vcpu, id_: int, fetch: Callable[[int], bytes]) -> None:
    """Writing a count moves the offset of all vCPUs, unless KVM_ARM_SET_COUNTER_OFFSET was used: then it is ignored."""
    value, arm = int.from_bytes(fetch(8), "little"), vcpu.vm.arm
    if id_ in _COUNTS:
        if not arm.counter_offset_set:
            offset = physical_count() - value & U64
            vcpu.vm.set_counter_offsets(**{"poffset" if _COUNTS[id_] else "voffset": offset})
    elif id_ in _CONTROLS:
        vcpu.timers[_CONTROLS[id_]].control = value
    else:
        vcpu.timers[_COMPARES[id_]].compare = value
