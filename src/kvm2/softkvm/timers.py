"""A vCPU's timers, virtual and physical: when they fire, and the interrupts that they raise.

After `arch_timer.c` of arch/arm64/kvm. A timer's registers are in `vcpu.state.sys`; its output is the level of a PPI
of the vGIC, or without one a bit of `kvm_run.s.regs.device_irq_level`.
"""

from __future__ import annotations

import errno
import threading
import time
from typing import TYPE_CHECKING, Final

from kvm2.abi.structs_arm64 import KVM_ARM_DEV_EL1_PTIMER, KVM_ARM_DEV_EL1_VTIMER
from kvm2.abi.sysregs import CNTP_CTL_EL0, CNTP_CVAL_EL0, CNTV_CTL_EL0, CNTV_CVAL_EL0, CNTV_TVAL_EL0
from kvm2.errors import KvmError
from kvm2.softkvm.alarm import alarm

if TYPE_CHECKING:
    from kvm2.softkvm.cpu.core import Core
    from kvm2.softkvm.vcpu import Vcpu

CTL_ENABLE, CTL_IMASK, CTL_ISTATUS = 1, 2, 4
COUNTER_TICK_NS: Final = 16  # the counter of the emulated core: 62.5 MHz
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
VIRTUAL, PHYSICAL = 0, 1
_CTL: Final = (CNTV_CTL_EL0, CNTP_CTL_EL0)
_CVAL: Final = (CNTV_CVAL_EL0, CNTP_CVAL_EL0)
_LEVEL_BITS: Final = (KVM_ARM_DEV_EL1_VTIMER, KVM_ARM_DEV_EL1_PTIMER)


def physical_count() -> int:
    """The host's counter, in ticks of the emulated core's timer."""
    return time.monotonic_ns() // COUNTER_TICK_NS


class Timer:
    """One timer of a vCPU (`struct arch_timer_context`), `kind` VIRTUAL or PHYSICAL."""

    def __init__(self, vcpu: Vcpu, kind: int) -> None:
        self.vcpu, self.kind = vcpu, kind
        self.level: bool | None = None  # its output, where somebody has looked at it
        self.enabled = False  # by kvm_timer_enable: the interrupt is its own
        # The alarm's thread and the vCPU's both look at the output: one at a time, or the older view would win.
        self._looking = threading.Lock()

    # ---- registers

    @property
    def offset(self) -> int:
        """The guest's counter is the host's minus this."""
        arm = self.vcpu.vm.arm
        return arm.poffset if self.kind else arm.voffset

    def count(self) -> int:
        """The counter that the guest sees."""
        return physical_count() - self.offset & U64

    @property
    def control(self) -> int:
        """CTL as it reads: ISTATUS whenever the time has come, enabled or not (read_timer_ctl)."""
        ctl = self.vcpu.state.sys.get(_CTL[self.kind], 0)
        return ctl | (CTL_ISTATUS if self.compare <= self.count() else 0)

    @control.setter
    def control(self, value: int) -> None:
        self.vcpu.state.sys[_CTL[self.kind]] = value & U32 & ~CTL_ISTATUS
        self.vcpu.timers.in_use |= bool(value & CTL_ENABLE)
        self.update()

    @property
    def compare(self) -> int:
        """CVAL."""
        return self.vcpu.state.sys.get(_CVAL[self.kind], 0)

    @compare.setter
    def compare(self, value: int) -> None:
        self.vcpu.state.sys[_CVAL[self.kind]] = value & U64
        self.update()

    @property
    def value(self) -> int:
        """TVAL: how far the time is away, 32 bits."""
        return self.compare - self.count() & U32

    @value.setter
    def value(self, value: int) -> None:
        self.compare = self.count() + ((value & U32 ^ 1 << 31) - (1 << 31))

    # ---- output

    def _armed(self) -> bool:
        return self.vcpu.state.sys.get(_CTL[self.kind], 0) & (CTL_ENABLE | CTL_IMASK) == CTL_ENABLE

    def should_fire(self) -> bool:
        """kvm_timer_should_fire."""
        return self._armed() and self.compare <= self.count()

    def deadline(self) -> int | None:
        """When it fires or has fired, in nanoseconds of the monotonic clock; None: it will not."""
        if not self._armed():
            return None
        return time.monotonic_ns() + (self.compare - self.count()) * COUNTER_TICK_NS

    def update(self) -> None:
        """After a register, the offset or the time has changed: the output, and when to look again."""
        if not self.enabled:
            return
        vcpu = self.vcpu
        with self._looking:
            level = self.should_fire()
            if level != self.level:
                vgic = vcpu.vm.vgic
                if vgic is not None:
                    vgic.inject(vcpu.gic, vcpu.vm.arm.timer_ppi[self.kind], level, owner=self)
                self.level = level  # now: where a signal's exception came before, this is done again
            alarm().set(self, None if level else self.deadline())

    def fired(self) -> None:
        """The alarm's thread: the time has come."""
        self.update()
        if self.vcpu.vm.vgic is None:
            self.vcpu.interrupt_lines_changed()  # userspace may have to be told

    def stop(self) -> None:
        """The vCPU goes away."""
        self.enabled = False
        alarm().set(self, None)


class VcpuTimers:
    """The timers of a vCPU."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.timers = (Timer(vcpu, VIRTUAL), Timer(vcpu, PHYSICAL))
        self.in_use = False  # one has been switched on: until then nobody need look

    def __getitem__(self, kind: int) -> Timer:
        return self.timers[kind]

    def enable(self) -> None:
        """kvm_timer_enable, at the first run: ENODEV where the vGIC was not initialised, EINVAL where two timers of the
        VM have one interrupt, or another device has it."""
        vgic = self.vcpu.vm.vgic
        if vgic is not None and not self.timers[0].enabled:
            if not vgic.initialized:
                raise KvmError(errno.ENODEV, "the vGIC was not initialised: KVM_DEV_ARM_VGIC_CTRL_INIT comes first")
            numbers = self.vcpu.vm.arm.timer_ppi
            if len(set(numbers)) != len(numbers):
                raise KvmError(errno.EINVAL, f"the timers' interrupts are {numbers}: each needs its own")
            for timer in self.timers:
                # Without VHE the physical timer is emulated (get_timer_map).
                hw = timer.kind == VIRTUAL or self.vcpu.vm.profile.mode == "vhe"
                try:
                    vgic.set_owner(self.vcpu.gic, numbers[timer.kind], timer, hw)
                except KvmError as error:
                    raise KvmError(errno.EINVAL, f"interrupt of a timer: {error.reason}") from None
        for timer in self.timers:
            timer.enabled = True
            timer.update()  # userspace may have set its registers, and the line of the vGIC, to anything

    def update(self) -> None:
        """Looks at both."""
        for timer in self.timers:
            timer.update()

    def reset(self) -> None:
        """kvm_timer_vcpu_reset: both off."""
        for timer in self.timers:
            timer.control = 0

    def levels(self) -> int:
        """KVM_ARM_DEV_EL1_*: for `device_irq_level` of a VM without a vGIC."""
        return sum(bit for timer, bit in zip(self.timers, _LEVEL_BITS, strict=True) if timer.should_fire())

    def stop(self) -> None:
        """The vCPU goes away."""
        for timer in self.timers:
            timer.stop()

    def attach(self, core: Core) -> None:
        """Lets the guest's accesses to the virtual timer come here: the core ignores them."""
        timer = self.timers[VIRTUAL]

        def set_control(value: int) -> None:
            timer.control = value & (CTL_ENABLE | CTL_IMASK)  # the hardware's register: the rest is RES0

        def set_compare(value: int) -> None:
            timer.compare = value

        def set_value(value: int) -> None:
            timer.value = value

        core.replace(CNTV_CTL_EL0, lambda: timer.control, set_control)
        core.replace(CNTV_CVAL_EL0, lambda: timer.compare, set_compare)
        core.replace(CNTV_TVAL_EL0, lambda: timer.value, set_value)
