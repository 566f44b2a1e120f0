"""The registers and the state machine, worked as Linux works them and as it does not."""

from __future__ import annotations

import json

import pytest

from kvm2.board.virtio import Console, Rng, VirtioMmio
from kvm2.board.virtio import queue as queue_module
from kvm2.board.virtio.registers import AT, CONFIG, REGISTERS, SIZE
from kvm2.errors import UsageError

from .driver import (
    ACKNOWLEDGE,
    BASE,
    DRIVER,
    DRIVER_OK,
    EVENT_IDX,
    FAILED,
    FEATURES_OK,
    INDIRECT_DESC,
    NEEDS_RESET,
    VERSION_1,
    FakeMemory,
    Line,
)

RNG_ID, CONSOLE_ID = 4, 3


@pytest.fixture
def source():
    """Numbered bytes, so that what arrives can be told."""
    return lambda size: bytes(number & 0xFF for number in range(size))


@pytest.fixture
def rng(attach, source):
    """An entropy device with its driver before `ready`."""
    driver = attach(Rng(source))
    driver.probe(RNG_ID, 0)
    return driver


def test_linux_sequence_from_probe_to_the_interrupt(rng):
    queue = rng.setup_queue(0)
    assert rng.readl("QueueReady") == 1 and queue.num == 256
    rng.ready()
    buffer = rng.allocate(64)
    assert rng.transact(queue, (), [(buffer, 64)]) == 64
    assert rng.memory.read(buffer, 64) == bytes(range(64))
    assert not rng.line.level and rng.line.changes == 2


def test_a_buffer_that_was_announced_too_early_is_used_at_driver_ok(rng):
    queue = rng.setup_queue(0)
    buffer = rng.allocate(8)
    rng.add(queue, (), [(buffer, 8)])
    rng.kick(queue)
    assert rng.get(queue) is None and not rng.line.level
    rng.ready()
    assert rng.get(queue) == (0, 8)


def test_every_register_answers_as_its_access_says(rng):
    frame = rng.frame
    for register in REGISTERS:
        readable, writable = register.offset in frame._readers, register.offset in frame._writers
        assert ("r" in register.access, "w" in register.access) == (readable, writable), register.name
    for offset in range(0, CONFIG, 4):
        if offset not in AT.values():
            frame.write(offset, 4, 0xFFFFFFFF)
            assert frame.read(offset, 4) == 0


@pytest.mark.parametrize("size", [1, 2, 8, 3, 0, 16])
def test_other_widths_and_odd_offsets_read_zero_and_write_nothing(rng, size):
    assert rng.frame.read(AT["MagicValue"], size) == 0
    assert rng.frame.read(AT["MagicValue"] + 1, 4) == 0
    before = rng.readl("Status")
    rng.frame.write(AT["Status"], size, 0)
    rng.frame.write(AT["Status"] + 2, 4, 0)
    assert rng.readl("Status") == before != 0


def test_shared_memory_and_queue_reset_are_not_there(rng):
    rng.writel("SHMSel", 3)
    assert {rng.readl(name) for name in ("SHMLenLow", "SHMLenHigh", "SHMBaseLow", "SHMBaseHigh")} == {0xFFFFFFFF}
    rng.writel("QueueReset", 1)
    assert rng.readl("QueueReset") == 0


def test_features_have_two_banks_and_no_third(rng):
    words = []
    for bank in range(4):
        rng.writel("DeviceFeaturesSel", bank)
        words.append(rng.readl("DeviceFeatures"))
    assert words == [(EVENT_IDX | INDIRECT_DESC), VERSION_1 >> 32, 0, 0]


@pytest.mark.parametrize("features", [0, EVENT_IDX, VERSION_1 | 1 << 34, VERSION_1 | 1 << 5])
def test_features_that_were_not_offered_and_legacy_drivers_are_refused(attach, features):
    driver = attach(Rng())
    driver.writel("Status", ACKNOWLEDGE)
    driver.writel("Status", ACKNOWLEDGE | DRIVER)
    driver.write_features(features)
    assert driver.add_status(FEATURES_OK) == ACKNOWLEDGE | DRIVER
    # Nor does it start without.
    assert driver.add_status(DRIVER_OK) == ACKNOWLEDGE | DRIVER
    driver.write_features(VERSION_1)
    assert driver.add_status(FEATURES_OK) & FEATURES_OK


def test_negotiated_features_stay(rng):
    rng.write_features(0)
    assert rng.frame.negotiated(32)


def test_status_bits_are_only_added_until_the_reset(rng):
    status = rng.readl("Status")
    rng.writel("Status", ACKNOWLEDGE)
    assert rng.readl("Status") == status
    rng.writel("Status", status | NEEDS_RESET | 0x130)
    assert rng.readl("Status") == status
    rng.writel("Status", FAILED)
    assert rng.readl("Status") == status | FAILED
    rng.writel("Status", 0)
    assert rng.readl("Status") == 0


def test_reset_forgets_queues_features_and_interrupts(rng):
    queue = rng.setup_queue(0)
    rng.ready()
    rng.add(queue, (), [(rng.allocate(8), 8)])
    rng.kick(queue)
    assert rng.line.level
    rng.writel("Status", 0)
    assert not rng.line.level
    assert (rng.readl("QueueReady"), rng.readl("InterruptStatus"), rng.readl("Status")) == (0, 0, 0)
    # And the whole sequence works again.
    rng.probe(RNG_ID, 0)
    again = rng.setup_queue(0)
    rng.ready()
    assert rng.transact(again, (), [(rng.allocate(8), 8)]) == 8


def test_there_is_no_second_queue(rng):
    for index in (1, 77, 0xFFFFFFFF):
        rng.writel("QueueSel", index)
        assert (rng.readl("QueueNumMax"), rng.readl("QueueReady")) == (0, 0)
        for name in ("QueueNum", "QueueDescLow", "QueueReady", "QueueNotify"):
            rng.writel(name, 1)
        assert (rng.readl("QueueReady"), rng.frame.fault) == (0, "")


def test_a_ready_queue_cannot_be_moved(rng):
    queue = rng.setup_queue(0)
    rng.writel("QueueNum", 4)
    rng.writel("QueueDescLow", 0)
    rng.writel("QueueDescHigh", 0)
    assert rng.frame.queues[0].size == queue.num and rng.frame.queues[0].desc == queue.desc
    rng.ready()
    assert rng.transact(queue, (), [(rng.allocate(4), 4)]) == 4


def test_a_queue_that_was_taken_away_is_left_alone_and_starts_anew(rng):
    queue = rng.setup_queue(0)
    rng.ready()
    rng.transact(queue, (), [(rng.allocate(4), 4)])
    rng.writel("QueueReady", 0)
    rng.add(queue, (), [(rng.allocate(4), 4)])
    rng.writel("QueueNotify", 0)
    assert rng.get(queue) is None and not rng.frame.fault
    again = rng.setup_queue(0)
    assert rng.transact(again, (), [(rng.allocate(4), 4)]) == 4


@pytest.mark.parametrize("num", [0, 3, 512, 0xFFFFFFFF])
def test_a_size_that_a_queue_cannot_have_needs_a_reset(rng, num):
    rng.writel("QueueSel", 0)
    rng.writel("QueueNum", num)
    rng.writel("QueueReady", 1)
    assert rng.readl("QueueReady") == 0 and rng.readl("Status") & NEEDS_RESET
    assert f"{num} descriptors" in rng.frame.fault and "256" in rng.frame.fault
    assert not rng.line.level, "no notification before DRIVER_OK (section 2.1.2)"


@pytest.mark.parametrize(("name", "offset"), [("Desc", 8), ("Driver", 1), ("Device", 2)])
def test_a_ring_off_its_alignment_needs_a_reset(rng, name, offset):
    rng.writel("QueueSel", 0)
    rng.writel("QueueNum", 8)
    rng.writel(f"Queue{name}Low", 0x1000 + offset)
    rng.writel("QueueReady", 1)
    assert rng.readl("Status") & NEEDS_RESET and "multiple of" in rng.frame.fault


def test_a_ring_beyond_the_last_address_needs_a_reset(rng):
    rng.writel("QueueSel", 0)
    rng.writel("QueueNum", 8)
    rng.writel("QueueDeviceHigh", 0xFFFFFFFF)
    rng.writel("QueueDeviceLow", 0xFFFFFFFC)
    rng.writel("QueueReady", 1)
    assert rng.readl("Status") & NEEDS_RESET and "1 << 64" in rng.frame.fault


def test_after_a_fault_nothing_is_done_until_the_reset(rng):
    queue = rng.setup_queue(0)
    rng.ready()
    rng.add(queue, (), [(0x1000, 8)])  # no memory there
    rng.kick(queue)
    assert rng.readl("Status") & NEEDS_RESET and "0x1000" in rng.frame.fault
    assert rng.interrupt() == 2
    buffer = rng.allocate(8)
    rng.add(queue, (), [(buffer, 8)])
    rng.writel("QueueNotify", 0)
    assert rng.get(queue) is None and not rng.line.level and not rng.memory.get(buffer, "Q")
    rng.writel("Status", rng.readl("Status") & ~NEEDS_RESET)
    assert rng.readl("Status") & NEEDS_RESET
    rng.writel("Status", 0)
    assert rng.readl("Status") == 0 and rng.frame.fault == ""


def test_work_beyond_one_notification_goes_on_with_the_acknowledgement(rng, monkeypatch):
    monkeypatch.setattr(queue_module, "MAX_BYTES", 100)
    queue = rng.setup_queue(0)
    rng.ready()
    for _ in range(5):
        rng.add(queue, (), [(rng.allocate(64), 64)])
    # A driver that wants no interrupt before the last one gets some all the same: it must come back.
    rng.memory.put(queue.avail + 4 + 2 * queue.num, "H", 4)
    rng.kick(queue)
    counts = []
    while rng.line.level:
        counts.append(rng.frame.queues[0].used_idx)
        rng.interrupt()
    assert counts == [2, 4, 5]


def test_configuration_in_any_width_and_nothing_behind_it(attach):
    driver = attach(Console(lambda data: None, cols=0x1234, rows=0x5678))
    assert [driver.config(offset, 1) for offset in range(4)] == [0x34, 0x12, 0x78, 0x56]
    assert driver.config(0, 4) == 0x56781234 and driver.config(0, 8) == 0x1_5678_1234
    assert driver.config(1, 2) == 0x7812
    assert [driver.frame.read(SIZE - 1, size) for size in (1, 2, 8, 0, -4)] == [0] * 5
    for offset in range(CONFIG, SIZE + 16, 3):
        driver.frame.write(offset, 8, (1 << 64) - 1)
    assert driver.config(0, 4) == 0x56781234


def test_a_change_of_the_configuration_is_told_with_another_generation(attach):
    console = Console(lambda data: None)
    driver = attach(console)
    before = driver.readl("ConfigGeneration")
    console.resize(132, 50)
    assert not driver.line.level and driver.readl("ConfigGeneration") != before, "no driver, no interrupt"
    driver.probe(CONSOLE_ID, 1)
    driver.ready()
    console.resize(100, 40)
    assert driver.interrupt() == 2 and driver.config(0, 4) == 40 << 16 | 100


def test_a_device_is_in_one_machine(attach):
    rng = Rng()
    attach(rng)
    with pytest.raises(UsageError, match="in a machine already"):
        attach(rng)


def test_a_restored_device_goes_on_where_it_was(rng, source):
    queue = rng.setup_queue(0, 16)
    rng.ready()
    for _ in range(40):
        rng.transact(queue, (), [(rng.allocate(4), 4)])
    rng.add(queue, (), [(rng.allocate(4), 4)])
    rng.kick(queue)
    saved = json.loads(json.dumps(rng.frame.state()))
    rng.line = Line()
    rng.frame = VirtioMmio(Rng(source), rng.memory, rng.line)
    rng.frame.restore(saved)
    assert rng.interrupt() == 1 and rng.get(queue) is not None
    assert rng.transact(queue, (), [(rng.allocate(4), 4)]) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "virtio-blk"}, "virtio-blk"),
        ({"queues": []}, "queues"),
        ({"driver_features": 1 << 3 | 1 << 32}, "0x8"),
        ({"status": 0x100}, "status"),
        ({"interrupts": "yes"}, "interrupts"),
        ({"queues": [{"size": -1}]}, "size = -1"),
        ({"selected": [0, 0]}, "queue"),
    ],
)
def test_a_state_that_cannot_be_is_refused(rng, change, says):
    rng.setup_queue(0)
    saved = rng.frame.state()
    with pytest.raises(UsageError, match=says):
        VirtioMmio(Rng(), FakeMemory(), Line()).restore(saved | change)


def test_a_state_with_a_queue_that_cannot_be_is_refused(rng):
    rng.setup_queue(0)
    saved = rng.frame.state()
    saved["queues"][0]["desc"] = BASE + 1
    with pytest.raises(UsageError, match="multiple of 16"):
        VirtioMmio(Rng(), FakeMemory(), Line()).restore(saved)
