"""The memory that ioctl arguments live in, read and written without ever crashing on a bad address.

A KVM client hands over addresses; the kernel answers a bad one with EFAULT. Here the client is this process, so the
same is asked of the operating system: `process_vm_readv` on ourselves respects page protections and stops at the first
page that is not there (Linux); `mach_vm_read_overwrite` and `mach_vm_write` do it on macOS.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from typing import Protocol

from kvm2.errors import EnvironmentFault, KvmError

ADDRESS_LIMIT = 1 << 64


class Memory(Protocol):
    """What the door needs of a client's address space. Every method checks; none reads a byte twice."""

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at `address`; KvmError(EFAULT) where any of them cannot be read."""
        ...

    def write(self, address: int, data: bytes) -> None:
        """Writes all of `data`; KvmError(EFAULT) where any byte cannot be written."""
        ...

    def accessible(self, address: int, size: int, write: bool) -> bool:
        """Whether `size` bytes at `address` can be read (and written), without changing them."""
        ...


class _IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class _Linux:
    """process_vm_readv/writev on ourselves."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._readv, self._writev = libc.process_vm_readv, libc.process_vm_writev
        for call in (self._readv, self._writev):
            call.restype = ctypes.c_ssize_t
            call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p] + [ctypes.c_ulong] * 2

    def read(self, address: int, buffer: ctypes.Array[ctypes.c_char], size: int) -> bool:
        here, there = _IoVec(ctypes.addressof(buffer), size), _IoVec(address, size)
        done = self._readv(os.getpid(), ctypes.addressof(here), 1, ctypes.addressof(there), 1, 0)
        return bool(done == size)

    def write(self, address: int, data: bytes) -> bool:
        source = ctypes.create_string_buffer(data, len(data))
        here, there = _IoVec(ctypes.addressof(source), len(data)), _IoVec(address, len(data))
        done = self._writev(os.getpid(), ctypes.addressof(here), 1, ctypes.addressof(there), 1, 0)
        return bool(done == len(data))


class _Darwin:
    """mach_vm_read_overwrite/mach_vm_write on our own task."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._task = ctypes.c_uint.in_dll(libc, "mach_task_self_")
        self._read, self._write = libc.mach_vm_read_overwrite, libc.mach_vm_write
        self._read.argtypes = [ctypes.c_uint] + [ctypes.c_uint64] * 3 + [ctypes.c_void_p]
        self._write.argtypes = [ctypes.c_uint, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint]

    def read(self, address: int, buffer: ctypes.Array[ctypes.c_char], size: int) -> bool:
        done = ctypes.c_uint64(0)
        where = ctypes.addressof(buffer)
        return self._read(self._task, address, size, where, ctypes.byref(done)) == 0 and done.value == size

    def write(self, address: int, data: bytes) -> bool:
        source = ctypes.create_string_buffer(data, len(data))
        return bool(self._write(self._task, address, ctypes.addressof(source), len(data)) == 0)


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

    def __init__(self) -> None:
        if sys.platform not in ("linux", "darwin"):
            raise EnvironmentFault(f"the software KVM runs on Linux and macOS, not on {sys.platform}")
        self._system: _Linux | _Darwin = _Linux() if sys.platform == "linux" else _Darwin()

    def read(self, address: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        if size and (address + size > ADDRESS_LIMIT or not self._system.read(address, buffer, size)):
            raise KvmError(errno.EFAULT, f"{size} bytes at {address:#x} cannot be read")
        return buffer.raw

    def write(self, address: int, data: bytes) -> None:
        if data and (address + len(data) > ADDRESS_LIMIT or not self._system.write(address, bytes(data))):
            raise KvmError(errno.EFAULT, f"{len(data)} bytes at {address:#x} cannot be written")

    def accessible(self, address: int, size: int, write: bool) -> bool:
        # One byte of each page decides: protection is per page. Writing back what was read changes nothing, as no
        # vCPU that shares the page runs while its VM's stage-2 fault is handled.
        page = os.sysconf("SC_PAGE_SIZE")
        start = address - address % page
        for at in range(start, address + size, page):
            where = max(at, address)
            try:
                byte = self.read(where, 1)
                if write:
                    self.write(where, byte)
            except KvmError:
                return False
        return True
