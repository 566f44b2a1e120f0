"""Memory for page tables: anonymous pages of this process, in which the emulated core finds its tables by address.

Python sees a table as a `memoryview` of 64-bit entries, the core as physical memory: for it, an address of this process
is a physical address. Pages cost memory only once an entry is written.
"""

from __future__ import annotations

import ctypes
import mmap

# Chunks grow from 16 tables to this size: small VMs stay small, and no chunk is large enough for a huge page, which the
# first entry written into it would make resident as a whole.
MAX_CHUNK = 1 << 20
FIRST_TABLES = 16


class Table:
    """A translation table: `entries` are its descriptors, `used` of them are not zero."""

    __slots__ = ("address", "entries", "used")

    def __init__(self, address: int, entries: memoryview[int]) -> None:
        self.address = address
        self.entries = entries
        self.used = 0


class Arena:
    """Allocates zeroed tables and takes them back. Nothing is mapped before the first allocation."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._chunks: list[tuple[mmap.mmap, memoryview]] = []
        self._chunk_address = 0
        self._next = self._end = 0
        self._chunk_size = min(FIRST_TABLES * page_size, MAX_CHUNK)
        self._free: list[Table] = []
        self._tables: list[Table] = []

    @property
    def reserved(self) -> int:
        """Bytes of address space that are mapped."""
        return sum(len(chunk) for chunk, _ in self._chunks)

    def table(self) -> Table:
        """A zeroed table of one page."""
        if self._free:
            return self._free.pop()
        return self.tables(1, self.page_size)[0]

    def tables(self, count: int, size: int) -> list[Table]:
        """`count` adjacent zeroed tables of `size` bytes each, the first aligned to the size of all."""
        total = count * size
        address = -(-self._next // total) * total
        if address + total > self._end:
            self._grow(total)
            address = -(-self._next // total) * total
        self._next = address + total
        view = self._chunks[-1][1]
        offset = address - self._chunk_address
        made = []
        for at in range(offset, offset + total, size):
            entries = view[at : at + size].cast("Q")
            made.append(Table(self._chunk_address + at, entries))
        self._tables += made
        return made

    def give_back(self, table: Table) -> None:
        """Takes a table of one page back, whatever is in it."""
        table.entries.cast("B")[:] = bytes(self.page_size)
        table.used = 0
        self._free.append(table)

    def close(self) -> None:
        """Unmaps everything; no table may be used (by the core either) from here on. May be called again."""
        for table in self._tables:
            table.entries.release()
        self._tables, self._free = [], []
        for chunk, view in self._chunks:
            view.release()
            chunk.close()
        self._chunks, self._next, self._end = [], 0, 0

    def _grow(self, total: int) -> None:
        # Twice the size of what is asked: the alignment may eat up to one of them.
        size = max(self._chunk_size, 2 * total)
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        chunk = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._chunk_address = ctypes.addressof(ctypes.c_char.from_buffer(chunk))
        self._chunks.append((chunk, memoryview(chunk)))
        self._next, self._end = self._chunk_address, self._chunk_address + size
        self._chunk_size = min(2 * self._chunk_size, MAX_CHUNK)
