"""A split virtqueue from the device's side (virtio 1.2, section 2.7).

The rings are in the guest's memory and the driver may be hostile: whatever is not as the specification demands ends
in a `QueueFault`, which the transport turns into DEVICE_NEEDS_RESET. Nothing here allocates more than a ring's size,
and a chain has at most as many descriptors as the largest queue.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kvm2.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

# struct vring_desc, and the bits of its flags.
DESC = struct.Struct("<QIHH")
DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT = 1, 2, 4
# struct vring_avail: flags, idx, ring[size], used_event.
# struct vring_used: flags, idx, ring[size] of (id, len), avail_event.
RING_HEADER = 4
AVAIL_ENTRY, USED_ENTRY, EVENT = 2, 8, 2
AVAIL_F_NO_INTERRUPT = 1
DESC_ALIGN, AVAIL_ALIGN, USED_ALIGN = 16, 2, 4
INDEX = 0xFFFF
"""Ring indices count on and wrap at 16 bits."""

MAX_CHAIN_BYTES = 1 << 32
"""Section 2.7.5.2: no chain is longer in total."""
ADDRESS_END = 1 << 64
# One notification does at most this much, so that a vCPU's thread comes back; the rest is done when the driver
# acknowledges the interrupt that it gets for the first part.
MAX_ROUNDS, MAX_BYTES = 4, 64 << 20


class QueueFault(Exception):
    """The driver broke a rule of virtio: which, in words. It never leaves the transport."""


class Memory(Protocol):
    """Guest memory, as `kvm2.vm.Vm` has it: UsageError where nothing is mapped."""

    def read(self, gpa: int, size: int, /) -> bytes: ...
    def write(self, gpa: int, data: bytes, /) -> None: ...


class Segment(NamedTuple):
    """`size` bytes of a buffer at guest physical address `gpa`."""

    gpa: int
    size: int


class Chain(NamedTuple):
    """One request: the descriptor it starts with, what the device may read and what it may write, in order."""

    head: int
    readable: list[Segment]
    writable: list[Segment]

    @property
    def size(self) -> int:
        """Bytes of all its segments."""
        return total(self.readable) + total(self.writable)


def total(segments: list[Segment]) -> int:
    """Bytes of the segments.

    >>> total([Segment(0x1000, 16), Segment(0x8000, 4)])
    20
    """
    return sum(segment.size for segment in segments)


def split(segments: list[Segment], size: int) -> tuple[list[Segment], list[Segment]]:
    """The first `size` bytes, and the rest: drivers may cut a request into segments as they like (section 2.7.4).

    >>> split([Segment(0x1000, 16), Segment(0x8000, 4)], 18)
    ([Segment(gpa=4096, size=16), Segment(gpa=32768, size=2)], [Segment(gpa=32770, size=2)])
    """
    first: list[Segment] = []
    for number, segment in enumerate(segments):
        if size <= 0:
            return first, segments[number:]
        take = min(size, segment.size)
        first.append(Segment(segment.gpa, take))
        size -= take
        if take < segment.size:
            return first, [Segment(segment.gpa + take, segment.size - take), *segments[number + 1 :]]
    return first, []


class GuestMemory:
    """The guest's memory for a device: an address without memory behind it is the driver's fault."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def read(self, gpa: int, size: int, what: str = "a buffer") -> bytes:
        """`size` bytes; QueueFault where they are not all mapped."""
        try:
            return self._memory.read(gpa, size)
        except UsageError as error:
            raise QueueFault(f"{what} at {gpa:#x}, {size:#x} bytes: {error}") from None

    def write(self, gpa: int, data: bytes, what: str = "a buffer") -> None:
        """Put `data`; QueueFault where not all of it is mapped."""
        try:
            self._memory.write(gpa, data)
        except UsageError as error:
            raise QueueFault(f"{what} at {gpa:#x}, {len(data):#x} bytes: {error}") from None

    def gather(self, segments: list[Segment]) -> bytes:
        """The bytes of all segments; the caller bounds them."""
        return b"".join(self.read(gpa, size) for gpa, size in segments)

    def scatter(self, segments: list[Segment], data: bytes) -> None:
        """`data` into the segments, which have room for it."""
        at = 0
        for gpa, size in segments:
            if at >= len(data):
                return
            self.write(gpa, data[at : at + size])
            at += size

    def pieces(self, segments: list[Segment], size: int) -> Iterator[bytes]:
        """The bytes of all segments in pieces of at most `size`."""
        for gpa, length in segments:
            for offset in range(0, length, size):
                yield self.read(gpa + offset, min(size, length - offset))


class Virtqueue:
    """One queue: where its rings are, and how far the device has come in them."""

    def __init__(self, memory: GuestMemory, max_size: int) -> None:
        self.memory = memory
        self.max_size = max_size
        self.reset()

    def reset(self) -> None:
        """As after power-on: not ready."""
        self.size = 0
        self.ready = False
        self.desc = self.avail = self.used = 0
        self.event_idx = self.indirect = False
        self._restart()

    def _restart(self) -> None:
        self.last_avail = self.used_idx = self.signalled = 0
        self.unfinished = False
        self._forget()

    def _forget(self) -> None:
        # What was read of the rings: good for the entries before `_seen`, which the driver may not change any more.
        self._seen = self.last_avail
        self._ring = self._table = b""
        self._done: list[bytes] = []
        self._wanted = False

    def enable(self, event_idx: bool, indirect: bool) -> None:
        """The driver has set QueueReady: check what it says of the queue, and start at index 0."""
        if not 0 < self.size <= self.max_size or self.size & (self.size - 1):
            raise QueueFault(f"a queue of {self.size} descriptors: allowed are powers of two up to {self.max_size}")
        for what, at, align, size in self._areas():
            if at % align or at + size > ADDRESS_END:
                raise QueueFault(f"{what} at {at:#x}: it must be a multiple of {align}, and end below 1 << 64")
        self.event_idx, self.indirect, self.ready = event_idx, indirect, True
        self._restart()

    def disable(self) -> None:
        """The driver has cleared QueueReady."""
        self.ready = self.unfinished = False

    def _areas(self) -> tuple[tuple[str, int, int, int], ...]:
        avail = RING_HEADER + AVAIL_ENTRY * self.size + EVENT
        used = RING_HEADER + USED_ENTRY * self.size + EVENT
        return (
            ("the descriptor table", self.desc, DESC_ALIGN, DESC.size * self.size),
            ("the available ring", self.avail, AVAIL_ALIGN, avail),
            ("the used ring", self.used, USED_ALIGN, used),
        )

    # -- what the driver made available

    def requests(self) -> Iterator[Chain]:
        """Every chain that is available, until there are none or one notification's work is done (`unfinished`)."""
        self.unfinished = False
        work = 0
        for _ in range(MAX_ROUNDS * self.size):
            chain = self.next()
            if chain is None:
                return
            yield chain
            work += chain.size
            if work > MAX_BYTES:
                break
        self.unfinished = True

    def next(self) -> Chain | None:
        """The next chain; None where there is none, and then the driver notifies of the next one."""
        chain = self.pop()
        if chain is None and self.arm():
            chain = self.pop()
        return chain

    def pop(self) -> Chain | None:
        """The next chain, or None where the driver has made none available."""
        if self.last_avail == self._seen and not self._look():
            return None
        slot = self.last_avail % self.size
        head = int.from_bytes(self._ring[AVAIL_ENTRY * slot : AVAIL_ENTRY * (slot + 1)], "little")
        chain = self._chain(head)
        self.last_avail = self.last_avail + 1 & INDEX
        return chain

    def unpop(self) -> None:
        """Leave the chain that `pop` gave last to the next `pop`."""
        self.last_avail = self.last_avail - 1 & INDEX

    def _available(self) -> int:
        index = int.from_bytes(self.memory.read(self.avail + 2, 2, "the available ring"), "little")
        if (index - self.last_avail & INDEX) > self.size:
            raise QueueFault(
                f"the available index jumped to {index}: {self.last_avail} were taken, the queue has {self.size}"
            )
        return index

    def _look(self) -> bool:
        """Whether there is something new; ring and table are read once for all of it, after the index."""
        index = self._available()
        if index == self.last_avail:
            return False
        self._ring = self.memory.read(self.avail + RING_HEADER, AVAIL_ENTRY * self.size, "the available ring")
        self._table = self.memory.read(self.desc, DESC.size * self.size, "the descriptor table")
        self._seen = index
        return True

    def arm(self) -> bool:
        """Ask for a notification of the next buffer; whether one came in the meantime (then there may be none)."""
        if self.event_idx:
            where = self.used + RING_HEADER + USED_ENTRY * self.size
            self.memory.write(where, self.last_avail.to_bytes(2, "little"), "the used ring")
        return self._available() != self.last_avail

    # -- descriptors

    def _chain(self, head: int) -> Chain:
        chain = Chain(head, [], [])
        size = 0
        for gpa, length, writable in self._descriptors(head):
            size += length
            if size > MAX_CHAIN_BYTES:
                raise QueueFault(f"descriptor chain {head} has more than 1 << 32 bytes")
            if gpa + length > ADDRESS_END:
                raise QueueFault(f"a buffer of {length:#x} bytes at {gpa:#x} goes beyond 1 << 64")
            if writable:
                chain.writable.append(Segment(gpa, length))
            elif chain.writable:
                raise QueueFault(f"descriptor chain {head} has a readable buffer after a writable one")
            else:
                chain.readable.append(Segment(gpa, length))
        return chain

    def _descriptors(self, head: int) -> Iterator[tuple[int, int, int]]:
        """(address, bytes, writable) of each buffer of a chain, following one indirect table."""
        table, entries, at, inside = self._table, self.size, head, False
        taken = 0
        while True:
            if at >= entries:
                raise QueueFault(f"descriptor {at} of a table of {entries}")
            # One more than there can be: the chain is a loop. Linux fills indirect tables up to what the device
            # has announced (seg_max) also where it could only have a smaller queue.
            taken += 1
            if taken > self.max_size:
                raise QueueFault(f"descriptor chain {head} has more than the queue's {self.max_size} descriptors")
            gpa, length, flags, following = DESC.unpack_from(table, DESC.size * at)
            if flags & DESC_F_INDIRECT:
                if inside or flags & DESC_F_NEXT:
                    raise QueueFault(
                        f"descriptor chain {head}: an indirect table is the last of a chain, not inside one"
                    )
                table, at, inside = self._indirect(gpa, length), 0, True
                entries = length // DESC.size
                taken -= 1
                continue
            yield gpa, length, flags & DESC_F_WRITE
            if not flags & DESC_F_NEXT:
                return
            at = following

    def _indirect(self, gpa: int, size: int) -> bytes:
        if not self.indirect:
            raise QueueFault("an indirect descriptor, but VIRTIO_RING_F_INDIRECT_DESC was not negotiated")
        if size == 0 or size % DESC.size or size > DESC.size * self.max_size:
            raise QueueFault(f"an indirect table of {size} bytes: allowed are 1 to {self.max_size} times {DESC.size}")
        return self.memory.read(gpa, size, "an indirect table")

    # -- what the device has used

    def push(self, chain: Chain, written: int) -> None:
        """The chain is done; `written` bytes were written from the start of its writable part. `flush` tells."""
        self._done.append(struct.pack("<II", chain.head, written))
        if len(self._done) >= self.size:  # as many as the used ring holds
            self._publish()

    def flush(self) -> bool:
        """Put what was `push`ed into the used ring; whether the driver wants an interrupt."""
        if self._done:
            self._publish()
        wanted, self._wanted = self._wanted, False
        return wanted

    def _publish(self) -> None:
        slot = self.used_idx % self.size
        room = self.size - slot
        entries, self._done = self._done, []
        ring = self.used + RING_HEADER
        self.memory.write(ring + USED_ENTRY * slot, b"".join(entries[:room]), "the used ring")
        if len(entries) > room:
            self.memory.write(ring, b"".join(entries[room:]), "the used ring")
        self.used_idx = self.used_idx + len(entries) & INDEX
        self.memory.write(self.used + 2, self.used_idx.to_bytes(2, "little"), "the used ring")
        self._wanted |= self._wants_interrupt()

    def _wants_interrupt(self) -> bool:
        """Section 2.7.7.2, and vring_need_event() in linux/virtio_ring.h."""
        if not self.event_idx:
            return not self.memory.read(self.avail, 1, "the available ring")[0] & AVAIL_F_NO_INTERRUPT
        where = self.avail + RING_HEADER + AVAIL_ENTRY * self.size
        event = int.from_bytes(self.memory.read(where, EVENT, "the available ring"), "little")
        old, self.signalled = self.signalled, self.used_idx
        return (self.used_idx - event - 1 & INDEX) < (self.used_idx - old & INDEX)

    # -- snapshots

    _STATE = {"size": 16, "desc": 64, "avail": 64, "used": 64, "last_avail": 16, "used_idx": 16, "signalled": 16}
    _FLAGS = ("ready", "event_idx", "indirect", "unfinished")

    def state(self) -> dict[str, Any]:
        """Everything but the rings, which are in the guest's memory."""
        return {name: getattr(self, name) for name in (*self._STATE, *self._FLAGS)}

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave; UsageError where that cannot be."""
        for name, bits in self._STATE.items():
            value = state.get(name)
            if not isinstance(value, int) or not 0 <= value < 1 << bits:
                raise UsageError(f"state of a virtqueue: {name} = {value!r}, where a number of {bits} bits belongs")
            setattr(self, name, value)
        for name in self._FLAGS:
            setattr(self, name, bool(state.get(name)))
        ready, indices = self.ready, (self.last_avail, self.used_idx, self.signalled, self.unfinished)
        if ready:
            try:
                self.enable(self.event_idx, self.indirect)
            except QueueFault as fault:
                raise UsageError(f"state of a virtqueue: {fault}") from None
            self.last_avail, self.used_idx, self.signalled, self.unfinished = indices
        self._forget()
