"""Moving a vCPU's state between a `CpuState` and an emulated core, as a whole or by group."""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, Final

from kvm2.errors import EnvironmentFault
from kvm2.softkvm.cpu import engine as uc
from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu.state import P_BYTES, Z_BYTES

if TYPE_CHECKING:
    from kvm2.softkvm.cpu.instance import Instance
    from kvm2.softkvm.cpu.state import CpuState

_PLAIN: Final = (uc.REG_PSTATE, uc.REG_SP_EL0, uc.REG_SP_EL1, uc.REG_ELR_EL1)
_SPSRS: Final = (reg.SPSR_EL1, reg.SPSR_ABT, reg.SPSR_UND, reg.SPSR_IRQ, reg.SPSR_FIQ)  # in the order of CpuState.spsr
_X: Final = struct.Struct("=31Q")
_Z: Final = struct.Struct(f"{Z_BYTES}s" * 32)
_P: Final = struct.Struct(f"{P_BYTES}s" * 17)
_M_AARCH32: Final = 0x10
_MODE: Final = 0xF
_EL1H: Final = 5
_NO_ADDRESS: Final = (1 << 64) - 1


def mode_name(pstate: int) -> str:
    """The name of a PSTATE's mode, for messages."""
    return {0: "EL0t", 4: "EL1t", 5: "EL1h"}.get(pstate & 0x1F, f"mode {pstate & 0x1F:#x}")


class Transfer:
    """The prepared transfers of one instance."""

    def __init__(self, instance: Instance) -> None:
        handle = instance.handle
        self.instance = instance
        self._core = reg.Batch(handle, _PLAIN, _SPSRS)
        self._fp_control = reg.Batch(handle, (uc.REG_FPSR, uc.REG_FPCR), ())
        self._system = reg.Batch(handle, (), sorted(reg.NATIVE[instance.model]))
        self._pstate = reg.Batch(handle, (uc.REG_PSTATE,), ())
        self._x = ctypes.addressof(instance.x)
        self._z = instance.env + instance.layout.z_in_env
        self._p = instance.env + instance.layout.p_in_env

    def read_pstate(self) -> int:
        """PSTATE in SPSR form."""
        return self._pstate.read()[0]

    def write_pstate(self, value: int) -> None:
        """PSTATE, with the stack pointer that belongs to the new mode."""
        self._check(value)
        plain = self._core.read()
        self._bank_out(plain)
        plain[0] = value
        self._core.write(plain)
        self.instance.sp.value = plain[2] if value & _MODE == _EL1H else plain[1]
        self.instance.rebuild_flags()

    def _check(self, pstate: int) -> None:
        if pstate & _M_AARCH32 or pstate & _MODE not in (0, 4, 5):
            raise EnvironmentFault(
                f"the emulated core executes EL0t, EL1t and EL1h; PSTATE {pstate:#x} is {mode_name(pstate)}"
            )

    def _bank_out(self, plain: list[int]) -> None:
        """The stack pointer in use lies outside its bank: SP_EL0 or SP_EL1 of `plain` gets its value."""
        plain[2 if plain[0] & _MODE == _EL1H else 1] = self.instance.sp.value

    # ---- saving

    def save_gpr(self, state: CpuState) -> None:
        """X0 to X30, PC, PSTATE, both stack pointers, ELR_EL1, the SPSRs."""
        state.x = list(_X.unpack(ctypes.string_at(self._x, _X.size)))
        state.pc = self.instance.pc
        plain = self._core.read()
        self._bank_out(plain)
        state.pstate, state.sp_el0, state.sp_el1, state.elr_el1 = plain[:4]
        state.spsr = plain[4:]

    def save_fp(self, state: CpuState) -> None:
        """Z (or V), P, FFR, FPSR, FPCR."""
        state.v = list(_Z.unpack(ctypes.string_at(self._z, _Z.size)))
        predicates = _P.unpack(ctypes.string_at(self._p, _P.size))
        state.p, state.ffr = list(predicates[:16]), predicates[16]
        state.fpsr, state.fpcr = self._fp_control.read()

    def save_sys(self, state: CpuState) -> None:
        """The system registers that the core holds; others in `state.sys` stay as they are."""
        state.sys.update(zip(self._system.system, self._system.read(), strict=True))

    # ---- loading

    def load(self, state: CpuState) -> None:
        """Everything; system registers that `state` does not have stay as the core has them."""
        self._check(state.pstate)
        instance = self.instance
        _X.pack_into(instance.x, 0, *state.x)
        instance.pc = state.pc
        if self._system.system:
            present = self._system.read()
            self._system.write([state.sys.get(enc, old) for enc, old in zip(self._system.system, present, strict=True)])
        self._core.write([state.pstate, state.sp_el0, state.sp_el1, state.elr_el1, *state.spsr])
        instance.sp.value = state.sp_el1 if state.pstate & _MODE == _EL1H else state.sp_el0
        ctypes.memmove(self._z, _Z.pack(*state.v), _Z.size)
        ctypes.memmove(self._p, _P.pack(*state.p, state.ffr), _P.size)
        self._fp_control.write([state.fpsr, state.fpcr])
        instance.exclusive.value = _NO_ADDRESS
        instance.rebuild_flags()
