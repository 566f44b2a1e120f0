"""Memory slots: which part of the guest's physical memory lies where in the client, and which pages it wrote.

After `__kvm_set_memory_region()` and the dirty-log functions of virt/kvm/kvm_main.c, check by check in their order, and
`kvm_arch_prepare_memory_region()` of arch/arm64/kvm/mmu.c. What a change means for the stage-2 tables is returned, not
done: `Change.unmap` and `Change.protect` are ranges of IPA.

>>> from types import SimpleNamespace as N
>>> slots = MemSlots(N(page_shift=12, nr_memslots=32767, quirks=frozenset()), ipa_bits=36)
>>> ram = dict(flags=0, memory_size=0x2000, userspace_addr=0x7F0000000000)
>>> slots.set(N(slot=0, guest_phys_addr=0x40000000, **ram)).kind
'create'
>>> slots.find(0x40001).userspace_addr == 0x7F0000000000, slots.find(0x40002)
(True, None)
>>> slots.set(N(slot=1, guest_phys_addr=0xFFFFFF000, **ram))  # doctest: +ELLIPSIS
Traceback (most recent call last):
kvm2.errors.KvmError: EFAULT: slot 1 ends at 0x1000001000, this VM's IPA space of 36 bits at 0x1000000000: ...
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvm2.abi.structs import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from kvm2.errors import KvmError
from kvm2.softkvm.dirty import WORD_BITS, DirtyBitmap, bitmap_bytes, spans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvm2.softkvm.stage2 import Stage2

VALID_FLAGS = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY

KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1

KVM_MEM_MAX_NR_PAGES = (1 << 31) - 1
U64 = 1 << 64


class SlotHost(Protocol):
    """What slots take from a described host (`softkvm.profile.Profile`)."""

    @property
    def page_shift(self) -> int: ...
    @property
    def nr_memslots(self) -> int: ...
    @property
    def quirks(self) -> frozenset[str]: ...


class Region(Protocol):
    """`struct kvm_userspace_memory_region`, and the fields that `..._region2` has in common with it."""

    @property
    def slot(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def guest_phys_addr(self) -> int: ...
    @property
    def memory_size(self) -> int: ...
    @property
    def userspace_addr(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot in force. Addresses and sizes are in bytes; `userspace_addr` is an address of the client."""

    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int

    @property
    def end(self) -> int:
        """The first guest physical address behind it."""
        return self.guest_phys_addr + self.memory_size

    @property
    def readonly(self) -> bool:
        """Writes of the guest leave as MMIO."""
        return bool(self.flags & KVM_MEM_READONLY)

    @property
    def logging(self) -> bool:
        """Writes of the guest are logged: pages start write-protected, and blocks are not used."""
        return bool(self.flags & KVM_MEM_LOG_DIRTY_PAGES)


Range = tuple[int, int]


class Change(NamedTuple):
    """What a call does: "none", "create", "delete", "move" or "flags", the slot before and after it, and the ranges
    (IPA, size) that the stage-2 tables must lose, or lose the write permission of."""

    kind: str
    old: Slot | None
    new: Slot | None
    unmap: tuple[Range, ...] = ()
    protect: tuple[Range, ...] = ()

    @property
    def slot(self) -> int:
        """The id."""
        slot = self.new or self.old
        return -1 if slot is None else slot.slot


class DirtyPages(NamedTuple):
    """The answer of KVM_GET_DIRTY_LOG: the bitmap for userspace, and the ranges (IPA, size) to write-protect again."""

    bitmap: bytes
    protect: tuple[Range, ...]


def _va_bits(host: SlotHost) -> int:
    # Where a process ends (TASK_SIZE_MAX): a kernel is built for 52-bit virtual addresses wherever it can be, which
    # with 4K and 16K pages takes the release that brought LPA2 (arch/arm64/Kconfig, ARM64_VA_BITS_52).
    return 48 if "no-lpa2" in host.quirks and host.page_shift != 16 else 52


class MemSlots:
    """The slots of one VM. Not locked: callers hold the VM's lock.

    `ipa_bits` is the VM's IPA space. `granule` is the page shift of its stage-2 tables where it is not the host's:
    everything in a slot is a multiple of the larger of both.
    """

    def __init__(self, profile: SlotHost, ipa_bits: int, granule: int | None = None) -> None:
        self.page_shift = profile.page_shift
        self.ipa_bits = ipa_bits
        self.nr_memslots = profile.nr_memslots
        self.va_limit = 1 << _va_bits(profile)
        self.alignment = 1 << max(self.page_shift, granule or 0)
        self.manual_protect = 0
        # By id, and by address, in one order: first pages (to search), pages behind the last, slots.
        self._by_id: dict[int, Slot] = {}
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._order: list[Slot] = []
        self._dirty: dict[int, DirtyBitmap] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Slot]:
        """Every slot, by ascending address."""
        return iter(tuple(self._order))

    @property
    def end(self) -> int:
        """The first guest physical address behind every slot."""
        return self._order[-1].end if self._order else 0

    def get(self, slot: int) -> Slot | None:
        """The slot of that id."""
        return self._by_id.get(slot)

    def find(self, gfn: int) -> Slot | None:
        """The slot that has the guest's page `gfn` (address >> host page shift)."""
        at = bisect_right(self._starts, gfn) - 1
        if at < 0:
            return None
        return self._order[at] if gfn < self._ends[at] else None

    # -- KVM_SET_USER_MEMORY_REGION, KVM_SET_USER_MEMORY_REGION2

    def set(self, region: Region) -> Change:
        """`plan` and `commit`: creates, moves, changes or (size 0) deletes a slot."""
        change = self.plan(region)
        self.commit(change)
        return change

    def plan(self, region: Region) -> Change:
        """What the call would do; changes nothing. KvmError where it is refused: EINVAL malformed, or a change that is
        not allowed; EEXIST overlap; EFAULT beyond the VM's IPA space."""
        self._check_region(region)
        old = self._by_id.get(region.slot)
        if not region.memory_size:
            if old is None:
                raise KvmError(errno.EINVAL, f"slot {region.slot} does not exist, so memory_size 0 deletes nothing")
            return Change("delete", old, None, unmap=((old.guest_phys_addr, old.memory_size),))
        new = Slot(region.slot, region.flags, region.guest_phys_addr, region.memory_size, region.userspace_addr)
        kind = "create" if old is None else self._kind_of_change(old, new)
        if kind == "none":
            return Change(kind, old, old)
        if kind != "flags":
            self._check_overlap(new)
        if new.end > 1 << self.ipa_bits:
            raise KvmError(
                errno.EFAULT,
                f"slot {new.slot} ends at {new.end:#x}, this VM's IPA space of {self.ipa_bits} bits at "
                f"{1 << self.ipa_bits:#x}: put it lower, or create the VM with more IPA bits",
            )
        unmap = ((old.guest_phys_addr, old.memory_size),) if old is not None and kind == "move" else ()
        # kvm_arch_commit_memory_region(): with "initially set" the pages are protected bit by bit, as they are cleared.
        protect = ((new.guest_phys_addr, new.memory_size),) if new.logging and not self.initially_set else ()
        return Change(kind, old, new, unmap, protect)

    def commit(self, change: Change) -> None:
        """Makes a plan true; the slots have not changed since."""
        old, new = change.old, change.new
        if change.kind == "none":
            return
        if old is not None:
            at = bisect_left(self._starts, old.guest_phys_addr >> self.page_shift)
            del self._starts[at], self._ends[at], self._order[at]
        if new is None or not new.logging:
            self._dirty.pop(change.slot, None)
        elif new.slot not in self._dirty:
            self._dirty[new.slot] = DirtyBitmap(new.memory_size >> self.page_shift, self.initially_set)
        if new is None:
            del self._by_id[change.slot]
            return
        at = bisect_left(self._starts, new.guest_phys_addr >> self.page_shift)
        self._starts.insert(at, new.guest_phys_addr >> self.page_shift)
        self._ends.insert(at, new.end >> self.page_shift)
        self._order.insert(at, new)
        self._by_id[new.slot] = new

    def apply(self, change: Change, stage2: Stage2) -> None:
        """`commit`, and in the tables what follows from it. No vCPU of the VM is in the guest meanwhile."""
        self.commit(change)
        for ipa, size in change.unmap:
            stage2.unmap(ipa, size)
        for ipa, size in change.protect:
            stage2.write_protect(ipa, size)

    def _check_region(self, region: Region) -> None:
        page, unit = self.page_shift, self.alignment
        end = region.guest_phys_addr + region.memory_size
        rules = (
            (region.flags & ~VALID_FLAGS, f"flags {region.flags:#x}: this host has {VALID_FLAGS:#x}"),
            (region.memory_size % unit, f"memory_size {region.memory_size:#x} is not a multiple of {unit:#x}"),
            (
                region.guest_phys_addr % unit,
                f"guest_phys_addr {region.guest_phys_addr:#x}: not a multiple of {unit:#x}",
            ),
            (region.userspace_addr % unit, f"userspace_addr {region.userspace_addr:#x}: not a multiple of {unit:#x}"),
            (
                region.userspace_addr + region.memory_size > self.va_limit,
                f"userspace_addr {region.userspace_addr:#x}: the range does not end below {self.va_limit:#x}, the end "
                "of a process (a tagged address does not either)",
            ),
            (
                region.slot >= self.nr_memslots,
                f"slot {region.slot:#x}: this host has 0..{self.nr_memslots - 1} in one address space",
            ),
            (end >= U64, f"guest_phys_addr + memory_size = {end:#x} is beyond 64 bits"),
            (
                region.memory_size >> page > KVM_MEM_MAX_NR_PAGES,
                f"memory_size {region.memory_size:#x}: a slot has at most {KVM_MEM_MAX_NR_PAGES:#x} pages",
            ),
        )
        for broken, reason in rules:
            if broken:
                raise KvmError(errno.EINVAL, reason)

    def _kind_of_change(self, old: Slot, new: Slot) -> str:
        if (
            new.userspace_addr != old.userspace_addr
            or new.memory_size != old.memory_size
            or (new.flags ^ old.flags) & KVM_MEM_READONLY
        ):
            raise KvmError(
                errno.EINVAL,
                f"slot {old.slot} exists: its size, userspace address and READONLY flag cannot change; delete it first",
            )
        if new.guest_phys_addr != old.guest_phys_addr:
            return "move"
        return "flags" if new.flags != old.flags else "none"

    def _check_overlap(self, new: Slot) -> None:
        first, last = new.guest_phys_addr >> self.page_shift, new.end >> self.page_shift
        # Of the slots that start below the end of the new one, the two highest can reach into it: one may be itself.
        at = bisect_left(self._starts, last)
        for other in reversed(self._order[max(0, at - 2) : at]):
            if other.slot != new.slot and other.end >> self.page_shift > first:
                raise KvmError(
                    errno.EEXIST,
                    f"slot {new.slot} [{new.guest_phys_addr:#x}, {new.end:#x}) overlaps slot {other.slot} "
                    f"[{other.guest_phys_addr:#x}, {other.end:#x})",
                )

    # -- dirty log

    @property
    def initially_set(self) -> bool:
        """Whether a slot whose logging starts has every page marked."""
        return bool(self.manual_protect & KVM_DIRTY_LOG_INITIALLY_SET)

    def enable_manual_protect(self, flags: int, value: int) -> None:
        """KVM_ENABLE_CAP(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) with args[0] = `value`: 0, 1 or 3, else EINVAL."""
        allowed = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
        if value & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE:
            allowed |= KVM_DIRTY_LOG_INITIALLY_SET
        if flags or value & ~allowed:
            raise KvmError(errno.EINVAL, f"flags {flags:#x}, args[0] {value:#x}: allowed are flags 0 and 0, 1 or 3")
        self.manual_protect = value

    def get_dirty(self, slot: int) -> DirtyPages:
        """KVM_GET_DIRTY_LOG. The bits are clear afterwards, and their pages to be protected again, unless clearing is
        manual. EINVAL for an id that no slot can have, ENOENT where nothing is logged."""
        bitmap = self._logged(slot)
        if self.manual_protect:
            return DirtyPages(bitmap.snapshot(), ())
        taken = bitmap.take()
        return DirtyPages(taken, self._ranges(slot, spans(taken)))

    def clear_dirty(
        self, slot: int, first_page: int, num_pages: int, fetch: Callable[[int], bytes]
    ) -> tuple[Range, ...]:
        """KVM_CLEAR_DIRTY_LOG: clears the bits set in the mask, which `fetch(size)` reads from the client after all
        checks. Returns the ranges (IPA, size) to write-protect again."""
        self._check_id(slot)
        if first_page % WORD_BITS:
            raise KvmError(errno.EINVAL, f"first_page {first_page} is not a multiple of {WORD_BITS}")
        bitmap = self._logged(slot)
        left = bitmap.npages - first_page
        if left < 0 or num_pages > left or (num_pages < left and num_pages % WORD_BITS):
            raise KvmError(
                errno.EINVAL,
                f"pages [{first_page}, {first_page + num_pages}) of slot {slot} with {bitmap.npages}: within it, and a "
                f"multiple of {WORD_BITS} unless they reach its end",
            )
        mask = fetch(bitmap_bytes(num_pages))
        return self._ranges(slot, bitmap.clear(first_page, mask))

    def mark_dirty(self, gfn: int) -> None:
        """A page was written, or mapped writable: marks every host page of the stage-2 granule that `gfn` lies in, as
        a write fault makes all of them writable. Nothing happens where nothing is logged."""
        unit = self.alignment >> self.page_shift
        self.mark_dirty_range(gfn // unit * unit << self.page_shift, self.alignment)

    def mark_dirty_range(self, gpa: int, size: int) -> None:
        """Marks the host pages of [gpa, gpa + size) as far as they lie in one slot that is logged."""
        first = gpa >> self.page_shift
        slot = self.find(first)
        bitmap = None if slot is None else self._dirty.get(slot.slot)
        if slot is not None and bitmap is not None:
            last = (gpa + size - 1) >> self.page_shift
            bitmap.set(first - (slot.guest_phys_addr >> self.page_shift), last - first + 1)

    def _check_id(self, slot: int) -> None:
        if slot >= self.nr_memslots:
            raise KvmError(
                errno.EINVAL, f"slot {slot:#x}: this host has 0..{self.nr_memslots - 1} in one address space"
            )

    def _logged(self, slot: int) -> DirtyBitmap:
        self._check_id(slot)
        bitmap = self._dirty.get(slot)
        if bitmap is None:
            raise KvmError(errno.ENOENT, f"slot {slot} does not exist, or not with KVM_MEM_LOG_DIRTY_PAGES")
        return bitmap

    def _ranges(self, slot: int, pages: list[tuple[int, int]]) -> tuple[Range, ...]:
        # In bytes of IPA, widened to whole stage-2 granules.
        base, unit = self._by_id[slot].guest_phys_addr, self.alignment
        ranges = []
        for first, count in pages:
            start, end = first << self.page_shift, (first + count) << self.page_shift
            start, end = start // unit * unit, -(-end // unit) * unit
            ranges.append((base + start, end - start))
        return tuple(ranges)
