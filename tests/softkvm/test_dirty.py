"""The dirty log: what is marked, what a read clears and protects again, and every refusal."""

from __future__ import annotations

import errno
import random
from types import SimpleNamespace

import pytest

from kvm2.abi.structs import UserspaceMemoryRegion
from kvm2.errors import KvmError
from kvm2.softkvm import profile
from kvm2.softkvm.dirty import DirtyBitmap, bitmap_bytes, spans
from kvm2.softkvm.memslots import MemSlots
from kvm2.softkvm.stage2 import Stage2, stage2_format
from kvm2.softkvm.stage2_fault import map_leaf

HVA, PAGE, BASE = 0x7F00_0000_0000, 4096, 0x100000
LOG = 1


def make(npages=70, granule=12, page_shift=12, manual=0, flags=LOG):
    host = SimpleNamespace(page_shift=page_shift, nr_memslots=32767, quirks=frozenset())
    slots = MemSlots(host, 40, granule)
    slots.enable_manual_protect(0, manual)
    slots.set(UserspaceMemoryRegion(1, flags, BASE, npages << page_shift, HVA))
    return slots


def bits(bitmap):
    return [page for page in range(8 * len(bitmap)) if bitmap[page // 8] >> page % 8 & 1]


def ones(size):
    return b"\xff" * size


def refused(number, call, *arguments):
    with pytest.raises(KvmError) as caught:
        call(*arguments)
    assert caught.value.errno == number
    assert caught.value.reason


@pytest.mark.parametrize(("npages", "size"), [(1, 8), (63, 8), (64, 8), (65, 16), (70, 16), (128, 16), (129, 24)])
def test_a_bitmap_is_whole_words(npages, size):
    assert bitmap_bytes(npages) == size
    assert len(make(npages).get_dirty(1).bitmap) == size


def test_marks_are_read_once():
    slots = make()
    for gfn in (0x100, 0x103, 0x100 + 69, 0x100 + 70, 0xFF):  # the last two are outside the slot
        slots.mark_dirty(gfn)
    first = slots.get_dirty(1)
    assert bits(first.bitmap) == [0, 3, 69]
    assert slots.get_dirty(1) == (bytes(16), ())
    assert first.protect == ((BASE, 4 * PAGE), (BASE + 69 * PAGE, PAGE))


def test_ranges_of_guest_memory():
    slots = make()
    slots.mark_dirty_range(BASE + 100, 1)
    slots.mark_dirty_range(BASE + 3 * PAGE - 1, 2)
    slots.mark_dirty_range(BASE + 69 * PAGE, 10 * PAGE)
    slots.mark_dirty_range(0, 4)
    assert bits(slots.get_dirty(1).bitmap) == [0, 2, 3, 69]


@pytest.mark.parametrize("slot", [32767, 40000, 1 << 16 | 1, 0xFFFF_FFFF])
def test_ids_that_no_slot_has(slot):
    refused(errno.EINVAL, make().get_dirty, slot)
    refused(errno.EINVAL, make().clear_dirty, slot, 0, 64, ones)


def test_nothing_logged():
    refused(errno.ENOENT, make().get_dirty, 2)
    refused(errno.ENOENT, make(flags=0).get_dirty, 1)
    refused(errno.ENOENT, make(flags=0).clear_dirty, 1, 0, 64, ones)
    refused(errno.EINVAL, make(flags=0).clear_dirty, 1, 1, 64, ones)  # first_page is checked before the slot
    make(flags=0).mark_dirty(0x100)


def test_logging_off_forgets():
    slots = make()
    slots.mark_dirty(0x100)
    slots.set(UserspaceMemoryRegion(1, 0, BASE, 70 * PAGE, HVA))
    refused(errno.ENOENT, slots.get_dirty, 1)
    slots.set(UserspaceMemoryRegion(1, LOG, BASE, 70 * PAGE, HVA))
    assert bits(slots.get_dirty(1).bitmap) == []


def test_a_moved_slot_keeps_its_bits():
    slots = make()
    slots.mark_dirty(0x105)
    slots.set(UserspaceMemoryRegion(1, LOG, 2 * BASE, 70 * PAGE, HVA))
    assert slots.get_dirty(1) == (bytes([0x20]) + bytes(15), ((2 * BASE + 5 * PAGE, PAGE),))


@pytest.mark.parametrize(
    ("first", "count", "number"),
    [
        (0, 64, 0),
        (0, 70, 0),
        (64, 6, 0),
        (0, 0, 0),
        (64, 0, 0),
        (0, 1, errno.EINVAL),
        (0, 65, errno.EINVAL),
        (64, 5, errno.EINVAL),
        (64, 64, errno.EINVAL),
        (0, 128, errno.EINVAL),
        (1, 64, errno.EINVAL),
        (128, 64, errno.EINVAL),
        (128, 0, errno.EINVAL),
        (1 << 63, 64, errno.EINVAL),
    ],
)
def test_which_pages_may_be_cleared(first, count, number):
    slots = make(manual=1)
    if number:
        refused(number, slots.clear_dirty, 1, first, count, ones)
    else:
        assert slots.clear_dirty(1, first, count, ones) == ()


def test_clearing_by_hand():
    slots = make(manual=1)
    for page in (0, 1, 5, 64, 69):
        slots.mark_dirty(0x100 + page)
    asked = []
    assert bits(slots.get_dirty(1).bitmap) == [0, 1, 5, 64, 69]
    assert slots.get_dirty(1).protect == (), "a read protects nothing when clearing is manual"
    assert slots.clear_dirty(1, 0, 64, lambda size: asked.append(size) or bytes([0b100001]) + bytes(7)) == (
        (BASE, 6 * PAGE),
    )
    assert bits(slots.get_dirty(1).bitmap) == [1, 64, 69]
    assert slots.clear_dirty(1, 64, 6, lambda size: asked.append(size) or ones(size)) == ((BASE + 64 * PAGE, 6 * PAGE),)
    assert bits(slots.get_dirty(1).bitmap) == [1]
    assert asked == [8, 8]


def test_a_mask_that_cannot_be_read_clears_nothing():
    slots = make(manual=1)
    slots.mark_dirty(0x100)

    def unreadable(size):
        raise KvmError(errno.EFAULT, "no memory there")

    refused(errno.EFAULT, slots.clear_dirty, 1, 0, 64, unreadable)
    refused(errno.EINVAL, slots.clear_dirty, 1, 0, 1, unreadable)
    assert bits(slots.get_dirty(1).bitmap) == [0]


@pytest.mark.parametrize(
    ("flags", "value", "allowed"),
    [
        (0, 0, True),
        (0, 1, True),
        (0, 3, True),
        (0, 2, False),
        (0, 4, False),
        (0, 5, False),
        (1, 1, False),
        (0, 1 << 32, False),
    ],
)
def test_enabling_manual_protect(flags, value, allowed):
    slots = make()
    if allowed:
        slots.enable_manual_protect(flags, value)
    else:
        refused(errno.EINVAL, slots.enable_manual_protect, flags, value)
    assert slots.manual_protect == (value if allowed else 0)


def test_initially_set():
    slots = make(manual=3)
    assert bits(slots.get_dirty(1).bitmap) == list(range(70))
    change = slots.plan(UserspaceMemoryRegion(2, LOG, 0x10000000, PAGE, HVA))
    assert change.protect == (), "pages are protected as they are cleared"
    assert slots.clear_dirty(1, 0, 70, ones) == ((BASE, 70 * PAGE),)
    assert bits(slots.get_dirty(1).bitmap) == []


def test_initially_set_with_manual_clearing_only():
    slots = make(manual=1)
    assert bits(slots.get_dirty(1).bitmap) == []


@pytest.mark.parametrize(("page_shift", "granule", "together"), [(12, 16, 16), (12, 14, 4), (14, 16, 4), (16, 12, 1)])
def test_a_granule_larger_than_a_page(page_shift, granule, together):
    slots = make(128, granule, page_shift)
    first = (BASE >> page_shift) + together
    slots.mark_dirty(first + together - 1)
    taken = slots.get_dirty(1)
    assert bits(taken.bitmap) == list(range(together, 2 * together))
    assert taken.protect == ((BASE + (together << page_shift), together << page_shift),)


def test_a_part_of_a_large_granule_protects_all_of_it():
    slots = make(128, 16, manual=1)
    slots.mark_dirty(0x100)
    assert slots.clear_dirty(1, 0, 64, lambda size: bytes([2]) + bytes(7)) == ((BASE, 1 << 16),)
    assert bits(slots.get_dirty(1).bitmap) == [0, *range(2, 16)]


def test_a_guest_that_writes():
    # What the fault path does with a logged slot, through the tables: write, read the log, write again.
    machine = profile.load("max-4k-6.12")
    stage2, slots = Stage2(stage2_format(machine, 40), machine), MemSlots(machine, 40)
    plain = UserspaceMemoryRegion(0, 0, 0x80000000, 4 << 20, HVA)
    slots.set(plain)
    map_leaf(stage2, slots.get(0), 0x80000000, writable=True, execute=False, blocks=True)
    slots.apply(slots.plan(UserspaceMemoryRegion(0, LOG, 0x80000000, 4 << 20, HVA)), stage2)
    assert stage2.stats().blocks == 1
    assert not stage2.translate(0x80003000).writable
    for _ in range(2):
        map_leaf(stage2, slots.get(0), 0x80003008, writable=True, execute=False, blocks=True)
        slots.mark_dirty(0x80003)
        assert [leaf.ipa for leaf in stage2.leaves() if leaf.writable] == [0x80003000]
        taken = slots.get_dirty(0)
        assert bits(taken.bitmap) == [3]
        for ipa, size in taken.protect:
            stage2.write_protect(ipa, size)
        assert not any(leaf.writable for leaf in stage2.leaves())
    assert stage2.stats()[1:3] == (512, 0)
    stage2.close()


def test_spans_have_every_set_bit():
    rng = random.Random(5)
    for _ in range(200):
        bitmap = bytes(rng.choice([0, 0, 0, rng.randrange(256)]) for _ in range(16))
        covered = [page for first, count in spans(bitmap) for page in range(first, first + count)]
        assert len(covered) == len(set(covered))
        assert set(bits(bitmap)) <= set(covered)
        assert {page // 8 for page in covered} == {page // 8 for page in bits(bitmap)}


def test_the_largest_slot_costs_no_memory_before_it_is_written():
    bitmap = DirtyBitmap((1 << 31) - 1)
    bitmap.set((1 << 31) - 2)
    assert bitmap.clear((1 << 31) - 64, ones(8)) == [((1 << 31) - 2, 1)]
