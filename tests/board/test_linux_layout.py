import contextlib
import itertools

import pytest

from kvm2.board import linux_layout as layout
from kvm2.board.linux_layout import BLOCK, check_rooms, place_linux, redistributors, rooms_of
from kvm2.errors import UsageError
from kvm2.spec import MemoryRange

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize("base", [GIB, 1 << 40, 1 << 47, GIB + 0x10000])
def test_everything_is_aligned_apart_and_inside(base):
    memory = (MemoryRange(base, 128 * MIB),)
    placed = place_linux(memory, 35 * MIB, 0x80000, 10 * MIB)
    assert (placed.kernel - 0x80000) % BLOCK == 0 and placed.kernel - base <= BLOCK + 0x80000
    assert placed.dtb % BLOCK == 0 and placed.dtb >= placed.kernel + 35 * MIB
    assert placed.initrd >= placed.dtb + BLOCK and placed.initrd % 0x10000 == 0
    assert placed.initrd + 10 * MIB <= memory[0].end


def test_the_lowest_range_with_room_takes_it():
    memory = (MemoryRange(1 << 40, GIB), MemoryRange(GIB, 16 * MIB), MemoryRange(4 * GIB, 64 * MIB))
    assert place_linux(memory, 35 * MIB, 0, 10 * MIB).kernel == 4 * GIB
    assert place_linux(memory, 35 * MIB, 0, 100 * MIB).kernel == 1 << 40


def test_too_little_memory_says_what_is_needed():
    with pytest.raises(UsageError, match=r"need a range of 0x2f00000 bytes.*0x1000000@0x40000000.*--memory"):
        place_linux((MemoryRange(GIB, 16 * MIB),), 35 * MIB, 0, 9 * MIB)
    exact = 0x2F00000
    assert place_linux((MemoryRange(GIB, exact),), 35 * MIB, 0, 9 * MIB)
    with pytest.raises(UsageError):
        place_linux((MemoryRange(GIB, exact - 1),), 35 * MIB, 0, 9 * MIB)


def test_linux_does_not_boot_beyond_48_bits():
    with pytest.raises(UsageError, match="2\\^48"):
        place_linux((MemoryRange(1 << 48, GIB),), 35 * MIB, 0, 0)


@pytest.mark.parametrize(
    ("piece", "free"),
    [
        (MemoryRange(GIB, GIB), True),
        (MemoryRange(0, 0x0800_0000), True),
        (MemoryRange(0, 0x0800_0001), False),
        (MemoryRange(0x0900_0000, 0x1000), False),
        (MemoryRange(0x0A00_0000 + 32 * 0x200, 0x1000), True),
        (MemoryRange(0, GIB), False),
    ],
)
def test_ram_leaves_the_devices_free(piece, free):
    with contextlib.nullcontext() if free else pytest.raises(UsageError, match="leave that free"):
        check_rooms((piece,), rooms_of(1))


def test_many_redistributors_need_a_second_region_that_ram_leaves_free_too():
    low, high = redistributors(200)
    assert low.end <= layout.UART_BASE and (low.size + high.size) // layout.REDIST_SIZE == 200
    check_rooms((MemoryRange(0x1000_0000, MIB),), rooms_of(123))
    with pytest.raises(UsageError, match="redistributors at 0x10000000"):
        check_rooms((MemoryRange(0x1000_0000, MIB),), rooms_of(124))


def test_no_two_rooms_overlap():
    rooms = [
        (layout.GIC_DIST, layout.GIC_DIST_SIZE),
        (layout.GIC_ITS, layout.GIC_ITS_SIZE),
        *((room.base, room.size) for room in redistributors(512)),
        (layout.UART_BASE, 0x1000),
        (layout.RTC_BASE, 0x1000),
        (layout.VIRTIO_BASE, layout.MOST_VIRTIO * layout.VIRTIO_STRIDE),
    ]
    rooms.sort()
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(rooms))
    assert layout.GICV2_CPU + layout.GICV2_CPU_SIZE <= layout.GIC_ITS
