"""A client's memory as a handful of byte ranges, for clients that are not a process: fuzzers, traces, examples, tests.

Whatever lies outside the ranges is EFAULT, to the byte, and every access is remembered.

>>> image = MemoryImage({0x1000: b"kvm2"})
>>> image.read(0x1000, 4), image.write(0x1003, b"3"), image.read(0x1000, 4)
(b'kvm2', None, b'kvm3')
>>> image.accessible(0x1000, 5, write=False), image.reads
(False, [(4096, 4), (4096, 4)])
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvm2.errors import KvmError
from kvm2.softkvm.memory import ProcessMemory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvm2.handle import Buffer

_OUTER = struct.Struct("=IHHQ")  # struct kvm_create_vm2


class MemoryImage:
    """`ranges` maps addresses to their bytes; addresses in `read_only` (starts of ranges) cannot be written."""

    def __init__(self, ranges: Mapping[int, bytes], read_only: frozenset[int] = frozenset()) -> None:
        self.ranges = {start: bytearray(data) for start, data in ranges.items()}
        self.read_only = read_only
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []

    def _find(self, address: int, size: int) -> int | None:
        for start, data in self.ranges.items():
            if start <= address and address + size <= start + len(data):
                return start
        return None

    def read(self, address: int, size: int) -> bytes:
        """The bytes there; KvmError(EFAULT) where one of them is outside every range."""
        start = self._find(address, size)
        if start is None:
            raise KvmError(errno.EFAULT, f"{size} bytes at {address:#x} cannot be read")
        self.reads.append((address, size))
        return bytes(self.ranges[start][address - start : address - start + size])

    def write(self, address: int, data: bytes) -> None:
        """Writes all bytes or, with KvmError(EFAULT), none."""
        start = self._find(address, len(data))
        if start is None or start in self.read_only:
            raise KvmError(errno.EFAULT, f"{len(data)} bytes at {address:#x} cannot be written")
        self.writes.append((address, len(data)))
        self.ranges[start][address - start : address - start + len(data)] = data

    def accessible(self, address: int, size: int, write: bool) -> bool:
        """Whether all of it lies in one range (that may be written)."""
        start = self._find(address, size)
        return start is not None and not (write and start in self.read_only)


LIST, ARRAY, FIRST, STEP = 0x1000, 0x2000, 0x10000, 0x10000


def list_image(
    *attributes: bytes | None,
    version: int = 0,
    nr_attrs: int | None = None,
    pad: int = 0,
    array: int | None = None,
    terminated: bool = False,
    misaligned: int = 0,
) -> MemoryImage:
    """A struct kvm_create_vm2 at LIST with these raw attributes, each in a range of its own that ends where the
    attribute ends. None is a NULL entry, b"" a pointer to nothing; `nr_attrs` may say something else than is there.

    >>> from kvm2.abi import vm2, wire
    >>> wire.decode(list_image(vm2.DryRun().pack()), LIST).attributes
    (DryRun(type=4, size=8, flags=0),)
    """
    pointers = [0 if data is None else FIRST + STEP * i + misaligned for i, data in enumerate(attributes)]
    ranges = {at: data for at, data in zip(pointers, attributes, strict=True) if data}
    words = pointers + [0] * terminated
    if nr_attrs is None:
        nr_attrs = 0 if terminated else len(pointers)
    if array is None:
        array = ARRAY if words else 0
    ranges[LIST] = _OUTER.pack(version, nr_attrs, pad, array)
    if words:
        ranges[ARRAY] = struct.pack(f"={len(words)}Q", *words)
    return MemoryImage(ranges)


class Fenced:
    """This process's memory, but only where some buffers lie; EFAULT elsewhere.

    For arguments that are wrong on purpose: a pointer that was changed may lead anywhere, and what a host writes there
    (a report that a former test left in freed memory names a place to write to) would damage this process.
    """

    def __init__(self, buffers: list[Buffer]) -> None:
        self.buffers, self._memory = buffers, ProcessMemory()

    def _check(self, address: int, size: int) -> None:
        if not any(one.address <= address and address + size <= one.address + one.size for one in self.buffers):
            raise KvmError(errno.EFAULT, f"{size} bytes at {address:#x} are not the test's")

    def own(self, address: int) -> bytes | None:
        return None

    def read(self, address: int, size: int) -> bytes:
        self._check(address, size)
        return self._memory.read(address, size)

    def write(self, address: int, data: bytes) -> None:
        self._check(address, len(data))
        self._memory.write(address, data)

    def accessible(self, address: int, size: int, write: bool) -> bool:
        return self._memory.accessible(address, size, write)
