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

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvm2.softkvm.stage2_format import CORE_IPA_BITS, LAST_LEVEL, Format, stage2_format
from kvm2.softkvm.stage2_tables import BLOCK, KIND, PAGE, TABLE, Step, Tables

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm2.softkvm.stage2_arena import Table

__all__ = ["DescriptorRecord", "Format", "Leaf", "Stage2", "Stats", "Step", "stage2_format"]

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


@lru_cache(maxsize=4)
def _write_bits(entries: int) -> int:
    # The write permission of every descriptor of a table, as one number.
    return int.from_bytes(S2AP_W.to_bytes(8, "little") * entries, "little")


class Stats(NamedTuple):
    """Tables (the concatenated ones of the start level count once), leaves, and bytes of address space for tables."""

    tables: int
    pages: int
    blocks: int
    reserved: int


class Stage2(Tables):
    """The tables of one VM. Not locked: the VM's lock is held by every caller that changes something."""

    def __init__(self, format: Format, profile: AttributeHost, vmid: int = 1) -> None:
        super().__init__(format)
        self.vmid = vmid & ((1 << profile.vmid_bits) - 1)
        # Grows whenever an entry was removed, redirected or lost a permission: cached translations are then stale.
        self.generation = 0
        self.vtcr, self.core_vtcr = format.vtcr, format.core_vtcr
        self._cnp = CNP if profile.cnp else 0
        memattr = MEMATTR_FWB if profile.fwb else MEMATTR_WB
        self._attributes = AF | memattr | S2AP_R | (0 if format.ds else SH_INNER)

    # -- registers

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
        if hva % self.format.page_size or hva < 0 or hva + size > 1 << CORE_IPA_BITS:
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

    def map_missing(self, ipa: int, hva: int, size: int) -> None:
        """Maps, writable, those granules of [ipa, ipa + size) that are not mapped. All of it in one table."""
        self._check(ipa, size)
        table, shift = self._table_at(ipa, LAST_LEVEL), self.format.page_shift
        first, low = self._index(ipa, LAST_LEVEL), self._attributes | S2AP_W | XN | PAGE
        for at in range(size >> shift):
            if not table.entries[first + at]:
                table.entries[first + at] = hva + (at << shift) | low
                table.used += 1

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

    # -- questions

    def translate(self, ipa: int) -> Leaf | None:
        """The leaf that maps `ipa`; None where a walk would fault."""
        found = self._leaf(ipa)
        if found is None:
            return None
        table, index = found
        descriptor = table.entries[index]
        level = LAST_LEVEL if descriptor & KIND == PAGE else BLOCK_LEVEL
        size = 1 << self.format.shift_at(level)
        offset = ipa & (size - 1)
        hva = (self.format.decode_address(descriptor) & -size) + offset
        return Leaf(hva, ipa - offset, size, level, bool(descriptor & S2AP_W), not descriptor & XN, descriptor)

    def leaves(self) -> Iterator[Leaf]:
        """Every page and block, by ascending IPA."""
        for level, _, ipa, descriptor in self._descriptors():
            if level == LAST_LEVEL or descriptor & KIND == BLOCK:
                leaf = self.translate(ipa)
                if leaf is not None:
                    yield leaf

    def dump(self) -> list[DescriptorRecord]:
        """Every descriptor that is not zero, in the order of a walk and in the form of the recorded dumps: `level`,
        `i`, `ipa`, `desc`, `kind` (table, block or page), for leaves `pa` and `size`."""
        records: list[DescriptorRecord] = []
        for level, index, ipa, descriptor in self._descriptors():
            record: DescriptorRecord = {"level": level, "i": index, "ipa": hex(ipa), "desc": hex(descriptor)}
            if level < LAST_LEVEL and descriptor & KIND == TABLE:
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
            blocks += level < LAST_LEVEL and descriptor & KIND == BLOCK
        return Stats(len(self._tables), pages, blocks, self._arena.reserved)

    # -- inside

    def _check(self, ipa: int, size: int) -> None:
        if self._closed:
            raise ValueError("these stage-2 tables are closed")
        if (ipa | size) % self.format.page_size or ipa < 0 or size < 0 or ipa + size > 1 << self.format.ipa_bits:
            page, bits = self.format.page_size, self.format.ipa_bits
            raise ValueError(f"[{ipa:#x}, {ipa + size:#x}): not multiples of {page:#x}, or beyond {bits} bits of IPA")

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
        if old & KIND == TABLE:
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

    def _unmap(self, table: Table, level: int, start: int, end: int) -> bool:
        removed = False
        size = 1 << self.format.shift_at(level)
        for index, descriptor, low, high in self._entries(table, level, start, end):
            is_table, whole = level < LAST_LEVEL and descriptor & KIND == TABLE, high - low == size
            if not is_table and whole:
                removed = True
            else:
                if is_table:
                    child = self._tables[descriptor & self._address_mask]
                else:
                    child = self._new_child(table, index, level, descriptor)
                if whole and level + 1 == LAST_LEVEL:  # nothing but pages in it: no need to look at each
                    removed = removed or child.used > 0
                else:
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
            raw, bits = table.entries.cast("B"), _write_bits(len(table.entries))
            old = int.from_bytes(raw, "little")
            raw[:] = (old & ~bits).to_bytes(len(raw), "little")
            return bool(old & bits)
        changed = False
        for index, descriptor, low, high in self._entries(table, level, start, end):
            if level < LAST_LEVEL and descriptor & KIND == TABLE:
                child = self._tables[descriptor & self._address_mask]
                changed = self._protect(child, level + 1, low, high) or changed
            elif descriptor & S2AP_W:
                table.entries[index] = descriptor & ~S2AP_W
                changed = True
        return changed
