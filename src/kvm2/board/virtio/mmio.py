"""The transport: a virtio device behind a page of registers (virtio 1.2, section 4.2; version 2, not the legacy one).

Whatever the driver does has a defined end. An access that the specification does not allow (another width, an offset
without a register) reads 0 or is ignored. A queue that cannot be worked on sets DEVICE_NEEDS_RESET, interrupts with a
configuration change, and stops every queue until the driver resets the device; `fault` says why, in words.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvm2.board.virtio import registers as regs
from kvm2.board.virtio.queue import GuestMemory, QueueFault, Virtqueue
from kvm2.board.virtio.registers import AT, CONFIG, REGISTER_BYTES, REGISTERS
from kvm2.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvm2.board.virtio.device import Device
    from kvm2.board.virtio.queue import Memory

WORD = 0xFFFF_FFFF
# Reading back a register that only holds a driver's choice is not allowed; a queue's address registers are two halves.
_QUEUE_ADDRESSES = {"Desc": "desc", "Driver": "avail", "Device": "used"}


class VirtioMmio:
    """One device in its frame of `size` bytes. `memory` is the guest's (a `Vm`), `irq` its level-triggered line.

    >>> from kvm2.board.virtio.rng import Rng
    >>> frame = VirtioMmio(Rng(), memory=None, irq=lambda level: None)
    >>> frame.read(0x000, 4).to_bytes(4, "little"), frame.read(0x004, 4), frame.read(0x008, 4)
    (b'virt', 2, 4)
    >>> frame.read(0x008, 1), frame.read(0x1000, 8)
    (0, 0)
    """

    size = regs.SIZE

    def __init__(self, device: Device, memory: Memory | None, irq: Callable[[bool], object]) -> None:
        self.device = device
        self.memory = GuestMemory(memory) if memory is not None else GuestMemory(NoMemory())
        self.features = device.features | regs.TRANSPORT_FEATURES
        self.queues = [Virtqueue(self.memory, size) for size in device.queue_sizes]
        self._irq = irq
        self._line = False
        # A device may call back from inside a request: a console's sink that feeds it, for instance.
        self._lock = threading.RLock()
        self._depth = 0
        self._line_lock = threading.RLock()
        self._readers = {AT[name]: read for name, read in self._reads().items()}
        self._writers = {AT[name]: write for name, write in self._writes().items()}
        self._generation = 0
        self._reset()
        device.attach(self)

    def _reset(self) -> None:
        self.status = 0
        self.interrupts = 0
        self.driver_features = 0
        self.fault = ""
        self._device_sel = self._driver_sel = self._queue_sel = 0
        for queue in self.queues:
            queue.reset()
        self._config = self.device.config()

    # -- the frame

    def read(self, offset: int, size: int) -> int:
        """What the guest reads: `size` bytes at `offset`, little-endian. Without a lock: each value is one word."""
        if offset >= CONFIG:
            at = offset - CONFIG
            return int.from_bytes(self._config[at : at + max(size, 0)], "little")
        reader = self._readers.get(offset) if size == REGISTER_BYTES else None
        return reader() if reader is not None else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes `size` bytes at `offset`."""
        if offset >= CONFIG:
            if size > 0 and offset + size <= self.size:
                data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
                with self._locked():
                    self.device.write_config(offset - CONFIG, data)
            return
        writer = self._writers.get(offset) if size == REGISTER_BYTES else None
        if writer is not None:
            with self._locked():
                writer(value & WORD)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock, and moves the interrupt line once nobody of this thread holds it any more."""
        with self._lock:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                outermost = self._depth == 0
        if outermost:
            self._move_line()

    def _move_line(self) -> None:
        # The level is looked at under the line's own lock, so the last caller leaves it as it should be.
        with self._line_lock:
            level = self.interrupts != 0
            if level != self._line:
                self._line = level
                self._irq(level)

    # -- registers

    def _reads(self) -> dict[str, Callable[[], int]]:
        return {
            "MagicValue": lambda: regs.MAGIC,
            "Version": lambda: regs.VERSION,
            "DeviceID": lambda: self.device.id,
            "VendorID": lambda: regs.VENDOR,
            "DeviceFeatures": lambda: self.features >> 32 * self._device_sel & WORD if self._device_sel < 2 else 0,
            "QueueNumMax": lambda: queue.max_size if (queue := self._queue()) else 0,
            "QueueReady": lambda: int(queue.ready) if (queue := self._queue()) else 0,
            "InterruptStatus": lambda: self.interrupts,
            "Status": lambda: self.status,
            **dict.fromkeys(("SHMLenLow", "SHMLenHigh", "SHMBaseLow", "SHMBaseHigh"), lambda: WORD),
            "QueueReset": lambda: 0,
            "ConfigGeneration": lambda: self._generation & WORD,
        }

    def _writes(self) -> dict[str, Callable[[int], None]]:
        halves = {
            f"Queue{name}{half}": self._address_writer(attribute, shift)
            for name, attribute in _QUEUE_ADDRESSES.items()
            for half, shift in (("Low", 0), ("High", 32))
        }
        return {
            "DeviceFeaturesSel": lambda value: setattr(self, "_device_sel", value),
            "DriverFeatures": self._write_driver_features,
            "DriverFeaturesSel": lambda value: setattr(self, "_driver_sel", value),
            "QueueSel": lambda value: setattr(self, "_queue_sel", value),
            "QueueNum": self._write_queue_num,
            "QueueReady": self._write_queue_ready,
            "QueueNotify": self._write_notify,
            "InterruptACK": self._write_ack,
            "Status": self._write_status,
            "SHMSel": lambda value: None,
            "QueueReset": lambda value: None,
            **halves,
        }

    def _queue(self) -> Virtqueue | None:
        selected = self._queue_sel
        return self.queues[selected] if selected < len(self.queues) else None

    def _write_driver_features(self, value: int) -> None:
        # Section 2.2: what is negotiated does not change any more.
        if self._driver_sel < 2 and not self.status & regs.FEATURES_OK:
            shift = 32 * self._driver_sel
            self.driver_features = self.driver_features & ~(WORD << shift) | value << shift

    def _write_queue_num(self, value: int) -> None:
        queue = self._queue()
        if queue is not None and not queue.ready:
            queue.size = value

    def _address_writer(self, attribute: str, shift: int) -> Callable[[int], None]:
        def write(value: int) -> None:
            queue = self._queue()
            if queue is not None and not queue.ready:
                setattr(queue, attribute, getattr(queue, attribute) & ~(WORD << shift) | value << shift)

        return write

    def _write_queue_ready(self, value: int) -> None:
        queue = self._queue()
        if queue is None:
            return
        if value != 1:
            queue.disable()
        elif not queue.ready:
            with self._faults():
                queue.enable(self.negotiated(regs.F_EVENT_IDX), self.negotiated(regs.F_INDIRECT_DESC))

    def _write_notify(self, value: int) -> None:
        if value < len(self.queues):
            self._service(value)

    def _write_ack(self, value: int) -> None:
        self.interrupts &= ~value
        # Work that a notification left over, which the driver does not know of (queue.MAX_BYTES).
        for number, queue in enumerate(self.queues):
            if queue.unfinished:
                self._service(number)

    def _write_status(self, value: int) -> None:
        """Section 2.1: bits are only added, but for 0, which resets; NEEDS_RESET is the device's own."""
        if value == 0:
            self._reset()
            self.device.reset()
            self._config = self.device.config()
            return
        added = value & regs.DRIVER_STATUS & ~self.status
        if added & regs.FEATURES_OK and not self._acceptable():
            added &= ~(regs.FEATURES_OK | regs.DRIVER_OK)
        if added & regs.DRIVER_OK and not (self.status | added) & regs.FEATURES_OK:
            added &= ~regs.DRIVER_OK
        self.status |= added
        if added & regs.DRIVER_OK and self.running:
            # What was notified too early is not lost.
            for number in range(len(self.queues)):
                self._service(number)

    def _acceptable(self) -> bool:
        """Whether the features that the driver wants were all offered, with VIRTIO_F_VERSION_1 among them."""
        return not self.driver_features & ~self.features and bool(self.driver_features >> regs.F_VERSION_1 & 1)

    # -- work

    @property
    def running(self) -> bool:
        """Whether a driver is there, and neither side has given up."""
        return self.status & (regs.DRIVER_OK | regs.NEEDS_RESET | regs.FAILED) == regs.DRIVER_OK

    def negotiated(self, feature: int) -> bool:
        """Whether the driver has accepted the feature with this number."""
        return bool(self.driver_features >> feature & 1)

    def service(self, queue: int) -> None:
        """Let the device work on a queue, as if the driver had notified it; from any thread."""
        with self._locked():
            self._service(queue)

    def config_changed(self) -> None:
        """The device's configuration space has changed; from any thread."""
        with self._locked():
            self._config = self.device.config()
            self._generation += 1
            if self.status & regs.DRIVER_OK:
                self.interrupts |= regs.INT_CONFIG

    def _service(self, number: int) -> None:
        queue = self.queues[number]
        if not (self.running and queue.ready):
            return
        with self._faults():
            try:
                self.device.handle(number, queue)
            finally:
                # Also what was done before a fault. With work left over the driver must come back, wanted or not.
                if queue.flush() or queue.unfinished:
                    self.interrupts |= regs.INT_VRING

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """What the driver did wrong ends the work until a reset (section 2.1.2)."""
        try:
            yield
        except QueueFault as fault:
            self.fault = self.fault or str(fault)
            self.status |= regs.NEEDS_RESET
            if self.status & regs.DRIVER_OK:
                self.interrupts |= regs.INT_CONFIG

    # -- snapshots

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is done inside, by whatever thread: memory, registers and `state` belong to the same moment."""
        with self._locked():
            yield

    def state(self) -> dict[str, Any]:
        """Registers, queues and the device's own state, as JSON values."""
        with self._lock:
            return {
                "kind": self.device.name,
                "status": self.status,
                "interrupts": self.interrupts,
                "driver_features": self.driver_features,
                "fault": self.fault,
                "generation": self._generation,
                "config": self._config.hex(),
                "selected": [self._device_sel, self._driver_sel, self._queue_sel],
                "queues": [queue.state() for queue in self.queues],
                "device": self.device.state(),
            }

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` gave; UsageError where this device cannot go on from there. The line is moved as it was."""
        with self._locked():
            queues = state.get("queues")
            if state.get("kind") != self.device.name or not isinstance(queues, list) or len(queues) != len(self.queues):
                have = f"{self.device.name} with {len(self.queues)} queues"
                raise UsageError(f"the state of a {state.get('kind')!r} cannot go on in a {have}")
            features = _number(state, "driver_features", 64)
            if _number(state, "status", 8) & regs.FEATURES_OK and features & ~self.features:
                raise UsageError(
                    f"the driver uses features {features & ~self.features:#x}, which this {self.device.name} "
                    "does not offer: make it as it was"
                )
            self.device.restore(dict(state.get("device") or {}))
            for queue, saved in zip(self.queues, queues, strict=True):
                queue.restore(dict(saved))
            self.driver_features = features
            self.status = _number(state, "status", 8)
            self.interrupts = _number(state, "interrupts", 2)
            self.fault = str(state.get("fault", ""))
            self._generation = _number(state, "generation", 64)
            selected = dict(zip(("device", "driver", "queue"), state.get("selected", ()), strict=False))
            self._device_sel, self._driver_sel, self._queue_sel = (
                _number(selected, name, 32) for name in ("device", "driver", "queue")
            )
            self._config = self.device.config()
            if state.get("config") != self._config.hex():
                # Another terminal's size, or nobody at the other end of the cable: the driver does not know yet.
                self.config_changed()

    def close(self) -> None:
        """Give back the device's threads and files."""
        self.device.close()

    def __repr__(self) -> str:
        return f"<VirtioMmio {self.device.name}: status {self.status:#x}{', ' + self.fault if self.fault else ''}>"


def _number(state: dict[str, Any], name: str, bits: int) -> int:
    value = state.get(name)
    if not isinstance(value, int) or not 0 <= value < 1 << bits:
        raise UsageError(f"state of a virtio device: {name} = {value!r}, where a number of {bits} bits belongs")
    return value


class NoMemory:
    """Guest memory of a frame that has no machine: nothing is mapped."""

    def read(self, gpa: int, size: int, /) -> bytes:
        """Never succeeds."""
        raise UsageError(f"guest physical address {gpa:#x} has no memory behind it: there is no guest")

    def write(self, gpa: int, data: bytes, /) -> None:
        """Never succeeds."""
        raise UsageError(f"guest physical address {gpa:#x} has no memory behind it: there is no guest")


assert len(AT) == len(REGISTERS), "two registers of one name"
