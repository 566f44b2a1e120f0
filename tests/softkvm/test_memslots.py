"""Memory slots: every rule by itself, in the order in which the kernel checks, and what it means for stage 2."""

from __future__ import annotations

import errno
import random
import timeit
from types import SimpleNamespace

import pytest

from kvm2.abi.structs import UserspaceMemoryRegion, UserspaceMemoryRegion2
from kvm2.errors import KvmError
from kvm2.softkvm import profile
from kvm2.softkvm.memslots import MemSlots
from kvm2.softkvm.stage2 import Stage2, stage2_format

HVA = 0x7F00_0000_0000
PAGE = 4096
LOG, READONLY, GUEST_MEMFD = 1, 2, 4
EINVAL, EEXIST, EFAULT = errno.EINVAL, errno.EEXIST, errno.EFAULT


def host(page_shift=12, quirks=()):
    return SimpleNamespace(page_shift=page_shift, nr_memslots=32767, quirks=frozenset(quirks))


def region(slot=0, flags=0, gpa=0, size=4 * PAGE, hva=HVA):
    return UserspaceMemoryRegion(slot, flags, gpa, size, hva)


@pytest.fixture
def slots():
    return MemSlots(host(), 40)


def refused(slots, number, **values):
    before = list(slots)
    with pytest.raises(KvmError) as caught:
        slots.set(region(**values))
    assert caught.value.errno == number
    assert caught.value.reason
    assert list(slots) == before
    return caught.value.reason


@pytest.mark.parametrize("bits", [32, 33, 36, 40, 48, 52])
def test_a_slot_may_end_exactly_at_the_limit(bits):
    # The 2018-2021 off-by-one, which an M1 with 36 bits found.
    slots = MemSlots(host(), bits)
    top = 1 << bits
    assert slots.set(region(gpa=top - 4 * PAGE)).kind == "create"
    assert slots.find((top >> 12) - 1).slot == 0
    assert slots.find(top >> 12) is None
    for gpa, size in ((top - PAGE, 2 * PAGE), (top, PAGE), (top + PAGE, PAGE), (2 * top, PAGE)):
        slots = MemSlots(host(), bits)
        assert f"{top:#x}" in refused(slots, EFAULT, gpa=gpa, size=size)
        refused(slots, EFAULT, gpa=gpa, size=size, flags=READONLY)


def test_the_limit_of_a_move(slots):
    slots.set(region(gpa=0))
    assert slots.set(region(gpa=(1 << 40) - 4 * PAGE)).kind == "move"
    refused(slots, EFAULT, gpa=(1 << 40) - 3 * PAGE)


def test_create_move_flags_delete(slots):
    assert slots.set(region(gpa=0x1000)) == ("create", None, slots.get(0), (), ())
    assert slots.set(region(gpa=0x1000)).kind == "none"
    old = slots.get(0)
    moved = slots.set(region(gpa=0x100000))
    assert (moved.kind, moved.old, moved.new) == ("move", old, slots.get(0))
    assert moved.unmap == ((0x1000, 4 * PAGE),)
    assert (slots.find(1), slots.find(0x100)) == (None, slots.get(0))
    flags = slots.set(region(gpa=0x100000, flags=LOG))
    assert (flags.kind, flags.unmap, flags.protect) == ("flags", (), ((0x100000, 4 * PAGE),))
    assert slots.set(region(gpa=0x100000)).protect == ()
    both = slots.set(region(gpa=0x200000, flags=LOG))
    assert (both.kind, both.unmap) == ("move", ((0x100000, 4 * PAGE),))
    deleted = slots.set(region(gpa=0xFFFF_FFFF_F000, size=0))
    assert (deleted.kind, deleted.unmap, deleted.slot) == ("delete", ((0x200000, 4 * PAGE),), 0)
    assert (len(slots), slots.get(0), slots.find(0x200)) == (0, None, None)
    refused(slots, EINVAL, size=0)


@pytest.mark.parametrize("flags", [GUEST_MEMFD, 8, 16, 1 << 16, 1 << 31, LOG | GUEST_MEMFD])
def test_unknown_flags(slots, flags):
    assert f"{flags:#x}" in refused(slots, EINVAL, flags=flags)


@pytest.mark.parametrize("name", ["gpa", "size", "hva"])
@pytest.mark.parametrize(
    ("page_shift", "granule"), [(12, 12), (12, 14), (12, 16), (14, 12), (14, 14), (16, 12), (16, 16)]
)
def test_alignment_is_to_the_larger_of_page_and_granule(name, page_shift, granule):
    slots = MemSlots(host(page_shift), 40, granule)
    unit = 1 << max(page_shift, granule)
    good = {"gpa": unit, "size": unit, "hva": HVA}
    for odd in (1, 512, unit // 2, unit - 1):
        assert hex(unit) in refused(slots, EINVAL, **(good | {name: good[name] + odd}))
    assert slots.set(region(**good)).kind == "create"


def test_the_client_address_space(slots):
    for hva in (1 << 52, (1 << 52) - 3 * PAGE, 0xFFFF_8000_0000_0000, HVA | 0xFF << 56, HVA | 1 << 55):
        refused(slots, EINVAL, hva=hva)
    assert slots.set(region(hva=(1 << 52) - 4 * PAGE)).kind == "create"
    assert slots.set(region(slot=1, gpa=0x100000, hva=0)).kind == "create"
    assert slots.set(region(slot=2, gpa=0x200000, hva=0)).kind == "create", "two slots may share memory"
    old_kernel = MemSlots(host(quirks=["no-lpa2"]), 40)
    refused(old_kernel, EINVAL, hva=1 << 48)
    assert old_kernel.set(region(hva=(1 << 48) - 4 * PAGE)).kind == "create"


@pytest.mark.parametrize("slot", [32767, 32768, 65535, 1 << 16, (1 << 16) + 1, 2 << 16, 0xFFFF_FFFF])
def test_slot_numbers(slots, slot):
    refused(slots, EINVAL, slot=slot)


def test_the_last_slot_number(slots):
    assert slots.set(region(slot=32766)).kind == "create"


def test_wrap_and_size(slots):
    refused(slots, EINVAL, gpa=(1 << 64) - 4 * PAGE)
    refused(slots, EINVAL, gpa=(1 << 64) - PAGE)
    most = ((1 << 31) - 1) << 12
    wide = MemSlots(host(), 48)
    refused(wide, EINVAL, size=most + PAGE)
    assert wide.set(region(size=most)).kind == "create"


@pytest.mark.parametrize(
    "change", [{"size": 2 * PAGE}, {"size": 8 * PAGE}, {"hva": HVA + PAGE}, {"flags": READONLY}, {"hva": 0}]
)
def test_what_cannot_change(slots, change):
    slots.set(region())
    assert "slot 0" in refused(slots, EINVAL, **change)
    slots.set(region(size=0))
    slots.set(region(flags=READONLY))
    refused(slots, EINVAL, flags=0)
    assert slots.set(region(flags=READONLY | LOG)).kind == "flags"


@pytest.mark.parametrize(
    ("gpa", "size"), [(0x10000, PAGE), (0xF000, 2 * PAGE), (0x13000, 2 * PAGE), (0xE000, 16 * PAGE)]
)
def test_overlap(slots, gpa, size):
    slots.set(region(slot=7, gpa=0x10000))
    assert "slot 7" in refused(slots, EEXIST, gpa=gpa, size=size)
    slots.set(region(slot=0, gpa=0x100000, size=size))
    refused(slots, EEXIST, gpa=gpa, size=size)


def test_neighbours_and_a_move_onto_oneself(slots):
    slots.set(region(slot=7, gpa=0x10000))
    assert slots.set(region(slot=1, gpa=0x14000, size=PAGE)).kind == "create"
    assert slots.set(region(slot=2, gpa=0xF000, size=PAGE)).kind == "create"
    refused(slots, EEXIST, slot=7, gpa=0x11000)
    refused(slots, EEXIST, slot=7, gpa=0xE000)
    slots.set(region(slot=1, size=0))
    assert slots.set(region(slot=7, gpa=0x11000)).kind == "move"


def test_which_error_wins(slots):
    top = 1 << 40
    slots.set(region(slot=1, gpa=top - 4 * PAGE))
    refused(slots, EEXIST, gpa=top - PAGE)  # overlap before the limit
    refused(slots, EINVAL, slot=1, gpa=top, hva=0)  # immutability before the limit
    refused(slots, EINVAL, gpa=top - PAGE, flags=8)
    refused(slots, EINVAL, slot=40000, gpa=top)
    assert slots.set(region(slot=1, gpa=2 * top, size=0)).kind == "delete", "the address of a deletion is ignored"


def test_region2_is_the_same(slots):
    again = UserspaceMemoryRegion2(3, 0, 0x1000, PAGE, HVA, 5, 6, 7, (1,) * 14)
    assert slots.set(again).kind == "create"
    with pytest.raises(KvmError):
        slots.set(UserspaceMemoryRegion2(4, GUEST_MEMFD, 0x9000, PAGE, HVA))


def test_every_slot_of_a_host():
    slots = MemSlots(host(), 40)
    order = list(range(32767))
    random.Random(1).shuffle(order)
    spent = timeit.timeit(lambda: [slots.set(region(slot=n, gpa=2 * PAGE * n, size=PAGE)) for n in order], number=1)
    assert spent < 5
    assert len(slots) == 32767
    for n in random.Random(2).sample(order, 500):
        assert slots.find(2 * n).slot == n
        assert slots.find(2 * n + 1) is None
    assert min(timeit.repeat(lambda: slots.find(40000), number=1000, repeat=3)) / 1000 < 20e-6


def test_apply_changes_the_tables():
    machine = profile.load("max-4k-6.12")
    stage2 = Stage2(stage2_format(machine, 40), machine)
    slots = MemSlots(machine, 40)
    slots.apply(slots.plan(region(gpa=0x10000)), stage2)
    stage2.map(0x10000, HVA, 4 * PAGE, writable=True)
    stage2.map(0x20000, HVA, PAGE, writable=True)
    slots.apply(slots.plan(region(gpa=0x10000, flags=LOG)), stage2)
    assert [leaf.writable for leaf in stage2.leaves()] == [False] * 4 + [True]
    slots.apply(slots.plan(region(gpa=0x100000, flags=LOG)), stage2)
    assert [leaf.ipa for leaf in stage2.leaves()] == [0x20000]
    stage2.map(0x100000, HVA, PAGE, writable=True)
    slots.apply(slots.plan(region(size=0)), stage2)
    assert [leaf.ipa for leaf in stage2.leaves()] == [0x20000]
    stage2.close()


def test_a_plan_changes_nothing(slots):
    change = slots.plan(region(flags=LOG))
    assert (len(slots), slots.find(0)) == (0, None)
    slots.commit(change)
    assert slots.find(0) is change.new
