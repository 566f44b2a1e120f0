"""Split queues: chains, rings that wrap, who is notified when, and everything that a driver may not do."""

from __future__ import annotations

import pytest

from kvm2.board.virtio import queue as module
from kvm2.board.virtio.queue import GuestMemory, QueueFault, Segment, Virtqueue, split, total

from .driver import BASE, INDIRECT, NEXT, WRITE, FakeMemory

DESC, AVAIL, USED, TABLE, DATA = BASE, BASE + 0x1000, BASE + 0x2000, BASE + 0x3000, BASE + 0x8000


class Ring:
    """A queue of `size` whose rings the test fills itself."""

    def __init__(self, size=8, *, event_idx=False, indirect=True, max_size=8):
        self.memory = FakeMemory(1 << 16)
        self.queue = Virtqueue(GuestMemory(self.memory), max_size)
        self.queue.size, self.queue.desc, self.queue.avail, self.queue.used = size, DESC, AVAIL, USED
        self.queue.enable(event_idx, indirect)
        self.size = size

    def desc(self, index, gpa=DATA, size=16, flags=0, following=0, table=DESC):
        self.memory.put(table + 16 * index, "QIHH", gpa, size, flags, following)

    def offer(self, *heads, index=None):
        at = self.memory.get(AVAIL + 2, "H")
        for number, head in enumerate(heads):
            self.memory.put(AVAIL + 4 + 2 * ((at + number) % self.size), "H", head)
        self.memory.put(AVAIL + 2, "H", at + len(heads) & 0xFFFF if index is None else index)

    def used(self):
        return self.memory.get(USED + 2, "H")


@pytest.fixture
def ring():
    return Ring()


def test_a_chain_has_its_buffers_in_order(ring):
    ring.desc(3, DATA, 16, NEXT, 1)
    ring.desc(1, DATA + 64, 5, NEXT, 0)
    ring.desc(0, DATA + 128, 512, NEXT | WRITE, 7)
    ring.desc(7, DATA + 999, 1, WRITE)
    ring.offer(3)
    chain = ring.queue.pop()
    assert chain == (
        3,
        [Segment(DATA, 16), Segment(DATA + 64, 5)],
        [Segment(DATA + 128, 512), Segment(DATA + 999, 1)],
    )
    assert chain.size == 534 and ring.queue.pop() is None


def test_an_indirect_table_is_followed_also_after_others(ring):
    ring.desc(0, DATA, 4, NEXT, 2)
    ring.desc(2, TABLE, 48, INDIRECT)
    ring.desc(0, DATA + 8, 8, NEXT, 2, table=TABLE)
    ring.desc(2, DATA + 16, 16, WRITE, 0, table=TABLE)
    ring.offer(0)
    chain = ring.queue.pop()
    assert [s.size for s in chain.readable] == [4, 8] and [s.size for s in chain.writable] == [16]


def test_an_indirect_table_may_be_longer_than_a_queue_that_the_driver_made_small():
    ring = Ring(2)
    ring.desc(0, TABLE, 16 * 8, INDIRECT)
    for number in range(8):
        ring.desc(number, DATA, 1, NEXT if number < 7 else 0, number + 1, table=TABLE)
    ring.offer(0)
    assert len(ring.queue.pop().readable) == 8


def test_indices_wrap_at_16_bits(ring):
    ring.desc(5, DATA, 4, WRITE)
    for turn in range(70000):
        ring.offer(5)
        ring.queue.push(ring.queue.pop(), 4)
        assert ring.queue.flush()
        if turn in (65534, 65535, 65536):
            assert ring.used() == turn + 1 & 0xFFFF == ring.queue.last_avail
    assert ring.memory.get(USED + 4 + 8 * (69999 % 8), "I") == 5


def test_the_used_ring_is_written_around_its_end(ring):
    for number in range(8):
        ring.desc(number, DATA, number, WRITE)
    ring.offer(*range(6))
    for chain in ring.queue.requests():
        ring.queue.push(chain, 100 + chain.head)
    ring.queue.flush()
    ring.offer(6, 7, 0, 1)
    for chain in ring.queue.requests():
        ring.queue.push(chain, 200 + chain.head)
    ring.queue.flush()
    entries = [(ring.memory.get(USED + 4 + 8 * n, "I"), ring.memory.get(USED + 8 + 8 * n, "I")) for n in range(8)]
    assert entries == [(0, 200), (1, 201), (2, 102), (3, 103), (4, 104), (5, 105), (6, 206), (7, 207)]
    assert ring.used() == 10


def test_many_requests_read_the_rings_once(ring):
    for number in range(8):
        ring.desc(number)
    ring.offer(*range(8))
    before = ring.memory.reads, ring.memory.writes
    for chain in ring.queue.requests():
        ring.queue.push(chain, 0)
    ring.queue.flush()
    reads, writes = ring.memory.reads - before[0], ring.memory.writes - before[1]
    assert reads <= 6 and writes <= 2, (reads, writes)


def test_unpop_gives_the_same_again(ring):
    ring.desc(0)
    ring.desc(1)
    ring.offer(0, 1)
    first = ring.queue.pop()
    ring.queue.unpop()
    assert ring.queue.pop() == first and ring.queue.pop().head == 1


def test_without_event_idx_the_flag_decides_about_the_interrupt(ring):
    ring.desc(0)
    for flag, wanted in ((0, True), (1, False), (0, True)):
        ring.memory.put(AVAIL, "H", flag)
        ring.offer(0)
        ring.queue.push(ring.queue.pop(), 0)
        assert ring.queue.flush() is wanted
    assert ring.queue.flush() is False, "nothing was used"


def test_with_event_idx_the_index_decides_about_the_interrupt():
    ring = Ring(event_idx=True)
    for number in range(8):
        ring.desc(number)
    ring.memory.put(AVAIL, "H", 1)  # the flag is ignored then
    ring.memory.put(AVAIL + 4 + 2 * 8, "H", 2)
    told = []
    for number in range(5):
        ring.offer(number)
        ring.queue.push(ring.queue.pop(), 0)
        told.append(ring.queue.flush())
    assert told == [False, False, True, False, False]


def test_with_event_idx_the_device_asks_for_the_next_notification():
    ring = Ring(event_idx=True)
    ring.desc(0)
    ring.offer(0, 0, 0)
    assert len(list(ring.queue.requests())) == 3
    assert ring.memory.get(USED + 4 + 8 * 8, "H") == 3


def test_what_comes_while_the_device_works_is_done_too_but_not_for_ever(ring):
    ring.desc(0, DATA, 1)
    ring.offer(0)
    done = 0
    for chain in ring.queue.requests():
        ring.queue.push(chain, 0)
        ring.offer(0)  # another vCPU that never stops
        done += 1
    assert done == module.MAX_ROUNDS * 8 and ring.queue.unfinished
    ring.queue.flush()
    assert ring.used() == done
    beyond = USED + 4 + 8 * 8
    assert not any(ring.memory.read(beyond, 1024)), "more was written than the used ring holds"


def test_one_notification_moves_a_bounded_number_of_bytes(ring, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    ring.desc(0, DATA, 600)
    ring.offer(0, 0, 0)
    assert len(list(ring.queue.requests())) == 2 and ring.queue.unfinished
    assert len(list(ring.queue.requests())) == 1 and not ring.queue.unfinished


def hostile(fill, says, **kind):
    return pytest.param(fill, says, kind, id=says)


@pytest.mark.parametrize(
    ("fill", "says", "kind"),
    [
        hostile(lambda r: r.desc(0, flags=NEXT, following=0), "more than the queue's 8"),
        hostile(lambda r: (r.desc(0, flags=NEXT, following=1), r.desc(1, flags=NEXT)), "more than the queue's"),
        hostile(lambda r: r.desc(0, flags=NEXT, following=8), "descriptor 8 of a table of 8"),
        hostile(lambda r: r.offer(8), "descriptor 8 of"),
        hostile(lambda r: r.offer(0xFFFF), "descriptor 65535 of"),
        hostile(lambda r: r.offer(index=9), "jumped to 9"),
        hostile(lambda r: r.offer(index=0x8000), "jumped to 32768"),
        hostile(lambda r: r.desc(0, TABLE, 0, INDIRECT), "table of 0 bytes"),
        hostile(lambda r: r.desc(0, TABLE, 24, INDIRECT), "table of 24 bytes"),
        hostile(lambda r: r.desc(0, TABLE, 16 * 9, INDIRECT), "table of 144 bytes"),
        hostile(lambda r: r.desc(0, TABLE, 0xFFFFFFF0, INDIRECT), "table of 4294967280 bytes"),
        hostile(lambda r: r.desc(0, 0, 16, INDIRECT), "an indirect table at 0x0"),
        hostile(lambda r: r.desc(0, TABLE, 16, INDIRECT | NEXT, 1), "table is the last of a chain"),
        hostile(lambda r: r.desc(0, TABLE, 16, INDIRECT), "was not negotiated", indirect=False),
        hostile(
            lambda r: (r.desc(0, TABLE, 16, INDIRECT), r.desc(0, TABLE, 16, INDIRECT, table=TABLE)), "not inside one"
        ),
        hostile(
            lambda r: (r.desc(0, TABLE, 16, INDIRECT), r.desc(0, flags=NEXT, following=1, table=TABLE)),
            "descriptor 1 of a table of 1",
        ),
        hostile(lambda r: (r.desc(0, flags=NEXT | WRITE, following=1), r.desc(1)), "readable buffer after a writable"),
        hostile(
            lambda r: [r.desc(n, DATA, 0xFFFFFFFF, NEXT if n < 2 else 0, n + 1) for n in range(3)], "more than 1 << 32"
        ),
        hostile(lambda r: r.desc(0, (1 << 64) - 8, 9), "beyond 1 << 64"),
    ],
)
def test_a_broken_rule_is_named(fill, says, kind):
    ring = Ring(**kind)
    fill(ring)
    if ring.memory.get(AVAIL + 2, "H") == 0:
        ring.offer(0)
    with pytest.raises(QueueFault, match=says):
        ring.queue.pop()


@pytest.mark.parametrize("which", ["desc", "avail", "used"])
def test_rings_without_memory(ring, which):
    ring.queue.disable()
    setattr(ring.queue, which, 0x10000)
    ring.queue.enable(True, True)
    ring.offer(0)
    with pytest.raises(QueueFault, match="0x10"):
        for chain in ring.queue.requests():
            ring.queue.push(chain, 0)
        ring.queue.flush()


def test_segments_are_cut_anywhere():
    segments = [Segment(100, 4), Segment(200, 0), Segment(300, 6)]
    for size in range(12):
        first, rest = split(segments, size)
        assert total(first) == min(size, 10) and total(first) + total(rest) == 10
        flat = [s.gpa + n for s in first + rest for n in range(s.size)]
        assert flat == [*range(100, 104), *range(300, 306)]
