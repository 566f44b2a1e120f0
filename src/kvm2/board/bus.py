"""The bus of a board: which device answers at which guest physical address, and what a device is.

>>> class Latch:
...     size, held = 0x1000, 0
...     def read(self, offset: int, size: int) -> int: return self.held
...     def write(self, offset: int, size: int, value: int) -> None: self.held = value
>>> bus, latch = Bus(), Latch()
>>> bus.add(0x0A00_0000, latch, "latch", spi=16)
>>> bus.find(0x0A00_0010) == (latch, 0x10), bus.find(0x0B00_0000)
(True, None)
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kvm2.errors import UsageError

if TYPE_CHECKING:
    from kvm2.exits import Mmio


class MmioDevice(Protocol):
    """A device behind `size` bytes of guest physical addresses.

    Accesses come from vCPU threads, several at once, and from guests that mean harm: any offset within `size`, any size
    of 1 to 8 bytes, any value has a defined answer and never raises. A read's bytes beyond the access are dropped.
    """

    @property
    def size(self) -> int:
        """Bytes of the frame."""

    def read(self, offset: int, size: int) -> int:
        """A load of `size` bytes, `offset` from the frame's start."""

    def write(self, offset: int, size: int, value: int) -> None:
        """A store of `size` bytes."""


class StatefulDevice(MmioDevice, Protocol):
    """A device that a snapshot keeps: `state` is JSON-able, and `restore` takes it back."""

    def state(self) -> dict[str, Any]:
        """Everything that a guest could tell the difference by."""

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, on a device made in the same way."""


@runtime_checkable
class Closeable(Protocol):
    """A device with threads or files."""

    def close(self) -> None:
        """Give them back; closing twice is fine."""


@dataclass(frozen=True)
class Place:
    """Where a device is: its name, first address, the first one after it, and its shared interrupt, or None."""

    name: str
    base: int
    end: int
    device: MmioDevice = field(compare=False)
    spi: int | None = None


class Bus:
    """The devices by address. `places` has them in the order in which they were added, by name."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self._ordered: list[Place] = []
        self._bases: list[int] = []
        # (base, end, read, write) of the device that was asked last: nearly always the one that is asked next. One
        # object, replaced at once, so that threads need no lock; the empty range claims nothing.
        self._last: tuple[int, int, Any, Any] = (0, 0, None, None)

    def add(self, base: int, device: MmioDevice, name: str, spi: int | None = None) -> None:
        """Put a device at `base`. UsageError where its name or an address of its frame is taken."""
        place = Place(name, base, base + device.size, device, spi)
        if name in self.places:
            raise UsageError(f"there is a device {name!r} already: each has a name of its own")
        for other in self.places.values():
            if other.base < place.end and place.base < other.end:
                there = f"{other.name} at {other.base:#x}..{other.end:#x}"
                raise UsageError(f"{name} at {place.base:#x}..{place.end:#x} overlaps {there}")
        self.places[name] = place
        self._ordered = sorted([*self._ordered, place], key=lambda one: one.base)
        self._bases = [one.base for one in self._ordered]

    def find(self, address: int) -> tuple[MmioDevice, int] | None:
        """The device whose frame has the address, and the offset in it; None where there is none."""
        place = self._at(address)
        return None if place is None else (place.device, address - place.base)

    def _at(self, address: int) -> Place | None:
        number = bisect_right(self._bases, address)
        if not number or address >= (place := self._ordered[number - 1]).end:
            return None
        return place

    def answer(self, exit: Mmio) -> bool:
        """Carry out an MMIO exit; False where no device is, and nothing was done.

        An access belongs to the device that has its first byte.
        """
        address = exit.address
        base, end, read, write = self._last
        if not base <= address < end:
            place = self._at(address)
            if place is None:
                return False
            base, read, write = place.base, place.device.read, place.device.write
            self._last = (base, place.end, read, write)
        size = exit.size
        if exit.is_write:
            write(address - base, size, exit.value)
        else:
            exit.reply(read(address - base, size) & ((1 << 8 * size) - 1))
        return True
