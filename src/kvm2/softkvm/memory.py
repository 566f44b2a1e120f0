"""The memory that ioctl arguments live in, read and written without ever crashing on a bad address.

A KVM client hands over addresses; the kernel answers a bad one with EFAULT. Here the client is this process, so the
operating system does the copying: `pwrite` of the client's bytes into an unnamed file, and `pread` from it into the
client's memory, are the kernel's own copy_from_user and copy_to_user. They respect page protections, stop at the first
byte that is not there, and need no privilege.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import tempfile
import threading
from typing import Protocol

from kvm2.errors import KvmError

ADDRESS_LIMIT = 1 << 63
BOUNCE_BYTES = 1 << 16

# madvise(2): make pages present as a read or a write would, without changing them (Linux 5.14).
MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23


class Memory(Protocol):
    """What the door needs of a client's address space. Every method checks; none reads a byte twice."""

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at `address`; KvmError(EFAULT) where any of them cannot be read."""
        ...

    def write(self, address: int, data: bytes) -> None:
        """Writes all of `data`; KvmError(EFAULT) where any byte cannot be written."""
        ...

    def accessible(self, address: int, size: int, write: bool) -> bool:
        """Whether `size` bytes at `address` can be read (or written too), without changing them."""
        ...


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ("pread", "pwrite"):
        call = getattr(libc, name)
        call.restype = ctypes.c_ssize_t
        call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


_LIBC = _libc()
_pread, _pwrite, _madvise = _LIBC.pread, _LIBC.pwrite, _LIBC.madvise


class _File:
    """An unnamed file, mapped to be looked at."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("kvm2-bounce") if sys.platform == "linux" else _unnamed_file()
        os.ftruncate(self.fd, BOUNCE_BYTES)
        self.view = mmap.mmap(self.fd, BOUNCE_BYTES)

    def __del__(self) -> None:
        self.view.close()
        os.close(self.fd)


class _Bounce(threading.local):
    """The file that bytes go through, one for each thread: it goes with the thread, for nothing else holds it."""

    def __init__(self) -> None:
        self.file = _File()
        self.fd, self.view = self.file.fd, self.file.view


def _unnamed_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


_bounce = _Bounce()


def _after_fork() -> None:
    # The child shares the parent's file, whose bytes would mix: it takes a new one.
    global _bounce
    _bounce = _Bounce()


os.register_at_fork(after_in_child=_after_fork)


def copy_in(address: int, size: int) -> bytes | None:
    """`size` bytes at `address` of this process, or None where any of them cannot be read.

    >>> import ctypes
    >>> cell = ctypes.create_string_buffer(b"kvm2")
    >>> copy_in(ctypes.addressof(cell), 4), copy_in(16, 4)
    (b'kvm2', None)
    """
    if size > BOUNCE_BYTES:
        head, tail = copy_in(address, BOUNCE_BYTES), copy_in(address + BOUNCE_BYTES, size - BOUNCE_BYTES)
        return None if head is None or tail is None else head + tail
    bounce = _bounce
    if address + size > ADDRESS_LIMIT or _pwrite(bounce.fd, address, size, 0) != size:
        return None
    data: bytes = bounce.view[:size]
    return data


def copy_out(address: int, data: bytes) -> bool:
    """Writes `data` to `address` of this process; False where any byte cannot be written."""
    bounce = _bounce
    for start in range(0, len(data), BOUNCE_BYTES):
        part = data[start : start + BOUNCE_BYTES]
        bounce.view[: len(part)] = part
        to = address + start
        if to + len(part) > ADDRESS_LIMIT or _pread(bounce.fd, to, len(part), 0) != len(part):
            return False
    return True


def _populate_works() -> bool:
    """Whether this kernel has MADV_POPULATE_*, tried on a page that is surely there."""
    if sys.platform != "linux":
        return False
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        cell = ctypes.c_char.from_buffer(page)
        works = bool(_madvise(ctypes.addressof(cell), mmap.PAGESIZE, MADV_POPULATE_WRITE) == 0)
        del cell
    return works


_POPULATE = _populate_works()


# What this process vouches for, start -> end: buffers of ours that stay for the time of one call.
_own: dict[int, int] = {}


class Vouched:
    """`with Vouched(address, size):` these bytes are a buffer of this process that nobody takes away meanwhile.

    Reads within it need not ask the system whether the address is good: an ioctl's argument is read in a third of the
    time.
    """

    __slots__ = ("_end", "_start")

    def __init__(self, address: int, size: int) -> None:
        self._start, self._end = address, address + size

    def __enter__(self) -> None:
        _own[self._start] = self._end

    def __exit__(self, *exc: object) -> None:
        _own.pop(self._start, None)


def _is_own(address: int, size: int) -> bool:
    # A copy: another thread may begin or end a call meanwhile.
    return any(start <= address and address + size <= end for start, end in _own.copy().items())


# Guest memory of this library's own making, start -> end: nobody waits for the first touch of one of its pages, as who
# serves pages by userfaultfd does.
_plain: dict[int, int] = {}


def plain(address: int, size: int) -> None:
    """This process's memory there is plain: pages may be made before they are touched."""
    _plain[address] = address + size


def not_plain(address: int) -> None:
    """The memory that began there goes away."""
    _plain.pop(address, None)


def is_plain(address: int, size: int) -> bool:
    """Whether all of it was said to be plain."""
    return any(start <= address and address + size <= end for start, end in _plain.copy().items())


class ProcessMemory:
    """This process's own address space.

    >>> import ctypes
    >>> cell = ctypes.create_string_buffer(b"kvm2")
    >>> ProcessMemory().read(ctypes.addressof(cell), 4)
    b'kvm2'
    >>> ProcessMemory().read(16, 4)
    Traceback (most recent call last):
    kvm2.errors.KvmError: EFAULT: 4 bytes at 0x10 cannot be read
    """

    def own(self, address: int) -> bytes | None:
        """The whole of a buffer that this process vouches for, by its first address; None where there is none."""
        end = _own.get(address)
        return None if end is None else ctypes.string_at(address, end - address)

    def read(self, address: int, size: int) -> bytes:
        if _own and _is_own(address, size):
            return ctypes.string_at(address, size)
        data = copy_in(address, size)
        if data is None:
            raise KvmError(errno.EFAULT, f"{size} bytes at {address:#x} cannot be read")
        return data

    def write(self, address: int, data: bytes) -> None:
        if _own and _is_own(address, len(data)):
            ctypes.memmove(address, data, len(data))
            return
        if not copy_out(address, data):
            raise KvmError(errno.EFAULT, f"{len(data)} bytes at {address:#x} cannot be written")

    def accessible(self, address: int, size: int, write: bool) -> bool:
        start = address & -mmap.PAGESIZE
        if address + size > ADDRESS_LIMIT:
            return False
        if _POPULATE:
            advice = MADV_POPULATE_WRITE if write else MADV_POPULATE_READ
            return bool(_madvise(start, address + size - start, advice) == 0)
        # Protection is per page, so one byte of each decides; it is written back as it was.
        for page in range(start, address + size, mmap.PAGESIZE):
            where = max(page, address)
            byte = copy_in(where, 1)
            if byte is None or (write and not copy_out(where, byte)):
                return False
        return True


class Within:
    """Another memory, and whether a read ever left the `size` bytes at `start` (`left`)."""

    def __init__(self, memory: Memory, start: int, size: int) -> None:
        self._memory, self._start, self._end = memory, start, start + size
        self.left = False
        self.write, self.accessible = memory.write, memory.accessible

    def read(self, address: int, size: int) -> bytes:
        """As the memory beneath."""
        self.left = self.left or not self._start <= address <= self._end - size
        return self._memory.read(address, size)
