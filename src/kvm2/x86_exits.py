"""The exits that only an x86-64 KVM gives, port I/O aside (that is `exits.Io`).

>>> from kvm2.abi import exits as abi
>>> from kvm2.exits import decode
>>> area = memoryview(bytearray(4096))
>>> area[abi.EXIT_REASON_OFFSET] = abi.KVM_EXIT_SHUTDOWN
>>> decode(area, "x86_64").kind, decode(area, "x86_64").ends
('shutdown', True)
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvm2.abi import exits as abi
from kvm2.abi.structs_x86 import DebugExitArch
from kvm2.errors import UsageError
from kvm2.exits import Exit

if TYPE_CHECKING:
    from collections.abc import Callable

_UNION = abi.UNION_OFFSET
_MSR_ERROR = _UNION + abi.Msr.LAYOUT.at("error").offset
_MSR_DATA = _UNION + abi.Msr.LAYOUT.at("data").offset


class Hlt(Exit):
    """KVM_EXIT_HLT: the guest halted, and no interrupt controller in the kernel could wake it. It may be run on."""

    __slots__ = ()
    kind = "hlt"


class Shutdown(Exit):
    """KVM_EXIT_SHUTDOWN: a triple fault. A processor would be reset."""

    __slots__ = ()
    kind = "shutdown"
    ends = True


class IrqWindowOpen(Exit):
    """KVM_EXIT_IRQ_WINDOW_OPEN: `Vcpu.interrupt` can inject now; `Vcpu.request_irq_window` asked for it."""

    __slots__ = ()
    kind = "irq_window_open"


class SetTpr(Exit):
    """KVM_EXIT_SET_TPR: the guest lowered its task priority, to `cr8`."""

    __slots__ = ("cr8",)
    kind = "set_tpr"

    def __init__(self, cr8: int) -> None:
        self.cr8 = cr8


class TprAccess(Exit):
    """KVM_EXIT_TPR_ACCESS: the instruction at `rip` touched the task-priority register."""

    __slots__ = ("is_write", "rip")
    kind = "tpr_access"

    def __init__(self, rip: int, is_write: bool) -> None:
        self.rip = rip
        self.is_write = is_write


class IoapicEoi(Exit):
    """KVM_EXIT_IOAPIC_EOI: the end of the level-triggered interrupt `vector` (KVM_CAP_SPLIT_IRQCHIP)."""

    __slots__ = ("vector",)
    kind = "ioapic_eoi"

    def __init__(self, vector: int) -> None:
        self.vector = vector


class MsrAccess(Exit):
    """KVM_EXIT_X86_RDMSR and _WRMSR (KVM_CAP_X86_USER_SPACE_MSR): MSR `index`, with what is written in `value`.

    `reason` is KVM_MSR_EXIT_REASON_*. A read wants `reply`; `fault` gives the guest #GP instead, of a write too.
    """

    __slots__ = ("_area", "index", "is_write", "reason", "value")
    __match_args__ = ("index", "is_write")
    kind = "msr"

    def __init__(self, index: int, is_write: bool, value: int, reason: int, area: memoryview) -> None:
        self.index = index
        self.is_write = is_write
        self.value = value
        self.reason = reason
        self._area = area

    def reply(self, value: int) -> None:
        """The 64-bit answer to a read; UsageError on a write, and where it does not fit."""
        if self.is_write:
            raise UsageError(f"the guest wrote MSR {self.index:#x}: a write takes no reply (allowed: on reads)")
        if not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise UsageError(f"reply {value!r} does not fit the 64 bits of MSR {self.index:#x}")
        self._area[_MSR_ERROR] = 0
        struct.pack_into("=Q", self._area, _MSR_DATA, value)

    def fault(self) -> None:
        """The guest gets a general protection fault."""
        self._area[_MSR_ERROR] = 1


class BusLock(Exit):
    """KVM_EXIT_X86_BUS_LOCK: the guest locked the bus (KVM_CAP_X86_BUS_LOCK_EXIT)."""

    __slots__ = ()
    kind = "x86_bus_lock"


class Notify(Exit):
    """KVM_EXIT_NOTIFY: the guest held the processor too long; `flags` bit 0: its state is no longer valid."""

    __slots__ = ("flags",)
    kind = "notify"

    def __init__(self, flags: int) -> None:
        self.flags = flags


class DebugException(Exit):
    """KVM_EXIT_DEBUG of x86-64: exception vector 1 (#DB) or 3 (#BP) at `pc`, with the debug registers."""

    __slots__ = ("dr6", "dr7", "exception", "pc")
    kind = "debug"

    def __init__(self, exception: int, pc: int, dr6: int, dr7: int) -> None:
        self.exception = exception
        self.pc = pc
        self.dr6 = dr6
        self.dr7 = dr7


class UnknownExit(Exit):
    """KVM_EXIT_UNKNOWN: the processor left the guest, and KVM does not know why; `reason` is the hardware's."""

    __slots__ = ("reason",)
    ends = True

    def __init__(self, reason: int) -> None:
        self.reason = reason


def _set_tpr(area: memoryview) -> Exit:
    return SetTpr(struct.unpack_from("=Q", area, abi.Run.LAYOUT.at("cr8").offset)[0])


def _tpr_access(area: memoryview) -> Exit:
    access = abi.TprAccess.unpack(area, _UNION)
    return TprAccess(access.rip, bool(access.is_write))


def _msr(area: memoryview, is_write: bool) -> Exit:
    access = abi.Msr.unpack(area, _UNION)
    return MsrAccess(access.index, is_write, access.data if is_write else 0, access.reason, area)


def _debug(area: memoryview) -> Exit:
    arch = DebugExitArch.unpack(area, _UNION)
    return DebugException(arch.exception, arch.pc, arch.dr6, arch.dr7)


DECODERS: dict[int, Callable[[memoryview], Exit]] = {
    abi.KVM_EXIT_UNKNOWN: lambda area: UnknownExit(abi.Hw.unpack(area, _UNION).hardware_exit_reason),
    abi.KVM_EXIT_DEBUG: _debug,
    abi.KVM_EXIT_HLT: lambda area: Hlt(),
    abi.KVM_EXIT_IRQ_WINDOW_OPEN: lambda area: IrqWindowOpen(),
    abi.KVM_EXIT_SHUTDOWN: lambda area: Shutdown(),
    abi.KVM_EXIT_SET_TPR: _set_tpr,
    abi.KVM_EXIT_TPR_ACCESS: _tpr_access,
    abi.KVM_EXIT_IOAPIC_EOI: lambda area: IoapicEoi(abi.Eoi.unpack(area, _UNION).vector),
    abi.KVM_EXIT_X86_RDMSR: lambda area: _msr(area, False),
    abi.KVM_EXIT_X86_WRMSR: lambda area: _msr(area, True),
    abi.KVM_EXIT_X86_BUS_LOCK: lambda area: BusLock(),
    abi.KVM_EXIT_NOTIFY: lambda area: Notify(abi.Notify.unpack(area, _UNION).flags),
}
