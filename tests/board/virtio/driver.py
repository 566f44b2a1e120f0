"""A guest's side of virtio-mmio, in the order of Linux's virtio_mmio.c and virtio_ring.c, on fake memory."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvm2.board.virtio.registers import AT, CONFIG
from kvm2.errors import UsageError

BASE = 1 << 40
"""Where the fake memory begins: high, so that the upper halves of addresses matter."""
PAGE = 4096
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x40, 0x80
INDIRECT_DESC, EVENT_IDX, VERSION_1 = 1 << 28, 1 << 29, 1 << 32
NEXT, WRITE, INDIRECT = 1, 2, 4


class FakeMemory:
    """`size` bytes at BASE; UsageError elsewhere, as `Vm.read` and `Vm.write`."""

    def __init__(self, size: int = 1 << 20) -> None:
        self.bytes = bytearray(size)
        self.reads = self.writes = 0

    def _at(self, gpa: int, size: int) -> int:
        assert size >= 0
        if not BASE <= gpa <= gpa + size <= BASE + len(self.bytes):
            raise UsageError(f"{gpa:#x} has no memory behind it")
        return gpa - BASE

    def read(self, gpa: int, size: int) -> bytes:
        self.reads += 1
        at = self._at(gpa, size)
        return bytes(self.bytes[at : at + size])

    def write(self, gpa: int, data: bytes) -> None:
        self.writes += 1
        at = self._at(gpa, len(data))
        self.bytes[at : at + len(data)] = data

    def put(self, gpa: int, code: str, *values: int) -> None:
        struct.pack_into("<" + code, self.bytes, gpa - BASE, *values)

    def get(self, gpa: int, code: str) -> int:
        return struct.unpack_from("<" + code, self.bytes, gpa - BASE)[0]


class Line:
    """The interrupt line: its level and how often it changed."""

    def __init__(self) -> None:
        self.level = False
        self.changes = 0

    def __call__(self, level: bool) -> None:
        assert level != self.level, "a device reports changes only"
        self.level = level
        self.changes += 1


@dataclass
class DriverQueue:
    """vring_virtqueue: where the rings are, and what the driver knows of them."""

    index: int
    num: int
    desc: int
    avail: int
    used: int
    free: list[int] = field(default_factory=list)
    taken: dict[int, list[int]] = field(default_factory=dict)
    avail_idx: int = 0
    num_added: int = 0
    last_used: int = 0


class Driver:
    """`probe` does what virtio_mmio_probe() and virtio_dev_probe() do; `queues` are made with `setup_queue`."""

    def __init__(self, frame, memory: FakeMemory, line: Line) -> None:
        self.frame, self.memory, self.line = frame, memory, line
        self.features = 0
        self.queues: dict[int, DriverQueue] = {}
        self.top = BASE

    def allocate(self, size: int) -> int:
        """Memory of the guest's, in whole pages."""
        at = self.top
        self.top += -(-size // PAGE) * PAGE
        assert self.top <= BASE + len(self.memory.bytes), "the fake memory is too small"
        return at

    def place(self, data: bytes) -> int:
        at = self.allocate(len(data))
        self.memory.write(at, data)
        return at

    # -- registers

    def readl(self, name: str) -> int:
        return self.frame.read(AT[name], 4)

    def writel(self, name: str, value: int) -> None:
        self.frame.write(AT[name], 4, value)

    def config(self, offset: int, size: int) -> int:
        """vm_get(): eight bytes are two words."""
        if size == 8:
            return self.config(offset, 4) | self.config(offset + 4, 4) << 32
        return self.frame.read(CONFIG + offset, size)

    def add_status(self, bits: int) -> int:
        self.writel("Status", self.readl("Status") | bits)
        return self.readl("Status")

    # -- virtio_mmio_probe(), register_virtio_device(), virtio_dev_probe()

    def probe(self, device_id: int, wanted: int) -> None:
        """Up to FEATURES_OK; `wanted` are the features that the device's driver knows."""
        assert self.readl("MagicValue") == 0x74726976
        assert self.readl("Version") == 2
        assert self.readl("DeviceID") == device_id
        assert self.readl("VendorID")
        self.writel("Status", 0)
        self.add_status(ACKNOWLEDGE)
        self.add_status(DRIVER)
        self.writel("DeviceFeaturesSel", 1)
        offered = self.readl("DeviceFeatures") << 32
        self.writel("DeviceFeaturesSel", 0)
        offered |= self.readl("DeviceFeatures")
        self.features = offered & (wanted | VERSION_1 | EVENT_IDX | INDIRECT_DESC)
        assert self.features & VERSION_1
        self.write_features(self.features)
        assert self.add_status(FEATURES_OK) & FEATURES_OK, "the device refuses features"

    def write_features(self, features: int) -> None:
        self.writel("DriverFeaturesSel", 1)
        self.writel("DriverFeatures", features >> 32)
        self.writel("DriverFeaturesSel", 0)
        self.writel("DriverFeatures", features & 0xFFFFFFFF)

    def setup_queue(self, index: int, limit: int = 1 << 15) -> DriverQueue:
        """vm_setup_vq(), with at most `limit` descriptors."""
        self.writel("QueueSel", index)
        assert not self.readl("QueueReady")
        num = min(self.readl("QueueNumMax"), limit)
        assert num
        ring = self.allocate(16 * num)
        queue = DriverQueue(index, num, ring, self.allocate(6 + 2 * num), self.allocate(6 + 8 * num))
        queue.free = list(range(num))
        self.writel("QueueNum", num)
        for name, address in (("Desc", queue.desc), ("Driver", queue.avail), ("Device", queue.used)):
            self.writel(f"Queue{name}Low", address & 0xFFFFFFFF)
            self.writel(f"Queue{name}High", address >> 32)
        self.writel("QueueReady", 1)
        self.queues[index] = queue
        return queue

    def ready(self) -> None:
        """virtio_device_ready()."""
        assert not self.add_status(DRIVER_OK) & NEEDS_RESET

    # -- virtqueue_add_split(), virtqueue_kick(), virtqueue_get_buf()

    def add(self, queue: DriverQueue, out: Sequence[tuple[int, int]], into: Sequence[tuple[int, int]] = ()) -> int:
        """Make a chain of (address, bytes) available without a kick; its head."""
        parts = [(*part, 0) for part in out] + [(*part, WRITE) for part in into]
        if self.features & INDIRECT_DESC and len(parts) > 1:
            table = self.allocate(16 * len(parts))
            self._fill(table, list(range(len(parts))), parts)
            used = [queue.free.pop(0)]
            self.memory.put(queue.desc + 16 * used[0], "QIHH", table, 16 * len(parts), INDIRECT, 0)
        else:
            used = [queue.free.pop(0) for _ in parts]
            self._fill(queue.desc, used, parts)
        queue.taken[used[0]] = used
        self.memory.put(queue.avail + 4 + 2 * (queue.avail_idx % queue.num), "H", used[0])
        queue.avail_idx = queue.avail_idx + 1 & 0xFFFF
        self.memory.put(queue.avail + 2, "H", queue.avail_idx)
        queue.num_added += 1
        return used[0]

    def _fill(self, table: int, indices: list[int], parts: list[tuple[int, int, int]]) -> None:
        for number, (address, size, flags) in enumerate(parts):
            last = number == len(parts) - 1
            following = 0 if last else indices[number + 1]
            self.memory.put(
                table + 16 * indices[number], "QIHH", address, size, flags | (0 if last else NEXT), following
            )

    def kick(self, queue: DriverQueue) -> bool:
        """virtqueue_kick(): notifies where the device wants that, and says so."""
        old, new = queue.avail_idx - queue.num_added & 0xFFFF, queue.avail_idx
        queue.num_added = 0
        if self.features & EVENT_IDX:
            event = self.memory.get(queue.used + 4 + 8 * queue.num, "H")
            needed = (new - event - 1 & 0xFFFF) < (new - old & 0xFFFF)
        else:
            needed = not self.memory.get(queue.used, "H") & 1
        if needed:
            self.writel("QueueNotify", queue.index)
        return needed

    def get(self, queue: DriverQueue) -> tuple[int, int] | None:
        """virtqueue_get_buf(): (head, bytes written), or None where nothing was used."""
        if self.memory.get(queue.used + 2, "H") == queue.last_used:
            return None
        entry = queue.used + 4 + 8 * (queue.last_used % queue.num)
        head, size = self.memory.get(entry, "I"), self.memory.get(entry + 4, "I")
        queue.free += queue.taken.pop(head)
        queue.last_used = queue.last_used + 1 & 0xFFFF
        self.memory.put(queue.avail + 4 + 2 * queue.num, "H", queue.last_used)  # used_event
        return head, size

    def interrupt(self) -> int:
        """vm_interrupt(): InterruptStatus, which is acknowledged."""
        assert self.line.level, "no interrupt is pending"
        status = self.readl("InterruptStatus")
        self.writel("InterruptACK", status)
        return status

    def transact(self, queue: DriverQueue, out: Sequence[tuple[int, int]], into: Sequence[tuple[int, int]] = ()) -> int:
        """One request until it is used, by its interrupt; the bytes written."""
        head = self.add(queue, out, into)
        self.kick(queue)
        assert self.interrupt() & 1
        done = self.get(queue)
        assert done is not None and done[0] == head and self.get(queue) is None
        return done[1]
