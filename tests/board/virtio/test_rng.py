"""The entropy device."""

from __future__ import annotations

import pytest

from kvm2.board.virtio import Rng
from kvm2.board.virtio import rng as module

from .driver import NEEDS_RESET


@pytest.fixture
def driver(attach):
    driver = attach(Rng())
    driver.probe(4, 0)
    driver.setup_queue(0)
    driver.ready()
    return driver


def test_random_bytes_from_this_machine(driver):
    at = driver.allocate(64)
    assert driver.transact(driver.queues[0], (), [(at, 32), (at + 32, 32)]) == 64
    first = driver.memory.read(at, 64)
    driver.transact(driver.queues[0], (), [(at, 64)])
    assert first != driver.memory.read(at, 64) and any(first)


def test_a_large_buffer_gets_a_part(driver):
    at = driver.allocate(1 << 17)
    assert driver.transact(driver.queues[0], (), [(at, 1 << 17)]) == module.MAX_BYTES
    assert not any(driver.memory.read(at + module.MAX_BYTES, module.MAX_BYTES))


def test_a_buffer_to_read_from_needs_a_reset(driver):
    driver.add(driver.queues[0], [(driver.allocate(8), 8)])
    driver.kick(driver.queues[0])
    assert driver.readl("Status") & NEEDS_RESET
