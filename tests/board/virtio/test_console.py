"""The console, worked as Linux's virtio_console.c works it."""

from __future__ import annotations

import pytest

from kvm2.board.virtio import Console, VirtioMmio
from kvm2.board.virtio import console as module
from kvm2.errors import UsageError

from .driver import NEEDS_RESET, Line

ID, F_SIZE = 3, 1


class Guest:
    def __init__(self, driver):
        self.driver = driver
        driver.probe(ID, F_SIZE)
        self.input, self.output = driver.setup_queue(0), driver.setup_queue(1)
        driver.ready()

    def offer(self, size):
        """fill_queue(): a buffer to receive into; its address."""
        at = self.driver.allocate(size)
        self.driver.add(self.input, (), [(at, size)])
        self.driver.kick(self.input)
        return at

    def received(self, at):
        done = self.driver.get(self.input)
        return None if done is None else self.driver.memory.read(at, done[1])


@pytest.fixture
def sent():
    return bytearray()


@pytest.fixture
def console(sent):
    return Console(sent.extend, cols=120, rows=33)


@pytest.fixture
def guest(attach, console):
    return Guest(attach(console))


def test_output_is_used_before_the_notification_returns(guest, sent):
    assert guest.driver.transact(guest.output, [(guest.driver.place(b"hello\n"), 6)]) == 0
    assert sent == b"hello\n"


def test_output_in_pieces(guest, sent, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 7)
    text = bytes(range(200))
    at = guest.driver.place(text)
    guest.driver.transact(guest.output, [(at, 100), (at + 100, 100)])
    assert sent == text


def test_input_waits_for_buffers_and_buffers_for_input(guest, console):
    assert console.feed(b"before") == 6
    at = guest.offer(4)
    assert guest.driver.interrupt() == 1 and guest.received(at) == b"befo"
    more = guest.offer(100)
    assert guest.received(more) == b"re"
    guest.driver.interrupt()
    last = guest.offer(100)
    assert not guest.driver.line.level and guest.received(last) is None
    console.feed(b"now")
    assert guest.driver.interrupt() == 1 and guest.received(last) == b"now"


def test_input_before_there_is_a_driver_is_kept(attach, console):
    console.feed(b"early")
    guest = Guest(attach(console))
    assert guest.received(guest.offer(64)) == b"early"


def test_input_that_nobody_reads_is_not_taken_for_ever(guest, console):
    data = bytes(module.MAX_PENDING + 5)
    assert console.feed(data) == module.MAX_PENDING
    assert console.space == 0 and console.feed(b"x") == 0
    guest.offer(4096)
    assert console.space == 4096 and console.feed(b"xy") == 2


def test_the_size_is_in_the_configuration(guest):
    assert guest.driver.features & F_SIZE
    assert (guest.driver.config(0, 2), guest.driver.config(2, 2), guest.driver.config(4, 4)) == (120, 33, 1)


def test_emergency_write_needs_no_queues(attach, console, sent):
    driver = attach(console)
    for char in b"oops":
        driver.frame.write(0x100 + 8, 4, char)
    assert sent == b"oops" and driver.config(8, 4) == 0


@pytest.mark.parametrize("size", [(-1, 24), (80, 65536)])
def test_a_terminal_that_cannot_be(console, size):
    with pytest.raises(UsageError, match="0 to 65535"):
        Console(print, cols=size[0], rows=size[1])
    with pytest.raises(UsageError, match="0 to 65535"):
        console.resize(*size)
    assert console.config()[:4] == b"\x78\0\x21\0"


def test_a_sink_may_feed(attach):
    echo = Console(lambda data: echo.feed(data))
    guest = Guest(attach(echo))
    at = guest.offer(16)
    guest.driver.transact(guest.output, [(guest.driver.place(b"ping"), 4)])
    assert guest.received(at) == b"ping"


@pytest.mark.parametrize("wrong", ["input", "output"])
def test_buffers_in_the_wrong_direction_need_a_reset(guest, console, wrong):
    queue, at = getattr(guest, wrong), guest.driver.allocate(16)
    parts = ([(at, 16)], ()) if wrong == "input" else ((), [(at, 16)])
    guest.driver.add(queue, *parts)
    guest.driver.kick(queue)
    console.feed(b"x")
    assert guest.driver.readl("Status") & NEEDS_RESET and "virtio-console" in guest.driver.frame.fault


def test_a_snapshot_keeps_what_was_not_read(guest, console, sent):
    console.feed(b"typed")
    saved = guest.driver.frame.state()
    guest.driver.line = Line()
    guest.driver.frame = VirtioMmio(Console(sent.extend), guest.driver.memory, guest.driver.line)
    guest.driver.frame.restore(saved)
    assert guest.received(guest.offer(16)) == b"typed"
    with pytest.raises(UsageError, match="pending"):
        guest.driver.frame.restore(saved | {"device": {"pending": "no"}})
