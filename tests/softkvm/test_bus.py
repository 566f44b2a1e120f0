"""The bus against its rule said plainly: who holds the whole access, in the order of kvm_io_bus_register_dev."""

from __future__ import annotations

import random

import pytest

from kvm2.errors import KvmError
from kvm2.softkvm.bus import NR_IOBUS_DEVS, Bus


class Named:
    """A device that takes nothing, so that all are asked."""

    def __init__(self, name: int, ioeventfd: bool = False) -> None:
        self.name, self.asked = name, 0
        self.is_ioeventfd = ioeventfd

    def read(self, vcpu: object, offset: int, size: int) -> int | None:
        self.asked += 1
        return None

    def write(self, vcpu: object, offset: int, size: int, value: int) -> bool:
        self.asked += 1
        return False


def compare(one: tuple[int, int], other: tuple[int, int]) -> int:
    """kvm_io_bus_cmp of two (address, length)."""
    if one[0] < other[0]:
        return -1
    first, second = (one[0] + one[1], other[0] + other[1]) if other[1] else (one[0], other[0])
    return int(first > second)


@pytest.mark.parametrize("shared", [False, True])
def test_who_is_asked(shared: bool) -> None:
    rng = random.Random(4)
    for turn in range(200):
        bus, expected = Bus(), []
        for name in range(rng.randrange(1, 9)):
            size = rng.choice((0, 1, 2, 4, 8)) if turn else 0
            base = rng.randrange(24) if shared else 16 * name + rng.randrange(8)
            device = Named(name)
            bus.add(base, size, device)
            place = next((at for at, old in enumerate(expected) if compare(old[0], (base, size)) > 0), len(expected))
            expected.insert(place, ((base, size), device))
        if rng.randrange(2):
            gone = rng.choice(expected)
            bus.remove(gone[1])
            expected.remove(gone)
        for address in range(150):
            for size in (1, 2, 4, 8):
                asked = [(there[0], device) for there, device in expected if compare((address, size), there) == 0]
                assert list(bus.at(address, size)) == asked
                assert bus.read(None, address, size) is None and not bus.write(None, address, size, 0)  # type: ignore[arg-type]


def test_its_limit_does_not_count_ioeventfds() -> None:
    bus = Bus()
    for number in range(3):
        bus.add(number, 1, Named(number, ioeventfd=True))
    for number in range(NR_IOBUS_DEVS):
        bus.add(0x1000 + number, 1, Named(number))
    for ioeventfd in (False, True):
        with pytest.raises(KvmError, match="ENOSPC"):
            bus.add(0, 1, Named(0, ioeventfd))
    assert bus.devices == NR_IOBUS_DEVS + 3


def test_addresses_beyond_64_bits() -> None:
    with pytest.raises(KvmError, match="EINVAL"):
        Bus().add((1 << 64) - 1, 2, Named(0))
