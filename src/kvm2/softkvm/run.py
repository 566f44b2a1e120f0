"""KVM_RUN: one vCPU's time in the guest, and what ends it.

After `kvm_arch_vcpu_ioctl_run` and `handle_exit` of arch/arm64/kvm. The emulated core runs EL1 and EL0 by itself; each
exception to EL2 arrives in `Execution.trap`, which either handles it and lets the guest go on, or prepares an exit.
"""

from __future__ import annotations

import errno
import struct
import threading
import time
from typing import TYPE_CHECKING

from kvm2.abi import exits
from kvm2.errors import KvmError
from kvm2.softkvm import code_lines, faults, guest_debug, hypercall, mmio, signals, stolen_time
from kvm2.softkvm.cpu.core import Core
from kvm2.softkvm.smccc import INVALID_GPA

if TYPE_CHECKING:
    from typing import Literal

    from kvm2.softkvm.vcpu import Vcpu
    from kvm2.softkvm.vm import Vm

EC_HVC64, EC_SMC64, EC_SYS64, EC_IABT, EC_DABT, EC_SERROR = 0x16, 0x17, 0x18, 0x20, 0x24, 0x2F
ESR_IL = 1 << 25  # a 32-bit instruction
ESR_UNDEF = ESR_IL  # EC 0, unknown reason
PSTATE_NRW, PSTATE_A = 0x10, 1 << 8
_EXIT_REASON = struct.Struct("=I")
EXIT_REASON_OFFSET = exits.EXIT_REASON_OFFSET
IMMEDIATE_EXIT = exits.IMMEDIATE_EXIT_OFFSET
DEVICE_IRQ_LEVEL = exits.SYNC_REGS_OFFSET
_LEVELS = struct.Struct("=Q")

CACHE_LINE = 64  # the shortest that CTR_EL0 shows

# A blocked vCPU (WFI, powered off) wakes up by itself this often, so that Python's signal handlers run in time.
NAP_SECONDS = 0.2


class Execution:
    """A vCPU's emulated core, made at its first KVM_RUN, and the loop around it.

    State: which side holds the registers (`vcpu.dirty`: the VMM changed them; `stale`: the core did), the access of an
    MMIO exit that waits for its completion, a signal that has arrived.
    """

    def __init__(self, vm: Vm, vcpu: Vcpu, run_area: memoryview, lock: threading.RLock) -> None:
        self.vm, self.vcpu, self.run_area = vm, vcpu, run_area
        self._lock = lock  # held by whoever is in an ioctl of this vCPU
        self.core: Core = None  # type: ignore[assignment]  # set at the first run, before anything uses it
        self.debug = guest_debug.GuestDebug(self)
        self.mmio_esr = 0
        self.mmio_order: Literal["little", "big"] = "little"  # of the guest's data, at that access
        self.exit_reason = exits.KVM_EXIT_UNKNOWN
        self.stale = False
        self.wait_for_interrupt = False
        self._running = False
        self._waiting = False  # in WFI
        self._inside = False  # about to enter the guest, in it, or in a trap of it
        self._thread = 0
        self._signalled = False
        self._kind = (False, False)
        self._wake = threading.Event()
        self._stage2_seen = self._code_seen = -1
        self._arm = vm.arm
        self._voffset = self._poffset = -1
        self._lines = (False, False)  # as the core shows them

    # ---- registers: the core's while it holds them, else the vCPU's state

    def pull(self) -> None:
        """Brings `vcpu.state` up to date with the core."""
        if self.stale:
            self.core.save(self.vcpu.state)
            self.stale = False

    # ---- KVM_RUN

    def run(self) -> int:
        """0 with an exit in the run area; KvmError(EINTR) after a signal, or the kernel's answer to a wrong use."""
        vcpu = self.vcpu
        if not vcpu.has_run:
            vcpu.check_runnable()
            self.vm.first_run(vcpu)
        self._signalled, self._running, self._thread = False, True, threading.get_ident()
        watching = signals.enter(self._signal)
        try:
            if vcpu.dirty or self._kind != self._kind_of_core():
                self._prepare()
            if self.mmio_esr:
                if vcpu.exception_pending:  # userspace answers the access with an external abort
                    self.mmio_esr = 0
                else:
                    mmio.complete(self)
                    self.debug.advanced()
            if self.run_area[IMMEDIATE_EXIT]:
                raise KvmError(errno.EINTR, "kvm_run.immediate_exit is set")
            self.exit_reason = exits.KVM_EXIT_UNKNOWN
            self._loop()
        finally:
            if watching:
                signals.leave()
            self._running = False
            if vcpu.timers.in_use and self.vm.vgic is None:
                _LEVELS.pack_into(self.run_area, DEVICE_IRQ_LEVEL, vcpu.timers.levels())  # kvm_timer_update_run
            _EXIT_REASON.pack_into(self.run_area, EXIT_REASON_OFFSET, self.exit_reason)
        return 0

    def _kind_of_core(self) -> tuple[bool, bool]:
        """Whether Python translates for the core, beyond 48 bits and for watchpoints; and whether there are others,
        which have translated code of their own and may be waited for. One that is alone sees its own changes."""
        return self.vm.soft_mmu or self.debug.watching, len(self.vm.vcpus) > 1

    def _prepare(self) -> None:
        """A core that holds the vCPU's registers."""
        vcpu = self.vcpu
        vcpu.before_entry()
        kind = self._kind_of_core()
        if self.core is None or self._kind != kind:
            with self.vm.run_lock:
                self.close()
            soft, several = self._kind = kind
            self.core = self.vm.make_core(vcpu, self.trap, soft)
            if several:
                self.core.watch_code(self._drop_code)
                self.core.set_wfe_trap(True)
            self._voffset = self._poffset = -1  # a new core has none, and no line is up
            self._lines = (False, False)
            self.debug.attach()
            vcpu.dirty = True
        if vcpu.dirty:
            if vcpu.state.pstate & PSTATE_NRW:
                self._refuse_aarch32()
            self.core.load(vcpu.state)
            vcpu.gic.interface.load()
            # The VMM may have written new instructions before it set registers: translated code must not outlive them.
            self.core.flush_code()
            vcpu.dirty = self.stale = False

    def _refuse_aarch32(self) -> None:
        """As `vcpu_mode_is_bad_32bit` where the host has no AArch32 EL0; elsewhere the emulated core lacks it."""
        vcpu = self.vcpu
        why = f"PSTATE {vcpu.state.pstate:#x} is AArch32"
        if vcpu.vm.arm.has_aarch32_el0():
            raise KvmError(errno.EOPNOTSUPP, f"{why}, which the emulated core does not execute: set an AArch64 mode")
        vcpu.initialized = vcpu.has_run = False
        self.exit_reason = exits.KVM_EXIT_FAIL_ENTRY
        raise KvmError(
            errno.EINVAL, f"{why}, which this host does not have: KVM_ARM_VCPU_INIT makes the vCPU usable again"
        )

    def _loop(self) -> None:
        while True:
            if self._signalled:
                self.exit_reason = exits.KVM_EXIT_INTR
                raise KvmError(errno.EINTR, "a signal arrived")
            if self.vm.dead:
                raise KvmError(errno.EIO, self.vm.dead)
            if self.vcpu.stopped():
                self._nap()
                continue
            if self.vcpu.suspended():
                self._wait_for_interrupt()
                if self.vcpu.runnable() or self._timers_changed():
                    return hypercall.wake_up(self)
                continue
            if self.vcpu.timers.in_use and self._timers_changed():
                self.exit_reason = exits.KVM_EXIT_INTR
                raise KvmError(errno.EINTR, "the output of a timer changed: kvm_run.s.regs.device_irq_level has it")
            if self.vcpu.before_entry():
                self._prepare()
            debugged = self.debug.wanted()
            if (debugged or self.debug.watching) and self.debug.other_core():
                self._prepare()
            outcome = self._enter(debugged)
            if outcome == "trap":
                if self.exit_reason != exits.KVM_EXIT_UNKNOWN:
                    return None
                if self.wait_for_interrupt:
                    self.wait_for_interrupt = False
                    self._wait_for_interrupt()
            elif outcome == "wfi":
                self.debug.advanced()
                self._wait_for_interrupt()
            elif outcome == "error":
                raise KvmError(errno.EFAULT, self.core.error)

    def _enter(self, debugged: bool) -> str:
        """Into the guest, until something ends it, with the other vCPUs of the VM out of it."""
        vm, core = self.vm, self.core
        steal = self.vcpu.steal_base != INVALID_GPA
        since = time.monotonic_ns() if steal else 0
        vm.run_lock.acquire(core.stop)
        try:  # at once: between a call and this a signal's exception would keep the lock
            if steal:
                stolen_time.account(self.vcpu, time.monotonic_ns() - since)
            self._synchronise()
            if self.vcpu.serror_pending:
                self._deliver_serror()
            # First this, then the lines: whoever changes one in between sees that it must be shown again.
            self._inside = True
            self._show_lines()
            self.stale = True
            if not debugged:
                return core.run()
            self.debug.enter()
            try:
                return core.run()
            finally:
                self.debug.leave()
        finally:
            self._inside = False
            vm.run_lock.unlock()
            vm.run_lock.pass_on()

    def _deliver_serror(self) -> None:
        """An SError that KVM_SET_VCPU_EVENTS left pending, once the guest does not mask it."""
        if not self.core.pstate & PSTATE_A:
            self.vcpu.serror_pending = False
            self.core.deliver_serror(EC_SERROR << 26 | ESR_IL | self.vcpu.serror_esr)

    def _synchronise(self) -> None:
        """What others changed since this core last ran: stage-2 entries, code, translations (TLBI stays local)."""
        vm, core = self.vm, self.core
        if vm.last_core is not core:
            vm.last_core = core
            core.flush_tlb()
        if self._stage2_seen != vm.stage2.generation:
            self._stage2_seen = vm.stage2.generation
            core.flush_tlb()
        arm = self._arm
        if self._voffset != arm.voffset or self._poffset != arm.poffset:
            self._voffset, self._poffset = arm.voffset, arm.poffset
            core.set_counter_offset(arm.voffset)
            core.trap_physical_counter(bool(arm.poffset))
        if self._code_seen != vm.code_generation:
            self._code_seen = vm.code_generation
            core.flush_code()

    def close(self) -> bool:
        """Frees the core; its registers stay in the vCPU's state. False where the vCPU is running in another thread."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self.core is not None:
                self.pull()
                self.core.close()
                self.core = None  # type: ignore[assignment]
                self.vcpu.dirty = True
        finally:
            self._lock.release()
        return True

    def _drop_code(self, hva: int | None) -> None:
        """IC IVAU: no core of the VM keeps what it translated from this cache line. None of the others runs now."""
        if hva is None:
            hva = code_lines.line_at_pc(self)
        if hva is None or hva >> self.vm.format.page_shift not in self.vm.code_pages:
            return
        for other in self.vm.executions:
            if other.core is not None:
                other.core.drop_code(hva & -CACHE_LINE, CACHE_LINE)

    # ---- being interrupted

    def _signal(self, arrived: bool) -> None:
        if arrived:
            self._signalled = True
        self._wake.set()
        if self.core is not None:
            self.core.stop()

    def kick(self) -> None:
        """What a signal does: ends a KVM_RUN that is under way."""
        if self._running:
            self._signal(True)

    def wake(self) -> None:
        """The vCPU's power state changed: it looks again."""
        self._signal(False)

    def interrupt_lines_changed(self) -> None:
        """The vGIC's lines changed: seen at once where this vCPU itself caused it, else at its next entry, which a vCPU
        in the guest is brought to."""
        if not self._inside:
            self._wake.set()
        elif self._thread == threading.get_ident():
            self._show_lines()
        else:
            self.core.stop()

    def _show_lines(self) -> None:
        vcpu = self.vcpu
        gic = vcpu.gic
        lines = gic.irq_line or vcpu.irq_input, gic.fiq_line or vcpu.fiq_input
        if lines != self._lines:
            self.core.set_irq(lines[0])
            self.core.set_fiq(lines[1])
            self._lines = lines  # last: a signal's exception in between repeats it

    def _wait_for_interrupt(self) -> None:
        """WFI (`kvm_vcpu_block`): until an interrupt is pending, userspace has to hear of a timer, or a signal arrives.
        A timer that fired ends it by its interrupt only."""
        self._waiting = True
        while not (self._signalled or self.vm.dead or self.vcpu.runnable() or self._timers_changed()):
            if self.vcpu.stopped():
                break
            self._nap()
        self._waiting = False

    def interrupt_pending(self) -> None:
        """One that may end WFI, though it changes no line: what is active has as high a priority."""
        if self._waiting:
            self._wake.set()

    def _timers_changed(self) -> bool:
        """kvm_timer_should_notify_user: without a vGIC, userspace delivers the timers' interrupts."""
        if self.vm.vgic is not None or not self.vcpu.timers.in_use:
            return False
        told: int = _LEVELS.unpack_from(self.run_area, DEVICE_IRQ_LEVEL)[0]
        return self.vcpu.timers.levels() != told

    def _nap(self) -> None:
        self._wake.wait(NAP_SECONDS)
        self._wake.clear()

    # ---- exceptions to EL2

    def trap(self) -> bool:
        """Called inside the core for each exception to EL2. True: go on in the guest; False: leave it."""
        return self.debug.trap(self._trap) if self.debug.stepping else self._trap()

    def _trap(self) -> bool:
        ec = self.core.exception.syndrome >> 26
        if ec in (EC_DABT, EC_IABT):
            return faults.handle(self)
        if ec == EC_HVC64:
            return hypercall.hvc(self)
        if ec == EC_SMC64:
            return hypercall.smc(self)
        if ec == EC_SYS64:
            return self._system_register()
        if ec in guest_debug.EXCEPTIONS:
            return self.debug.exception()
        # SVE or pointer authentication without the feature, and whatever else is not the guest's to use.
        self.undefined()
        return True

    def undefined(self) -> None:
        """The guest gets the exception for an undefined instruction (`kvm_inject_undefined`)."""
        self.core.deliver_el1(ESR_UNDEF)

    def _system_register(self) -> bool:
        """A trapped MRS, MSR or system instruction: ISS of EC 0x18."""
        core = self.core
        iss = core.syndrome
        read, target = iss & 1, iss >> 5 & 31
        enc = (
            (iss >> 20 & 3) << 14 | (iss >> 14 & 7) << 11 | (iss >> 10 & 15) << 7 | (iss >> 1 & 15) << 3 | iss >> 17 & 7
        )
        if enc in INVALIDATE_ALL:
            self.vm.forget_code()
            core.pc += 4
            return False  # out and in again, without what was translated
        operand = core.x[target] if target != 31 and not read else 0
        value = self.vcpu.guest_sysreg(enc, not read, operand)
        if value is None:
            self.undefined()
            return True
        if read and target != 31:
            core.x[target] = value
        core.pc += 4
        return read == 1 or enc not in guest_debug.REGISTERS or self.debug.written()


def _sys(op1: int, crm: int, op2: int) -> int:
    return 1 << 14 | op1 << 11 | 7 << 7 | crm << 3 | op2


INVALIDATE_ALL = frozenset({_sys(0, 1, 0), _sys(0, 5, 0)})  # IC IALLUIS, IC IALLU
