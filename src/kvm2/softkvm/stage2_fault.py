"""Which page or block a stage-2 fault maps, after `user_mem_abort()` of arch/arm64/kvm/mmu.c."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from kvm2.softkvm.memslots import Slot
    from kvm2.softkvm.stage2 import Stage2
    from kvm2.softkvm.stage2_format import Format


class LeafRange(NamedTuple):
    """What a leaf translates: `size` bytes from `ipa` to `hva`."""

    ipa: int
    hva: int
    size: int


def leaf_range(format: Format, slot: Slot, ipa: int, blocks: bool) -> LeafRange:
    """The leaf for a fault at `ipa` in `slot`: a block where the caller allows it (the memory is one huge page) and
    `fault_supports_stage2_huge_mapping()` does (both addresses agree within a block, and the block lies in the slot);
    a page otherwise, and always where writes are logged.

    >>> from kvm2.softkvm.memslots import Slot
    >>> from types import SimpleNamespace
    >>> format = SimpleNamespace(page_size=4096, block_size=1 << 21)
    >>> slot = Slot(0, 0, 0x80000000, 0x400000, 0x7F0000000000)
    >>> leaf_range(format, slot, 0x80005008, True).size, leaf_range(format, slot, 0x80005008, False).size
    (2097152, 4096)
    """
    to_hva = slot.userspace_addr - slot.guest_phys_addr
    block = format.block_size
    start = ipa & -block
    inside = slot.guest_phys_addr <= start and start + block <= slot.end
    if blocks and inside and not to_hva % block and not slot.logging:
        return LeafRange(start, start + to_hva, block)
    start = ipa & -format.page_size
    return LeafRange(start, start + to_hva, format.page_size)


def map_leaf(stage2: Stage2, slot: Slot, ipa: int, *, writable: bool, execute: bool, blocks: bool) -> LeafRange:
    """Maps the leaf for a fault at `ipa`. What was executable stays so; `writable` is what the memory, the slot and its
    dirty log allow. Marking the leaf's pages dirty is the caller's."""
    leaf = leaf_range(stage2.format, slot, ipa, blocks)
    old = stage2.translate(ipa)
    executable = execute or (old is not None and old.executable)
    stage2.map(leaf.ipa, leaf.hva, leaf.size, writable=writable, executable=executable)
    return leaf
