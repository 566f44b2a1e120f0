"""One emulated Arm core, seen as a hypervisor at EL2 sees it.

The guest's EL1 and EL0 run inside the emulator under real HCR_EL2, VTCR_EL2 and VTTBR_EL2 settings. Exceptions to EL1
are taken in the core; an exception to EL2 calls `on_trap`, inside the emulator's hook, with the syndrome and fault
address in place. `on_trap` answers True when it has dealt with it (the guest goes on where PC says) and False to leave
`run`. Nothing may be raised through the emulator's frames: an exception of `on_trap` ends `run` and is raised there.

What traps: HVC, SMC, WFI (handled here), stage-2 aborts, ID registers and CSSELR, CCSIDR, CLIDR, CTR_EL0, ACTLR, AIDR,
REVIDR, the PMU, the physical timer, cache maintenance to the point of unification where asked for; SVE and pointer
authentication where the guest has none. PC is at the instruction, except for HVC: there it is behind it, as in ELR_EL2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from kvm2.softkvm.cpu import decode, sysregs
from kvm2.softkvm.cpu import engine as uc
from kvm2.softkvm.cpu import instance as inst
from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu.instance import COUNTER_HZ, Instance
from kvm2.softkvm.cpu.registers import NATIVE
from kvm2.softkvm.cpu.stop import StopGate
from kvm2.softkvm.cpu.transfer import Transfer

if TYPE_CHECKING:
    from kvm2.softkvm.cpu.softmmu import Stage2Walk
    from kvm2.softkvm.cpu.state import CpuState

__all__ = ["COUNTER_HZ", "NATIVE", "Core"]

EC_UNKNOWN, EC_WFX, EC_PAC, EC_SYS64, EC_SVE, EC_DABT_LOW = 0x00, 0x01, 0x09, 0x18, 0x19, 0x24
EC_SHIFT: Final = 26
IL: Final = 1 << 25
S1PTW: Final = 1 << 7
FAULT_TYPE: Final = 0x3C  # of the fault status: 0 is an address-size fault
ABORTS: Final = frozenset({0x20, 0x21, 0x24, 0x25})  # instruction and data aborts from a lower and the current EL
UNDEFINED: Final = IL  # ESR of an undefined instruction: EC 0, 32-bit instruction
SERROR_VECTOR: Final = 0x180  # from the synchronous vector of the same group
_UNTIL: Final = (1 << 64) - 4
_NO_ADDRESS: Final = (1 << 64) - 1
_SCTLR_EE, _SCTLR_E0E = 1 << 25, 1 << 24


class Core:
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
        self.instance = instance = Instance(model)
        self.model = model
        self.on_trap, self.on_undef = on_trap, on_undef
        self.x = instance.x
        self.error = ""
        self._exception = instance.exception
        self._cpu = instance.cpu
        self._fast = instance.engine.FAST
        self._transfer = Transfer(instance)
        self._hpfar = reg.Batch(instance.handle, (), (reg.HPFAR_EL2,))
        self._hcr = reg.Batch(instance.handle, (), (reg.HCR_EL2,))
        self._gate = StopGate(instance.request_stop)
        self._left: str | None = None
        self._failure: BaseException | None = None
        self._interrupts = 0
        self._interrupts_shown = True
        self._registers = sysregs.Overrides(instance, self._gate)
        self._sve = False
        if model == "max" and pauth:
            instance.hcr |= inst.HCR_API | inst.HCR_APK
            instance.write_sys(reg.HCR_EL2, instance.hcr)
        # The library keeps only the address: the callback object must live as long as the core.
        self._callback = uc.INTR_CALLBACK(self._on_exception)
        instance.engine.hook(instance.handle, uc.HOOK_INTR, self._callback)
        self._soft: Any = None
        self._high: Any = None
        self._soft_fault: int | None = None  # the IPA of a stage-2 abort that Python's walk found, not the emulator's
        if soft_mmu is not None:
            from kvm2.softkvm.cpu.softmmu import SoftMmu

            if above_48_only:
                self._high = SoftMmu(self, soft_mmu, soft_pa_bits, above_48_only=True)
            else:
                self._soft = SoftMmu(self, soft_mmu, soft_pa_bits)

    def close(self) -> None:
        """Free the core (about 1 ms); it must not be running."""
        self._gate.close()
        self.instance.close()

    # ---- registers

    @property
    def pc(self) -> int:
        """The program counter, live."""
        return self.instance.pc

    @pc.setter
    def pc(self, value: int) -> None:
        self.instance.pc = value

    @property
    def pstate(self) -> int:
        """PSTATE in SPSR form, live."""
        return self._transfer.read_pstate()

    @pstate.setter
    def pstate(self, value: int) -> None:
        self._transfer.write_pstate(value)

    def read_sys(self, enc: int) -> int:
        """A system register that the core holds."""
        return self.instance.read_sys(enc)

    def write_sys(self, enc: int, value: int) -> None:
        """A system register that the core holds."""
        self.instance.write_sys(enc, value)

    def override(self, enc: int, read: Callable[[], int] | None, write: Callable[[int], None] | None) -> None:
        """Let functions answer the guest's reads and writes of a register that the core knows and does not trap.

        Before the first `run`. The virtual timer needs it: the core ignores writes to CNTV_*.
        """
        self._registers.override(enc, read, write)

    def knows(self, enc: int) -> bool:
        """Whether the core itself has a register or system instruction with this encoding."""
        return inst.register_info(self.instance, enc, missing_ok=True) is not None

    def big_endian(self) -> bool:
        """Whether the guest's data accesses are big-endian now (SCTLR_EL1.EE, or E0E at EL0)."""
        bit = _SCTLR_EE if self.pstate & 0xC else _SCTLR_E0E
        return bool(self.read_sys(reg.SCTLR_EL1) & bit)

    def counter(self) -> int:
        """The physical counter now, in ticks of `COUNTER_HZ`."""
        return self.read_sys(reg.CNTPCT_EL0)

    def set_counter_offset(self, ticks: int) -> None:
        """CNTVOFF_EL2: the virtual counter is the physical one minus this."""
        self.write_sys(reg.CNTVOFF_EL2, ticks & _NO_ADDRESS)

    # ---- the present exception

    @property
    def syndrome(self) -> int:
        """ESR_EL2 of the trap, as the emulator reports it; for data aborts see `abort_syndrome`."""
        return int(self._exception.syndrome)

    @property
    def far(self) -> int:
        """FAR_EL2 of an abort."""
        return int(self._exception.vaddress)

    def hpfar(self) -> int:
        """The IPA of a stage-2 abort, its low 12 bits zero (HPFAR_EL2.FIPA)."""
        if self._soft_fault is not None:
            return self._soft_fault
        return (self._hpfar.read()[0] >> 4) << 12

    def soft_fault(self, ipa: int) -> None:
        """The page of a stage-2 abort that Python's walk found; `hpfar` answers it."""
        self._soft_fault = ipa

    def insn(self) -> int | None:
        """The instruction word at PC, or None where fetching it would fault."""
        data = self.instance.read_code(self.pc)
        return None if data is None else int.from_bytes(data, "little")

    def abort_syndrome(self) -> int:
        """ESR_EL2 of an abort with the access fields that hardware gives (ISV 0 for write-back forms)."""
        esr = int(self._exception.syndrome)
        if esr & decode.ISV and esr >> EC_SHIFT == EC_DABT_LOW:
            word = self.insn()
            if word is not None:
                esr = esr & ~decode.ISS_FIELDS | decode.access_iss(word)
        return esr

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

    def run(self) -> str:
        """Run the guest until something ends it.

        "trap": `on_trap` said False. "stop": `stop` was called. "wfi": the guest waits for an interrupt, PC is behind
        the instruction. "error": the emulator failed, `error` says how.
        """
        gate, instance = self._gate, self.instance
        if not gate.enter():
            return "stop"
        start, handle = instance.engine.LIB.uc_emu_start, instance.handle
        instance.exclusive.value = _NO_ADDRESS  # an exception return to the guest clears the monitor
        self._left = None
        if not self._interrupts_shown:
            self._show_interrupts(True)
        try:
            while True:
                error = start(handle, instance.pc, _UNTIL, 0, 0)
                if self._failure is not None:
                    failure, self._failure = self._failure, None
                    raise failure
                if self._left is not None:
                    return self._left
                if error == uc.ERR_EXCEPTION and self._soft is not None:
                    if not self._soft.fault():
                        return "trap"
                    error = 0
                if gate.take():
                    return "stop"
                if error:
                    self.error = self._explain(error)
                    return "error"
        finally:
            gate.leave()

    def stop(self) -> None:
        """End `run` before its next basic block, from any thread; a stop sent while not running ends the next `run`."""
        self._gate.stop()

    def _explain(self, error: int) -> str:
        text = self.instance.engine.LIB.uc_strerror(error).decode()
        return f"the emulated core stopped at PC {self.pc:#x}: {text} (Unicorn error {error})"

    def _on_exception(self, handle: int, number: int, user: object) -> None:
        exception = self._exception
        esr = exception.syndrome
        try:
            if exception.target_el == 1:
                ec = esr >> EC_SHIFT
                if ec in (EC_UNKNOWN, EC_SVE):
                    self._undefined(esr)
                elif self._high is not None and ec in ABORTS and not esr & FAULT_TYPE:
                    self._beyond_48_bits(esr)
                else:
                    self._fast.arm_cpu_do_interrupt_aarch64(self._cpu)
                return
            ec = esr >> EC_SHIFT
            if ec == EC_WFX:
                self.instance.pc += 4
                self._leave("wfi")
                return
            if ec == EC_UNKNOWN:
                # The emulator loses the syndrome of its only trap that is raised in the midst of an instruction.
                exception.syndrome = EC_PAC << EC_SHIFT | IL
            elif ec == EC_SVE:
                exception.syndrome = esr | IL  # and this bit, here
            self._gate.in_hook = True
            if not self.on_trap():
                self._leave("trap")
        except BaseException as failure:
            self._failure = failure
            self._leave("trap")
        finally:
            self._gate.in_hook = False

    def _beyond_48_bits(self, esr: int) -> None:
        """The emulator's address-size fault, which on this host may be a stage-2 fault."""
        self._gate.in_hook = True
        try:
            handled = self._high.beyond(esr, int(self._exception.vaddress))
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
        if self._interrupts and self._interrupts_shown:
            self._show_interrupts(False)
        self.instance.request_stop()

    # ---- interrupts

    def set_irq(self, pending: bool) -> None:
        """The virtual IRQ line (HCR_EL2.VI): level-sensitive, taken as PSTATE.I allows, ends WFI."""
        self._line(inst.HCR_VI, pending)

    def set_fiq(self, pending: bool) -> None:
        """The virtual FIQ line (HCR_EL2.VF)."""
        self._line(inst.HCR_VF, pending)

    def _line(self, bit: int, pending: bool) -> None:
        lines = self._interrupts | bit if pending else self._interrupts & ~bit
        if lines != self._interrupts:
            self._interrupts = lines
            if self._interrupts_shown:
                self._show_interrupts(True)

    def _show_interrupts(self, shown: bool) -> None:
        self._interrupts_shown = shown
        self._hcr.write([self.instance.hcr | (self._interrupts if shown else 0)])

    def _set_hcr(self, bits: int, on: bool) -> None:
        self.instance.hcr = self.instance.hcr | bits if on else self.instance.hcr & ~bits
        self._show_interrupts(self._interrupts_shown)

    # ---- what the hypervisor sets

    def set_stage2(self, vtcr: int, vttbr: int) -> None:
        """VTCR_EL2 and VTTBR_EL2, with stage 2 on. The core knows no DS bit, and PS up to 48 bits."""
        self.write_sys(reg.VTCR_EL2, vtcr)
        self.write_sys(reg.VTTBR_EL2, vttbr)
        if self._soft is None:
            self._set_hcr(inst.HCR_VM, True)
        self.flush_tlb()

    def flush_tlb(self) -> None:
        """Forget cached translations: after a stage-2 entry was removed or restricted, or another core ran the VM."""
        self.instance.engine.flush_tlb(self.instance.handle)

    def flush_code(self) -> None:
        """Forget translated code: after guest memory that holds instructions was written from outside this core."""
        self.instance.engine.flush_code(self.instance.handle)

    def set_id(self, midr: int, mpidr: int) -> None:
        """What the guest reads as MIDR_EL1 and MPIDR_EL1."""
        self.write_sys(reg.VPIDR_EL2, midr)
        self.write_sys(reg.VMPIDR_EL2, mpidr)

    def set_sve(self, vqs: tuple[int, ...] | None) -> None:
        """The guest's vector lengths in quadwords; None: SVE instructions trap (EC 0x19). Model "max", before `run`."""
        self._sve = vqs is not None
        self._registers.set_sve(vqs)

    def set_traps(self, smp: bool) -> None:
        """With several vCPUs, trap IC IVAU, IC IALLU and DC CVAU (EC 0x18): each core has its own translated code."""
        self._set_hcr(inst.HCR_TPU, smp)

    # ---- state

    def load(self, state: CpuState) -> None:
        """Take over a vCPU's whole state; registers missing from `state.sys` stay as they are."""
        self._transfer.load(state)
        self.flush_tlb()

    def save(self, state: CpuState) -> None:
        """Bring the whole of `state` up to date."""
        self._transfer.save_gpr(state)
        self._transfer.save_fp(state)
        self._transfer.save_sys(state)

    def save_gpr(self, state: CpuState) -> None:
        """Only X, PC, PSTATE, SP, ELR and SPSR."""
        self._transfer.save_gpr(state)

    def save_fp(self, state: CpuState) -> None:
        """Only the floating-point and SVE registers."""
        self._transfer.save_fp(state)

    def save_sys(self, state: CpuState) -> None:
        """Only the system registers of `NATIVE[model]`."""
        self._transfer.save_sys(state)
