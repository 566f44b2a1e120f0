"""Stage-2 tables: attributes as the kernel sets them, blocks and splitting, what makes cached translations stale."""

from __future__ import annotations

import gc
import timeit

import pytest

from kvm2.softkvm import profile
from kvm2.softkvm.memslots import Slot
from kvm2.softkvm.stage2 import Stage2, stage2_format
from kvm2.softkvm.stage2_fault import leaf_range, map_leaf

MAX, A57, MAX16 = "max-4k-6.12", "cortex-a57-4k", "max-16k-6.12"
HVA = 0x7F00_0000_0000
XN = 1 << 54


@pytest.fixture
def make():
    made = []

    def build(host=MAX, bits=40, shift=None, vmid=1):
        machine = profile.load(host)
        made.append(Stage2(stage2_format(machine, bits, shift), machine, vmid))
        return made[-1]

    yield build
    for stage2 in made:
        stage2.close()


@pytest.mark.parametrize(
    ("host", "page", "readonly", "block"),
    [
        (MAX, 0x4DB, 0x45B, 0x4D9),
        (MAX16, 0x4DB, 0x45B, 0x4D9),
        (A57, 0x7FF, 0x77F, 0x7FD),
        ("max-4k-6.1", 0x7DB, 0x75B, 0x7D9),
    ],
)
def test_attributes(make, host, page, readonly, block):
    stage2 = make(host)
    size = stage2.format.page_size
    stage2.map(0, HVA, size, writable=True)
    stage2.map(size, HVA, size, writable=False)
    stage2.map(2 * size, HVA, size, writable=True, executable=True)
    stage2.map(0x80000000, HVA, stage2.format.block_size, writable=True)
    found = [leaf.descriptor - HVA for leaf in stage2.leaves()]
    assert found == [XN | page, XN | readonly, page, XN | block]


@pytest.mark.parametrize(("host", "block"), [(MAX, 2 << 20), (MAX16, 32 << 20)])
def test_block_sizes(make, host, block):
    stage2 = make(host)
    assert stage2.format.block_size == block
    stage2.map(block, HVA, 2 * block, writable=True)
    assert stage2.stats()[1:3] == (0, 2)
    leaf = stage2.translate(2 * block + 0x1234)
    assert (leaf.ipa, leaf.size, leaf.level, leaf.hva) == (2 * block, block, 2, HVA + block + 0x1234)


def test_blocks_of_64k_pages(make):
    stage2 = make(MAX, 40, shift=16)
    assert stage2.format.block_size == 512 << 20
    stage2.map(0, HVA, 512 << 20, writable=True)
    stage2.unmap(0x10000, 0x10000)
    assert stage2.stats().pages == 8191
    assert stage2.translate(0x1FFFF).__class__ is type(None)
    assert stage2.translate(0x20001).hva == HVA + 0x20001


def test_nothing_is_allocated_before_the_first_mapping(make):
    stage2 = make()
    assert stage2.stats() == (0, 0, 0, 0)
    assert stage2.translate(0) is None
    assert stage2.walk(0) == []
    stage2.unmap(0, 1 << 40)
    stage2.write_protect(0, 1 << 40)
    assert stage2.stats() == (0, 0, 0, 0)
    assert stage2.generation == 0
    stage2.map(0, HVA, 4096, writable=True)
    assert stage2.stats().reserved <= 1 << 18


@pytest.mark.parametrize("bits", [32, 34, 40, 43, 48, 52])
@pytest.mark.parametrize(("host", "shift"), [(MAX, 12), (MAX, 14), (MAX, 16), (MAX16, 14)])
def test_registers(make, host, shift, bits):
    stage2 = make(host, bits, shift, vmid=0x1234)
    table_bytes = stage2.format.concatenated * stage2.format.page_size
    assert stage2.base % table_bytes == 0
    assert stage2.vttbr == 0x1234 << 48 | stage2.base | 1
    assert stage2.core_vttbr >> 48 == 0x1234
    assert stage2.vtcr == stage2.format.vtcr


def test_vmid_and_cnp_of_a_small_host(make):
    stage2 = make(A57, vmid=0x1FF)
    assert stage2.vttbr >> 48 == 0xFF
    assert stage2.vttbr & 1 == 0


def test_generation_counts_what_makes_a_cached_translation_wrong(make):
    stage2 = make()

    def bumped(change):
        before = stage2.generation
        change()
        return stage2.generation > before

    def remap(hva=HVA, writable=True, executable=False, size=4096):
        return lambda: stage2.map(0, hva, size, writable=writable, executable=executable)

    assert not bumped(remap(writable=False))
    assert not bumped(remap(writable=False))
    assert not bumped(remap())
    assert not bumped(remap(executable=True))
    assert bumped(remap())
    assert bumped(remap(writable=False))
    assert bumped(remap(hva=HVA + 4096, writable=False))
    assert not bumped(lambda: stage2.relax(0, writable=True, executable=True))
    assert bumped(lambda: stage2.write_protect(0, 4096))
    assert not bumped(lambda: stage2.write_protect(0, 4096))
    assert not bumped(lambda: stage2.unmap(4096, 4096))
    assert bumped(remap(size=2 << 20))  # a table with a page gives way to a block
    assert not bumped(lambda: stage2.map(0, HVA, 4096, writable=True))  # split: every address as before
    assert bumped(lambda: stage2.unmap(0, 4096))


def test_relax_adds_and_never_takes(make):
    stage2 = make()
    assert not stage2.relax(0, writable=True)
    stage2.map(0, HVA, 4096, writable=False, executable=True)
    assert stage2.relax(0)
    assert stage2.translate(0)[4:6] == (False, True)
    assert stage2.relax(0, writable=True)
    assert stage2.translate(0)[4:6] == (True, True)


def test_a_page_mapped_into_a_block_splits_it(make):
    stage2 = make()
    stage2.map(0, HVA, 2 << 20, writable=True)
    stage2.write_protect(0x5000, 4096)
    assert stage2.stats().blocks == 1, "protected as a whole"
    stage2.map(0x5000, HVA + 0x5000, 4096, writable=True)
    assert stage2.stats()[1:3] == (512, 0)
    writable = [leaf.ipa for leaf in stage2.leaves() if leaf.writable]
    assert writable == [0x5000]
    assert all(leaf.hva == HVA + leaf.ipa for leaf in stage2.leaves())


def test_pages_only(make):
    stage2 = make()
    stage2.map(0, HVA, 2 << 20, writable=False, blocks=False)
    assert stage2.stats()[1:3] == (512, 0)


def test_write_protect_of_whole_and_part_tables(make):
    stage2 = make()
    stage2.map(0x1FF000, HVA, 0x402000, writable=True, blocks=False)
    stage2.write_protect(0x200000, 0x200000)
    stage2.write_protect(0x400000, 0x1000)
    protected = {leaf.ipa for leaf in stage2.leaves() if not leaf.writable}
    assert protected == set(range(0x200000, 0x401000, 0x1000))


def test_unmapping_a_huge_range_walks_only_what_is_there(make):
    stage2 = make(MAX, 52)
    places = [0, 1 << 30, (1 << 48) - 4096, 1 << 48, (1 << 52) - 4096]
    for ipa in places:
        stage2.map(ipa, HVA, 4096, writable=True)
    assert stage2.stats().pages == 5
    assert timeit.timeit(lambda: stage2.unmap(0, 1 << 52), number=1) < 0.1
    assert stage2.stats()[:3] == (1, 0, 0)
    assert stage2.generation == 1


def test_tables_are_used_again(make):
    stage2 = make()
    for turn in range(100):
        stage2.map(turn << 30, HVA, 4096, writable=True)
        stage2.unmap(turn << 30, 4096)
    assert stage2.stats().reserved <= 1 << 18
    stage2.map(1 << 30, HVA, 4096, writable=True)
    assert stage2.stats().pages == 1, "a table that was used before is empty"


def test_the_first_two_tables_of_16k_at_52_bits_are_a_pair(make):
    stage2 = make(MAX16, 52)
    pair = stage2.core_vttbr & ((1 << 48) - 2)
    assert pair != stage2.base
    stage2.map(1 << 47, HVA, 1 << 14, writable=True)
    stage2.map(1 << 48, HVA, 1 << 14, writable=True)
    stage2.map(0, HVA, 1 << 14, writable=True)
    tables = [step.table for ipa in (0, 1 << 47) for step in stage2.walk(ipa) if step.level == 1]
    assert tables == [pair, pair + (1 << 14)]
    stage2.unmap(0, 1 << 52)
    stage2.map(1 << 47, HVA, 1 << 14, writable=True)
    assert stage2.walk(1 << 47)[1].table == pair + (1 << 14)
    assert stage2.translate(0) is None


@pytest.mark.parametrize(
    ("ipa", "hva", "size"),
    [(1, HVA, 4096), (0, HVA + 1, 4096), (0, HVA, 4097), ((1 << 40) - 4096, HVA, 8192), (0, (1 << 48) - 4096, 8192)],
)
def test_what_cannot_be_mapped_is_refused(make, ipa, hva, size):
    stage2 = make()
    with pytest.raises(ValueError, match="0x"):
        stage2.map(ipa, hva, size, writable=True)
    assert stage2.dump() == []


def test_dump_has_the_form_of_the_recorded_ones(make):
    stage2 = make()
    stage2.map(0x40000000, HVA, 4096, writable=True)
    table1, table2, page = stage2.dump()
    assert (table1["level"], table1["i"], table1["ipa"], table1["kind"]) == (1, 1, "0x40000000", "table")
    assert int(table1["desc"], 16) & 0xFFF == 3
    assert table2["level"] == 2
    assert page == {
        "level": 3,
        "i": 0,
        "ipa": "0x40000000",
        "desc": "0x407f00000004db",
        "kind": "page",
        "pa": "0x7f0000000000",
        "size": 4096,
    }


def test_close_in_any_order(make):
    first, second = make(), make()
    for stage2 in (first, second):
        stage2.map(0, HVA, 4096, writable=True)
    first.close()
    first.close()
    assert second.translate(0).hva == HVA
    assert first.translate(0) is None
    assert first.stats() == (0, 0, 0, 0)
    for use in (lambda: first.map(0, HVA, 4096, writable=True), lambda: first.vttbr, lambda: first.unmap(0, 4096)):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_tables_are_freed_without_close():
    machine = profile.load(MAX)
    stage2 = Stage2(stage2_format(machine, 40), machine)
    stage2.map(0, HVA, 4096, writable=True)
    del stage2
    gc.collect()  # an exported buffer that is left over would warn, and warnings are errors


SLOT = Slot(0, 0, 0x8010_0000, 0x60_0000, HVA + 0x10_0000)


@pytest.mark.parametrize(
    ("slot", "ipa", "blocks", "expected"),
    [
        (SLOT, 0x8020_5008, True, (0x8020_0000, HVA + 0x20_0000, 2 << 20)),
        (SLOT, 0x8020_5008, False, (0x8020_5000, HVA + 0x20_5000, 4096)),
        (SLOT, 0x8010_5008, True, (0x8010_5000, HVA + 0x10_5000, 4096)),  # the block begins before the slot
        (SLOT, 0x8060_0000, True, (0x8060_0000, HVA + 0x60_0000, 4096)),  # and this one ends behind it
        (Slot(0, 1, *[0x8000_0000, 4 << 20, HVA]), 0x8000_0000, True, (0x8000_0000, HVA, 4096)),  # logged
        (Slot(0, 0, *[0x8000_0000, 4 << 20, HVA + 4096]), 0x8000_0000, True, (0x8000_0000, HVA + 4096, 4096)),
        (Slot(0, 2, *[0x8000_0000, 2 << 20, HVA]), 0x801F_FFFF, True, (0x8000_0000, HVA, 2 << 20)),
    ],
)
def test_which_leaf_a_fault_maps(slot, ipa, blocks, expected):
    assert leaf_range(stage2_format(profile.load(MAX), 40), slot, ipa, blocks) == expected


def test_what_was_executable_stays_so(make):
    stage2 = make()
    map_leaf(stage2, SLOT, 0x8020_0000, writable=False, execute=True, blocks=False)
    map_leaf(stage2, SLOT, 0x8020_0000, writable=True, execute=False, blocks=False)
    assert stage2.translate(0x8020_0000)[4:6] == (True, True)
    assert stage2.generation == 0


def test_a_fault_is_cheap(make):
    stage2 = make()
    stage2.map(0, HVA, 4096, writable=True)
    once = min(timeit.repeat(lambda: stage2.map(4096, HVA, 4096, writable=True), number=1000, repeat=5)) / 1000
    assert once < 200e-6
