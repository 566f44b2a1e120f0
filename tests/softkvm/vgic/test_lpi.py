"""LPIs at the redistributors: their tables, turning them on and off, saving what is pending."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm2.softkvm.vgic import lpi, lpi_queue

from .its_guest import (
    FIRST,
    GICR_CTLR,
    GICR_INVALLR,
    GICR_INVLPIR,
    GICR_PENDBASER,
    GICR_PROPBASER,
    PENDING,
    PROPERTIES,
    RAM,
    REDIST,
    guest,
    mapc,
    mapd,
    mapti,
    refused,
    words,
)

SPURIOUS = 1023
NOWHERE = 0x7000_0000
PTZ = 1 << 62


@pytest.fixture
def mapped():
    """LPIs 8192 and 8193 of device 5 at vCPU 0, 8194 at vCPU 1."""
    with guest() as g:
        g.start()
        g.configure(*range(FIRST, FIRST + 3))
        g.send(mapd(5), mapc(0, 0), mapc(1, 1), mapti(5, 0, FIRST), mapti(5, 1, FIRST + 1), mapti(5, 2, FIRST + 2, 1))
        yield g


def pending(g, vcpu, intid):
    return g.vm.read(PENDING + vcpu * 0x10000 + intid // 8, 1)[0] >> intid % 8 & 1


def test_the_base_registers():
    with guest() as g:
        base, ones = REDIST, (1 << 64) - 1
        assert g.read(base + GICR_PROPBASER) == 0x580 == g.read(base + GICR_PENDBASER)
        g.write(base + GICR_PROPBASER, ones)
        g.write(base + GICR_PENDBASER, ones)
        assert g.read(base + GICR_PROPBASER) == 0x000F_FFFF_FFFF_FF9F
        assert g.read(base + GICR_PENDBASER) == 0x000F_FFFF_FFFF_0F80
        assert g.vgic.cpus()[0].pendbaser & PTZ
        g.write(base + GICR_PROPBASER, 0)
        assert g.read(base + GICR_PROPBASER) == 0x180
        # One for all redistributors; each has its own pending table.
        g.write(base + 0x20000 + GICR_PROPBASER, PROPERTIES | 15)
        g.write(base + 0x20000 + GICR_PENDBASER, PENDING)
        assert g.read(base + GICR_PROPBASER) == PROPERTIES | 0x18F
        assert g.read(base + GICR_PENDBASER) == 0x000F_FFFF_FFFF_0F80
        g.write(base + GICR_PROPBASER + 4, 2, 4)
        assert g.read(base + GICR_PROPBASER) == 2 << 32 | PROPERTIES | 0x18F
        # Locked while LPIs are on.
        g.write(base + GICR_CTLR, 1, 4)
        g.write(base + GICR_PROPBASER, 0)
        g.write(base + GICR_PENDBASER, 0)
        assert g.read(base + GICR_PROPBASER) == 2 << 32 | PROPERTIES | 0x18F and g.read(base + GICR_PENDBASER) != 0x180


@given(st.integers(0, (1 << 64) - 1))
def test_sanitising_is_stable_and_leaves_addresses(value):
    for clean, address in ((lpi.sanitise_propbaser, 0xF_FFFF_FFFF_F000), (lpi.sanitise_pendbaser, 0xF_FFFF_FFFF_0000)):
        once = clean(value)
        assert clean(once) == once and once & address == value & address
        assert once >> 10 & 3 != 2 and once >> 7 & 7 not in (0, 1) and once >> 56 & 7 in (0, 1)


def test_without_an_its_lpis_stay_off():
    with guest() as g:
        g.soft.itses.clear()
        g.redist(0, GICR_CTLR, 1, 4)
        assert not g.vgic.cpus()[0].lpis_enabled


def test_turning_lpis_off_loses_what_is_pending(mapped):
    g = mapped
    assert [g.message(5, n) for n in range(3)] == [1, 1, 1]
    g.redist(0, GICR_CTLR, 0, 4)
    assert refused(g.message, 5, 0) == "EBUSY" and g.acknowledge(0) == SPURIOUS
    assert g.acknowledge(1) == FIRST + 2  # the other vCPU's is not touched
    g.redist(0, GICR_CTLR, 1, 4)
    assert g.acknowledge(0) == SPURIOUS and g.message(5, 0) == 1 and g.acknowledge(0) == FIRST


def test_turning_them_on_reads_the_pending_table(mapped):
    g = mapped
    g.redist(0, GICR_CTLR, 0, 4)
    at = PENDING + FIRST // 8
    g.vm.write(at, b"\x05")  # 8192, and 8194, which is vCPU 1's
    g.redist(0, GICR_CTLR, 1, 4)
    assert [g.acknowledge(0), g.acknowledge(0), g.acknowledge(1)] == [FIRST, SPURIOUS, SPURIOUS]
    assert g.vm.read(at, 1) == b"\x05"
    g.redist(0, GICR_CTLR, 0, 4)
    g.redist(0, GICR_PENDBASER, PENDING | PTZ)
    g.redist(0, GICR_CTLR, 1, 4)
    assert g.acknowledge(0) == SPURIOUS
    # A table that is not memory: nothing is pending, and nothing breaks.
    g.redist(0, GICR_CTLR, 0, 4)
    g.redist(0, GICR_PENDBASER, NOWHERE)
    g.redist(0, GICR_CTLR, 1, 4)
    assert g.acknowledge(0) == SPURIOUS and g.message(5, 0) == 1


def test_a_new_lpi_takes_its_pending_bit(mapped):
    g = mapped
    g.configure(FIRST + 8)
    at = PENDING + (FIRST + 8) // 8
    g.vm.write(at, b"\x81")
    g.send(mapti(5, 8, FIRST + 8))
    assert g.acknowledge(0) == FIRST + 8 and g.vm.read(at, 1) == b"\x80"
    g.send(mapti(5, 9, FIRST + 15, 3))  # a collection without a target
    assert g.vm.read(at, 1) == b"\x80"


def test_a_pending_table_that_cannot_be_written():
    with guest() as g:
        g.vm.map(0x6000_0000, 0x10000, readonly=True).write(FIRST // 8, b"\1")
        g.start()
        g.configure(FIRST, byte=0)
        g.redist(0, GICR_CTLR, 0, 4)
        g.redist(0, GICR_PENDBASER, 0x6000_0000)
        g.redist(0, GICR_CTLR, 1, 4)
        g.send(mapd(5), mapc(0), mapti(5, 0, FIRST))
        assert not g.vgic.lpis and g.message(5, 0) == 0


def test_saving_what_is_pending(mapped):
    g = mapped
    g.vm.write(PENDING + FIRST // 8, b"\xfe")  # bits of nobody stay
    g.message(5, 0)
    g.message(5, 2)
    g.save_pending()
    assert g.vm.read(PENDING + FIRST // 8, 1) == b"\xfd" and pending(g, 1, FIRST + 2) == 1
    assert g.acknowledge(0) == FIRST
    g.save_pending()
    assert pending(g, 0, FIRST) == 0
    g.redist(1, GICR_CTLR, 0, 4)
    g.redist(1, GICR_PENDBASER, NOWHERE)
    assert refused(g.save_pending) == "EFAULT"
    g.vgic.initialized = False
    assert refused(g.save_pending) == "ENXIO"


def test_invalidation_at_the_redistributor(mapped):
    g = mapped
    g.configure(FIRST, FIRST + 1, FIRST + 2, byte=0)
    g.redist(0, GICR_INVLPIR, FIRST)
    assert [g.message(5, n) for n in range(3)] == [1, 1, 1]
    assert [g.acknowledge(0), g.acknowledge(0), g.acknowledge(1)] == [FIRST + 1, SPURIOUS, FIRST + 2]
    g.message(5, 1)
    g.message(5, 2)
    g.redist(0, GICR_INVALLR, 0)
    assert [g.acknowledge(0), g.acknowledge(1)] == [SPURIOUS, FIRST + 2]
    g.configure(FIRST, FIRST + 1)
    for offset, value, size in ((GICR_INVLPIR + 4, FIRST, 4), (GICR_INVLPIR, 32, 8), (GICR_INVLPIR, 60000, 8)):
        g.redist(0, offset, value, size)
    assert g.acknowledge(0) == SPURIOUS
    g.redist(0, GICR_INVLPIR, FIRST + 1, 4)
    assert g.acknowledge(0) == FIRST + 1
    # A table that is not memory leaves things as they were.
    for number in range(2):
        g.redist(number, GICR_CTLR, 0, 4)
    g.redist(0, GICR_PROPBASER, NOWHERE | 15)
    g.redist(0, GICR_CTLR, 1, 4)
    for offset in (GICR_INVALLR, GICR_INVLPIR):
        g.redist(0, offset, FIRST)
    g.send(words(0x0C, 5, 0), words(0x0D))
    assert g.message(5, 1) == 1 and g.acknowledge(0) == FIRST + 1


def test_a_disabled_distributor_holds_lpis_back(mapped):
    g = mapped
    g.vgic.enabled = False
    assert g.message(5, 0) == 1 and g.acknowledge(0) == SPURIOUS
    g.vgic.enabled = True
    g.vgic.update_all()
    assert g.acknowledge(0) == FIRST


def test_guest_memory_across_slots_and_beyond():
    from kvm2.softkvm import guest_memory

    with guest() as g:
        end = RAM + (16 << 20)
        g.vm.map(end, 0x1000)
        guest_memory.write(g.soft, end - 3, b"abcdef")
        assert guest_memory.read(g.soft, end - 4, 8) == b"\0abcdef\0"
        assert refused(guest_memory.write, g.soft, end + 0xFFE, b"1234") == "EFAULT"
        assert guest_memory.read(g.soft, end + 0xFFE, 2) == b"12"  # what was there is written
        assert refused(guest_memory.read, g.soft, end + 0xFFF, 2) == "EFAULT"
        reader = guest_memory.PageReader(g.soft)
        assert reader.byte(end) == ord("d") and refused(reader.byte, end + 0x1000) == "EFAULT"


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from([0, 0x20, 0xA0, None])), max_size=200))
def test_the_queue_finds_the_first_whatever_comes_and_goes(steps):
    queue, made = lpi_queue.LpiQueue(), {}
    for number, priority in steps:
        irq = made.setdefault(number, lpi.Lpi(FIRST + number, None))
        if priority is None:
            queue.remove(irq)
        else:
            irq.priority = priority
            queue.add(irq)
        expected = min(queue.members.values(), key=lambda irq: (irq.priority, irq.intid), default=None)
        assert queue.first() is expected
        assert len(queue._heap) <= 2 * len(queue.members) + lpi_queue.SLACK
