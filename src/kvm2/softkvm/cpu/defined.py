"""System registers that the core itself does not have (ICC_*_EL1), answered by Python.

A register is put into the core's own table, with an access check that is ours. The check does everything: it runs
before the access with PC at the instruction, so it may say "undefined", and what it puts into one spare word of the
register file is what the core then reads. Nothing may be raised through the emulator's frames: the access of a failed
check does not happen, and is tried again when the core runs again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from kvm2.errors import EnvironmentFault
from kvm2.softkvm.cpu import instance as inst
from kvm2.softkvm.cpu import registers as reg

if TYPE_CHECKING:
    from kvm2.softkvm.cpu.instance import Instance
    from kvm2.softkvm.cpu.stop import StopGate

_STATE_AA64: Final = 1
_EL1_READ: Final = 0xA8  # PL1_R: EL1, EL2, EL3
_EL1_WRITE: Final = 0x54
_OK, _UNDEFINED = 0, 2  # CP_ACCESS_OK, CP_ACCESS_TRAP_UNCATEGORIZED
_OP0_SYSTEM: Final = 2  # below are instructions: SYS, MSR (immediate)
_OP1_EL1: Final = 3
_MASK: Final = (1 << 64) - 1
_READS: Final = 1 << 21  # of MRS and MSR
_XZR: Final = 31

# The registers come in; the description and the direction, which the instruction word tells too, are not taken.
ACCESS_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)

Read: TypeAlias = Callable[[], int | None]
Write: TypeAlias = Callable[[int], bool | None]


class Definitions:
    """The added registers of one instance. `failed` takes what a function raised, and makes the core leave."""

    def __init__(self, instance: Instance, gate: StopGate, failed: Callable[[BaseException], None]) -> None:
        self._instance, self._gate, self._failed = instance, gate, failed
        # The word that an access goes through, behind those that sysregs.Overrides gives away.
        self._offset = instance.layout.spare_in_env + 8 * len(reg.STORED)
        self._word = ctypes.c_uint64.from_address(instance.env + self._offset)
        self._kept: list[Any] = []  # the library has only the addresses

    def define(self, enc: int, read: Read | None, write: Write | None, done: Callable[[], None] | None = None) -> None:
        """See `Core.define`."""
        instance = self._instance
        if enc >> 14 < _OP0_SYSTEM or enc >> 16 or enc >> 11 & 7 > _OP1_EL1:
            raise EnvironmentFault(f"{enc:#06x} is not the encoding of an EL1 register (op0 2 or 3, op1 0 to 3)")
        if inst.register_info(instance, enc, missing_ok=True) is not None:
            raise EnvironmentFault(f"the emulated core has system register {enc:#06x} itself: use `override`")
        handler = self._accesses(read, write, done=done)
        next(handler)
        callback = ACCESS_CALLBACK(handler.send)
        info = inst.RegInfo(
            name=b"kvm2",
            crn=enc >> 7 & 15,
            crm=enc >> 3 & 15,
            op0=enc >> 14,
            op1=enc >> 11 & 7,
            op2=enc & 7,
            state=_STATE_AA64,
            access=(_EL1_READ if read else 0) | (_EL1_WRITE if write else 0),
            fieldoffset=self._offset,
            accessfn=ctypes.cast(callback, ctypes.c_void_p).value,
        )
        self._kept += [handler, callback, info]
        instance.engine.FAST.define_one_arm_cp_reg_with_opaque_aarch64(instance.cpu, ctypes.byref(info), None)
        found = inst.register_info(instance, enc)
        if (found.accessfn, found.fieldoffset) != (info.accessfn, info.fieldoffset):
            raise EnvironmentFault("the emulated core's check failed: Unicorn 2.1.4 describes registers in another way")

    def replace(self, enc: int, read: Callable[[], int], write: Callable[[int], None]) -> None:
        """See `Core.replace`."""
        info = inst.register_info(self._instance, enc)
        check = inst.CHECK_CALLBACK(info.accessfn)
        handler = self._accesses(read, write, partial(check, self._instance.env, ctypes.addressof(info)))
        next(handler)
        callback = ACCESS_CALLBACK(handler.send)
        info.accessfn = ctypes.cast(callback, ctypes.c_void_p).value
        info.fieldoffset, info.readfn, info.writefn = self._offset, None, None
        # What is not the guest's own access asks no check.
        reader = inst.READ_CALLBACK(lambda env, description: read() & _MASK)
        writer = inst.WRITE_CALLBACK(lambda env, description, value: write(value))
        info.raw_readfn = ctypes.cast(reader, ctypes.c_void_p).value
        info.raw_writefn = ctypes.cast(writer, ctypes.c_void_p).value
        self._kept += [handler, callback, reader, writer]

    def _accesses(
        self,
        read: Read | None,
        write: Write | None,
        native: Callable[[int], int] = lambda is_read: _OK,
        done: Callable[[], None] | None = None,
    ) -> Generator[int, int, None]:
        # A generator for the same reason as Core._exceptions: a signal's exception is raised inside the `try`.
        # An access comes again where `answer` is still "undefined"; a signal may come at the end of the loop too.
        answer, gate = _OK, self._gate
        while True:
            try:
                while True:
                    given, answer = answer, _UNDEFINED
                    yield given
                    permitted = native(0)
                    gate.in_hook = True
                    if permitted != _OK or self._access(read, write, done):
                        answer = permitted
                    gate.in_hook = False
            except GeneratorExit:
                return
            except BaseException as failure:
                gate.in_hook = False
                self._failed(failure)

    def _access(self, read: Read | None, write: Write | None, done: Callable[[], None] | None) -> bool:
        instance = self._instance
        # Which way, and for a write which X: only the instruction tells. Looking at it is half the cost.
        word = _READS if write is None else instance.read_code(instance.pc_cell.value)
        if word is None:  # the guest took the page from under its feet
            return False
        if word & _READS:
            value = read() if read is not None else None
            if value is None:
                return False
            self._word.value = value & _MASK
        else:
            target = word & _XZR
            if write is None or write(instance.x[target] if target != _XZR else 0) is False:
                return False
        if done is not None:
            done()
        return True

    def close(self) -> None:
        """The core is about to be freed."""
        for kept in self._kept:
            if isinstance(kept, Generator):
                kept.close()
