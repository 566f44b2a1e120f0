"""Stage-2 translation tables of a VM: real descriptors in memory of this process, read by the emulated core itself.

**An emulated physical address is an address of this process**: a leaf holds the address of the memory slot's bytes
(HVA), VTTBR_EL2 that of the first table. Tables appear with the first mapping and go when they are empty.

Leaves have the attributes that the kernel gives them (`stage2_set_prot_attr()`): normal write-back memory, AF set,
readable, execute-never until asked otherwise. With LPA2 (VTCR_EL2.DS) bits 9:8 are address bits 51:50, which are zero
here; the core reads them as "non-shareable", so that the same tables serve both. Of a VM with more than 48 bits of IPA
the core walks the first 2^48 bytes by `core_vttbr`; the rest is answered by `Stage2.translate`.

>>> from types import SimpleNamespace
>>> host = SimpleNamespace(page_shift=12, parange=5, lpa2=False, vmid_bits=16, fwb=True, cnp=True)
>>> stage2 = Stage2(stage2_format(host, 40), host, vmid=1)
>>> stage2.map(0x40000000, 0x7F0000000000, 4096, writable=True)
>>> leaf = stage2.translate(0x40000123)
>>> hex(leaf.hva), leaf.writable, leaf.executable, hex(leaf.descriptor)
('0x7f0000000123', True, False, '0x407f00000007db')
>>> stage2.close()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvm2.softkvm.stage2_arena import Arena, Table
from kvm2.softkvm.stage2_format import CORE_IPA_BITS, LAST_LEVEL, Format, stage2_format

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DescriptorRecord", "Format", "Leaf", "Stage2", "Stats", "Step", "stage2_format"]

VALID, TABLE, PAGE = 1, 3, 3
BLOCK = 1
AF = 1 << 10
SH_INNER = 3 << 8
S2AP_R, S2AP_W = 1 << 6, 1 << 7
XN = 1 << 54
MEMATTR_FWB, MEMATTR_WB = 0b0110 << 2, 0b1111 << 2
VMID_SHIFT, CNP = 48, 1
BLOCK_LEVEL = 2

DescriptorRecord = dict[str, int | str]


class AttributeHost(Protocol):
    """What leaves and VTTBR_EL2 take from a described host."""

    @property
    def fwb(self) -> bool: ...
    @property
    def cnp(self) -> bool: ...
    @property
    def vmid_bits(self) -> int: ...


class Leaf(NamedTuple):
    """A translation: the host address of the IPA that was asked for, and the page or block that says so."""

    hva: int
    ipa: int
    size: int
    level: int
    writable: bool
    executable: bool
    descriptor: int


class Step(NamedTuple):
    """One level of a walk: the address of the table, the index in it, the descriptor found there."""

    level: int
    table: int
    index: int
    descriptor: int


class Stats(NamedTuple):
    """Tables (the concatenated ones of the start level count once), leaves, and bytes of address space for tables."""

    tables: int
    pages: int
    blocks: int
    reserved: int


class Stage2:
    """The tables of one VM. Not locked: the VM's lock is held by every caller that changes something."""

    def __init__(self, format: Format, profile: AttributeHost, vmid: int = 1) -> None:
        self.format = format
        self.vmid = vmid & ((1 << profile.vmid_bits) - 1)
        # Grows whenever an entry was removed, redirected or lost a permission: cached translations are then stale.
        self.generation = 0
        self.vtcr, self.core_vtcr = format.vtcr, format.core_vtcr
        self._cnp = CNP if profile.cnp else 0
        memattr = MEMATTR_FWB if profile.fwb else MEMATTR_WB
        self._attributes = AF | memattr | S2AP_R | (0 if format.ds else SH_INNER)
        self._arena = Arena(format.page_size)
        self._tables: dict[int, Table] = {}
        self._root: Table | None = None
        self._core_pair: list[Table] = []
        self._index_mask = (1 << format.stride) - 1
        self._address_mask = (1 << CORE_IPA_BITS) - format.page_size
        entries = 1 << format.stride
        self._writable_bits = int.from_bytes(S2AP_W.to_bytes(8, "little") * entries, "little")
        self._closed = False

    # -- registers

    @property
    def base(self) -> int:
        """Address of the table of the start level, made on first use, aligned to its size."""
        return self._make_root().address

    @property
    def vttbr(self) -> int:
        """VTTBR_EL2 as the host would hold it: VMID, base, CnP (`kvm_get_vttbr()`)."""
        return self._vttbr(self.base)

    @property
    def core_vttbr(self) -> int:
        """VTTBR_EL2 for the emulated core, which goes with `core_vtcr`."""
        base = self.base
        return self._vttbr(self._core_pair[0].address if self._core_pair else base)

    def _vttbr(self, base: int) -> int:
        return self.vmid << VMID_SHIFT | base | base >> 46 & 0b111100 | self._cnp

    # -- changes

    def map(
        self, ipa: int, hva: int, size: int, *, writable: bool, executable: bool = False, blocks: bool = True
    ) -> None:
        """Maps [ipa, ipa + size) to [hva, hva + size), replacing what was there.

        All three are multiples of the granule (ValueError). Wherever both addresses are aligned to a block and a whole
        block is left, a block is used, unless `blocks` is false.
        """
        self._check(ipa, size)
        if hva % self.format.page_size or hva < 0 or (hva + size) >> CORE_IPA_BITS:
            raise ValueError(f"hva {hva:#x}: not a multiple of the granule, or above 48 bits")
        low = self._attributes | (S2AP_W if writable else 0) | (0 if executable else XN)
        block, end, to_hva = self.format.block_size, ipa + size, hva - ipa
        while ipa < end:
            if blocks and not (ipa | ipa + to_hva) % block and end - ipa >= block:
                self._map_block(ipa, ipa + to_hva | low | BLOCK)
                ipa += block
            else:
                stop = min(end, (ipa // block + 1) * block)
                self._map_pages(ipa, stop, ipa + to_hva | low | PAGE)
                ipa = stop

    def relax(self, ipa: int, *, writable: bool = False, executable: bool = False) -> bool:
        """Adds permissions to the leaf at `ipa` (`kvm_pgtable_stage2_relax_perms()`); False where there is none."""
        found = self._leaf(ipa)
        if found is None:
            return False
        table, index = found
        table.entries[index] = (table.entries[index] | (S2AP_W if writable else 0)) & ~(XN if executable else 0)
        return True

    def unmap(self, ipa: int, size: int) -> None:
        """Removes every mapping in [ipa, ipa + size), splitting blocks that reach beyond it."""
        self._check(ipa, size)
        if self._root is not None and size and self._unmap(self._root, self.format.start_level, ipa, ipa + size):
            self.generation += 1

    def write_protect(self, ipa: int, size: int) -> None:
        """Takes the write permission from every leaf that meets [ipa, ipa + size) (`kvm_stage2_wp_range()`): a block
        as a whole, as it is split only when it is next written."""
        self._check(ipa, size)
        if self._root is not None and size and self._protect(self._root, self.format.start_level, ipa, ipa + size):
            self.generation += 1

    def close(self) -> None:
        """Frees the tables. No core may run on them any more. May be called again."""
        self._closed = True
        self._root, self._core_pair = None, []
        self._tables.clear()
        self._arena.close()

    # -- questions

    def walk(self, ipa: int) -> list[Step]:
        """The descriptors that a table walk for `ipa` reads, in order; empty beyond the IPA space."""
        steps: list[Step] = []
        table = self._root
        if ipa < 0 or ipa >> self.format.ipa_bits:
            return steps
        for level in range(self.format.start_level, LAST_LEVEL + 1):
            if table is None:
                break
            index = self._index(ipa, level)
            descriptor = table.entries[index]
            steps.append(Step(level, table.address, index, descriptor))
            if descriptor & TABLE != TABLE or level == LAST_LEVEL:
                break
            table = self._tables[descriptor & self._address_mask]
        return steps

    def translate(self, ipa: int) -> Leaf | None:
        """The leaf that maps `ipa`; None where a walk would fault."""
        found = self._leaf(ipa)
        if found is None:
            return None
        table, index = found
        descriptor = table.entries[index]
        level = LAST_LEVEL if descriptor & TABLE == PAGE else BLOCK_LEVEL
        size = 1 << self.format.shift_at(level)
        offset = ipa & (size - 1)
        hva = (self.format.decode_address(descriptor) & -size) + offset
        return Leaf(hva, ipa - offset, size, level, bool(descriptor & S2AP_W), not descriptor & XN, descriptor)

    def leaves(self) -> Iterator[Leaf]:
        """Every page and block, by ascending IPA."""
        for level, _, ipa, descriptor in self._descriptors():
            if level == LAST_LEVEL or descriptor & TABLE == BLOCK:
                leaf = self.translate(ipa)
                if leaf is not None:
                    yield leaf

    def dump(self) -> list[DescriptorRecord]:
        """Every descriptor that is not zero, in the order of a walk and in the form of the recorded dumps: `level`,
        `i`, `ipa`, `desc`, `kind` (table, block or page), for leaves `pa` and `size`."""
        records: list[DescriptorRecord] = []
        for level, index, ipa, descriptor in self._descriptors():
            record: DescriptorRecord = {"level": level, "i": index, "ipa": hex(ipa), "desc": hex(descriptor)}
            if level < LAST_LEVEL and descriptor & TABLE == TABLE:
                record["kind"] = "table"
            else:
                size = 1 << self.format.shift_at(level)
                record["kind"] = "page" if level == LAST_LEVEL else "block"
                record |= {"pa": hex(self.format.decode_address(descriptor) & -size), "size": size}
            records.append(record)
        return records

    def stats(self) -> Stats:
        """Counts tables and leaves."""
        pages = blocks = 0
        for level, _, _, descriptor in self._descriptors():
            pages += level == LAST_LEVEL
            blocks += level < LAST_LEVEL and descriptor & TABLE == BLOCK
        return Stats(len(self._tables), pages, blocks, self._arena.reserved)

    # -- inside

    def _check(self, ipa: int, size: int) -> None:
        if self._closed:
            raise ValueError("these stage-2 tables are closed")
        if (ipa | size) % self.format.page_size or ipa < 0 or size < 0 or ipa + size > 1 << self.format.ipa_bits:
            page, bits = self.format.page_size, self.format.ipa_bits
            raise ValueError(f"[{ipa:#x}, {ipa + size:#x}): not multiples of {page:#x}, or beyond {bits} bits of IPA")

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
            if level == LAST_LEVEL or descriptor & TABLE == BLOCK:
                return table, index
            table = self._tables[descriptor & self._address_mask]
        return None

    def _table_at(self, ipa: int, last: int) -> Table:
        # The table of level `last` that resolves `ipa`, made where it is missing; a block in the way is split.
        table = self._make_root()
        for level in range(self.format.start_level, last):
            index = self._index(ipa, level)
            descriptor = table.entries[index]
            if descriptor & TABLE == TABLE:
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

    def _map_pages(self, ipa: int, stop: int, descriptor: int) -> None:
        page = self.format.page_size
        table = self._table_at(ipa, LAST_LEVEL)
        first = self._index(ipa, LAST_LEVEL)
        for index in range(first, first + ((stop - ipa) >> self.format.page_shift)):
            self._set(table, index, descriptor)
            descriptor += page

    def _map_block(self, ipa: int, descriptor: int) -> None:
        table, index = self._table_at(ipa, BLOCK_LEVEL), self._index(ipa, BLOCK_LEVEL)
        old = table.entries[index]
        if old & TABLE == TABLE:
            child = self._tables[old & self._address_mask]
            if child.used:
                self.generation += 1
            table.entries[index] = 0
            table.used -= 1
            self._drop_child(child)
        self._set(table, index, descriptor)

    def _set(self, table: Table, index: int, new: int) -> None:
        old = table.entries[index]
        table.entries[index] = new
        if not old:
            table.used += 1
        # Stale: another address or attribute, the write permission gone, execute-never come.
        elif (old ^ new) & ~(S2AP_W | XN) or old & ~new & S2AP_W or new & ~old & XN:
            self.generation += 1

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

    def _unmap(self, table: Table, level: int, start: int, end: int) -> bool:
        removed = False
        size = 1 << self.format.shift_at(level)
        for index, descriptor, low, high in self._entries(table, level, start, end):
            is_table = level < LAST_LEVEL and descriptor & TABLE == TABLE
            if not is_table and high - low == size:
                removed = True
            else:
                if is_table:
                    child = self._tables[descriptor & self._address_mask]
                else:
                    child = self._new_child(table, index, level, descriptor)
                removed = self._unmap(child, level + 1, low, high) or removed
                if child.used:
                    continue
                self._drop_child(child)
            table.entries[index] = 0
            table.used -= 1
        return removed

    def _protect(self, table: Table, level: int, start: int, end: int) -> bool:
        if level == LAST_LEVEL and level > self.format.start_level and end - start == 1 << self.format.shift_at(2):
            # A whole table of leaves at once: an entry that is zero stays zero.
            raw = table.entries.cast("B")
            old = int.from_bytes(raw, "little")
            raw[:] = (old & ~self._writable_bits).to_bytes(len(raw), "little")
            return bool(old & self._writable_bits)
        changed = False
        for index, descriptor, low, high in self._entries(table, level, start, end):
            if level < LAST_LEVEL and descriptor & TABLE == TABLE:
                child = self._tables[descriptor & self._address_mask]
                changed = self._protect(child, level + 1, low, high) or changed
            elif descriptor & S2AP_W:
                table.entries[index] = descriptor & ~S2AP_W
                changed = True
        return changed

    def _descriptors(self) -> Iterator[tuple[int, int, int, int]]:
        if self._root is not None:
            yield from self._descend(self._root, self.format.start_level, 0)

    def _descend(self, table: Table, level: int, base: int) -> Iterator[tuple[int, int, int, int]]:
        shift = self.format.shift_at(level)
        span = self.format.entries if level == self.format.start_level else 1 << self.format.stride
        for index, descriptor, ipa, _ in self._entries(table, level, base, base + (span << shift)):
            yield level, index, ipa, descriptor
            if level < LAST_LEVEL and descriptor & TABLE == TABLE:
                yield from self._descend(self._tables[descriptor & self._address_mask], level + 1, ipa)
