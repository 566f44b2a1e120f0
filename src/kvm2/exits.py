"""What ended a KVM_RUN, as small typed objects made from the shared `kvm_run` area.

An `Mmio` or `Io` read wants an answer before the vCPU runs again; nearly every other exit is only to be looked at. The
classes are plain ones with slots and not frozen dataclasses, because one is made for every exit. What only x86-64 has,
port I/O aside, is in `x86_exits`.

>>> from kvm2.exits import Mmio
>>> area = memoryview(bytearray(4096))
>>> exit = Mmio(0x0900_0018, 4, False, bytes(8), area)
>>> exit
Mmio(address=0x9000018, size=4, read)
>>> exit.reply(0x90)
>>> bytes(area[40:44]).hex()
'90000000'
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvm2.abi import exits as abi
from kvm2.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

_UNION = abi.UNION_OFFSET
BYTES = (bytes, bytearray, memoryview)
_MMIO_DATA = _UNION + next(entry.offset for entry in abi.Mmio.LAYOUT.fields if entry.name == "data")

# The two commonest exits are unpacked at once, not by their declarations; tests hold these against the declarations.
# struct mmio: phys_addr, data, len, is_write. struct io: direction, size, port, count, data_offset, and the first eight
# bytes of the data, which x86 KVM keeps a page behind the start (KVM_PIO_PAGE_OFFSET).
MMIO = struct.Struct("=32xQ8sIB")
IO = struct.Struct("=32xBBHIQ4048x8s")
_unpack_mmio, _unpack_io = MMIO.unpack_from, IO.unpack_from
_MMIO, _IO, _OUT = abi.KVM_EXIT_MMIO, abi.KVM_EXIT_IO, abi.KVM_EXIT_IO_OUT
_REASON = abi.EXIT_REASON_OFFSET
_IO_DATA = 4096
_NUMBER = struct.Struct("=I")
_new = object.__new__

_ENDING_EVENTS = (
    abi.KVM_SYSTEM_EVENT_SHUTDOWN,
    abi.KVM_SYSTEM_EVENT_RESET,
    abi.KVM_SYSTEM_EVENT_CRASH,
    abi.KVM_SYSTEM_EVENT_SEV_TERM,
)
_EVENT_NAMES = {
    getattr(abi, f"KVM_SYSTEM_EVENT_{name.upper()}"): name
    for name in ("shutdown", "reset", "crash", "wakeup", "suspend", "sev_term")
}


class Exit:
    """The base of every exit. `kind` is the KVM_EXIT_ name in lower case; `ends` says that the vCPU will not go on."""

    __slots__: tuple[str, ...] = ()
    kind: str = "unknown"
    ends: bool = False

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={_show(getattr(self, name))}" for name in self.__slots__ if name[0] != "_")
        return f"{type(self).__name__}({fields})"


def _show(value: object) -> str:
    return hex(value) if isinstance(value, int) and value > 9 else repr(value)


class Mmio(Exit):
    """KVM_EXIT_MMIO: an access of 1 to 8 bytes to a guest physical address without memory behind it.

    `address` is the guest physical address, `size` the number of bytes, `is_write` the direction.
    """

    __slots__ = ("_area", "_raw", "address", "is_write", "size")
    __match_args__ = ("address", "size", "is_write")
    kind = "mmio"

    def __init__(self, address: int, size: int, is_write: bool, raw: bytes, area: memoryview) -> None:
        self.address = address
        self.size = size
        self.is_write = is_write
        self._raw = raw
        self._area = area

    @property
    def data(self) -> bytes:
        """The bytes that the guest wrote; of a read, what lay there before the answer."""
        return self._raw[: self.size]

    @property
    def value(self) -> int:
        """The bytes that the guest wrote, as a little-endian number."""
        return int.from_bytes(self._raw[: self.size], "little")

    def reply(self, data: bytes | bytearray | int) -> None:
        """The answer to a read: exactly `size` bytes, or a number that fits in them. UsageError otherwise."""
        size = self.size
        if self.is_write:
            raise UsageError(f"the guest wrote to {self.address:#x}: a write takes no reply (allowed: on reads)")
        if isinstance(data, int):
            if not 0 <= data < 1 << 8 * size:
                raise UsageError(f"reply {data:#x} does not fit the guest's {size}-byte read of {self.address:#x}")
            data = data.to_bytes(size, "little")
        elif not isinstance(data, BYTES):
            raise UsageError(f"reply {data!r}: a read is answered with {size} bytes, or a number")
        elif len(data) != size:
            raise UsageError(f"a reply of {len(data)} bytes to a {size}-byte read of {self.address:#x}: give {size}")
        self._area[_MMIO_DATA : _MMIO_DATA + size] = data

    def __repr__(self) -> str:
        what = f"write, data={self.data.hex()}" if self.is_write else "read"
        return f"Mmio(address={self.address:#x}, size={self.size}, {what})"


class Io(Exit):
    """KVM_EXIT_IO: `count` accesses of `size` bytes (1, 2 or 4) to an x86 port; more than one by INS and OUTS."""

    __slots__ = ("_area", "_raw", "count", "is_write", "port", "size")
    __match_args__ = ("port", "size", "is_write")
    kind = "io"

    def __init__(self, port: int, size: int, is_write: bool, count: int, raw: bytes, area: memoryview) -> None:
        self.port = port
        self.size = size
        self.is_write = is_write
        self.count = count
        self._raw = raw
        self._area = area

    @property
    def data(self) -> bytes:
        """What the guest wrote, size * count bytes, first access first; of a read, what lay there before the answer."""
        return self._raw[: self.size * self.count]

    @property
    def value(self) -> int:
        """What a single access wrote, as a little-endian number; UsageError where there are more: see `values`."""
        if self.count != 1:
            raise UsageError(f"{self!r} is {self.count} accesses at once: `values` has a number for each")
        return int.from_bytes(self.data, "little")

    @property
    def values(self) -> tuple[int, ...]:
        """A number for each access."""
        size = self.size
        return tuple(int.from_bytes(self.data[i : i + size], "little") for i in range(0, size * self.count, size))

    def reply(self, data: bytes | bytearray | int) -> None:
        """The answer to a read: size * count bytes, or for a single access a number that fits. UsageError otherwise."""
        size = self.size * self.count
        if self.is_write:
            raise UsageError(f"the guest wrote to port {self.port:#x}: a write takes no reply (allowed: on reads)")
        if isinstance(data, int):
            if self.count != 1:
                raise UsageError(f"{self!r} is {self.count} accesses at once: reply with {size} bytes")
            if not 0 <= data < 1 << 8 * size:
                raise UsageError(f"reply {data:#x} does not fit the guest's {size}-byte read of port {self.port:#x}")
            data = data.to_bytes(size, "little")
        elif not isinstance(data, BYTES):
            raise UsageError(f"reply {data!r}: a read is answered with {size} bytes, or a number")
        elif len(data) != size:
            raise UsageError(f"a reply of {len(data)} bytes to a read of {size} from port {self.port:#x}: give {size}")
        self._area[_IO_DATA : _IO_DATA + size] = data

    def __repr__(self) -> str:
        what = f"write, data={self.data.hex()}" if self.is_write else "read"
        many = f", count={self.count}" if self.count != 1 else ""
        return f"Io(port={self.port:#x}, size={self.size}{many}, {what})"


class SystemEvent(Exit):
    """KVM_EXIT_SYSTEM_EVENT: `type` is KVM_SYSTEM_EVENT_*, `data` up to 16 words that say more."""

    __slots__ = ("data", "type")
    __match_args__ = ("type",)
    kind = "system_event"

    def __init__(self, type: int, data: tuple[int, ...] = ()) -> None:
        self.type = type
        self.data = data

    @property
    def name(self) -> str:
        """ "shutdown", "reset", "crash", "wakeup", "suspend"; "event 9" for one that has no name here."""
        return _EVENT_NAMES.get(self.type, f"event {self.type}")

    @property
    def ends(self) -> bool:  # type: ignore[override]
        return self.type in _ENDING_EVENTS

    def __repr__(self) -> str:
        return f"SystemEvent({self.name}, data={[hex(word) for word in self.data]})"


class Interrupted(Exit):
    """KVM_EXIT_INTR: `kick()`, a signal or `immediate_exit` got KVM_RUN back (errno EINTR); nothing is lost."""

    __slots__ = ()
    kind = "intr"


class Hypercall(Exit):
    """KVM_EXIT_HYPERCALL: an SMCCC call that a filter forwards; `flags` bit 0: made by SMC. x0..x3 are in the regs."""

    __slots__ = ("args", "flags", "nr")
    __match_args__ = ("nr",)
    kind = "hypercall"

    def __init__(self, nr: int, args: tuple[int, ...], flags: int) -> None:
        self.nr = nr
        self.args = args
        self.flags = flags


class Debug(Exit):
    """KVM_EXIT_DEBUG: `hsr` is the syndrome of the debug exception, `far` its address. x86-64's is `DebugException`."""

    __slots__ = ("far", "hsr")
    kind = "debug"

    def __init__(self, hsr: int, far: int) -> None:
        self.hsr = hsr
        self.far = far


class Nisv(Exit):
    """KVM_EXIT_ARM_NISV: an access outside memory without instruction syndrome (a pair, SIMD, a cache operation)."""

    __slots__ = ("esr_iss", "fault_ipa")
    kind = "arm_nisv"

    def __init__(self, esr_iss: int, fault_ipa: int) -> None:
        self.esr_iss = esr_iss
        self.fault_ipa = fault_ipa


class MemoryFault(Exit):
    """KVM_EXIT_MEMORY_FAULT: `size` bytes at `gpa` could not be made accessible; `flags` says which kind."""

    __slots__ = ("flags", "gpa", "size")
    kind = "memory_fault"

    def __init__(self, flags: int, gpa: int, size: int) -> None:
        self.flags = flags
        self.gpa = gpa
        self.size = size


class FailEntry(Exit):
    """KVM_EXIT_FAIL_ENTRY: the host could not enter the guest; `reason` is the hardware's."""

    __slots__ = ("cpu", "reason")
    kind = "fail_entry"
    ends = True

    def __init__(self, reason: int, cpu: int) -> None:
        self.reason = reason
        self.cpu = cpu


class InternalError(Exit):
    """KVM_EXIT_INTERNAL_ERROR: KVM itself could not go on; `suberror` and up to 16 words of `data`."""

    __slots__ = ("data", "suberror")
    kind = "internal_error"
    ends = True

    def __init__(self, suberror: int, data: tuple[int, ...]) -> None:
        self.suberror = suberror
        self.data = data

    @property
    def instruction(self) -> bytes:
        """What x86 KVM could not emulate: up to 15 bytes from the instruction on; b"" where KVM does not say."""
        flags, words = self.data[0] if self.data else 0, self.data[1:3]
        said = flags & abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES and len(words) == 2
        if self.suberror != abi.KVM_INTERNAL_ERROR_EMULATION or not said:
            return b""
        raw = struct.pack("=2Q", *words)  # struct emulation_failure: insn_size, insn_bytes
        return raw[1 : 1 + raw[0]]


class Other(Exit):
    """Any other exit reason: `reason` is its number, `payload` the 256 bytes of the union."""

    __slots__ = ("payload", "reason")
    __match_args__ = ("reason",)

    def __init__(self, reason: int, payload: bytes) -> None:
        self.reason = reason
        self.payload = payload

    @property
    def kind(self) -> str:  # type: ignore[override]
        return abi.name_of(self.reason).removeprefix("KVM_EXIT_").lower()


def _system_event(area: memoryview) -> Exit:
    event = abi.SystemEvent.unpack(area, _UNION)
    return SystemEvent(event.type, event.data[: min(event.ndata, 16)])


def _internal(area: memoryview) -> Exit:
    error = abi.InternalError.unpack(area, _UNION)
    return InternalError(error.suberror, error.data[: min(error.ndata, 16)])


def _hypercall(area: memoryview) -> Exit:
    call = abi.Hypercall.unpack(area, _UNION)
    return Hypercall(call.nr, call.args, call.flags)


def _debug(area: memoryview) -> Exit:
    arch = abi.Debug.unpack(area, _UNION).arch
    return Debug(arch.hsr | arch.hsr_high << 32, arch.far)


def _fail_entry(area: memoryview) -> Exit:
    failure = abi.FailEntry.unpack(area, _UNION)
    return FailEntry(failure.hardware_entry_failure_reason, failure.cpu)


def _nisv(area: memoryview) -> Exit:
    access = abi.ArmNisv.unpack(area, _UNION)
    return Nisv(access.esr_iss, access.fault_ipa)


def _memory_fault(area: memoryview) -> Exit:
    fault = abi.MemoryFault.unpack(area, _UNION)
    return MemoryFault(fault.flags, fault.gpa, fault.size)


_DECODERS: dict[int, Callable[[memoryview], Exit]] = {
    abi.KVM_EXIT_HYPERCALL: _hypercall,
    abi.KVM_EXIT_DEBUG: _debug,
    abi.KVM_EXIT_FAIL_ENTRY: _fail_entry,
    abi.KVM_EXIT_INTR: lambda area: Interrupted(),
    abi.KVM_EXIT_INTERNAL_ERROR: _internal,
    abi.KVM_EXIT_SYSTEM_EVENT: _system_event,
    abi.KVM_EXIT_ARM_NISV: _nisv,
    abi.KVM_EXIT_MEMORY_FAULT: _memory_fault,
}


def decode(area: memoryview, arch: str = "arm64") -> Exit:
    """The exit that a `kvm_run` area describes, on a host of this architecture.

    >>> area = memoryview(bytearray(4096))
    >>> area[8], area[32] = 24, 1
    >>> decode(area)
    SystemEvent(shutdown, data=[])
    """
    reason = area[_REASON]  # its lowest byte: there are far fewer than 256
    # The objects are filled here and not by __init__: after an exit every call is slow.
    if reason == _IO:
        direction, size, port, count, at, raw = _unpack_io(area)
        io = _new(Io)
        io.port = port
        io.size = size
        io.count = count
        io._raw = raw
        io._area = area
        io.is_write = direction == _OUT
        return io if count == 1 and at == _IO_DATA else _string_io(io, at)
    if reason == _MMIO:
        address, raw, size, is_write = _unpack_mmio(area)
        mmio = _new(Mmio)
        mmio.address = address
        mmio.size = size
        mmio.is_write = is_write != 0
        mmio._raw = raw
        mmio._area = area
        return mmio
    return _rarer(_NUMBER.unpack_from(area, _REASON)[0], area, arch)


def _string_io(io: Io, at: int) -> Io:
    size = io.size * io.count
    if at != _IO_DATA:
        raise ValueError(f"kvm_run's io.data_offset is {at:#x}: x86 KVM has {_IO_DATA:#x}")
    io._raw = bytes(io._area[at : at + size])
    return io


def _rarer(reason: int, area: memoryview, arch: str) -> Exit:
    if arch == "x86_64":
        from kvm2.x86_exits import DECODERS

        decoder = DECODERS.get(reason) or _DECODERS.get(reason)
    else:
        decoder = _DECODERS.get(reason)
    return Other(reason, bytes(area[_UNION : _UNION + 256])) if decoder is None else decoder(area)
