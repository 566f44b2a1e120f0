"""The block device (virtio 1.2, section 5.2) on a raw file or block device.

A request is done before the notification returns. What the file refuses is VIRTIO_BLK_S_IOERR for the driver, as is a
request beyond the disk or one that a read-only disk cannot do; a type that is not known is VIRTIO_BLK_S_UNSUPP.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from kvm2.board.virtio.device import QUEUE_SIZE, Device
from kvm2.board.virtio.disk import SECTOR, Disk
from kvm2.board.virtio.queue import QueueFault, Segment, split, total
from kvm2.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvm2.board.virtio.queue import Chain

ID = 2

F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_DISCARD, F_WRITE_ZEROES = 2, 5, 6, 9, 10, 13, 14
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2

HEADER = struct.Struct("<IIQ")  # type, reserved, sector
RANGE = struct.Struct("<QII")  # struct virtio_blk_discard_write_zeroes: sector, num_sectors, flags
RANGE_UNMAP = 1
ID_BYTES = 20

# struct virtio_blk_config as far as max_write_zeroes_seg and write_zeroes_may_unmap: capacity, size_max, seg_max,
# geometry, blk_size, topology (4), writeback, padding, num_queues, discard (3), write zeroes (3).
CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
SEG_MAX = QUEUE_SIZE - 2
"""Segments of a request, at most: a descriptor each for header and status remain."""
PHYSICAL_BLOCK_EXP = 3
"""Blocks of 8 sectors, 4 KiB, are what the file systems below like best."""
BLOCK_SECTORS = 1 << PHYSICAL_BLOCK_EXP
PIECE = 1 << 20
"""Data goes between file and guest in pieces of at most this many bytes."""
MAX_DISCARD_SECTORS, MAX_DISCARD_RANGES = 1 << 22, 16
# Zeros may have to be written: a request shall not hold up its vCPU for long.
MAX_ZERO_SECTORS, MAX_ZERO_RANGES = 1 << 15, 1


class _Refused(Exception):
    """The request ends with this status."""

    def __init__(self, status: int) -> None:
        self.status = status


class Blk(Device):
    """A disk; `serial` (up to 20 ASCII characters) is what the guest finds below /dev/disk/by-id.

    UsageError where the file is no disk (see `Disk`) or the serial number too long.
    """

    name = "virtio-blk"
    id = ID

    def __init__(self, path: str | Path, *, readonly: bool = False, serial: str = "") -> None:
        if len(serial) > ID_BYTES or not serial.isascii():
            raise UsageError(f"serial {serial!r}: allowed are up to {ID_BYTES} ASCII characters")
        self.serial = serial
        self.disk = Disk(path, readonly=readonly)
        self.features = sum(1 << bit for bit in (F_SEG_MAX, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY))
        self.features |= 1 << F_RO if readonly else 1 << F_DISCARD | 1 << F_WRITE_ZEROES
        self._kinds = {
            T_IN: self._in,
            T_OUT: self._out,
            T_FLUSH: self._flush,
            T_GET_ID: self._get_id,
            T_DISCARD: self._discard,
            T_WRITE_ZEROES: self._write_zeroes,
        }

    def config(self) -> bytes:
        """struct virtio_blk_config."""
        capacity = self.disk.size // SECTOR
        topology = (PHYSICAL_BLOCK_EXP, 0, BLOCK_SECTORS, 0)
        discard: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
        if not self.disk.readonly:
            discard = (MAX_DISCARD_SECTORS, MAX_DISCARD_RANGES, 1, MAX_ZERO_SECTORS, MAX_ZERO_RANGES, 1)
        return CONFIG.pack(capacity, 0, SEG_MAX, 0, 0, 0, SECTOR, *topology, 0, 0, 1, *discard)

    def request(self, number: int, chain: Chain) -> int:
        """One request: header, data either way, and a status byte at the very end."""
        header, data_out = split(chain.readable, HEADER.size)
        room = total(chain.writable) - 1
        if total(header) != HEADER.size or room < 0:
            raise QueueFault(f"virtio-blk: a request without header ({HEADER.size} bytes) or status byte")
        data_in, status_byte = split(chain.writable, room)
        kind, _, sector = HEADER.unpack(self.bus.memory.gather(header))
        try:
            if kind not in self._kinds:
                raise _Refused(S_UNSUPP)
            written, status = self._kinds[kind](sector, data_out, data_in), S_OK
        except _Refused as refused:
            written, status = 0, refused.status
        except OSError:
            written, status = 0, S_IOERR
        self.bus.memory.scatter([segment for segment in status_byte if segment.size], bytes([status]))
        # What counts is written from the start on: the status byte only where nothing is missing before it.
        return written + 1 if written == room else written

    def _in(self, sector: int, data_out: list[Segment], data_in: list[Segment]) -> int:
        for offset, part in self._parts(sector, data_in):
            self.bus.memory.scatter(part, self.disk.read(offset, total(part)))
        return total(data_in)

    def _out(self, sector: int, data_out: list[Segment], data_in: list[Segment]) -> int:
        self._writable()
        for offset, part in self._parts(sector, data_out):
            self.disk.write(offset, self.bus.memory.gather(part))
        self._settle()
        return 0

    def _flush(self, sector: int, data_out: list[Segment], data_in: list[Segment]) -> int:
        if not self.disk.readonly:
            self.disk.flush()
        return 0

    def _get_id(self, sector: int, data_out: list[Segment], data_in: list[Segment]) -> int:
        if total(data_in) < ID_BYTES:
            raise _Refused(S_IOERR)
        self.bus.memory.scatter(data_in, self.serial.encode("ascii").ljust(ID_BYTES, b"\0"))
        return ID_BYTES

    def _discard(self, sector: int, data_out: list[Segment], data_in: list[Segment]) -> int:
        for offset, size, _ in self._ranges(data_out, 0, MAX_DISCARD_SECTORS, MAX_DISCARD_RANGES):
            self.disk.discard(offset, size)  # a wish: where it cannot be, nothing happens
        self._settle()
        return 0

    def _write_zeroes(self, sector: int, data_out: list[Segment], data_in: list[Segment]) -> int:
        for offset, size, flags in self._ranges(data_out, RANGE_UNMAP, MAX_ZERO_SECTORS, MAX_ZERO_RANGES):
            self.disk.zero(offset, size, bool(flags & RANGE_UNMAP))
        self._settle()
        return 0

    def _settle(self) -> None:
        # Section 5.2.6.2: a driver that did not accept FLUSH takes what is written for safe.
        if not self.bus.negotiated(F_FLUSH):
            self.disk.flush()

    def _writable(self) -> None:
        if self.disk.readonly:
            raise _Refused(S_IOERR)

    def _parts(self, sector: int, segments: list[Segment]) -> Iterator[tuple[int, list[Segment]]]:
        """(offset in the file, segments) of each piece of a read or write; refused beyond the disk."""
        size = total(segments)
        if size % SECTOR:
            raise _Refused(S_IOERR)
        self._inside(sector, size)
        offset = sector * SECTOR
        while segments:
            part, segments = split(segments, PIECE)
            yield offset, part
            offset += PIECE

    def _inside(self, sector: int, size: int) -> None:
        if sector * SECTOR + size > self.disk.size:
            raise _Refused(S_IOERR)

    def _ranges(
        self, segments: list[Segment], flags_allowed: int, max_sectors: int, max_ranges: int
    ) -> list[tuple[int, int, int]]:
        """(offset, bytes, flags) of each range of a discard or write-zeroes request; all are checked first."""
        self._writable()
        size = total(segments)
        if size == 0 or size % RANGE.size or size > RANGE.size * max_ranges:
            raise _Refused(S_IOERR)
        ranges = list(RANGE.iter_unpack(self.bus.memory.gather(segments)))
        for sector, count, flags in ranges:
            if flags & ~flags_allowed:
                raise _Refused(S_UNSUPP)
            if not 0 < count <= max_sectors:
                raise _Refused(S_IOERR)
            self._inside(sector, count * SECTOR)
        return [(sector * SECTOR, count * SECTOR, flags) for sector, count, flags in ranges]

    def state(self) -> dict[str, Any]:
        """The disk's size and kind; its contents stay in the file, and are on the medium now."""
        if not self.disk.readonly:
            self.disk.flush()
        return {"bytes": self.disk.size, "readonly": self.disk.readonly}

    def restore(self, state: dict[str, Any]) -> None:
        """UsageError where this is another disk than the one in the snapshot."""
        have = {"bytes": self.disk.size, "readonly": self.disk.readonly}
        if state != have:
            raise UsageError(
                f"disk {self.disk.path} {_in_words(have)}, and the snapshot's {_in_words(state)}: give it that disk"
            )

    def close(self) -> None:
        """Closes and unlocks the file."""
        self.disk.close()


def _in_words(state: dict[str, Any]) -> str:
    return f"has {state['bytes']} bytes and is {'read-only' if state['readonly'] else 'writable'}"
