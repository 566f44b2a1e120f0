"""The tree of translation tables behind `Stage2`: where tables lie, how they hang together, how they are walked.

Tables appear when something is put into them and go when they are empty; the first ones (concatenated at the start
level) stay until the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvm2.softkvm.stage2_arena import Arena, Table
from kvm2.softkvm.stage2_format import CORE_IPA_BITS, LAST_LEVEL, Format

if TYPE_CHECKING:
    from collections.abc import Iterator

# The two low bits of a descriptor: a block (levels 1 and 2), a table, or, at level 3, a page.
VALID, BLOCK, TABLE, PAGE = 1, 1, 3, 3
KIND = 3


class Step(NamedTuple):
    """One level of a walk: the address of the table, the index `i` in it, the descriptor found there."""

    level: int
    table: int
    i: int
    descriptor: int


class Tables:
    """The tables of one VM: a tree of `Table`, found again by address."""

    def __init__(self, format: Format) -> None:
        self.format = format
        self._arena = Arena(format.page_size)
        self._tables: dict[int, Table] = {}
        self._root: Table | None = None
        self._core_pair: list[Table] = []
        self._index_mask = (1 << format.stride) - 1
        self._address_mask = (1 << CORE_IPA_BITS) - format.page_size
        self._closed = False

    @property
    def base(self) -> int:
        """Address of the table of the start level, made on first use, aligned to its size."""
        return self._make_root().address

    def walk(self, ipa: int) -> list[Step]:
        """The descriptors that a table walk for `ipa` reads, in order; empty beyond the IPA space."""
        steps: list[Step] = []
        table = self._root
        if table is None or ipa < 0 or ipa >> self.format.ipa_bits:
            return steps
        for level in range(self.format.start_level, LAST_LEVEL + 1):
            index = self._index(ipa, level)
            descriptor = table.entries[index]
            steps.append(Step(level, table.address, index, descriptor))
            if descriptor & KIND != TABLE or level == LAST_LEVEL:
                break
            table = self._tables[descriptor & self._address_mask]
        return steps

    def close(self) -> None:
        """Frees the tables. No core may run on them any more. May be called again."""
        self._closed = True
        self._root, self._core_pair = None, []
        self._tables.clear()
        self._arena.close()

    def _make_root(self) -> Table:
        if self._root is None:
            if self._closed:
                raise ValueError("these stage-2 tables are closed")
            self._root = self._arena.tables(1, self.format.pgd_pages * self.format.page_size)[0]
            self._tables[self._root.address] = self._root
            if self.format.core_start_level > self.format.start_level:
                # 16K pages, 52 bits: the core's 48-bit walk starts one level lower, with the tables of the first two
                # entries of level 0 as a concatenated pair. So these two lie side by side, always.
                self._core_pair = self._arena.tables(2, self.format.page_size)
                self._tables |= {table.address: table for table in self._core_pair}
        return self._root

    def _index(self, ipa: int, level: int) -> int:
        index = ipa >> self.format.shift_at(level)
        return index if level == self.format.start_level else index & self._index_mask

    def _leaf(self, ipa: int) -> tuple[Table, int] | None:
        table = self._root
        if table is None or ipa < 0 or ipa >> self.format.ipa_bits:
            return None
        for level in range(self.format.start_level, LAST_LEVEL + 1):
            index = self._index(ipa, level)
            descriptor = table.entries[index]
            if not descriptor & VALID:
                return None
            if level == LAST_LEVEL or descriptor & KIND == BLOCK:
                return table, index
            table = self._tables[descriptor & self._address_mask]
        return None

    def _table_at(self, ipa: int, last: int) -> Table:
        # The table of level `last` that resolves `ipa`, made where it is missing; a block in the way is split.
        table = self._make_root()
        for level in range(self.format.start_level, last):
            index = self._index(ipa, level)
            descriptor = table.entries[index]
            if descriptor & KIND == TABLE:
                table = self._tables[descriptor & self._address_mask]
            else:
                table = self._new_child(table, index, level, descriptor)
        return table

    def _new_child(self, table: Table, index: int, level: int, block: int) -> Table:
        if self._core_pair and table is self._root and index < 2:
            child = self._core_pair[index]
        else:
            child = self._arena.table()
            self._tables[child.address] = child
        if block:  # pages that translate as the block did, so nothing that is cached becomes wrong
            page, first = self.format.page_size, block | PAGE
            for i in range(1 << self.format.stride):
                child.entries[i] = first + i * page
            child.used = 1 << self.format.stride
        else:
            table.used += 1
        table.entries[index] = child.address | TABLE
        return child

    def _drop_child(self, child: Table) -> None:
        if child in self._core_pair:
            child.entries.cast("B")[:] = bytes(self.format.page_size)
            child.used = 0
        else:
            del self._tables[child.address]
            self._arena.give_back(child)

    def _entries(self, table: Table, level: int, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        # (index, descriptor, first and last + 1 of [start, end) in the entry) of the entries in use that it meets.
        shift = self.format.shift_at(level)
        first, seen, used = self._index(start, level), 0, table.used
        base = start >> shift << shift
        for index in range(first, first + ((end - 1) >> shift) - (start >> shift) + 1):
            if seen == used:
                return
            descriptor = table.entries[index]
            if descriptor:
                seen += 1
                entry = base + ((index - first) << shift)
                yield index, descriptor, max(start, entry), min(end, entry + (1 << shift))

    def _descriptors(self) -> Iterator[tuple[int, int, int, int]]:
        if self._root is not None:
            yield from self._descend(self._root, self.format.start_level, 0)

    def _descend(self, table: Table, level: int, base: int) -> Iterator[tuple[int, int, int, int]]:
        shift = self.format.shift_at(level)
        span = self.format.entries if level == self.format.start_level else 1 << self.format.stride
        for index, descriptor, ipa, _ in self._entries(table, level, base, base + (span << shift)):
            yield level, index, ipa, descriptor
            if level < LAST_LEVEL and descriptor & KIND == TABLE:
                yield from self._descend(self._tables[descriptor & self._address_mask], level + 1, ipa)
