"""The disk: requests as Linux's virtio_blk.c makes them, and what a disk refuses."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from kvm2.board.virtio import Blk, VirtioMmio
from kvm2.board.virtio import blk as module
from kvm2.board.virtio.disk import Disk
from kvm2.errors import UsageError

from .driver import BASE, NEEDS_RESET, FakeMemory, Line

SECTORS = 8192
# VIRTIO_BLK_F_* that virtio_blk.c knows of what is offered, and others.
KNOWN = sum(1 << bit for bit in (1, 2, 4, 5, 6, 9, 10, 11, 12, 13, 14, 16, 17))
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2


@pytest.fixture
def image(tmp_path):
    """A file of 4 MiB in which every sector says its number."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(struct.pack("<Q", sector) * 64 for sector in range(SECTORS)))
    return path


class Guest:
    """A driver with the queue of a disk."""

    def __init__(self, driver, features=KNOWN):
        self.driver = driver
        driver.probe(2, features)
        self.queue = driver.setup_queue(0)
        driver.ready()
        self.header, self.status = driver.allocate(16), driver.allocate(1)

    def request(self, kind, sector=0, out=(), into=()):
        """(status, bytes written)."""
        self.driver.memory.put(self.header, "IIQ", kind, 0, sector)
        self.driver.memory.put(self.status, "B", 0xEE)
        written = self.driver.transact(self.queue, [(self.header, 16), *out], [*into, (self.status, 1)])
        return self.driver.memory.get(self.status, "B"), written

    def read(self, sector, size):
        at = self.driver.allocate(size)
        assert self.request(IN, sector, into=[(at, size)]) == (OK, size + 1)
        return self.driver.memory.read(at, size)

    def write(self, sector, data):
        return self.request(OUT, sector, out=[(self.driver.place(data), len(data))])[0]

    def ranges(self, kind, *ranges):
        data = b"".join(struct.pack("<QII", *r) for r in ranges)
        return self.request(kind, out=[(self.driver.place(data), len(data))])[0]


@pytest.fixture
def guest(attach, image):
    return Guest(attach(Blk(image, serial="KVM2-0001"), size=8 << 20))


def test_configuration_as_the_driver_reads_it(guest, image):
    config = guest.driver.config
    assert config(0, 8) == SECTORS
    assert (config(12, 4), config(20, 4)) == (254, 512)  # seg_max, blk_size
    assert (config(24, 1), config(25, 1), config(26, 2), config(28, 4)) == (3, 0, 8, 0)  # topology
    assert config(36, 4) and config(40, 4) == 16 and config(44, 4) == 1  # discard
    assert config(48, 4) and config(52, 4) == 1 and config(56, 1) == 1  # write zeroes
    assert guest.driver.features & KNOWN == sum(1 << bit for bit in (2, 6, 9, 10, 13, 14))


@pytest.mark.parametrize("features", [KNOWN, 0])
def test_data_both_ways_with_and_without_indirect_tables(attach, image, features):
    driver = attach(Blk(image), size=8 << 20)
    if not features:
        driver.frame.features &= ~(1 << 28 | 1 << 29)
    guest = Guest(driver, features)
    assert guest.read(5, 1024) == struct.pack("<Q", 5) * 64 + struct.pack("<Q", 6) * 64
    data = os.urandom(3 * 4096)
    assert guest.write(800, data) == OK
    assert image.read_bytes()[800 * 512 :][: len(data)] == data
    assert guest.read(800, len(data)) == data
    assert guest.read(SECTORS - 1, 512) == struct.pack("<Q", SECTORS - 1) * 64


def test_a_request_cut_into_odd_pieces(guest):
    driver = guest.driver
    header = driver.place(struct.pack("<IIQ", OUT, 0, 10))
    data = os.urandom(1536)
    at = driver.place(data)
    parts = [(header, 3), (header + 3, 13), (at, 1), (at + 1, 0), (at + 1, 1000), (at + 1001, 535)]
    assert driver.transact(guest.queue, parts, [(guest.status, 1)]) == 1
    assert guest.read(10, 1536) == data
    # Header and data in one, and the status byte behind the data.
    both = driver.place(struct.pack("<IIQ", IN, 0, 10))
    room = driver.allocate(1537)
    driver.memory.put(room + 1536, "B", 0xEE)
    assert driver.transact(guest.queue, [(both, 16)], [(room, 700), (room + 700, 837)]) == 1537
    assert driver.memory.read(room, 1537) == data + b"\0"


def test_more_than_one_piece(guest, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 1000)
    data = os.urandom(64 * 512)
    assert guest.write(3, data) == OK and guest.read(3, len(data)) == data


def test_many_requests_with_one_notification(guest):
    driver = guest.driver
    places = []
    for sector in range(60):
        header, room, status = (
            driver.place(struct.pack("<IIQ", IN, 0, sector)),
            driver.allocate(512),
            driver.allocate(1),
        )
        driver.add(guest.queue, [(header, 16)], [(room, 512), (status, 1)])
        places.append(room)
    driver.kick(guest.queue)
    assert driver.interrupt() == 1
    assert [driver.get(guest.queue)[1] for _ in range(60)] == [513] * 60
    assert [driver.memory.get(room, "Q") for room in places] == list(range(60))


def test_flush_reaches_the_medium(guest, monkeypatch):
    flushed = []
    monkeypatch.setattr(Disk, "flush", lambda self: flushed.append(1))
    assert guest.write(0, bytes(512)) == OK and not flushed
    assert guest.request(FLUSH) == (OK, 1) and flushed == [1]


def test_without_flush_every_write_reaches_the_medium(attach, image, monkeypatch):
    guest = Guest(attach(Blk(image)), 0)
    flushed = []
    monkeypatch.setattr(Disk, "flush", lambda self: flushed.append(1))
    assert guest.write(0, bytes(512)) == OK and flushed == [1]


def test_the_serial_number(guest):
    room = guest.driver.allocate(20)
    assert guest.request(GET_ID, into=[(room, 20)]) == (OK, 21)
    assert guest.driver.memory.read(room, 20) == b"KVM2-0001".ljust(20, b"\0")
    assert guest.request(GET_ID, into=[(room, 19)])[0] == IOERR


def test_discard_and_write_zeroes(guest, image):
    before = image.read_bytes()
    assert guest.ranges(WRITE_ZEROES, (100, 7, 0)) == OK
    assert guest.ranges(WRITE_ZEROES, (2000, 64, 1)) == OK
    assert guest.ranges(DISCARD, (3000, 8, 0), (4000, 8, 0)) == OK
    after = image.read_bytes()
    zero = set(range(100, 107)) | set(range(2000, 2064))
    maybe = set(range(3000, 3008)) | set(range(4000, 4008))
    for sector in range(SECTORS):
        there = after[512 * sector : 512 * sector + 512]
        if sector in zero:
            assert not any(there), sector
        elif sector not in maybe:
            assert there == before[512 * sector : 512 * sector + 512], sector
    assert len(after) == len(before)


@pytest.mark.parametrize(
    ("kind", "ranges", "status"),
    [
        (DISCARD, [(0, 1, 1)], UNSUPP),
        (DISCARD, [(0, 1, 2)], UNSUPP),
        (WRITE_ZEROES, [(0, 1, 2)], UNSUPP),
        (DISCARD, [(SECTORS, 1, 0)], IOERR),
        (DISCARD, [((1 << 64) - 1, 1, 0)], IOERR),
        (DISCARD, [(0, 0, 0)], IOERR),
        (DISCARD, [(0, 0xFFFFFFFF, 0)], IOERR),
        (DISCARD, [(n, 1, 0) for n in range(17)], IOERR),
        (WRITE_ZEROES, [(0, 1, 0), (1, 1, 0)], IOERR),
        (WRITE_ZEROES, [], IOERR),
    ],
)
def test_ranges_that_are_refused_change_nothing(guest, image, kind, ranges, status):
    before = image.read_bytes()
    assert guest.ranges(kind, *ranges) == status
    assert image.read_bytes() == before


@pytest.mark.parametrize("kind", [2, 3, 14, 15, 0x80000000, 0xFFFFFFFF])
def test_an_unknown_request_is_unsupported(guest, kind):
    room = guest.driver.allocate(512)
    assert guest.request(kind, into=[(room, 512)]) == (UNSUPP, 0)
    assert guest.request(kind) == (UNSUPP, 1)


@pytest.mark.parametrize(
    ("sector", "size"), [(SECTORS, 512), (SECTORS - 1, 1024), ((1 << 64) - 1, 512), (1 << 55, 512), (0, 100), (0, 513)]
)
def test_reads_and_writes_beyond_the_disk_or_of_parts_of_sectors_are_io_errors(guest, image, sector, size):
    before = image.read_bytes()
    room = guest.driver.place(b"\x5a" * size)
    assert guest.request(IN, sector, into=[(room, size)]) == (IOERR, 0)
    assert guest.driver.memory.read(room, size) == b"\x5a" * size
    assert guest.request(OUT, sector, out=[(room, size)]) == (IOERR, 1)
    assert image.read_bytes() == before


def test_a_read_only_disk(attach, image):
    before = image.read_bytes()
    guest = Guest(attach(Blk(image, readonly=True)))
    assert guest.driver.features & 1 << 5 and not guest.driver.features & (1 << 13 | 1 << 14)
    assert guest.write(0, bytes(512)) == IOERR
    assert guest.ranges(DISCARD, (0, 1, 0)) == IOERR and guest.ranges(WRITE_ZEROES, (0, 1, 0)) == IOERR
    assert guest.request(FLUSH)[0] == OK
    assert guest.read(7, 512) == struct.pack("<Q", 7) * 64
    assert image.read_bytes() == before


def test_what_the_file_refuses_is_an_io_error(guest, image, monkeypatch):
    def refuse(self, *args):
        raise OSError(errno.ENOSPC, "full")

    for name in ("write", "flush", "discard", "zero"):
        monkeypatch.setattr(Disk, name, refuse)
    assert guest.write(0, bytes(512)) == IOERR
    assert guest.request(FLUSH)[0] == IOERR
    assert guest.ranges(DISCARD, (0, 1, 0)) == IOERR and guest.ranges(WRITE_ZEROES, (0, 1, 0)) == IOERR
    os.truncate(image, 512)
    room = guest.driver.allocate(512)
    assert guest.request(IN, 0, into=[(room, 512)])[0] == OK
    assert guest.request(IN, 1, into=[(room, 512)])[0] == IOERR
    assert guest.driver.readl("Status") & NEEDS_RESET == 0


@pytest.mark.parametrize(
    ("out", "into"),
    [([(0, 16)], []), ([(0, 15)], [(64, 1)]), ([], [(64, 512)]), ([(0, 16)], [(64, 0)]), ([(0, 0)], [(64, 1)])],
)
def test_a_request_without_header_or_status_needs_a_reset(guest, out, into):
    at = guest.driver.allocate(4096)
    guest.driver.add(guest.queue, [(at + a, n) for a, n in out], [(at + a, n) for a, n in into])
    guest.driver.kick(guest.queue)
    assert guest.driver.interrupt() & 2 and guest.driver.readl("Status") & NEEDS_RESET
    assert "header" in guest.driver.frame.fault


def test_data_where_no_memory_is_needs_a_reset(guest):
    header = guest.driver.place(struct.pack("<IIQ", OUT, 0, 0))
    for where in (BASE - 512, (1 << 64) - 512):
        guest.driver.add(guest.queue, [(header, 16), (where, 512)], [(guest.status, 1)])
        guest.driver.kick(guest.queue)
        assert guest.driver.readl("Status") & NEEDS_RESET


def test_two_machines_do_not_write_one_disk(image):
    first = Blk(image)
    for readonly in (False, True):
        with pytest.raises(UsageError, match="in use by another machine"):
            Blk(image, readonly=readonly)
    first.close()
    first.close()
    readers = [Blk(image, readonly=True) for _ in range(2)]
    with pytest.raises(UsageError, match="in use"):
        Blk(image)
    for reader in readers:
        reader.close()
    Blk(image).close()


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (b"", "empty.*truncate -s 1G"),
        (b"x" * 1000, "1000 bytes.*512.*append 24"),
        (b"QFI\xfb" + bytes(508), "qcow2.*qemu-img convert"),
        (None, "No such file"),
    ],
)
def test_files_that_are_no_disks(tmp_path, contents, says):
    path = tmp_path / "x"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(UsageError, match=says):
        Blk(path)
    if contents:
        path.write_bytes(bytes(512))
        Blk(path).close()  # it is not locked


def test_devices_and_directories_are_no_disks(tmp_path):
    for path in ("/dev/null", tmp_path):
        with pytest.raises(UsageError, match=r"neither|directory"):
            Blk(path, readonly=True)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="neither"):
        Blk(tmp_path / "fifo", readonly=True)


def test_a_serial_number_that_does_not_fit(image):
    for serial in ("x" * 21, "ä"):
        with pytest.raises(UsageError, match="20 ASCII"):
            Blk(image, serial=serial)


def test_a_snapshot_goes_on_with_the_same_disk_only(guest, image, tmp_path):
    assert guest.write(9, b"\x11" * 512) == OK
    saved = guest.driver.frame.state()
    guest.driver.frame.close()
    guest.driver.line = Line()
    again = VirtioMmio(Blk(image), guest.driver.memory, guest.driver.line)
    again.restore(saved)
    guest.driver.frame = again
    assert guest.read(9, 512) == b"\x11" * 512
    again.close()
    other = tmp_path / "other.img"
    other.write_bytes(bytes(512))
    small = VirtioMmio(Blk(other), FakeMemory(), Line())
    with pytest.raises(UsageError, match="give it that disk"):
        small.restore(saved)
    small.close()


def test_another_disk_than_the_snapshots_is_refused_in_words(tmp_path):
    path = tmp_path / "d"
    path.write_bytes(bytes(1024))
    blk = Blk(path, readonly=True)
    with pytest.raises(
        UsageError, match="d has 1024 bytes and is read-only, and the snapshot's has 512 bytes and is writable"
    ):
        blk.restore({"bytes": 512, "readonly": False})
    blk.close()
