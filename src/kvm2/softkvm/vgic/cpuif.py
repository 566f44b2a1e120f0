"""A vCPU's CPU interface: which interrupt is signalled, and what acknowledging and ending one does.

After `vgic-v3-sr.c` of arch/arm64/kvm/hyp, which does in software what the virtual CPU interface of a GICv3 does in
hardware (Arm IHI 0069, chapter 4.8): priorities in groups by the binary points, preemption, both EOI modes. A GICv2's
interface is the same one with other registers in front (`mmio_v2`).

Everything here runs under the vGIC's lock. The methods that change something refresh the interrupt lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvm2.softkvm.vgic.irq import (
    MAX_SPI,
    MIN_LPI,
    NR_PRIVATE_IRQS,
    NR_SGIS,
    PRIORITY_BITS,
    PRIORITY_MASK,
    SPURIOUS,
    Irq,
)

if TYPE_CHECKING:
    from kvm2.softkvm.vgic.state import VgicCpu

PREEMPTION_BITS: Final = PRIORITY_BITS
BPR_MIN: Final = 8 - PREEMPTION_BITS  # of group 1; group 0's is one less
BPR_MAX: Final = 7
IDLE: Final = 0xFF  # the running priority while nothing is active
PRIORITY_STEP: Final = 8 - PREEMPTION_BITS
ID_BITS: Final = 1  # 24 bits of interrupt numbers, as ICH_VTR_EL2.IDbits says it
GROUP_BITS: Final = 0xFF


class CpuInterface:
    """The registers of a CPU interface (ICH_VMCR_EL2, ICH_AP0R<n>_EL2, ICH_AP1R<n>_EL2) and what they do.

    `pmr` is the priority mask; `bpr0`, `bpr1` the binary points; `eoimode` splits drop and deactivation; `cbpr`
    uses group 0's binary point for both; `ap0r`, `ap1r` have a bit for each active preemption level. `ackctl` and
    `fiqen` are GICv2's: on a GICv3 group 0 is always signalled as FIQ.
    """

    def __init__(self, cpu: VgicCpu) -> None:
        self._cpu = cpu
        self.v2 = False
        self.pmr = 0
        self.bpr0 = self.bpr1 = 0
        self.eoimode = self.cbpr = self.grpen0 = self.grpen1 = self.ackctl = False
        self.fiqen = True
        self.ap0r = self.ap1r = 0
        # Of an IAR or EOIR whose access a signal's exception ended, and which comes again: what it has done so far.
        self.acknowledged: tuple[Irq, int] | None = None
        self.dropped: int | None = None
        self.priority_bits, self.id_bits = PRIORITY_BITS, ID_BITS

    def reset(self, model: str) -> None:
        """vgic_v3_enable and vgic_v2_enable: everything off. The binary points get their reset values by `load`."""
        self.__init__(self._cpu)  # type: ignore[misc]
        self.v2 = model == "v2"
        self.fiqen = not self.v2

    def load(self) -> None:
        """vgic_v3_load: before the vCPU runs, values that userspace restored become what the interface implements."""
        vgic = self._cpu.vcpu.vm.vgic
        if vgic is not None:
            with vgic.lock:
                self.pmr &= PRIORITY_MASK
                self.bpr0, self.bpr1 = max(self.bpr0, BPR_MIN - 1), max(self.bpr1, BPR_MIN)
                self._cpu.refresh()

    # ---- priorities

    def binary_point(self, group: int) -> int:
        """How many low bits of a priority do not preempt (__vgic_v3_pri_to_pre)."""
        if not group or self.cbpr:
            return min(self.bpr0 + 1, BPR_MAX) if group else self.bpr0 + 1
        return self.bpr1

    def preemption(self, priority: int, group: int) -> int:
        """The group priority: what is compared for preemption."""
        return priority & GROUP_BITS << self.binary_point(group)

    def running(self) -> int:
        """The running priority (ICC_RPR_EL1): of the highest active preemption level, 0xff while there is none."""
        active = self.ap0r | self.ap1r
        if not active:
            return IDLE
        return ((active & -active).bit_length() - 1) << PRIORITY_STEP

    def _highest(self) -> Irq | None:
        """The pending interrupt with the highest priority that is enabled by its group; lowest number among equals."""
        best = None
        for irq in self._cpu.listed.values():
            if irq.active or not irq.enabled or not irq.pending:
                continue
            if not (self.grpen1 if irq.group else self.grpen0):
                continue
            if best is None or (irq.priority, irq.intid) < (best.priority, best.intid):
                best = irq
        lpi = self._cpu.lpis.first()
        if lpi is not None and self.grpen1 and (best is None or lpi.priority < best.priority):
            return lpi
        return best

    def _signalled(self, irq: Irq | None) -> bool:
        """Whether it passes the priority mask and preempts what is active."""
        if irq is None or irq.priority >= self.pmr:
            return False
        return self.preemption(irq.priority, irq.group) < self.running()

    def lines(self) -> tuple[bool, bool]:
        """(IRQ, FIQ): what the interface signals to its vCPU."""
        if not self._cpu.listed and not self._cpu.lpis.members:
            return False, False
        irq = self._highest()
        if irq is None or not self._signalled(irq):
            return False, False
        fiq = not irq.group and self.fiqen
        return not fiq, fiq

    def has_pending(self) -> bool:
        """kvm_vgic_vcpu_pending_irq: whether WFI ends, which the running priority does not matter for."""
        lpi = self._cpu.lpis.first()
        if lpi is not None and lpi.priority < self.pmr:
            return True
        return any(
            irq.pending and irq.enabled and not irq.active and irq.priority < self.pmr
            for irq in self._cpu.listed.values()
        )

    # ---- acknowledge, end, deactivate

    def acknowledge(self, group: int | None, keep: bool = False) -> tuple[int, int]:
        """Reads IAR: (number, source vCPU of a GICv2 SGI) of the interrupt that becomes active, 1023 for none.

        `group` is the register's; None takes whichever comes (GICv2 with AckCtl). With `keep` it is the answer until
        `done`: whose access is ended in between asks again.
        """
        if self.acknowledged is None:
            irq = self._highest()
            if irq is None or (group is not None and irq.group != group) or not self._signalled(irq):
                return SPURIOUS, 0
            self.acknowledged = self._activate(irq)
        irq, source = self.acknowledged
        cpu = self._cpu
        if cpu.vcpu.vm.observer is not None:
            cpu.vcpu.vm.observe("irq-ack", intid=irq.intid, vcpu=cpu.vcpu.vcpu_id)
        cpu.vgic.update(irq)
        cpu.refresh()
        if not keep:
            self.acknowledged = None
        return irq.intid, source

    def _activate(self, irq: Irq) -> tuple[Irq, int]:
        """Its priority and it become active; with the source. Whole or not at all: behind the calls no signal comes."""
        level = 1 << (self.preemption(irq.priority, irq.group) >> PRIORITY_STEP)
        from_source = self.v2 and irq.intid < NR_SGIS and irq.source
        source = (irq.source & -irq.source).bit_length() - 1 if from_source else 0
        if irq.group:
            self.ap1r |= level
        else:
            self.ap0r |= level
        if from_source:
            # One sender's request at a time; the interrupt stays pending for the others (vgic_v2_populate_lr).
            irq.source &= irq.source - 1
            irq.active_source = source
            irq.pending_latch = irq.source != 0
        else:
            irq.pending_latch = False
        irq.active = irq.intid < MIN_LPI  # LPIs have no active state
        return irq, source

    def done(self) -> None:
        """The guest has what it accessed."""
        self.acknowledged = self.dropped = None

    def end(self, group: int, intid: int, source: int = 0, keep: bool = False) -> None:
        """Writes EOIR: drops the priority, and with EOImode 0 deactivates (__vgic_v3_write_eoir)."""
        if self.dropped is None:
            self.dropped = self._drop_priority()
        dropped, cpu = self.dropped, self._cpu
        if cpu.vcpu.vm.observer is not None:
            cpu.vcpu.vm.observe("irq-eoi", intid=intid, vcpu=cpu.vcpu.vcpu_id)
        if intid < MIN_LPI and not self.eoimode:
            irq = self._active(intid, source)
            if irq is not None and irq.group == group and self.preemption(irq.priority, group) == dropped:
                self._deactivate(irq)
        cpu.refresh()
        if not keep:
            self.dropped = None

    def _drop_priority(self) -> int:
        """Clears the highest active preemption level of both groups; which it was (__vgic_v3_clear_highest_active)."""
        zero, one = self.ap0r & -self.ap0r, self.ap1r & -self.ap1r
        if not zero and not one:
            return IDLE
        group0 = zero and (not one or zero < one)
        priority = ((zero if group0 else one).bit_length() - 1) << PRIORITY_STEP
        # Behind the last call: no signal comes in between.
        if group0:
            self.ap0r ^= zero
        else:
            self.ap1r ^= one
        return priority

    def _active(self, intid: int, source: int) -> Irq | None:
        irq = self._cpu.listed.get(intid)
        if irq is None or not irq.active:
            return None
        if self.v2 and intid < NR_SGIS and irq.active_source != source:
            return None
        return irq

    def deactivate(self, intid: int, source: int = 0) -> None:
        """Writes DIR: with EOImode 1 the interrupt is no longer active; ignored otherwise, and for LPIs."""
        if not self.eoimode or intid >= MIN_LPI:
            return
        irq = self._active(intid, source)
        if irq is not None:
            self._deactivate(irq)

    def _deactivate(self, irq: Irq) -> None:
        irq.active = False
        vgic = self._cpu.vgic
        if vgic.eoi_notifier is not None and not irq.edge and NR_PRIVATE_IRQS <= irq.intid <= MAX_SPI:
            vgic.eoi_notifier(irq)  # which may lower the line, before anybody looks at it
        vgic.update(irq)

    def highest_pending(self, group: int | None) -> int:
        """Reads HPPIR: the number that IAR would be about if priorities did not matter."""
        irq = self._highest()
        return SPURIOUS if irq is None or (group is not None and irq.group != group) else irq.intid

    # ---- registers, as a guest or userspace writes them

    def set_pmr(self, value: int) -> None:
        """The priority mask; unimplemented low bits read as zero."""
        self.pmr = value & PRIORITY_MASK
        self._cpu.refresh()

    def set_bpr0(self, value: int) -> None:
        """Group 0's binary point: at least the smallest that there is."""
        self.bpr0 = max(value & 7, BPR_MIN - 1)
        self._cpu.refresh()

    def set_bpr1(self, value: int) -> None:
        """Group 1's binary point; ignored where group 0's is used for both."""
        if not self.cbpr:
            self.bpr1 = max(value & 7, BPR_MIN)
            self._cpu.refresh()

    def read_bpr1(self) -> int:
        """Group 1's binary point as it is in force."""
        return min(self.bpr0 + 1, BPR_MAX) if self.cbpr else self.bpr1

    def set_groups(self, group0: bool | None = None, group1: bool | None = None) -> None:
        """Enables or disables the groups that are given."""
        if group0 is not None:
            self.grpen0 = group0
        if group1 is not None:
            self.grpen1 = group1
        self._cpu.refresh()

    def set_control(self, eoimode: bool, cbpr: bool) -> None:
        """ICC_CTLR_EL1.EOImode and CBPR."""
        self.eoimode, self.cbpr = eoimode, cbpr
        self._cpu.refresh()
