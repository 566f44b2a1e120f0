"""The dirty bitmap of a memory slot: one bit for each page of the host, in whole 64-bit words."""

from __future__ import annotations

import re

WORD_BITS = 64

_NOT_ZERO = re.compile(rb"[^\0]+")


def bitmap_bytes(npages: int) -> int:
    """Bytes of the bitmap of `npages` pages (`kvm_dirty_bitmap_bytes()`).

    >>> bitmap_bytes(1), bitmap_bytes(64), bitmap_bytes(70)
    (8, 8, 16)
    """
    return -(-npages // WORD_BITS) * (WORD_BITS // 8)


def spans(bitmap: bytes) -> list[tuple[int, int]]:
    """(first page, pages) of each run of bytes with a bit in it, from its first to its last set bit.

    Pages between whose bit is clear are included, as in the kernel (`kvm_arch_mmu_enable_log_dirty_pt_masked()`): to
    protect a page again that is clean already changes nothing.

    >>> spans(bytes([0b00101000, 0, 0b1, 0b10000000]))
    [(3, 3), (16, 16)]
    """
    found = []
    for run in _NOT_ZERO.finditer(bitmap):
        first, last = bitmap[run.start()], bitmap[run.end() - 1]
        start = run.start() * 8 + (first & -first).bit_length() - 1
        end = (run.end() - 1) * 8 + last.bit_length()
        found.append((start, end - start))
    return found


class DirtyBitmap:
    """The bits of `npages` pages, all clear or (`KVM_DIRTY_LOG_INITIALLY_SET`) all set."""

    def __init__(self, npages: int, initially_set: bool = False) -> None:
        self.npages = npages
        self._bits = bytearray(bitmap_bytes(npages))
        if initially_set:
            self._bits[: npages // 8] = b"\xff" * (npages // 8)
            if npages % 8:
                self._bits[npages // 8] = (1 << npages % 8) - 1

    def set(self, first: int, count: int = 1) -> None:
        """Marks pages [first, first + count); those beyond the slot are left out."""
        bits = self._bits
        for page in range(first, min(first + count, self.npages)):
            bits[page >> 3] |= 1 << (page & 7)

    def snapshot(self) -> bytes:
        """The bitmap as userspace gets it."""
        return bytes(self._bits)

    def take(self) -> bytes:
        """The bitmap, which is clear afterwards."""
        taken = bytes(self._bits)
        if any(_NOT_ZERO.finditer(taken)):
            self._bits = bytearray(len(taken))
        return taken

    def clear(self, first: int, mask: bytes) -> list[tuple[int, int]]:
        """Clears the bits that `mask` has set, from page `first` (a multiple of 64); spans of those that were set."""
        start = first // 8
        part = self._bits[start : start + len(mask)]
        now, wanted = int.from_bytes(part, "little"), int.from_bytes(mask[: len(part)], "little")
        cleared = now & wanted
        if not cleared:
            return []
        self._bits[start : start + len(part)] = (now ^ cleared).to_bytes(len(part), "little")
        return [(first + page, count) for page, count in spans(cleared.to_bytes(len(part), "little"))]
