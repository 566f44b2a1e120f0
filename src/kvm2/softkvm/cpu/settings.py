"""What a hypervisor sets and reads in a core that is not running: registers, translation, traps, a vCPU's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kvm2.softkvm.cpu import instance as inst
from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu import sysregs
from kvm2.softkvm.cpu.debug import DebugLogic
from kvm2.softkvm.cpu.defined import Definitions, Read, Write
from kvm2.softkvm.cpu.hcr import HypervisorConfig
from kvm2.softkvm.cpu.instance import Instance
from kvm2.softkvm.cpu.stop import StopGate
from kvm2.softkvm.cpu.transfer import Transfer
from kvm2.softkvm.cpu.untrapped import Untrapped

if TYPE_CHECKING:
    from kvm2.softkvm.cpu.state import CpuState

_MASK: Final = (1 << 64) - 1
_SCTLR_EE, _SCTLR_E0E = 1 << 25, 1 << 24


class CoreSettings:
    """The part of a `Core` that does not run: usable inside `on_trap` and while stopped, by the core's own thread."""

    def __init__(self, model: str, pauth: bool) -> None:
        self.instance = instance = Instance(model)
        self.model = model
        self.x = instance.x
        self._transfer = Transfer(instance)
        with_pauth = inst.HCR_API | inst.HCR_APK if pauth and model == "max" else 0
        self._hcr = HypervisorConfig(instance, inst.HCR_GUEST | with_pauth)
        self._gate = StopGate(instance.request_stop)
        self.debug = DebugLogic(instance)
        self.sctlr = instance.cell(reg.SCTLR_EL1)
        self._registers = sysregs.Overrides(instance, self._gate)
        self._defined = Definitions(instance, self._gate, self._fail)
        self._untrapped = Untrapped(instance, self._fail)
        self._sve = False
        self._native_stage2 = True

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

        Before the first `run`. What they raise is lost: `replace` is for functions during which a signal may come.
        """
        self._registers.override(enc, read, write)

    def replace(self, enc: int, read: Callable[[], int], write: Callable[[int], None]) -> None:
        """As `define`, for a register that the core knows and whose own check of the access stays. The virtual timer
        needs it: the core ignores writes to CNTV_*."""
        self._defined.replace(enc, read, write)

    def define(
        self, enc: int, read: Read | None, write: Write | None, *, done: Callable[[], None] | None = None
    ) -> None:
        """Add a register of EL1 that the core does not have (ICC_*_EL1); `knows` is then true.

        `read()` answers an MRS, `write(value)` takes an MSR; None, or an answer of None to a read and False to a write:
        an undefined instruction. At EL0 it is undefined always. The functions run inside the emulator with PC at the
        instruction; interrupt lines that a write changes count from the next instruction on, and `stop` in a write
        ends `run` behind it (in a read: behind its basic block). What they raise `run` raises, with PC at the access,
        which comes again unless `done()` has returned, which is called when the guest has its answer. Before the first
        `run` of code that uses the register.
        """
        self._defined.define(enc, read, write, done)

    def _fail(self, failure: BaseException) -> None:
        raise NotImplementedError  # of the part that runs

    def knows(self, enc: int) -> bool:
        """Whether the core itself has a register or system instruction with this encoding."""
        return inst.register_info(self.instance, enc, missing_ok=True) is not None

    def big_endian(self) -> bool:
        """Whether the guest's data accesses are big-endian now (SCTLR_EL1.EE, or E0E at EL0)."""
        sctlr = self.sctlr.value
        if not sctlr & (_SCTLR_EE | _SCTLR_E0E):
            return False
        return bool(sctlr & (_SCTLR_EE if self.pstate & 0xC else _SCTLR_E0E))

    def counter(self) -> int:
        """The physical counter now, in ticks of `COUNTER_HZ`."""
        return self.read_sys(reg.CNTPCT_EL0)

    def set_counter_offset(self, ticks: int) -> None:
        """CNTVOFF_EL2: the virtual counter is the physical one minus this."""
        self.write_sys(reg.CNTVOFF_EL2, ticks & _MASK)

    def trap_physical_counter(self, on: bool) -> None:
        """Whether the guest's CNTPCT_EL0 traps (EC 0x18), as its timer does: it shows the host's counter otherwise."""
        self.write_sys(reg.CNTHCTL_EL2, 0 if on else inst.CNTHCTL_EL1PCTEN)

    # ---- interrupts

    def set_irq(self, pending: bool) -> None:
        """The virtual IRQ line (HCR_EL2.VI): level-sensitive, taken as PSTATE.I allows, ends WFI."""
        self._hcr.line(inst.HCR_VI, pending)

    def set_fiq(self, pending: bool) -> None:
        """The virtual FIQ line (HCR_EL2.VF)."""
        self._hcr.line(inst.HCR_VF, pending)

    def hold_lines(self, on: bool) -> None:
        """Keep the interrupt lines from the core, for one step; or give them back."""
        if on:
            self._hcr.hide()
        else:
            self._hcr.show()

    # ---- what the hypervisor sets

    def set_stage2(self, vtcr: int, vttbr: int) -> None:
        """VTCR_EL2 and VTTBR_EL2, with stage 2 on. The core knows no DS bit, and PS up to 48 bits."""
        self.write_sys(reg.VTCR_EL2, vtcr)
        self.write_sys(reg.VTTBR_EL2, vttbr)
        if self._native_stage2:
            self._hcr.set(inst.HCR_VM, True)
        self.flush_tlb()

    def flush_tlb(self) -> None:
        """Forget cached translations: after a stage-2 entry was removed or restricted, or another core ran the VM."""
        self.instance.engine.flush_tlb(self.instance.handle)

    def flush_code(self) -> None:
        """Forget translated code: after guest memory that holds instructions was written from outside this core."""
        self.instance.engine.flush_code(self.instance.handle)

    def host_address(self, va: int) -> int | None:
        """The host address behind a virtual address of the guest's present context, None where a read would fault."""
        return self.instance.host_address(va)

    def drop_code(self, address: int, size: int) -> None:
        """Forget translated code of this host memory: what IC IVAU means, a few microseconds where there is none."""
        self.instance.drop_code(address, size)

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
        self._hcr.set(inst.HCR_TPU, smp)

    def set_cache_type(self, ctr: int) -> None:
        """CTR_EL0 without a trap: a constant from now on. Before the first `run`."""
        self._untrapped.cache_type(ctr)
        self._hcr.set(inst.HCR_TID2, False)

    def watch_code(self, changed: Callable[[int | None], None]) -> None:
        """`changed(host address)` is called at IC IVAU; IC IALLU still traps, DC CVAU does nothing. Instead of
        `set_traps`, which costs a trap for each. None: the guest's address would fault. Before the first `run`."""
        self._untrapped.code(changed)

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
