"""The state of an ITS in guest memory: bytes of ABI revision 0, and bytes that contradict themselves."""

from __future__ import annotations

import pytest

from kvm2.abi import its as abi
from kvm2.abi import vgic_attrs as va
from kvm2.abi.structs import KVM_MEM_LOG_DIRTY_PAGES

from .its_guest import (
    COLLECTIONS,
    DEVICES,
    FIRST,
    ITT,
    PENDING,
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

SAVE, RESTORE, RESET = va.KVM_DEV_ARM_ITS_SAVE_TABLES, va.KVM_DEV_ARM_ITS_RESTORE_TABLES, va.KVM_DEV_ARM_ITS_CTRL_RESET
VALID = abi.VALID
REGISTERS = (abi.GITS_CBASER, abi.GITS_CWRITER, abi.GITS_CREADR, abi.GITS_BASER, abi.GITS_BASER + 8)


def cte(collection: int, vcpu: int) -> int:
    return VALID | vcpu << 16 | collection


def dte(itt: int, bits: int, step: int) -> int:
    return VALID | step << 49 | itt >> 8 << 5 | bits - 1


def ite(intid: int, collection: int, step: int) -> int:
    return step << 48 | intid << 16 | collection


def load(g: Guest, devices=(), collections=(), events=()) -> None:
    """Tables as somebody has saved them: (device, entry) ..., entries ..., (event, entry) at ITT."""
    for base in (DEVICES, COLLECTIONS, ITT):
        g.vm.write(base, bytes(0x10000))
    for number, entry in devices:
        g.set_entry(DEVICES + 8 * number, entry)
    for number, entry in enumerate(collections):
        g.set_entry(COLLECTIONS + 8 * number, entry)
    for number, entry in events:
        g.set_entry(ITT + 8 * number, entry)


def test_what_is_saved_byte_for_byte():
    with guest() as g:
        g.start()
        g.configure(*range(FIRST, FIRST + 16))
        far = ITT + 0x10000
        g.send(mapd(8000, far, 16), mapd(7, bits=5), mapd(6, bits=1), mapc(3, 1), mapc(0, 0))
        g.send(mapti(7, 31, FIRST + 2, 3), mapti(7, 2, FIRST), mapti(7, 4, FIRST + 1, 9), mapti(8000, 65535, FIRST + 3))
        g.control(SAVE)
        assert [g.entry(COLLECTIONS + 8 * n) for n in range(4)] == [cte(3, 1), cte(0, 0), cte(9, 0xFFFF_FFFF), 0]
        assert [g.entry(DEVICES + 8 * n) for n in (6, 7, 8000)] == [dte(ITT, 1, 1), dte(ITT, 5, 7993), dte(far, 16, 0)]
        assert [g.entry(ITT + 8 * n) for n in (2, 4, 31)] == [
            ite(FIRST, 0, 2),
            ite(FIRST + 1, 9, 27),
            ite(FIRST + 2, 3, 0),
        ]
        assert g.entry(far + 8 * 65535) == ite(FIRST + 3, 0, 0)
        # An event without a collection is saved as none; what follows is still a step away from the one before.
        g.send(mapc(9, valid=False))
        g.control(SAVE)
        assert [g.entry(ITT + 8 * n) for n in (2, 4, 31)] == [ite(FIRST, 0, 2), 0, ite(FIRST + 2, 3, 0)]
        assert [g.entry(COLLECTIONS + 8 * n) for n in range(3)] == [cte(3, 1), cte(0, 0), 0]


def test_steps_are_capped():
    with guest() as g:
        g.start(table_pages=8)
        g.send(mapd(0, bits=1), mapd(65535, bits=1))
        g.control(SAVE)
        assert g.entry(DEVICES) == dte(ITT, 1, (1 << 14) - 1)
        g.control(RESET)
        for at, value in ((abi.GITS_BASER, DEVICES | VALID | 7), (abi.GITS_BASER + 8, COLLECTIONS | VALID)):
            g.put(at, value)
        g.control(RESTORE)
        assert set(g.model.devices) == {0, 65535}


def test_a_vm_is_restored_from_memory_and_registers():
    with guest() as old, guest() as new:
        old.start(indirect=True)
        old.configure(*range(FIRST, FIRST + 16))
        second = RAM + (8 << 20)
        old.set_entry(DEVICES + 8, second | VALID)
        old.send(mapd(8192 + 5, ITT, 5), mapd(8192 + 9, ITT + 0x1000, 5), mapc(4, 1), mapc(2, 0))
        old.send(mapti(8192 + 5, 3, FIRST, 4), mapti(8192 + 9, 0, FIRST + 1, 2), mapti(8192 + 9, 1, FIRST + 2, 7))
        assert old.message(8192 + 5, 3) == 1
        old.save_pending()
        assert old.vm.read(PENDING + 0x10000 + FIRST // 8, 1) == b"\1"
        old.control(SAVE)
        # The other VM: memory, redistributors, the registers, tables, and at last GITS_CTLR.
        new.vm.write(RAM, old.vm.read(RAM, RAM_SIZE))
        for number in range(2):
            new.redist(number, 0x70, RAM + (4 << 20) | 15)
            new.redist(number, 0x78, PENDING + number * 0x10000)
            new.redist(number, 0, 1, 4)
        for register in REGISTERS:
            new.put(register, old.get(register))
        new.put(abi.GITS_CREADR, old.get(abi.GITS_CREADR))
        new.control(RESTORE)
        new.put(abi.GITS_CTLR, old.get(abi.GITS_CTLR))
        assert [new.get(r) for r in (*REGISTERS, abi.GITS_CTLR)] == [old.get(r) for r in (*REGISTERS, abi.GITS_CTLR)]
        assert list(new.model.collections) == list(old.model.collections) == [4, 2, 7]
        new.vgic.enabled = True
        for cpu in new.vgic.cpus():
            cpu.interface.set_pmr(0xF8)
            cpu.interface.set_groups(True, True)
            new.vgic.update_all()
        assert new.acknowledge(1) == FIRST  # it was pending
        assert new.message(8192 + 9, 0) == 1 and new.acknowledge(0) == FIRST + 1
        assert new.message(8192 + 9, 1) == 0
        assert new.vm.read(PENDING + 0x10000 + FIRST // 8, 1) == b"\0"  # consumed
        # Saved again, it is the same.
        before = new.vm.read(DEVICES, 0x20000) + new.vm.read(COLLECTIONS, 0x100) + new.vm.read(ITT, 0x10000)
        new.control(SAVE)
        assert before == new.vm.read(DEVICES, 0x20000) + new.vm.read(COLLECTIONS, 0x100) + new.vm.read(ITT, 0x10000)


@pytest.mark.parametrize(
    ("devices", "collections", "events", "expected"),
    [
        ((), (cte(0, 0), cte(1, 1)), (), ""),
        ((), (cte(0, 0), cte(0, 1)), (), "EEXIST"),
        ((), (cte(0, 2),), (), "EINVAL"),
        ((), (cte(0, 0xFFFF_FFFF),), (), ""),
        ((), (cte(8192, 0),), (), "EINVAL"),
        ((), (cte(0, 0) | 0x7FF << 52,), (), ""),  # reserved bits
        (((5, dte(ITT, 5, 0)),), (cte(0, 0),), ((3, ite(FIRST, 0, 0)),), ""),
        (((5, dte(ITT, 17, 0)),), (cte(0, 0),), (), "EINVAL"),
        (((5, dte(ITT, 5, 0)),), (cte(0, 0),), ((3, ite(FIRST - 1, 0, 0)),), "EINVAL"),
        (((5, dte(ITT, 5, 0)),), (cte(0, 0),), ((3, ite(FIRST, 1, 0)),), "EINVAL"),
        (((5, dte(ITT, 5, 0)),), (cte(0, 0),), ((3, ite(FIRST, 0, 29)),), "EINVAL"),
        (((5, dte(ITT, 5, 0)),), (cte(0, 0),), ((3, ite(FIRST, 0, 28)), (31, ite(FIRST, 0, 0))), ""),
        (((5, dte(ITT, 5, 0)),), (cte(0, 0),), ((3, 0xFFFF),), ""),  # no LPI: not valid, the next one is looked at
        (((5, dte(ITT, 5, 0)),), (cte(0, 0),), ((32, ite(1, 0, 0)),), ""),  # behind the table
        (((5, dte(RAM + RAM_SIZE, 5, 0)),), (cte(0, 0),), (), "EFAULT"),
        (((5, dte(ITT, 5, 1)), (6, dte(ITT, 20, 0))), (cte(0, 0),), (), "EINVAL"),
        (((5, dte(ITT, 5, 0)), (6, dte(ITT, 20, 0))), (cte(0, 0),), (), ""),  # 5 said that it is the last
        (((5, dte(ITT, 5, 0x3FFF)),), (cte(0, 0),), (), ""),  # to behind the table
    ],
)
def test_tables_are_checked_and_what_is_wrong_maps_nothing(devices, collections, events, expected):
    with guest() as g:
        g.start()
        load(g, devices, collections, events)
        assert refused(g.control, RESTORE) == expected
        if expected:
            assert not g.model.devices and not g.model.collections and not g.vgic.lpis and not g.model.event_count
        else:
            assert len(g.model.collections) == len(collections)


def test_entries_that_are_not_valid_and_devices_beyond_the_ids():
    with guest() as g:
        g.start(indirect=True)
        load(g, ((1, RAM + (8 << 20) | VALID),), (cte(0, 0),), ((1, ite(FIRST, 0, 0)),))
        g.set_entry(DEVICES, 77)  # no second level
        g.set_entry(RAM + (8 << 20), 77)  # no device
        g.set_entry(RAM + (8 << 20) + 8, dte(ITT, 1, 0))
        g.control(RESTORE)
        assert list(g.model.devices) == [8193] and g.model.event_count == 1
        # Restored again over what is there: the first one stays, and its events are counted once.
        g.set_entry(COLLECTIONS, cte(1, 0))
        g.set_entry(ITT + 8, ite(FIRST, 1, 0))
        before = g.model.devices[8193]
        g.control(RESTORE)
        assert g.model.devices[8193] is before and g.model.event_count == 1
        g.control(RESET)
        g.put(abi.GITS_BASER, DEVICES | VALID | 8)
        g.put(abi.GITS_BASER + 8, COLLECTIONS | VALID)
        g.vm.write(DEVICES, bytes(0x10000))
        g.set_entry(DEVICES + 8 * 65536, dte(ITT, 1, 0))
        assert refused(g.control, RESTORE) == "EINVAL"


def test_without_a_vgic_there_are_no_lpis_to_restore():
    with guest() as g:
        g.start()
        load(g, ((5, dte(ITT, 5, 0)),), (cte(0, 0),), ((0, ite(FIRST, 0, 0)),))
        g.soft.vgic = None
        assert refused(g.control, RESTORE) == "EFAULT" and not g.model.devices


def test_a_table_of_the_wrong_kind_of_memory():
    with guest() as g:
        g.start()
        g.send(mapd(5), mapc(0))
        g.vm.map(0x6000_0000, 0x20000, readonly=True)
        g.set_reg(abi.GITS_CTLR, 0, 4)
        g.set_reg(abi.GITS_BASER + 8, 0x6000_0000 | VALID)
        g.set_reg(abi.GITS_CTLR, 1, 4)
        g.send(mapc(0))
        assert refused(g.control, SAVE) == "EFAULT"
        g.control(RESET)
        g.put(abi.GITS_BASER + 8, 0x7000_0000 | VALID)
        assert refused(g.control, RESTORE) == "EFAULT"


def test_without_valid_tables_nothing_is_saved_or_restored():
    with guest() as g:
        load(g, ((5, dte(ITT, 5, 0)),), (cte(0, 0),))
        g.control(RESTORE)
        assert not g.model.devices and not g.model.collections
        g.control(SAVE)
        assert g.entry(DEVICES + 40) == dte(ITT, 5, 0)


def test_a_device_whose_entry_is_nowhere_is_left_out():
    with guest() as g:
        g.start(indirect=True)
        g.set_entry(DEVICES, RAM + (8 << 20) | VALID)
        g.set_entry(DEVICES + 8, RAM + (9 << 20) | VALID)
        g.send(mapd(1, bits=1), mapd(8192, bits=1), mapd(8200, bits=1))
        g.set_entry(DEVICES + 8, 0)
        g.control(SAVE)
        assert g.entry(RAM + (8 << 20) + 8) == dte(ITT, 1, 0) and g.entry(RAM + (9 << 20)) == 0
        g.set_entry(DEVICES + 8, RAM + (9 << 20) | VALID)
        g.set_entry(DEVICES, 0)
        g.control(SAVE)
        assert g.entry(RAM + (9 << 20)) == dte(ITT, 1, 8) and g.entry(RAM + (9 << 20) + 64) == dte(ITT, 1, 0)


def test_a_full_collection_table_has_no_end_mark():
    with guest() as g:
        g.start()
        for at in range(0, 8192 * 32, 32 * 64):
            g.send(*(mapc(at // 32 + n) for n in range(64)))
        assert len(g.model.collections) == 8192
        g.set_entry(COLLECTIONS + 0x10000, 55)
        g.control(SAVE)
        assert g.entry(COLLECTIONS + 0x10000) == 55 and g.entry(COLLECTIONS + 0xFFF8) == cte(8191, 0)
        g.control(RESET)
        g.put(abi.GITS_BASER + 8, COLLECTIONS | VALID)
        g.control(RESTORE)
        assert len(g.model.collections) == 8192


def test_reset_forgets_everything_but_the_abi():
    with guest() as g:
        g.start()
        g.configure(FIRST)
        g.send(mapd(5), mapc(0), mapti(5, 0, FIRST))
        g.control(RESET)
        assert [g.get(r) for r in (abi.GITS_CTLR, *REGISTERS[:3])] == [0x8000_0000, 0, 0, 0]
        assert g.get(abi.GITS_BASER) >> 63 == g.get(abi.GITS_BASER + 8) >> 63 == 0
        assert g.get(abi.GITS_BASER) >> 48 & 0x1F == 7 and g.get(abi.GITS_IIDR) == 0x4B00_043B
        assert not g.model.devices and not g.model.collections and not g.vgic.lpis
        assert refused(g.message, 5, 0) == "EBUSY"


def test_dirty_pages_are_logged():
    with guest() as g:
        g.start()
        g.send(mapd(5), mapc(0), words(abi.SYNC))
        g.ram.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
        g.control(SAVE)
        bitmap = g.ram.dirty_log()
        pages = [page for page in range(RAM_SIZE >> 12) if bitmap[page >> 3] >> (page & 7) & 1]
        assert pages == [DEVICES - RAM >> 12, COLLECTIONS - RAM >> 12]
