"""Device attributes of a vCPU: the PMU, the timers' interrupts, stolen time.

After `kvm_arm_pmu_v3_*_attr`, `kvm_arm_timer_*_attr` and `kvm_arm_pvtime_*_attr` of arch/arm64/kvm.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi.caps import KVM_CAP_STEAL_TIME
from kvm2.abi.structs import DeviceAttr
from kvm2.abi.structs_arm64 import PmuEventFilter
from kvm2.abi.sysregs import ID_AA64DFR0_EL1
from kvm2.errors import KvmError
from kvm2.softkvm import features as feat
from kvm2.softkvm.smccc import INVALID_GPA

if TYPE_CHECKING:
    from kvm2.softkvm.vcpu import Vcpu

PMU_GROUP, TIMER_GROUP, PVTIME_GROUP = 0, 1, 2
PMU_IRQ, PMU_INIT, PMU_FILTER, PMU_SET_PMU = range(4)
PVTIME_IPA = 0
FIRST_PPI, FIRST_SPI, LAST_SPI = 16, 32, 1019
STOLEN_TIME_ALIGN = 64
ALLOW, DENY = 0, 1
PMU_OWNER: Final = "PMU"
_V3 = 1
# Attributes of 6.1's timer group; 6.12 adds the two timers of EL2.
_TIMERS: Final = {False: 2, True: 4}


def _attribute(vcpu: Vcpu, arg: int) -> DeviceAttr:
    return DeviceAttr.unpack(vcpu.vm.memory.read(arg, DeviceAttr.SIZE))


def _none(attr: DeviceAttr) -> KvmError:
    return KvmError(errno.ENXIO, f"attribute {attr.attr} of group {attr.group}: this vCPU has none such")


def _int(vcpu: Vcpu, address: int) -> int:
    return int.from_bytes(vcpu.vm.memory.read(address, 4), "little", signed=True)


def _timers(vcpu: Vcpu) -> int:
    return _TIMERS[feat.vm_wide_features(vcpu.vm)]


def _has_stolen_time(vcpu: Vcpu) -> bool:
    return vcpu.vm.profile.caps.get(KVM_CAP_STEAL_TIME, 0) > 0


def has(vcpu: Vcpu, arg: int) -> int:
    """KVM_HAS_DEVICE_ATTR: 0, or ENXIO."""
    attr = _attribute(vcpu, arg)
    if attr.group == PMU_GROUP:
        there = attr.attr <= PMU_SET_PMU and bool(vcpu.features & feat.PMU)
    elif attr.group == TIMER_GROUP:
        there = attr.attr < _timers(vcpu)
    else:
        there = attr.group == PVTIME_GROUP and attr.attr == PVTIME_IPA and _has_stolen_time(vcpu)
    if not there:
        raise _none(attr)
    return 0


def get(vcpu: Vcpu, arg: int) -> int:
    """KVM_GET_DEVICE_ATTR: the PMU's interrupt (4 bytes), a timer's (4), the stolen-time address (8)."""
    attr = _attribute(vcpu, arg)
    if attr.group == PMU_GROUP and attr.attr == PMU_IRQ:
        data = _pmu_irq(vcpu).to_bytes(4, "little")
    elif attr.group == TIMER_GROUP and attr.attr < _timers(vcpu):
        data = vcpu.vm.arm.timer_ppi[attr.attr].to_bytes(4, "little")
    elif attr.group == PVTIME_GROUP and attr.attr == PVTIME_IPA and _has_stolen_time(vcpu):
        data = vcpu.steal_base.to_bytes(8, "little")
    else:
        raise _none(attr)
    vcpu.vm.memory.write(attr.addr, data)
    return 0


def _pmu_irq(vcpu: Vcpu) -> int:
    if not vcpu.vm.irqchip:
        raise KvmError(errno.EINVAL, "the PMU has an interrupt only with an in-kernel interrupt controller")
    if not vcpu.features & feat.PMU:
        raise KvmError(errno.ENODEV, "this vCPU was initialised without PMU_V3")
    if vcpu.pmu_irq is None:
        raise KvmError(errno.ENXIO, "the PMU's interrupt was not set yet")
    return vcpu.pmu_irq


def put(vcpu: Vcpu, arg: int) -> int:
    """KVM_SET_DEVICE_ATTR, with the kernel's order of checks for each group."""
    attr = _attribute(vcpu, arg)
    if attr.group == PMU_GROUP:
        with vcpu.vm.lock:
            _set_pmu(vcpu, attr)
    elif attr.group == TIMER_GROUP:
        _set_timer(vcpu, attr)
    elif attr.group == PVTIME_GROUP:
        _set_stolen_time(vcpu, attr)
    else:
        raise _none(attr)
    return 0


def _set_pmu(vcpu: Vcpu, attr: DeviceAttr) -> None:
    if not vcpu.features & feat.PMU:
        raise KvmError(errno.ENODEV, "this vCPU was initialised without PMU_V3")
    if vcpu.pmu_created:
        raise KvmError(errno.EBUSY, "the PMU of this vCPU is initialised already")
    if attr.attr == PMU_IRQ:
        _set_pmu_irq(vcpu, attr)
    elif attr.attr == PMU_FILTER:
        _set_pmu_filter(vcpu, attr)
    elif attr.attr == PMU_INIT:
        _init_pmu(vcpu)
    elif attr.attr == PMU_SET_PMU:
        number = _int(vcpu, attr.addr)
        raise KvmError(errno.ENXIO, f"PMU {number}: this host names none (/sys/bus/event_source/devices/*/type)")
    else:
        raise _none(attr)


def _set_pmu_irq(vcpu: Vcpu, attr: DeviceAttr) -> None:
    if not vcpu.vm.irqchip:
        raise KvmError(errno.EINVAL, "the PMU has an interrupt only with an in-kernel interrupt controller")
    irq = _int(vcpu, attr.addr)
    if not FIRST_PPI <= irq <= LAST_SPI:
        raise KvmError(errno.EINVAL, f"interrupt {irq}: a PPI (16-31) or an SPI (32-1019)")
    shared = irq < FIRST_SPI
    for other in vcpu.vm.vcpus.values():
        if other.pmu_irq is not None and (other.pmu_irq != irq if shared else other.pmu_irq == irq):
            raise KvmError(errno.EINVAL, f"interrupt {irq}: a PPI is the same for all vCPUs, an SPI another for each")
    if vcpu.pmu_irq is not None:
        raise KvmError(errno.EBUSY, f"the PMU's interrupt is {vcpu.pmu_irq} already")
    vcpu.pmu_irq = irq


def _set_pmu_filter(vcpu: Vcpu, attr: DeviceAttr) -> None:
    version = vcpu.vm.arm.host_register(ID_AA64DFR0_EL1) >> 8 & 0xF
    events = 1 << (10 if version == _V3 else 16)
    wanted = PmuEventFilter.unpack(vcpu.vm.memory.read(attr.addr, PmuEventFilter.SIZE))
    if wanted.base_event + wanted.nevents > events or wanted.action not in (ALLOW, DENY):
        raise KvmError(
            errno.EINVAL, f"events {wanted.base_event:#x}+{wanted.nevents:#x}: this host has {events:#x}; action 0 or 1"
        )
    if vcpu.vm.ran:
        raise KvmError(errno.EBUSY, "the event filter is final since the VM ran for the first time")
    arm = vcpu.vm.arm
    if arm.pmu_filter is None:
        # The first filter decides what holds for all other events: the opposite of what it says.
        arm.pmu_filter, arm.pmu_filter_default = {}, wanted.action == DENY
    for event in range(wanted.base_event, wanted.base_event + wanted.nevents):
        arm.pmu_filter[event] = wanted.action == ALLOW


def _init_pmu(vcpu: Vcpu) -> None:
    vgic = vcpu.vm.vgic
    if vgic is not None:
        if not vgic.initialized:
            raise KvmError(errno.ENODEV, "initialise the interrupt controller before the PMU")
        if vcpu.pmu_irq is None:
            raise KvmError(errno.ENXIO, "set the PMU's interrupt first")
        vgic.set_owner(vcpu.gic, vcpu.pmu_irq, PMU_OWNER)
    vcpu.pmu_created = True


def _set_timer(vcpu: Vcpu, attr: DeviceAttr) -> None:
    vm = vcpu.vm
    if not vm.irqchip:
        raise KvmError(errno.EINVAL, "timers have interrupts only with an in-kernel interrupt controller")
    irq = _int(vcpu, attr.addr)
    if not FIRST_PPI <= irq < FIRST_SPI:
        raise KvmError(errno.EINVAL, f"interrupt {irq}: a timer's is a PPI, 16 to 31")
    with vm.lock:
        if vm.ran:
            raise KvmError(errno.EBUSY, "the timers' interrupts are final since the VM ran for the first time")
        if attr.attr >= _timers(vcpu):
            raise _none(attr)
        vm.arm.timer_ppi[attr.attr] = irq


def _set_stolen_time(vcpu: Vcpu, attr: DeviceAttr) -> None:
    if not _has_stolen_time(vcpu) or attr.attr != PVTIME_IPA:
        raise _none(attr)
    ipa = int.from_bytes(vcpu.vm.memory.read(attr.addr, 8), "little")
    if ipa % STOLEN_TIME_ALIGN:
        raise KvmError(errno.EINVAL, f"stolen time at {ipa:#x}: {STOLEN_TIME_ALIGN}-byte aligned")
    if vcpu.steal_base != INVALID_GPA:
        raise KvmError(errno.EEXIST, f"stolen time is at {vcpu.steal_base:#x} already")
    if vcpu.vm.slots.find(ipa >> vcpu.vm.profile.page_shift) is None:
        raise KvmError(errno.EINVAL, f"stolen time at {ipa:#x}: no memory slot is there")
    vcpu.steal_base = ipa
