"""One Unicorn instance made into a non-secure Arm core with a hypervisor configuration around EL1 and EL0.

The emulated physical address space *is* this process's address space: one region maps every address from 64 KiB to
2^48 onto itself. A stage-2 leaf therefore holds a host virtual address, and so does VTTBR_EL2. Nothing in the emulator
checks such an address: the stage-2 tables alone decide what a guest reaches, and an entry that points to memory which
this process has not mapped ends the process with SIGSEGV.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_uint8, c_uint32, c_uint64, c_void_p
from typing import Any, Final

from kvm2.errors import EnvironmentFault
from kvm2.softkvm.cpu import calibrate
from kvm2.softkvm.cpu import engine as uc
from kvm2.softkvm.cpu import registers as reg

MODELS: Final = {"a72": uc.MODEL_A72, "max": uc.MODEL_MAX}
COUNTER_HZ: Final = 62_500_000  # CNTFRQ_EL0 of the core: its counter is the host's monotonic clock in 16 ns steps

# Room for translated code. A guest kernel's working set is larger than 8 MiB, and a full buffer is dropped whole.
TCG_BUFFER: Final = 64 << 20
LOWEST: Final = 0x10000
TOP: Final = 1 << 48
PARANGE_48: Final = 5
_TLBS_OF_GUESTS: Final = (0, 2, 3)  # EL0, EL1, EL1 with PAN: ARMMMUIdx_E10_0, E10_1, E10_1_PAN

HCR_VM, HCR_FMO, HCR_IMO, HCR_AMO, HCR_VF, HCR_VI = 1 << 0, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7
HCR_TWI, HCR_TID1, HCR_TID2, HCR_TID3, HCR_TSC = 1 << 13, 1 << 16, 1 << 17, 1 << 18, 1 << 19
HCR_TACR, HCR_TPU, HCR_RW, HCR_TLOR, HCR_APK, HCR_API = 1 << 21, 1 << 24, 1 << 31, 1 << 35, 1 << 40, 1 << 41
_HCR_TRAPS: Final = HCR_TWI | HCR_TID1 | HCR_TID2 | HCR_TID3 | HCR_TSC | HCR_TACR | HCR_TLOR
HCR_GUEST: Final = HCR_RW | HCR_FMO | HCR_IMO | HCR_AMO | _HCR_TRAPS
SCR_GUEST: Final = 0x531  # NS, RES1, HCE, RW
SCR_APK_API: Final = 3 << 16
MDCR_TRAPS: Final = 3 << 5 | 7 << 9  # TPM and TPMCR, the PMU; TDA, TDOSA and TDRA, the debug registers
CNTHCTL_EL1PCTEN: Final = 1  # the physical counter is the guest's, the physical timer traps
CPTR_EL2_TZ: Final = 1 << 8
CPTR_EL3_EZ: Final = 1 << 8
CPTR_EL2_RES1: Final = 0x32FF


class Instance:
    """The C side of a core: its memory map, its EL2 registers, and live views of its private fields."""

    def __init__(self, model: str) -> None:
        if model not in MODELS:
            raise EnvironmentFault(f"there is no core model {model!r}; known: {', '.join(MODELS)}")
        self.model = model
        self.engine = engine = uc.engine()
        self.layout = layout = calibrate.layout()
        self.handle = handle = engine.open(MODELS[model], TCG_BUFFER)
        error = engine.LIB.uc_mem_map_ptr(handle, LOWEST, TOP - LOWEST, uc.PROT_ALL, c_void_p(LOWEST))
        engine.check(error, "mapping the host's address space")
        self.base = handle.value or 0
        self.cpu = calibrate.cpu_object(engine, handle)
        self.env = self.cpu + layout.env_in_cpu
        self._views()
        self._prepare()
        self._lowest_el2()

    def _views(self) -> None:
        env, layout = self.env, self.layout
        self.x = (c_uint64 * 31).from_address(env + 64)
        self.sp = c_uint64.from_address(env + 64 + 31 * 8)
        self.pc_cell = c_uint64.from_address(env + 64 + 32 * 8)
        self.exception = calibrate.ExceptionInfo.from_address(env + layout.exception_in_env)
        self.exception_index = c_int32.from_address(self.cpu + layout.exception_index_in_cpu)
        self._word = c_uint32()
        self._word_pointer = ctypes.byref(self._word)
        self._fast_read = self.engine.FAST.uc_vmem_read
        self.exclusive = c_uint64.from_address(env + layout.exclusive_in_env)
        cells = [(self.base + at, value) for at, value in layout.stop_in_uc]
        cells += [(self.cpu + at, value) for at, value in layout.stop_in_cpu]
        self._stop_cells = [(c_uint8.from_address(address), value) for address, value in cells]
        self._no_exit_request = c_uint8.from_address(self.base + layout.no_exit_request_in_uc)

    def _prepare(self) -> None:
        """The two private settings: stops at block boundaries only, and 48-bit physical addresses."""
        self._no_exit_request.value = 1
        word = c_uint64.from_address(self.env + self.layout.mmfr0_in_env)
        if word.value != self.read_sys(reg.ID_AA64MMFR0_EL1):
            raise EnvironmentFault(
                "the emulated core's check failed: ID_AA64MMFR0_EL1 does not lie where Unicorn 2.1.4 keeps it"
            )
        word.value = word.value & ~0xF | PARANGE_48

        # Whenever a page gets its first code, every entry of every TLB is looked at. Those of EL2, EL3 and the secure
        # state, which nothing here ever uses, shrink to one entry each.
        for number in range(calibrate.TLBS):
            if number not in _TLBS_OF_GUESTS:
                c_uint64.from_address(self.cpu + self.layout.tlbs_in_cpu + 16 * number).value = 0

    def _lowest_el2(self) -> None:
        maximal = self.model == "max"
        self.write_sys(reg.SCR_EL3, SCR_GUEST | (SCR_APK_API if maximal else 0))
        self.write_sys(reg.HCR_EL2, HCR_GUEST)
        self.write_sys(reg.MDCR_EL2, self.read_sys(reg.MDCR_EL2) | MDCR_TRAPS)
        self.write_sys(reg.CNTHCTL_EL2, CNTHCTL_EL1PCTEN)
        if maximal:
            self.write_sys(reg.CPTR_EL3, CPTR_EL3_EZ)
            self.write_sys(reg.ZCR_EL3, 15)
            self.write_sys(reg.CPTR_EL2, CPTR_EL2_RES1 | CPTR_EL2_TZ)

    def close(self) -> None:
        """Free the instance; its views must not be used afterwards."""
        if self.base:
            self.base = 0
            self.engine.LIB.uc_close(self.handle)

    # ---- registers

    @property
    def pc(self) -> int:
        """The program counter, live."""
        return self.pc_cell.value

    @pc.setter
    def pc(self, value: int) -> None:
        self.pc_cell.value = value

    def read_sys(self, enc: int) -> int:
        """A system register of the core, EL2 and EL3 ones too."""
        return self.engine.read_sys(self.handle, enc)

    def write_sys(self, enc: int, value: int) -> None:
        """A system register of the core, EL2 and EL3 ones too."""
        self.engine.write_sys(self.handle, enc, value)

    def rebuild_flags(self) -> None:
        """Recompute what the core derives from PSTATE and the system registers."""
        self.engine.FAST.arm_rebuild_hflags_aarch64(self.env)

    def enter_el1(self, esr: int) -> None:
        """A synchronous exception entry to EL1 from the present state (AArch64.TakeException)."""
        self.exception.syndrome = esr
        self.exception.target_el = 1
        # As "undefined instruction" the entry writes ESR_EL1 and leaves FAR_EL1 alone.
        self.exception_index.value = 1
        self.engine.FAST.arm_cpu_do_interrupt_aarch64(self.cpu)
        self.exception_index.value = -1

    def request_stop(self) -> None:
        """What `uc_emu_stop` writes. The function itself is not for other threads: it counts calls, unlocked."""
        for cell, value in self._stop_cells:
            cell.value = value

    def read_code(self, address: int) -> int | None:
        """The word at a virtual address of the guest as an instruction fetch sees it, or None where it would fault."""
        word = self._word
        if self._fast_read(self.handle, address, uc.PROT_EXEC, self._word_pointer, 4):
            return None
        return word.value

    def cell(self, enc: int) -> c_uint64:
        """A live view of a 64-bit system register, for reading."""
        view = c_uint64.from_address(self.env + register_info(self, enc).fieldoffset)
        if view.value != self.read_sys(enc):
            raise EnvironmentFault(
                f"the emulated core's check failed: Unicorn 2.1.4 keeps system register {enc:#06x} in another place"
            )
        return view

    def host_address(self, address: int) -> int | None:
        """Where in this process the guest's virtual address lies for a read, or None where that would fault."""
        found = c_uint64()
        error = self.engine.FAST.uc_vmem_translate(self.handle, address, uc.PROT_READ, ctypes.byref(found))
        return None if error else found.value

    def drop_code(self, address: int, size: int) -> None:
        """Forget the blocks translated from host memory `[address, address + size)`."""
        fast, handle, start = self.engine.FAST, self.handle, address - LOWEST
        fast.tb_exec_unlock_aarch64(handle)  # where a page is either writable or executable (macOS)
        fast.tb_invalidate_phys_range_aarch64(handle, start, start + size)
        fast.tb_exec_lock_aarch64(handle)


# ---- replacing how the core reads or writes a system register

READ_CALLBACK = ctypes.CFUNCTYPE(c_uint64, c_void_p, c_void_p)
WRITE_CALLBACK = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_uint64)
CHECK_CALLBACK = ctypes.PYFUNCTYPE(ctypes.c_int, c_void_p, c_void_p, ctypes.c_int)  # of its own, to be called


class RegInfo(ctypes.Structure):
    """`ARMCPRegInfo`."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        *((field, c_uint8) for field in ("cp", "crn", "crm", "op0", "op1", "op2")),
        *((field, c_int32) for field in ("state", "type", "access", "secure")),
        ("opaque", c_void_p),
        *((field, c_uint64) for field in ("resetvalue", "fieldoffset", "bank0", "bank1")),
        ("accessfn", c_void_p),
        ("readfn", c_void_p),
        ("writefn", c_void_p),
        ("raw_readfn", c_void_p),
        ("raw_writefn", c_void_p),
        ("resetfn", c_void_p),
        ("orig_readfn", c_void_p),
        ("orig_writefn", c_void_p),
    ]


def register_info(instance: Instance, enc: int, missing_ok: bool = False) -> Any:
    """The core's own description of a system register, whose functions may be replaced."""
    table = c_uint64.from_address(instance.env + instance.layout.cp_regs_in_env).value
    key = c_uint32(1 << 28 | 0x13 << 16 | enc)
    address = instance.engine.FAST.get_arm_cp_reginfo_aarch64(c_void_p(table), key)
    info = RegInfo.from_address(address) if address else None
    found = info and (info.op0 << 14 | info.op1 << 11 | info.crn << 7 | info.crm << 3 | info.op2)
    if info is None and missing_ok:
        return None
    if found != enc:
        raise EnvironmentFault(f"the emulated core ({instance.model}) does not know system register {enc:#06x}")
    return info
