"""Hostile drivers: random registers, rings, descriptors and memory, on every kind of device."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm2.board.virtio import Blk, Console, Net, Rng, VirtioMmio
from kvm2.board.virtio.link import Link
from kvm2.board.virtio.queue import MAX_BYTES, MAX_CHAIN_BYTES
from kvm2.board.virtio.registers import AT, CONFIG, SIZE

from .driver import BASE, DRIVER_OK, NEEDS_RESET, FakeMemory, Line

MEMORY = 1 << 16
QUEUE = 8
DISK_SECTORS = 64
RINGS = (BASE, BASE + 0x400, BASE + 0x800)


class Cable(Link):
    """A link without a socket."""

    def __init__(self):
        self.up = True

    def start(self, deliver, ready, changed):
        self.deliver, self.changed = deliver, changed

    def send(self, frame):
        return True

    def wake(self):
        pass

    def close(self):
        pass


class CountedMemory(FakeMemory):
    """Counts the bytes that one action moves."""

    moved = 0

    def read(self, gpa, size):
        data = super().read(gpa, size)
        self.moved += size
        return data

    def write(self, gpa, data):
        super().write(gpa, data)
        self.moved += len(data)


class Machine:
    """A device with a driver that does as it likes. Every access checks what must always hold."""

    def __init__(self, kind, image):
        self.heard = 0
        self.memory, self.line = CountedMemory(MEMORY), Line()
        self.device = {"blk": lambda: Blk(image), "console": self._console, "rng": Rng, "net": lambda: Net(Cable())}[
            kind
        ]()
        self.frame = VirtioMmio(self.device, self.memory, self.line)

    def _console(self):
        return Console(self._hear)

    def _hear(self, data):
        self.heard += len(data)

    def used(self):
        return [queue.used_idx for queue in self.frame.queues]

    def check(self, act):
        broken, used = self.frame.status & NEEDS_RESET, self.used()
        self.memory.moved = 0
        act()
        # A notification's budget and the chain that goes beyond it, for each queue.
        assert self.memory.moved < len(self.frame.queues) * (MAX_BYTES + MAX_CHAIN_BYTES)
        status = self.frame.read(AT["Status"], 4)
        assert self.line.level == (self.frame.read(AT["InterruptStatus"], 4) != 0)
        assert bool(status & NEEDS_RESET) == bool(self.frame.fault)
        if broken and status & NEEDS_RESET:
            assert self.used() == used, "it works on though it needs a reset"
        if status & NEEDS_RESET and not broken and status & DRIVER_OK:
            assert self.frame.read(AT["InterruptStatus"], 4) & 2

    def write(self, offset, size, value):
        self.check(lambda: self.frame.write(offset, size, value))

    def read(self, offset, size):
        value = self.frame.read(offset, size)
        assert 0 <= value < 1 << 8 * max(size, 0)

    def set(self, name, value):
        self.write(AT[name], 4, value)

    def start(self, features=(1 << 32 | 1 << 28 | 1 << 29)):
        """A proper beginning, so that the hostile part reaches the queues."""
        self.set("Status", 0)
        self.set("Status", 3)
        for half in (0, 1):
            self.set("DriverFeaturesSel", half)
            self.set("DriverFeatures", features >> 32 * half & 0xFFFFFFFF)
        self.set("Status", 11)
        for number in range(len(self.frame.queues)):
            self.set("QueueSel", number)
            self.set("QueueNum", QUEUE)
            for name, at in zip(("Desc", "Driver", "Device"), RINGS, strict=True):
                self.set(f"Queue{name}Low", at + 0x100 * number & 0xFFFFFFFF)
                self.set(f"Queue{name}High", at >> 32)
            self.set("QueueReady", 1)
        self.set("Status", 15)
        assert self.frame.running

    def outside(self, data):
        """The world beyond the device does something too."""
        if isinstance(self.device, Console):
            self.check(lambda: self.device.feed(data))
        elif isinstance(self.device, Net):
            self.check(lambda: self.device.link.deliver([data, data]))
            self.check(self.device.link.changed)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "disk.img"
    path.write_bytes(bytes(512 * DISK_SECTORS))
    return path


def machine(kind, image, play):
    made = Machine(kind, image)
    try:
        play(made)
        # Whatever happened: a reset makes it new.
        made.set("Status", 0)
        made.memory.bytes[:] = bytes(MEMORY)
        made.start()
    finally:
        made.frame.close()


KINDS = pytest.mark.parametrize("kind", ["blk", "console", "rng", "net"])
words = st.one_of(
    st.integers(0, 16),
    st.sampled_from([BASE & 0xFFFFFFFF, BASE >> 32, 0xFFFFFFFF, 0x1000, 0x400, 0x800]),
    st.integers(0, (1 << 64) - 1),
)
accesses = st.tuples(
    st.sampled_from(["read", "write", "set", "poke", "outside"]),
    st.one_of(st.sampled_from(sorted(AT.values())), st.integers(0, SIZE + 8)),
    st.sampled_from([4, 4, 4, 1, 2, 8, 0, 3, 16]),
    words,
)


@KINDS
@given(st.lists(accesses, max_size=60), st.booleans())
@settings(max_examples=60, deadline=None)
def test_random_accesses(image, kind, steps, started):
    def play(made):
        if started:
            made.start()
        for act, offset, size, value in steps:
            if act == "read":
                made.read(offset, size)
            elif act == "write":
                made.write(offset, size, value)
            elif act == "set":
                made.write(offset & ~3, 4, value)
            elif act == "poke":
                made.memory.put(BASE + value % (MEMORY - 8), "Q", value)
            else:
                made.outside(value.to_bytes(8, "little"))

    machine(kind, image, play)


addresses = st.one_of(
    st.integers(BASE, BASE + MEMORY - 1),
    st.sampled_from([0, BASE - 8, BASE + MEMORY - 8, (1 << 64) - 8, *RINGS]),
)
sizes = st.one_of(st.integers(0, 64), st.sampled_from([512, 513, 4096, MEMORY, 0xFFFFFFFF, 0x80000000]))
descriptors = st.tuples(addresses, sizes, st.integers(0, 7), st.integers(0, QUEUE))


@KINDS
@given(
    table=st.lists(descriptors, min_size=QUEUE, max_size=QUEUE),
    inner=st.lists(descriptors, max_size=QUEUE),
    heads=st.lists(st.integers(0, QUEUE), max_size=QUEUE),
    jumps=st.lists(st.one_of(st.integers(0, QUEUE), st.integers(0, 0xFFFF)), min_size=1, max_size=4),
    header=st.tuples(st.integers(0, 16), st.integers(0, DISK_SECTORS + 1)),
    features=st.sampled_from([1 << 32, 1 << 32 | 1 << 28, 1 << 32 | 1 << 29, 1 << 32 | 1 << 28 | 1 << 29]),
)
@settings(max_examples=100, deadline=None)
def test_random_queues(image, kind, table, inner, heads, jumps, header, features):
    def play(made):
        count = len(made.frame.queues)
        # Requests that look like a disk's lie all over the memory.
        for at in range(0x1000, MEMORY, 32):
            made.memory.put(BASE + at, "IIQ", header[0], 0, header[1])
        for number, desc in enumerate(inner):
            made.memory.put(BASE + 0x1000 + 16 * number, "QIHH", *desc)
        made.start(features)
        for jump in jumps:
            for queue in range(count):
                for number, desc in enumerate(table):
                    made.memory.put(RINGS[0] + 0x100 * queue + 16 * number, "QIHH", *desc)
                for number, head in enumerate(heads):
                    made.memory.put(RINGS[1] + 0x100 * queue + 4 + 2 * number, "H", head)
                made.memory.put(RINGS[1] + 0x100 * queue + 2, "H", jump)
                made.set("QueueNotify", queue)
            made.outside(b"hello, guest")
            made.set("InterruptACK", 3)

    machine(kind, image, play)


@KINDS
def test_the_largest_chain_is_bounded_work(image, kind):
    """As many descriptors as there may be, all of the whole memory: no more is moved than they say."""

    def play(made):
        made.start()
        for queue in range(len(made.frame.queues)):
            for number in range(QUEUE):
                flags = (1 if number < QUEUE - 1 else 0) | (2 if kind == "rng" or (kind == "blk" and number) else 0)
                made.memory.put(RINGS[0] + 0x100 * queue + 16 * number, "QIHH", BASE, MEMORY, flags, number + 1)
            made.memory.put(RINGS[1] + 0x100 * queue + 2, "H", QUEUE)
            made.set("QueueNotify", queue)
        assert made.memory.moved <= 2 * QUEUE * QUEUE * MEMORY
        assert made.heard <= QUEUE * QUEUE * MEMORY

    machine(kind, image, play)


def test_a_ring_on_top_of_its_own_buffers_ends(image):
    """The device writes into its own rings: what it reads there next is checked like everything else."""

    def play(made):
        made.start()
        made.memory.write(RINGS[0], struct.pack("<QIHH", RINGS[0], 0x1000, 2, 0) * QUEUE)
        made.memory.put(RINGS[1] + 2, "H", QUEUE)
        for _ in range(8):
            made.set("QueueNotify", 0)
            made.set("InterruptACK", 3)

    machine("rng", image, play)


def test_offsets_beyond_the_frame_and_all_widths(image):
    def play(made):
        for offset in range(CONFIG - 8, SIZE + 32):
            for size in range(17):
                made.read(offset, size)
                made.write(offset, size, (1 << 128) - 1)

    for kind in ("blk", "console", "rng", "net"):
        machine(kind, image, play)
