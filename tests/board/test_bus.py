import pytest

from kvm2.board.bus import Bus
from kvm2.errors import UsageError
from kvm2.exits import Mmio


class Device:
    def __init__(self, size=0x1000, answer=0x1122334455667788):
        self.size, self.answer, self.seen = size, answer, []

    def read(self, offset, size):
        self.seen.append(("read", offset, size))
        return self.answer

    def write(self, offset, size, value):
        self.seen.append(("write", offset, size, value))


@pytest.fixture
def bus():
    return Bus()


def access(address, size, data=None):
    area = memoryview(bytearray(4096))
    return Mmio(address, size, data is not None, (data or b"").ljust(8, b"\0"), area), area


def test_each_frame_answers_for_its_own_addresses(bus):
    first, second = Device(0x200), Device(0x200)
    bus.add(0xA000200, second, "second")
    bus.add(0xA000000, first, "first", 16)
    assert bus.find(0xA0001FF) == (first, 0x1FF) and bus.find(0xA000200) == (second, 0)
    assert bus.find(0xA000400) is None and bus.find(0x9FFFFFF) is None
    assert [place.name for place in bus.places.values()] == ["second", "first"] and bus.places["first"].spi == 16


def test_accesses_go_back_and_forth_between_devices(bus):
    first, second = Device(), Device()
    bus.add(0x1000, first, "first")
    bus.add(0x2000, second, "second")
    for address, data in ((0x1004, b"\1"), (0x2008, b"\2\0"), (0x1004, b"\3"), (0x2FFF, b"\4")):
        assert bus.answer(access(address, len(data), data)[0])
    assert first.seen == [("write", 4, 1, 1), ("write", 4, 1, 3)]
    assert second.seen == [("write", 8, 2, 2), ("write", 0xFFF, 1, 4)]


@pytest.mark.parametrize(("size", "shown"), [(1, "88"), (2, "8877"), (4, "88776655"), (8, "8877665544332211")])
def test_a_read_is_cut_to_its_size(bus, size, shown):
    bus.add(0x1000, Device(), "device")
    exit, area = access(0x1010, size)
    assert bus.answer(exit) and bytes(area[40:48]).hex() == shown.ljust(16, "0")


def test_where_nothing_is_nothing_is_done(bus):
    assert not bus.answer(access(0, 4)[0])
    device = Device()
    bus.add(0x1000, device, "device")
    bus.answer(access(0x1000, 4)[0])
    assert not bus.answer(access(0x2000, 4)[0]) and not bus.answer(access(0xFFF, 4)[0]) and len(device.seen) == 1


def test_names_and_addresses_are_each_ones_own(bus):
    bus.add(0x1000, Device(), "device")
    with pytest.raises(UsageError, match="already"):
        bus.add(0x8000, Device(), "device")
    with pytest.raises(UsageError, match=r"other at 0x1800..0x2800 overlaps device at 0x1000..0x2000"):
        bus.add(0x1800, Device(), "other")
    assert bus.find(0x2400) is None
