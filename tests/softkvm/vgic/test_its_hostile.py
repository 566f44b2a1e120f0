"""A guest that means harm: whatever it writes to the ITS and into its tables, there is a defined end.

No exception leaves the ITS, its map stays consistent, and what is mapped can be saved, reset and used again.
"""

from __future__ import annotations

import random
import struct

import pytest

from kvm2.abi import its as abi
from kvm2.abi import vgic_attrs as va
from kvm2.errors import KvmError

from .its_guest import (
    FIRST,
    ITS,
    ITT,
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

REDIST_REGISTERS = (0x0, 0x70, 0x78, 0xA0, 0xB0)


def consistent(g: Guest) -> None:
    """Every event's LPI is known and counted; who is pending and enabled is on its vCPU's list."""
    counted: dict[int, int] = {}
    for its in g.soft.itses:
        assert its.event_count == len(its.events())
        assert its.creadr < its._queue_size() and its.cwriter < its._queue_size()
        for event in its.events():
            counted[event.lpi.intid] = counted.get(event.lpi.intid, 0) + 1
            assert g.vgic.lpis[event.lpi.intid] is event.lpi
            assert event.collection is None or its.collections[event.collection.number] is event.collection
    for intid, lpi in g.vgic.lpis.items():
        assert lpi.references == counted.get(intid, 0)
        listed = lpi.target if g.vgic.enabled and lpi.enabled and lpi.pending_latch else None
        assert lpi.cpu is listed and (listed is None or listed.lpis.members[intid] is lpi)


def address(rng: random.Random) -> int:
    return rng.choice([rng.getrandbits(52), RAM + rng.randrange(RAM_SIZE), RAM + RAM_SIZE - 0x800, ITS, 0, QUEUE, ITT])


def command(rng: random.Random) -> bytes:
    """Any opcode with words that make sense now and then."""
    if rng.random() < 0.2:
        return rng.randbytes(32)
    small, intid = rng.choice([0, 1, 2, 5]), FIRST + rng.randrange(40)
    return rng.choice(
        [
            words(rng.choice(list(abi.COMMANDS)), small, rng.choice([0, 1, 8, 63]), intid, rng.getrandbits(64)),
            mapd(small, address(rng) & ~0xFF & (1 << 52) - 1, rng.randrange(1, 17), rng.random() < 0.8),
            mapc(rng.choice([0, 1, 2, 9999]), rng.randrange(3), rng.random() < 0.7),
            mapti(small, rng.randrange(70), intid, rng.choice([0, 1, 2, 9999])),
            words(abi.INT, small, rng.randrange(70)),
            words(abi.MOVALL, two=rng.randrange(3) << 16, three=rng.randrange(3) << 16),
        ]
    )


def register(rng: random.Random, g: Guest) -> None:
    offset = rng.choice(
        [rng.choice(abi.GITS.registers).offset + rng.choice([0, 0, 0, 4, 8]), rng.randrange(abi.GITS.size)]
    )
    value = rng.choice([rng.getrandbits(64), address(rng) | abi.VALID | rng.getrandbits(8), 1, 0])
    size = rng.choice([1, 2, 4, 8])
    if rng.random() < 0.5:
        g.write(ITS + offset, value & (1 << 8 * size) - 1, size)
    else:
        seen = g.read(ITS + offset, size)
        assert seen is not None and 0 <= seen < 1 << 8 * size


def step(rng: random.Random, g: Guest) -> None:
    what = rng.random()
    if what < 0.45:
        at = rng.randrange(0, QUEUE_SIZE, 32)
        many = rng.randrange(1, 12)
        g.vm.write(QUEUE + at, b"".join(command(rng) for _ in range(min(many, (QUEUE_SIZE - at) // 32))))
        # The pointer is put where these lie, as a guest cannot: the queue is walked from there.
        g.model.creadr = min(at, g.model._queue_size() - 32)
        g.set_reg(abi.GITS_CWRITER, at + 32 * many)
    elif what < 0.6:
        register(rng, g)
    elif what < 0.7:
        offset = rng.choice(REDIST_REGISTERS)
        value = rng.choice([0, 1, address(rng) | rng.getrandbits(5), rng.getrandbits(64)])
        g.write(0x080A_0000 + rng.randrange(2) * 0x20000 + offset, value, 4 if offset == 0 else 8)
    elif what < 0.9:
        assert refused(g.message, rng.choice([0, 1, 2, 5]), rng.randrange(70)) in ("", "EBUSY")
    elif what < 0.95:
        g.acknowledge(rng.randrange(2))
    else:
        g.vm.write(RAM + rng.randrange(RAM_SIZE // 8) * 8, rng.randbytes(8))


SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 40))]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_guests_end_defined(seed):
    rng = random.Random(seed)
    with guest() as g:
        g.start(indirect=bool(seed & 1))
        if seed & 1:
            g.set_entry(RAM + (2 << 20), RAM + (9 << 20) | abi.VALID)
        for _ in range(100):
            step(rng, g)
        consistent(g)
        for control in (va.KVM_DEV_ARM_ITS_SAVE_TABLES, va.KVM_DEV_ARM_ITS_RESTORE_TABLES):
            try:
                g.control(control)
            except KvmError as refusal:
                assert refusal.name in ("EFAULT", "EINVAL", "EEXIST")
        consistent(g)
        g.control(va.KVM_DEV_ARM_ITS_CTRL_RESET)
        consistent(g)
        assert not g.model.event_count
        # The same machine, set up properly, works.
        for number in range(2):
            g.redist(number, 0, 0, 4)
        g.start()
        g.configure(FIRST)
        g.send(mapd(5), mapc(0), mapti(5, 0, FIRST))
        while g.acknowledge() != 1023:
            pass
        assert g.message(5, 0) == 1 and g.acknowledge() == FIRST


@pytest.mark.parametrize("seed", range(8))
def test_tables_of_rubbish_are_restored_or_refused(seed):
    rng = random.Random(1000 + seed)
    with guest() as g:
        g.start(indirect=bool(seed & 1))
        tables = [RAM + n * 0x10000 for n in range(0x20, 0x31)]
        for base in tables:
            for _ in range(rng.choice([0, 3, 40])):
                where = rng.choice([rng.randrange(16), rng.randrange(8192)])
                entry = rng.choice(
                    [
                        rng.getrandbits(64),
                        abi.VALID | rng.choice(tables) >> 3 | rng.randrange(32) | rng.randrange(4) << 49,
                        abi.VALID | rng.choice(tables),
                        (FIRST + rng.randrange(99)) << 16 | rng.randrange(3) | rng.randrange(3) << 48,
                        abi.VALID | rng.randrange(3) << 16 | rng.randrange(3),
                    ]
                )
                g.set_entry(base + 8 * where, entry)
        try:
            g.control(va.KVM_DEV_ARM_ITS_RESTORE_TABLES)
        except KvmError as refusal:
            assert refusal.name in ("EFAULT", "EINVAL", "EEXIST")
            assert not g.model.devices and not g.model.collections
        consistent(g)


def test_a_queue_in_the_tables_and_tables_in_the_queue():
    with guest() as g:
        g.start()
        for value in (QUEUE | abi.VALID, QUEUE | abi.VALID | abi.BASER_INDIRECT):
            g.set_reg(abi.GITS_CTLR, 0, 4)
            g.set_reg(abi.GITS_BASER, value)
            g.set_reg(abi.GITS_BASER + 8, QUEUE | abi.VALID)
            g.set_reg(abi.GITS_CBASER, QUEUE | abi.VALID | 15)
            g.set_reg(abi.GITS_CTLR, 1, 4)
            g.vm.write(QUEUE, (mapd(1, QUEUE) + mapc(0) + mapti(1, 0, FIRST) + mapd(1, QUEUE, valid=False)) * 512)
            g.set_reg(abi.GITS_CWRITER, 0xFFE0)
            assert g.reg(abi.GITS_CREADR) == 0xFFE0
            consistent(g)


def test_a_full_queue_of_the_dearest_commands_ends_soon():
    with guest() as g:
        g.start()
        g.configure(*range(FIRST, FIRST + 1024))
        g.vm.write(QUEUE, struct.pack("<4Q", abi.SYNC, 0, 0, 0) * 2048)
        g.send(mapd(5, bits=10), mapc(0, 0), *(mapti(5, event, FIRST + event) for event in range(1024)))
        # Every LPI moves to and fro, 600 times: more than one access has the time for.
        g.model.creadr = g.model.cwriter = 0
        move = words(abi.MOVALL, two=0, three=1 << 16) + words(abi.MOVALL, two=1 << 16, three=0)
        g.vm.write(QUEUE, move * 300)
        g.set_reg(abi.GITS_CWRITER, 600 * 32)
        assert 0 < g.model.creadr < 600 * 32
        passes = 1
        while g.reg(abi.GITS_CTLR, 4) == 1:
            passes += 1
        assert g.reg(abi.GITS_CREADR) == 600 * 32 and passes == 2  # and one more, of 256 commands each
        consistent(g)
