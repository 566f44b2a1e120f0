"""The file or block device behind a virtio disk: opened, locked, and changed in place. Raw contents only."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import sys
from typing import TYPE_CHECKING

from kvm2.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

SECTOR = 512
ZEROS = bytes(1 << 20)
# fallocate(2): FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE.
PUNCH_HOLE = 0x01 | 0x02
# First bytes of image formats that hold a disk but are not one.
FORMATS = {b"QFI\xfb": "qcow2", b"KDMV": "vmdk", b"vhdxfile": "vhdx", b"conectix": "vpc", b"QED\0": "qed"}


class Disk:
    """An open image of `size` bytes. Nobody else may open it for writing as a `Disk`, nor read what is written here.

    UsageError where the file cannot be one: missing, locked, another format, no whole number of sectors.
    """

    def __init__(self, path: str | Path, *, readonly: bool = False) -> None:
        self.path = str(path)
        self.readonly = readonly
        self.fd = -1
        try:
            self.fd = os.open(self.path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
            self._lock()
            self.size = self._measure()
            self._look_at_contents()
        except OSError as error:
            self.close()
            hint = "; a read-only disk may do" if error.errno in (errno.EACCES, errno.EROFS) and not readonly else ""
            raise UsageError(f"disk {self.path}: {error.strerror}{hint}") from error
        except UsageError:
            self.close()
            raise

    def _lock(self) -> None:
        # Two writers, or a writer and a cached reader, destroy a file system; several readers do not.
        try:
            fcntl.flock(self.fd, (fcntl.LOCK_SH if self.readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"disk {self.path} is in use by another machine: stop that one, or give each its own copy "
                "(several may share a disk that all of them open read-only)"
            ) from None

    def _measure(self) -> int:
        mode = os.fstat(self.fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise UsageError(f"disk {self.path} is neither a file nor a block device")
        size = os.lseek(self.fd, 0, os.SEEK_END)
        if size == 0:
            raise UsageError(f"disk {self.path} is empty: make it as large as it shall be (truncate -s 1G FILE)")
        if size % SECTOR:
            more = SECTOR - size % SECTOR
            raise UsageError(
                f"disk {self.path} has {size} bytes, which is no multiple of a sector's {SECTOR}: "
                f"append {more} (truncate -s +{more} FILE)"
            )
        return size

    def _look_at_contents(self) -> None:
        start = os.pread(self.fd, 8, 0)
        for magic, kind in FORMATS.items():
            if start.startswith(magic):
                raise UsageError(
                    f"disk {self.path} is a {kind} image, and raw ones are taken: qemu-img convert -O raw makes one"
                )

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; OSError where the file does not have them (any more)."""
        data = os.pread(self.fd, size, offset)
        while len(data) < size:
            more = os.pread(self.fd, size - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, "the file has become shorter", self.path)
            data += more
        return data

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put `data` at `offset`."""
        view = memoryview(data)
        while view:
            done = os.pwrite(self.fd, view, offset)
            offset, view = offset + done, view[done:]

    def flush(self) -> None:
        """What was written is on the medium when this returns."""
        if sys.platform == "darwin":
            os.fsync(self.fd)
        else:
            os.fdatasync(self.fd)

    def discard(self, offset: int, size: int) -> bool:
        """Give the space of a range back, so that it reads as zeros; False where the file system cannot."""
        if sys.platform != "linux":
            return False
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(self.fd, PUNCH_HOLE, ctypes.c_long(offset), ctypes.c_long(size)) == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
            return False
        raise OSError(code, os.strerror(code), self.path)

    def zero(self, offset: int, size: int, unmap: bool) -> None:
        """A range becomes zeros; with `unmap` its space may be given back."""
        if unmap and self.discard(offset, size):
            return
        for at in range(offset, offset + size, len(ZEROS)):
            self.write(at, memoryview(ZEROS)[: min(len(ZEROS), offset + size - at)])

    def close(self) -> None:
        """Closes and unlocks the file; may be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
