"""One emulated Arm core, seen as a hypervisor at EL2 sees it.

The guest's EL1 and EL0 run inside the emulator under real HCR_EL2, VTCR_EL2 and VTTBR_EL2 settings. Exceptions to EL1
are taken in the core; an exception to EL2 calls `on_trap`, inside the emulator's hook, with the syndrome and fault
address in place. `on_trap` answers True when it has dealt with it (the guest goes on where PC says) and False to leave
`run`. Nothing may be raised through the emulator's frames: an exception of `on_trap` ends `run` and is raised there,
with PC at the instruction, an HVC's too unless `answered` has been set.

What traps: HVC, SMC, WFI (handled here), stage-2 aborts, ID registers and CSSELR, CCSIDR, CLIDR, CTR_EL0, ACTLR, AIDR,
REVIDR, the PMU, the physical timer, cache maintenance to the point of unification where asked for; SVE and pointer
authentication where the guest has none. PC is at the instruction, except for HVC: there it is behind it, as in ELR_EL2.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final

from kvm2.softkvm.cpu import decode
from kvm2.softkvm.cpu import engine as uc
from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu.instance import COUNTER_HZ
from kvm2.softkvm.cpu.registers import NATIVE
from kvm2.softkvm.cpu.settings import CoreSettings
from kvm2.softkvm.cpu.tlbi import TlbMaintenance
from kvm2.softkvm.cpu.watch import Watch
from kvm2.softkvm.cpu.yields import Yields

if TYPE_CHECKING:
    from kvm2.softkvm.cpu.softmmu import Stage2Walk
    from kvm2.softkvm.cpu.state import CpuState

__all__ = ["COUNTER_HZ", "NATIVE", "Core"]

EC_UNKNOWN, EC_WFX, EC_PAC, EC_HVC, EC_SYS64, EC_SVE, EC_DABT_LOW = 0x00, 0x01, 0x09, 0x16, 0x18, 0x19, 0x24
EC_STEP_SAME: Final = 0x33
PSTATE_D: Final = 1 << 9
EC_SHIFT: Final = 26
IL: Final = 1 << 25
FAULT_TYPE: Final = 0x3C  # of the fault status: 0 is an address-size fault
ABORTS: Final = frozenset({0x20, 0x21, 0x24, 0x25})  # instruction and data aborts from a lower and the current EL
UNDEFINED: Final = IL  # ESR of an undefined instruction: EC 0, 32-bit instruction
SERROR_VECTOR: Final = 0x180  # from the synchronous vector of the same group
_UNTIL: Final = (1 << 64) - 4
_NO_ADDRESS: Final = (1 << 64) - 1

# The access fields of instruction words that were looked at: a guest has few that touch devices.
_access_iss: dict[int, int] = {}
_REMEMBERED = 4096


def _remember(word: int) -> int:
    if len(_access_iss) >= _REMEMBERED:
        _access_iss.clear()
    iss = _access_iss[word] = decode.access_iss(word)
    return iss


class Core(CoreSettings):
    """An emulated core of `model` "a72" (Armv8.0) or "max" (v8.4 with SVE and pointer authentication).

    `on_undef(insn)` is asked before an undefined instruction becomes the guest's exception: True means that it was
    emulated and PC moved on. `pauth` lets the guest use pointer authentication. `soft_mmu` selects translation in
    Python, for guests with addresses above 48 bits; `soft_pa_bits` is the physical address size that such a guest sees.
    With `above_48_only` the emulator translates, and Python only says what becomes of an access beyond its 48 bits.

    One thread at a time may use a core; `stop` alone may be called from any.
    """

    def __init__(
        self,
        model: str,
        on_trap: Callable[[], bool],
        *,
        on_undef: Callable[[int], bool] | None = None,
        pauth: bool = False,
        soft_mmu: Stage2Walk | None = None,
        above_48_only: bool = False,
        soft_pa_bits: int = 52,
    ) -> None:
        super().__init__(model, pauth)
        self.on_trap, self.on_undef = on_trap, on_undef
        self.error = ""
        instance = self.instance
        self.exception = instance.exception
        self._cpu = instance.cpu
        self._fast = instance.engine.FAST
        self._hpfar = instance.cell(reg.HPFAR_EL2)
        self._left: str | None = None  # how `run` ends
        self._failure: BaseException | None = None  # or with what
        self._taken = True  # the present exception has been handled, or handling it was begun
        self._unfinished = 0  # the number of one that was not
        self.answered = True  # `on_trap` has given the guest what an HVC asked for
        self._handler = self._exceptions()
        next(self._handler)
        # The library keeps only the address: the callback object must live as long as the core.
        self._callback = uc.INTR_CALLBACK(self._handler.send)
        instance.engine.hook(instance.handle, uc.HOOK_INTR, self._callback)
        self._yields = Yields(instance, self._yielded, self._fail)
        self._tlbi = TlbMaintenance(instance, self._fail)
        self._soft: Any = None
        self._high: Any = None
        self.watch: Watch | None = None  # where Python translates
        self._soft_fault: int | None = None  # the IPA of a stage-2 abort that Python's walk found, not the emulator's
        if soft_mmu is not None:
            from kvm2.softkvm.cpu.softmmu import SoftMmu

            if above_48_only:
                self._high = SoftMmu(self, soft_mmu, soft_pa_bits, above_48_only=True)
            else:
                self._soft = SoftMmu(self, soft_mmu, soft_pa_bits)
                self.watch = Watch(self, self._soft)
                self._native_stage2 = False
                self._tlbi.walk, self._untrapped.by_tlb = self._soft.mapping_size, False
                self._tlbi.everything = True

    def close(self) -> None:
        """Free the core (about 1 ms); it must not be running."""
        self._gate.close()
        self._defined.close()
        self._untrapped.close()
        self._yields.close()
        self._tlbi.close()
        self._handler.close()
        self.instance.close()

    def load(self, state: CpuState) -> None:
        """Take over a vCPU's whole state; registers missing from `state.sys` stay as they are."""
        self._unfinished = 0
        super().load(state)

    def flush_tlb(self) -> None:
        """Forget cached translations: after a stage-2 entry was removed or restricted, or another core ran the VM."""
        super().flush_tlb()
        self._tlbi.forget()

    # ---- the present exception

    @property
    def syndrome(self) -> int:
        """ESR_EL2 of the trap, as the emulator reports it; for data aborts see `abort_syndrome`."""
        return int(self.exception.syndrome)

    @property
    def far(self) -> int:
        """FAR_EL2 of an abort."""
        return int(self.exception.vaddress)

    def hpfar(self) -> int:
        """The IPA of a stage-2 abort, its low 12 bits zero (HPFAR_EL2.FIPA)."""
        if self._soft_fault is not None:
            return self._soft_fault
        return self._hpfar.value >> 4 << 12

    def soft_fault(self, ipa: int) -> None:
        """The page of a stage-2 abort that Python's walk found; `hpfar` answers it."""
        self._soft_fault = ipa

    def insn(self) -> int | None:
        """The instruction word at PC, or None where fetching it would fault."""
        return self.instance.read_code(self.instance.pc)

    def abort_syndrome(self) -> int:
        """ESR_EL2 of an abort with the access fields that hardware gives (ISV 0 for write-back forms)."""
        esr: int = self.exception.syndrome
        if esr & decode.ISV and esr >> EC_SHIFT == EC_DABT_LOW:
            instance = self.instance
            word = instance.read_code(instance.pc_cell.value)
            if word is not None:
                iss = _access_iss.get(word)
                if iss is None:
                    iss = _remember(word)
                esr = esr & ~decode.ISS_FIELDS | iss
        return esr

    def advance(self) -> None:
        """PC goes on to the next instruction."""
        self.instance.pc_cell.value += 4

    def deliver_el1(self, esr: int, far: int | None = None) -> None:
        """Make the guest take a synchronous exception at EL1, now: inside `on_trap` or while stopped.

        ELR_EL1 becomes PC. `esr` is complete (EC, IL, ISS); FAR_EL1 changes only with `far`.
        """
        if far is not None:
            self.instance.write_sys(reg.FAR_EL1, far)
        self.instance.enter_el1(esr)

    def deliver_serror(self, esr: int) -> None:
        """Make the guest take an SError at EL1, now; the caller looks at PSTATE.A first."""
        self.instance.enter_el1(esr)
        self.instance.pc += SERROR_VECTOR

    # ---- running

    def set_wfe_trap(self, on: bool) -> None:
        """Whether WFE and YIELD end `run`, as "wfe" with PC behind them. Without, they cost the guest under 1 us."""
        self._yields.set(on)

    def _yielded(self) -> None:
        self._leave("wfe")

    def run(self) -> str:
        """Run the guest until something ends it.

        "trap": `on_trap` said False. "stop": `stop` was called. "wfi": the guest waits for an interrupt, PC is behind
        the instruction. "wfe": it waits for another CPU, and `set_wfe_trap` was asked for; PC is behind WFE or YIELD.
        "error": the emulator failed, `error` says how.
        """
        gate = self._gate
        try:
            if self._left is None and not gate.enter():
                return "stop"
            gate.in_hook = False
            self.instance.exclusive.value = _NO_ADDRESS  # an exception return to the guest clears the monitor
            if not self._hcr.shown:
                self._hcr.show()
            if self._unfinished:
                self._finish()
            return self._run()
        finally:
            gate.running = False  # not by a call: a signal handler's exception may come at the start of any function

    def _run(self) -> str:
        gate, instance = self._gate, self.instance
        start, handle = instance.engine.LIB.uc_emu_start, instance.handle
        error = 0
        while True:
            # There is an outcome already where a signal handler's exception came between it and the return.
            if self._left is None:
                self._yields.entering = True
                error = start(handle, instance.pc, _UNTIL, 0, 0)
            if self._failure is not None:
                self._left = None
                failure, self._failure = self._failure, None
                raise failure
            if self._left is not None:
                outcome, self._left = self._left, None
                return outcome
            if error == uc.ERR_EXCEPTION and self._soft is not None:
                if not self._soft.fault():
                    return "trap"
                error = 0
            if gate.take():
                return "stop"
            if error:
                self.error = self._explain(error)
                return "error"

    def stop(self) -> None:
        """End `run` before its next basic block, from any thread; a stop sent while not running ends the next `run`."""
        self._gate.stop()

    def _explain(self, error: int) -> str:
        text = self.instance.engine.LIB.uc_strerror(error).decode()
        return f"the emulated core stopped at PC {self.pc:#x}: {text} (Unicorn error {error})"

    def _exceptions(self) -> Generator[None, int, None]:
        """The emulator's hook for every exception, as a generator whose `send` is the C side's callback.

        A signal that arrives while the guest runs is raised (KeyboardInterrupt) at the first Python instruction: at the
        `yield`, which is inside the `try`. In a plain function it would be before it, and lost.
        """
        while True:
            try:
                while True:
                    self._taken = False
                    yield
                    if self._failure is None:  # else: the exception that an access to a defined register failed with
                        self._take()
                    self._gate.in_hook = False
            except GeneratorExit:
                return
            except BaseException as failure:
                self._gate.in_hook = False
                if not self._taken:
                    self._unfinished = self.instance.exception_index.value
                elif not self.answered and self.exception.syndrome >> EC_SHIFT == EC_HVC:
                    self.instance.pc_cell.value -= 4  # it comes again, as what traps with PC at it does
                self._failure = failure
                self._leave("trap")

    def _take(self) -> None:
        exception = self.exception
        esr = exception.syndrome
        ec = esr >> EC_SHIFT
        if exception.target_el == 1:
            self._taken = True
            if ec in (EC_UNKNOWN, EC_SVE):
                self._undefined(esr)
            elif self._high is not None and ec in ABORTS and not esr & FAULT_TYPE:
                self._beyond_48_bits(esr)
            elif ec == EC_STEP_SAME and self.pstate & PSTATE_D:
                # The step over an instruction that masks debug exceptions: the emulator did not see that it does.
                self.instance.rebuild_flags()
            else:
                self._fast.arm_cpu_do_interrupt_aarch64(self._cpu)
            return
        if ec == EC_WFX:
            self._taken = True
            self.instance.pc += 4
            self._leave("wfi")
            return
        if ec == EC_UNKNOWN:
            # The emulator loses the syndrome of its only trap that is raised in the midst of an instruction.
            exception.syndrome = EC_PAC << EC_SHIFT | IL
        elif ec == EC_SVE:
            exception.syndrome = esr | IL  # and this bit, here
        self.answered, self._gate.in_hook, self._taken = False, True, True
        if not self.on_trap():
            self._leave("trap")

    def _fail(self, failure: BaseException) -> None:
        """A function of `define` raised this; its access then ends in an exception, which is not the guest's."""
        self._failure = failure
        self._leave("trap")

    def _finish(self) -> None:
        """Take the exception at which a signal handler's exception ended the previous run."""
        self.instance.exception_index.value, self._unfinished = self._unfinished, 0
        try:
            self._take()
        finally:
            self._gate.in_hook = False
            self.instance.exception_index.value = -1

    def _beyond_48_bits(self, esr: int) -> None:
        """The emulator's address-size fault, which on this host may be a stage-2 fault."""
        self._gate.in_hook = True
        try:
            handled = self._high.beyond(esr, int(self.exception.vaddress))
        finally:
            self._soft_fault = None
        if handled is None:
            self._fast.arm_cpu_do_interrupt_aarch64(self._cpu)
        elif not handled:
            self._leave("trap")

    def _undefined(self, esr: int) -> None:
        """EC 0 for the guest: first whoever emulates instructions, then what the emulator's report lacks."""
        word = self.insn()
        if word is not None:
            if self.on_undef is not None:
                self._gate.in_hook = True
                if self.on_undef(word):
                    return
            if decode.is_daif_immediate(word):
                esr = EC_SYS64 << EC_SHIFT | IL | decode.sysreg_trap_iss(word)
        if esr >> EC_SHIFT == EC_SVE:
            esr = esr | IL if self._sve else UNDEFINED
        self.instance.enter_el1(esr)

    def _leave(self, outcome: str) -> None:
        """Out of `run` with the guest exactly as it is: a pending interrupt must not be taken on the way out."""
        self._left = outcome
        self._hcr.hide()
        self.instance.request_stop()
