"""Debug exceptions of a vCPU: those that userspace asked for (KVM_SET_GUEST_DEBUG), and the guest's own.

After arch/arm64/kvm/debug.c (`kvm_arm_setup_debug` before each entry, `kvm_arm_clear_debug` after it) and
`kvm_handle_guest_debug`. The guest's debug registers are in `vcpu.state.sys`, as its accesses always trap: the core's
own hold what is in force. While userspace debugs, BRK, steps, breakpoints and watchpoints leave the guest
(MDCR_EL2.TDE), the guest's own too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvm2.abi import exits
from kvm2.abi.structs_arm64 import (
    KVM_DEBUG_ARCH_HSR_HIGH_VALID,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW,
    DebugExitArch,
)
from kvm2.abi.sysregs import ID_AA64DFR0_EL1, MDSCR_EL1, OSLSR_EL1
from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu.debug import (
    COMPARATORS,
    IDLE,
    MDSCR_MDE,
    MDSCR_SS,
    MDSCR_USED,
    PSTATE_SS,
    Debugging,
    Pair,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvm2.softkvm.run import Execution

EC_SHIFT: Final = 26
EC_BREAKPOINT, EC_SOFTWARE_STEP, EC_WATCHPOINT, EC_BRK = 0x30, 0x32, 0x34, 0x3C
EXCEPTIONS: Final = frozenset({EC_BREAKPOINT, EC_SOFTWARE_STEP, EC_WATCHPOINT, EC_BRK})
OSLSR_OSLK: Final = 1 << 1
OP0_DEBUG: Final = 2
MOVE_MASK, MOVE_DEBUG_REGISTER, MOVE_READ = 0xFFD8_0000, 0xD510_0000, 1 << 21  # MSR and MRS with op0 = 2
NOT_EL0: Final = 0xC  # of PSTATE
BRPS_SHIFT, WRPS_SHIFT = 12, 20  # of ID_AA64DFR0_EL1
U32: Final = 0xFFFF_FFFF

# (DBGBVR, DBGBCR) and (DBGWVR, DBGWCR) by number.
_BREAKPOINTS, _WATCHPOINTS = (
    tuple((reg.enc(2, 0, 0, n, value), reg.enc(2, 0, 0, n, value + 1)) for n in range(COMPARATORS)) for value in (4, 6)
)
REGISTERS: Final = frozenset({MDSCR_EL1, reg.enc(2, 0, 1, 0, 4)}).union(*_BREAKPOINTS, *_WATCHPOINTS)  # and OSLAR_EL1


class GuestDebug:
    """The debugging of one vCPU's execution.

    `stepping`: the core steps, for userspace or for the guest. `vcpu.step_pending`: userspace's step is made, and its
    exception waits (the active-pending state, DBG_SS_ACTIVE_PENDING).
    """

    def __init__(self, execution: Execution) -> None:
        self._ex = execution
        self._vcpu = execution.vcpu
        self.stepping = False
        self.watching = False  # for the core: watchpoints need translation in Python
        self._active = False
        self._for_userspace = False
        self._guest_ss = 0
        self._reported = False
        dfr0 = execution.vm.profile.registers.get(ID_AA64DFR0_EL1, 0)
        self._breakpoints = _BREAKPOINTS[: (dfr0 >> BRPS_SHIFT & 0xF) + 1]
        self._watchpoints = _WATCHPOINTS[: (dfr0 >> WRPS_SHIFT & 0xF) + 1]

    def wanted(self) -> bool:
        """Whether there is anything to do before the guest is entered."""
        vcpu = self._vcpu
        return (
            self._active
            or vcpu.guest_debug is not None
            or bool(vcpu.state.sys.get(MDSCR_EL1, 0) & (MDSCR_SS | MDSCR_MDE))
        )

    def attach(self) -> None:
        """A new core, with nothing in force: the debug registers that it has not are answered as the others are."""
        self._active = self.stepping = False
        self._ex.core.on_undef = self._undefined

    def _undefined(self, word: int) -> bool:
        """MRS or MSR of a debug register that the core has not (its breakpoints end at number 5)."""
        core = self._ex.core
        if word & MOVE_MASK != MOVE_DEBUG_REGISTER or not core.pstate & NOT_EL0:
            return False
        read, target, enc = word & MOVE_READ, word & 31, OP0_DEBUG << 14 | word >> 5 & 0x3FFF
        value = self._vcpu.guest_sysreg(enc, not read, core.x[target] if target != 31 and not read else 0)
        if value is None:
            return False
        if read and target != 31:
            core.x[target] = value
        core.pc += 4
        if self.stepping:
            core.pstate &= ~PSTATE_SS
        if enc in REGISTERS and not read and not self.written():
            core.stop()
        return True

    # ---- what is in force

    def _wanted(self) -> Debugging:
        vcpu = self._vcpu
        state, debug = vcpu.state.sys, vcpu.guest_debug
        control = debug.control if debug is not None else 0
        mdscr = state.get(MDSCR_EL1, 0) & MDSCR_USED
        breakpoints: tuple[Pair, ...] = ()
        watchpoints: tuple[Pair, ...] = ()
        if control or state.get(OSLSR_EL1, 0) & OSLSR_OSLK:
            # The guest cannot step while userspace debugs: unwinding that would be hard (debug.c).
            mdscr = mdscr & ~MDSCR_SS | (MDSCR_SS if control & KVM_GUESTDBG_SINGLESTEP else 0)
            if control & KVM_GUESTDBG_USE_HW:
                mdscr |= MDSCR_MDE
            elif state.get(OSLSR_EL1, 0) & OSLSR_OSLK:
                mdscr &= ~MDSCR_MDE
        if mdscr & MDSCR_MDE:
            if debug is not None and control & KVM_GUESTDBG_USE_HW:
                arch = debug.arch
                breakpoints = in_use(zip(arch.dbg_bvr, arch.dbg_bcr, strict=True), len(self._breakpoints))
                watchpoints = in_use(zip(arch.dbg_wvr, arch.dbg_wcr, strict=True), len(self._watchpoints))
            else:
                breakpoints = in_use(((state.get(v, 0), state.get(c, 0)) for v, c in self._breakpoints), COMPARATORS)
                watchpoints = in_use(((state.get(v, 0), state.get(c, 0)) for v, c in self._watchpoints), COMPARATORS)
        return Debugging(mdscr, bool(control), breakpoints, watchpoints)

    def _apply(self) -> None:
        wanted = self._wanted()
        core = self._ex.core
        core.debug.set(wanted)
        if core.watch is not None:
            core.watch.set(wanted.watchpoints, wanted.breakpoints)
        self._active = wanted != IDLE
        self.stepping = bool(wanted.mdscr & MDSCR_SS)

    def enter(self) -> None:
        """Before the guest is entered (`kvm_arm_setup_debug`)."""
        vcpu, core = self._vcpu, self._ex.core
        self._apply()
        debug = vcpu.guest_debug
        self._for_userspace = debug is not None and bool(debug.control & KVM_GUESTDBG_SINGLESTEP)
        if self._for_userspace:
            pstate = core.pstate
            self._guest_ss = pstate & PSTATE_SS
            step = 0 if vcpu.step_pending else PSTATE_SS
            if step != self._guest_ss:
                core.pstate = pstate ^ PSTATE_SS

    def leave(self) -> None:
        """After the guest was left (`kvm_arm_clear_debug`): its own PSTATE.SS is back."""
        if self._ex.core.watch is not None:
            self._ex.core.watch.settle()
        if self._for_userspace:
            self._for_userspace = False
            core, vcpu = self._ex.core, self._vcpu
            pstate = core.pstate
            if not pstate & PSTATE_SS:
                vcpu.step_pending = not self._reported
            self._reported = False
            if pstate & PSTATE_SS != self._guest_ss:
                core.pstate = pstate ^ PSTATE_SS

    def written(self) -> bool:
        """The guest wrote one of `REGISTERS`, inside a trap. False: it must be left, for another core."""
        if self.wanted():
            self._apply()
        return not self.other_core()

    def other_core(self) -> bool:
        """Whether the vCPU needs another core than it has: watchpoints came, or they and their debugger went."""
        vcpu = self._vcpu
        if self.watching or self.wanted():
            # gdb takes its watchpoints away for each step: as long as it is there, the core stays.
            stays = self.watching and vcpu.guest_debug is not None
            self.watching = stays or bool(self._wanted().watchpoints)
            soft = self.watching or self._ex.vm.soft_mmu
            return soft != (self._ex.core is not None and self._ex.core.watch is not None)
        return False

    # ---- steps over what the hypervisor does for the guest

    def advanced(self) -> None:
        """The hypervisor did the guest's instruction: that was the step (`kvm_skip_instr`)."""
        vcpu = self._vcpu
        if vcpu.guest_debug is not None and vcpu.guest_debug.control & KVM_GUESTDBG_SINGLESTEP:
            vcpu.step_pending = True

    def trap(self, handle: Callable[[], bool]) -> bool:
        """`handle` deals with an exception to EL2 while the core steps."""
        core = self._ex.core
        pc = core.pc
        go_on = handle()
        if core.pc != pc and core.pstate & PSTATE_SS:
            core.pstate &= ~PSTATE_SS
        return go_on

    # ---- the exit

    def exception(self) -> bool:
        """A debug exception: KVM_EXIT_DEBUG (`kvm_handle_guest_debug`). False, as the guest is left."""
        ex = self._ex
        syndrome = ex.core.syndrome
        ec = syndrome >> EC_SHIFT
        far = ex.core.far if ec == EC_WATCHPOINT else 0
        arch = DebugExitArch(hsr=syndrome & U32, hsr_high=syndrome >> 32, far=far)
        payload = exits.Debug(arch).pack()
        area = ex.run_area
        area[exits.UNION_OFFSET : exits.UNION_OFFSET + len(payload)] = payload
        area[exits.FLAGS_OFFSET : exits.FLAGS_OFFSET + 2] = KVM_DEBUG_ARCH_HSR_HIGH_VALID.to_bytes(2, "little")
        ex.exit_reason = exits.KVM_EXIT_DEBUG
        self._reported = ec == EC_SOFTWARE_STEP
        if self._reported:
            self._vcpu.step_pending = False
        return False


def in_use(pairs: Iterable[Pair], count: int) -> tuple[Pair, ...]:
    """The first `count` comparators, or none of them where none is enabled.

    >>> in_use([(0x1000, 0), (0x2000, 0)], 2), in_use([(0x1000, 1), (0x2000, 0), (0, 1)], 2)
    ((), ((4096, 1), (8192, 0)))
    """
    kept = tuple(pairs)[:count]
    return kept if any(control & 1 for _, control in kept) else ()
