"""How handles make the calls that only an x86-64 KVM has: by name, with the structure of the registry."""

from __future__ import annotations

import errno
from functools import cache
from typing import TYPE_CHECKING, Any

from kvm2.abi import ioctls
from kvm2.abi.layout import Scalar, Structure, extent
from kvm2.errors import KvmError, UsageError
from kvm2.handle import Buffer, Handle, checked_word, packed
from kvm2.names import listed

if TYPE_CHECKING:
    from collections.abc import Sequence

# KVM_MAX_CPUID_ENTRIES, and room enough for every list of MSRs of today; a list that needs more gets it.
FIRST_ROOM = 256
MOST_ROOM = 1 << 16


@cache
def row_of(call: str) -> ioctls.Ioctl:
    """The declaration of a call on x86-64."""
    return ioctls.named(call, "x86_64")[0]


class X86Calls(Handle):
    """The base of the x86-64 part of a handle."""

    def _x86_call(self, call: str, arg: int | Buffer = 0) -> int:
        self._only_on("x86_64", call)
        return self.ioctl(row_of(call).number, arg)

    def _x86_get(self, call: str, start: Structure | None = None) -> Any:
        """A call that fills its structure, from zeros or from `start`."""
        self._only_on("x86_64", call)
        row = row_of(call)
        return self.exchange(row.number, _kind(row)() if start is None else start)

    def _x86_set(self, call: str, value: Structure) -> None:
        self._only_on("x86_64", call)
        row = row_of(call)
        kind = _kind(row)
        if type(value) is not kind:
            raise UsageError(f"{call} takes a {kind.__module__}.{kind.__name__}, not {value!r}")
        self.ioctl(row.number, value)

    def _x86_word(self, call: str, value: int) -> None:
        """A call whose argument points to one number."""
        self._only_on("x86_64", call)
        row = row_of(call)
        size = extent(row.payload)[0]
        self.ioctl(row.number, Buffer(checked_word(call, value, 8 * size).to_bytes(size, "little")))

    def _x86_list(self, call: str) -> tuple[Any, ...]:
        """A call that fills a head and as many items as there are; asked again with more room after E2BIG."""
        self._only_on("x86_64", call)
        row, room = row_of(call), FIRST_ROOM
        head, size = _kind(row), extent(row.tail)[0]
        while True:
            data = Buffer(head(room).pack() + bytes(room * size))
            try:
                self.ioctl(row.number, data)
            except KvmError as error:
                if error.errno != errno.E2BIG or room >= MOST_ROOM:
                    raise
                room = max(2 * room, _count(data.bytes()))
                continue
            return _items(row, data.bytes())

    def _x86_send_list(self, call: str, items: Sequence[Structure]) -> tuple[int, bytes]:
        """A call with a head and these items: (what it returned, the bytes as the host left them)."""
        self._only_on("x86_64", call)
        row, items = row_of(call), listed(items, "entries")
        for item in items:
            if type(item) is not row.tail:
                raise UsageError(f"{call} takes objects of {getattr(row.tail, '__qualname__', row.tail)}, not {item!r}")
        data = Buffer(_kind(row)(len(items)).pack() + b"".join(packed(item).bytes() for item in items))
        return self.ioctl(row.number, data), data.bytes()


def _kind(row: ioctls.Ioctl) -> Any:
    if not isinstance(row.payload, type):
        raise TypeError(f"{row.name} has no structure")
    return row.payload


def _count(data: bytes) -> int:
    return int.from_bytes(data[:4], "little")


def _items(row: ioctls.Ioctl, data: bytes) -> tuple[Any, ...]:
    tail, start = row.tail, _kind(row).SIZE
    size = extent(tail)[0]
    places = range(start, start + _count(data) * size, size)
    if isinstance(tail, Scalar):
        return tuple(int.from_bytes(data[at : at + size], "little") for at in places)
    assert isinstance(tail, type)
    return tuple(tail.unpack(data, at) for at in places)
