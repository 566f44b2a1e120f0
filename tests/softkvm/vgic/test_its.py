"""Messages become LPIs, as the commands in the queue say; each command with its checks; the queue."""

from __future__ import annotations

import pytest

from kvm2.abi import its as abi
from kvm2.abi.its import Error
from kvm2.softkvm.vgic import its as its_module
from kvm2.softkvm.vgic import its_commands, its_map

from .its_guest import (
    COLLECTIONS,
    DEVICES,
    FIRST,
    GICR_CTLR,
    ITS,
    ITT,
    PROPERTIES,
    QUEUE,
    QUEUE_SIZE,
    RAM,
    RAM_SIZE,
    Guest,
    guest,
    mapc,
    mapd,
    mapti,
    refused,
    words,
)

SPURIOUS = 1023
NOWHERE = 0x10_0000_0000  # in the IPA space, in no slot


@pytest.fixture
def started():
    """An ITS that is on, with device 5 and collections 0 and 1 on vCPUs 0 and 1."""
    with guest() as g:
        g.start()
        g.configure(*range(FIRST, FIRST + 64))
        g.send(mapd(5), mapc(0, 0), mapc(1, 1))
        yield g


def results(g: Guest, *commands: bytes) -> list[int]:
    """What each command ends with."""
    found = []
    g.soft.observer = lambda what, facts: found.append(facts["result"]) if what == "its-command" else None
    g.send(*commands)
    g.soft.observer = None
    return found


# ---- messages


def test_a_message_is_an_interrupt_of_the_collections_vcpu(started):
    g = started
    g.send(mapti(5, 3, 8200, 1), words(abi.MAPI, 5, 8195, two=0))
    assert g.message(5, 3) == 1 and g.message(5, 8195) == 0  # 8195 does not fit into 8 bits of event ids
    assert [g.acknowledge(0), g.acknowledge(1), g.acknowledge(1)] == [SPURIOUS, 8200, SPURIOUS]
    g.send(mapd(6, bits=14), words(abi.MAPI, 6, 8195, two=0))
    assert g.message(6, 8195) == 1 and g.acknowledge(0) == 8195


def test_the_highest_priority_comes_first_and_what_is_disabled_stays(started):
    g = started
    g.configure(8200, byte=0xA0 | 1)
    g.configure(8201, byte=0x40 | 1)
    g.configure(8202, byte=0x20)
    g.send(*(mapti(5, n, 8200 + n) for n in range(3)))
    assert [g.message(5, n) for n in range(3)] == [1, 1, 1]
    assert [g.acknowledge() for _ in range(3)] == [8201, 8200, SPURIOUS]
    g.configure(8202, byte=0x20 | 1)
    assert g.acknowledge() == SPURIOUS  # not read again yet
    g.send(words(abi.INV, 5, 2))
    assert g.acknowledge() == 8202


def test_what_a_message_is_refused_with():
    with guest() as g:
        assert refused(g.message, 5, 0) == "EBUSY"  # the ITS is off
        g.start()
        g.configure(FIRST)
        assert g.message(5, 0) == 0
        g.send(mapd(5), mapti(5, 0, FIRST))
        assert g.message(5, 0) == 0  # the collection leads nowhere yet
        g.redist(0, GICR_CTLR, 0, 4)
        g.send(mapc(0, 0))
        assert refused(g.message, 5, 0) == "EBUSY"  # LPIs are off
        g.redist(0, GICR_CTLR, 1, 4)
        assert refused(g.message, 5, 0, flags=0) == "EINVAL"
        assert refused(g.message, 5, 0, RAM) == "EINVAL" == refused(g.message, 5, 0, ITS - 8)
        # The kernel looks for an ITS there, not for the register.
        assert g.message(5, 0, ITS) == 1 == g.message(5, 0, ITS + abi.GITS.size - 1)
        assert g.acknowledge() == FIRST
        # A translation that is cached is not checked again, until something is invalidated.
        assert g.message(5, 0, flags=0) == 1
        g.send(mapc(1, 1), mapc(7, valid=False))
        assert refused(g.message, 5, 0, flags=0) == "EINVAL"
        g.set_reg(abi.GITS_CTLR, 0, 4)
        assert refused(g.message, 5, 0) == "EBUSY"


def test_without_an_its_there_are_no_messages():
    with guest() as g:
        g.soft.itses.clear()
        assert refused(g.message, 5, 0) == "ENODEV"


def test_two_itses_have_their_own_maps():
    with guest() as g:
        second = g.vm.create_device("vgic-its")
        assert g.vm.check_extension("MSI_DEVID") == 1
        g.place(ITS + 0x40_0000, second)
        g.start()
        g.configure(FIRST)
        g.send(mapd(5), mapc(0, 0), mapti(5, 0, FIRST))
        assert refused(g.message, 5, 0, ITS + 0x40_0000 + abi.GITS_TRANSLATER) == "EBUSY"
        assert g.message(5, 0) == 1 and len(g.soft.itses) == 2


# ---- commands


def test_commands_that_map_are_checked(started):
    g = started
    outside = COLLECTIONS + RAM_SIZE  # behind the memory
    assert results(
        g,
        mapd(0x1_0000),
        mapd(8192),
        mapd(7, bits=17),
        mapd(7, bits=17, valid=False),
        mapd(7, outside),
        mapc(0, 2),
        mapc(0x2001, 0),
        mapti(9, 0, FIRST),
        mapti(5, 256, FIRST),
        mapti(7, 0, FIRST),
        mapti(5, 0, FIRST - 1),
        mapti(5, 0, 1 << 16),
        mapti(5, 0, 0xFFFF_FFFF),
        mapti(5, 0, FIRST, 0x2001),
        mapti(5, 0, FIRST),
        mapti(5, 0, FIRST + 1),
    ) == [
        Error.MAPD_DEVICE_OOR,
        Error.MAPD_DEVICE_OOR,  # one page of table
        Error.MAPD_ITTSIZE_OOR,
        0,
        0,  # where the table is shows when an event is mapped
        Error.MAPC_PROCNUM_OOR,
        Error.MAPC_COLLECTION_OOR,
        Error.MAPTI_UNMAPPED_DEVICE,
        Error.MAPTI_ID_OOR,
        Error.MAPTI_ID_OOR,
        Error.MAPTI_PHYSICALID_OOR,
        Error.MAPTI_PHYSICALID_OOR,
        Error.MAPTI_PHYSICALID_OOR,
        Error.MAPC_COLLECTION_OOR,
        0,
        0,  # mapped already: the first one stays
    ]
    assert g.message(5, 0) == 1 and g.acknowledge() == FIRST and g.lpi(FIRST + 1) is None


def test_the_configuration_table_decides_how_many_lpis_there_are():
    with guest() as g:
        g.redist(0, 0x70, PROPERTIES | 12)  # 13 bits: none
        g.start()
        g.redist(0, GICR_CTLR, 0, 4)
        g.redist(0, 0x70, PROPERTIES | 12)
        g.send(mapd(5), mapc(0))
        assert results(g, mapti(5, 0, FIRST)) == [Error.MAPTI_PHYSICALID_OOR]
        g.redist(0, 0x70, PROPERTIES | 13)
        assert results(g, mapti(5, 0, FIRST * 2), mapti(5, 0, FIRST * 2 - 1)) == [Error.MAPTI_PHYSICALID_OOR, 0]


def test_an_lpi_whose_tables_are_not_memory_is_not_mapped():
    with guest() as g:
        for number in range(2):
            g.redist(number, 0x70, NOWHERE | 15)
        g.start()
        for number in range(2):
            g.redist(number, GICR_CTLR, 0, 4)
        g.redist(0, 0x70, NOWHERE | 15)
        assert results(g, mapd(5), mapc(0), mapti(5, 0, FIRST, 3)) == [0, 0, -14]
        assert not g.vgic.lpis and list(g.model.collections) == [0]  # nor is the collection made for it
        g.redist(0, 0x70, PROPERTIES | 15)
        g.redist(0, 0x78, NOWHERE)
        assert results(g, mapti(5, 0, FIRST, 0)) == [-14] and not g.vgic.lpis
        assert results(g, mapti(5, 0, FIRST, 3)) == [0]  # without a target there is no pending table


def test_commands_on_events(started):
    g = started
    g.send(mapti(5, 0, FIRST), mapti(5, 1, FIRST + 1, 9))
    missing = words(0, 5, 77)[1:]
    assert results(g, *(bytes([op]) + missing for op in (abi.MOVI, abi.DISCARD, abi.CLEAR, abi.INT, abi.INV))) == [
        Error.MOVI_UNMAPPED_INTERRUPT,
        Error.DISCARD_UNMAPPED_INTERRUPT,
        Error.CLEAR_UNMAPPED_INTERRUPT,
        Error.INT_UNMAPPED_INTERRUPT,
        Error.INV_UNMAPPED_INTERRUPT,
    ]
    assert results(
        g,
        words(abi.MOVI, 5, 0, two=8),  # to no collection
        words(abi.MOVI, 5, 0, two=9),  # to one without a target
        words(abi.MOVI, 5, 1, two=0),  # from one
        words(abi.DISCARD, 5, 1),
        words(abi.INT, 5, 1),
        words(abi.INVALL, two=9),
        words(abi.MOVALL, two=0, three=2 << 16),
        words(abi.MOVALL, two=2 << 16, three=0),
    ) == [
        Error.MOVI_UNMAPPED_COLLECTION,
        Error.MOVI_UNMAPPED_COLLECTION,
        Error.MOVI_UNMAPPED_COLLECTION,
        Error.DISCARD_UNMAPPED_INTERRUPT,
        Error.INT_UNMAPPED_INTERRUPT,
        Error.INVALL_UNMAPPED_COLLECTION,
        Error.MOVALL_PROCNUM_OOR,
        Error.MOVALL_PROCNUM_OOR,
    ]
    assert results(g, words(abi.SYNC), words(0x25), words(0xFF)) == [0, -19, -19]


def test_int_clear_and_moving_what_is_pending(started):
    g = started
    g.send(mapti(5, 0, FIRST), mapti(5, 1, FIRST + 1), words(abi.INT, 5, 0), words(abi.INT, 5, 1))
    assert g.vgic.cpus()[0].irq_line
    g.send(words(abi.CLEAR, 5, 0), words(abi.MOVI, 5, 1, two=1))
    assert [g.acknowledge(0), g.acknowledge(1)] == [SPURIOUS, FIRST + 1]
    g.send(words(abi.INT, 5, 0), words(abi.INT, 5, 1), words(abi.MOVALL, two=0, three=1 << 16))
    assert [g.acknowledge(0), *sorted(g.acknowledge(1) for _ in range(2))] == [SPURIOUS, FIRST, FIRST + 1]
    assert results(g, words(abi.MOVALL, two=1 << 16, three=1 << 16)) == [0]
    # A collection that is mapped again takes its interrupts along.
    g.send(words(abi.INT, 5, 1), mapc(1, 0))
    assert [g.acknowledge(1), g.acknowledge(0)] == [SPURIOUS, FIRST + 1]


def test_an_observer_is_told(started):
    g, seen = started, []
    g.send(mapti(5, 0, FIRST))
    g.soft.observer = lambda what, facts: seen.append((what, *facts.values()))
    g.send(words(abi.INT, 5, 0), words(abi.CLEAR, 5, 0), words(abi.INT, 5, 9))
    g.message(5, 0)
    raised, lowered = ("irq-line", FIRST, 1, 0), ("irq-line", FIRST, 0, 0)
    unmapped = ("its-command", abi.INT, Error.INT_UNMAPPED_INTERRUPT)
    assert seen == [raised, ("its-command", abi.INT, 0), lowered, ("its-command", abi.CLEAR, 0), unmapped, raised]


def test_invall_reads_the_configuration_of_one_vcpus_lpis(started):
    g = started
    g.configure(FIRST, FIRST + 1, byte=0)
    g.send(mapti(5, 0, FIRST, 0), mapti(5, 1, FIRST + 1, 1))
    assert [g.message(5, n) for n in range(2)] == [1, 1]
    g.configure(FIRST, FIRST + 1)
    g.send(words(abi.INVALL, two=0))
    assert [g.acknowledge(0), g.acknowledge(1)] == [FIRST, SPURIOUS]
    g.send(words(abi.INVALL, two=1))
    assert g.acknowledge(1) == FIRST + 1


def test_discard_and_unmapping(started):
    g = started
    g.set_entry(ITT + 8, 0x1234)
    g.send(mapti(5, 1, FIRST))
    assert results(g, words(abi.DISCARD, 5, 1)) == [0] and g.entry(ITT + 8) == 0 and g.lpi(FIRST) is None
    assert g.message(5, 1) == 0
    # What is on a vCPU's list arrives all the same, and the LPI is gone afterwards.
    g.send(mapti(5, 1, FIRST))
    g.message(5, 1)
    g.send(words(abi.DISCARD, 5, 1))
    assert g.lpi(FIRST) is not None and g.acknowledge() == FIRST and g.lpi(FIRST) is None
    # A collection without a target keeps its events, which lead nowhere.
    g.send(mapti(5, 1, FIRST), mapc(0, valid=False))
    assert g.message(5, 1) == 0 and results(g, words(abi.DISCARD, 5, 1)) == [Error.DISCARD_UNMAPPED_INTERRUPT]
    g.send(mapc(0, 0))
    assert g.message(5, 1) == 0  # the event belonged to the old one
    # A device that is mapped again or unmapped has lost all events; unmapping clears its entry.
    assert g.lpi(FIRST) is not None
    g.send(mapd(5))
    assert g.lpi(FIRST) is None and g.message(5, 1) == 0
    g.send(mapti(5, 1, FIRST))
    g.set_entry(DEVICES + 5 * 8, 77)
    g.send(mapd(5, valid=False))
    assert g.entry(DEVICES + 5 * 8) == 0 and g.lpi(FIRST) is None and g.model.event_count == 0


def test_one_lpi_of_two_events(started):
    g = started
    g.send(mapti(5, 0, FIRST), mapti(5, 1, FIRST, 1))
    lpi = g.lpi(FIRST)
    assert lpi is not None and lpi.references == 2 and lpi.target is g.vgic.cpus()[0]
    g.send(words(abi.DISCARD, 5, 0))
    assert g.message(5, 1) == 1 and g.acknowledge(0) == FIRST
    g.send(words(abi.DISCARD, 5, 1))
    assert g.lpi(FIRST) is None


def test_an_indirect_device_table(started):
    g = started
    g.set_reg(abi.GITS_CTLR, 0, 4)
    g.set_reg(abi.GITS_BASER, DEVICES | abi.VALID | abi.BASER_INDIRECT)
    g.set_reg(abi.GITS_CTLR, 1, 4)
    second = RAM + (8 << 20)
    assert results(g, mapd(5), mapd(8192 + 3)) == [Error.MAPD_DEVICE_OOR] * 2  # no second level there
    g.set_entry(DEVICES, second | abi.VALID)
    g.set_entry(DEVICES + 8, NOWHERE | abi.VALID)
    g.set_entry(second + 5 * 8, 9)
    assert results(g, mapd(5), mapd(8192 + 3), mapd(5, valid=False)) == [0, Error.MAPD_DEVICE_OOR, 0]
    assert g.entry(second + 5 * 8) == 0
    g.set_reg(abi.GITS_CTLR, 0, 4)
    g.set_reg(abi.GITS_BASER, NOWHERE | abi.VALID | abi.BASER_INDIRECT)
    g.set_reg(abi.GITS_CTLR, 1, 4)
    assert results(g, mapd(5)) == [Error.MAPD_DEVICE_OOR]


# ---- the queue


def test_the_queue_is_a_ring(started):
    g = started
    for _ in range(QUEUE_SIZE // abi.COMMAND_SIZE):
        g.send(words(abi.SYNC))
    assert g.reg(abi.GITS_CWRITER) == g.reg(abi.GITS_CREADR) == 3 * abi.COMMAND_SIZE
    g.set_reg(abi.GITS_CWRITER, QUEUE_SIZE)  # beyond: ignored
    assert g.reg(abi.GITS_CWRITER) == 3 * abi.COMMAND_SIZE
    g.set_reg(abi.GITS_CWRITER, 0x20 | 0xFFF0_001F)  # the offset only
    assert g.reg(abi.GITS_CWRITER) == 0x20
    g.set_reg(abi.GITS_CWRITER + 4, 0xFFFF_FFFF, 4)
    assert g.reg(abi.GITS_CWRITER) == g.reg(abi.GITS_CREADR) == 0x20


def test_a_queue_that_is_not_memory_is_passed_over(started):
    g = started
    g.set_reg(abi.GITS_CTLR, 0, 4)
    g.set_reg(abi.GITS_CBASER, NOWHERE | abi.VALID | 0xF)
    g.set_reg(abi.GITS_CTLR, 1, 4)
    assert g.reg(abi.GITS_CWRITER) == 0
    g.set_reg(abi.GITS_CWRITER, 0xFFE0)
    assert g.reg(abi.GITS_CREADR) == 0xFFE0 and g.reg(abi.GITS_CTLR, 4) == 0x8000_0001


def test_commands_wait_for_the_its_to_be_enabled():
    with guest() as g:
        g.start()
        g.set_reg(abi.GITS_CTLR, 0, 4)
        g.vm.write(QUEUE, mapc(3, 1))
        g.set_reg(abi.GITS_CWRITER, 0x20)
        assert g.reg(abi.GITS_CTLR, 4) == 0 and g.reg(abi.GITS_CREADR) == 0 and not g.model.collections
        g.set_reg(abi.GITS_CTLR, 1, 4)
        assert g.reg(abi.GITS_CTLR, 4) == 0x8000_0001 and g.model.collections[3].target == 1


def test_one_write_does_bounded_work_and_the_next_access_goes_on(started, monkeypatch):
    g = started
    g.send(*(mapti(5, n, FIRST + n) for n in range(64)))
    monkeypatch.setattr(its_module, "PASS_BUDGET", 300)
    seen = []
    monkeypatch.setitem(its_commands._COMMANDS, abi.SYNC, lambda its, words: seen.append(1) or 0)
    at = g.reg(abi.GITS_CWRITER)
    g.vm.write(QUEUE + at, words(abi.INVALL, two=0) * 10 + words(abi.SYNC))
    g.set_reg(abi.GITS_CWRITER, at + 11 * 32)
    assert g.model.creadr == at + 5 * 32 and not seen  # 65 each
    assert g.reg(abi.GITS_CREADR) == at + 10 * 32
    assert g.reg(abi.GITS_CTLR, 4) == 0x8000_0001 and seen == [1]


def test_a_map_has_a_limit(started, monkeypatch):
    monkeypatch.setattr(its_map, "MAX_EVENTS", 2)
    g = started
    assert results(g, *(mapti(5, n, FIRST) for n in range(3))) == [0, 0, -12]
    assert results(g, words(abi.DISCARD, 5, 0), mapti(5, 2, FIRST)) == [0, 0]
