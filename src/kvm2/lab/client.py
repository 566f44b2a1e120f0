"""The client of a scenario: its names, its memory, and ioctls on a backend.

What a step of a scenario refers to by name (a VM, a vCPU, a device, client memory) lives here, and so does what the
program that recorded the published answers had: one buffer for arguments, one scratch area for what they point at.
Both keep old contents beyond what a step writes, as that program's did.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
from functools import cache
from typing import TYPE_CHECKING

from kvm2.errors import KvmError, UsageError
from kvm2.lab.alarm import Alarm
from kvm2.softkvm.memory import ProcessMemory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvm2.hosts.backend import Backend

KVM = "kvm"
KVM_RUN = 0xAE80
BUFFER_BYTES, SCRATCH_BYTES = 1 << 20, 1 << 16
# A kernel with 64K pages hands out memory at such boundaries; slots demand the host's page, whatever this machine's is.
ALIGNMENT = 1 << 16
PROTECTIONS = {"": mmap.PROT_READ | mmap.PROT_WRITE, "ro": mmap.PROT_READ, "none": 0}
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0x40


class Undefined(Exception):
    """A step uses a name that nothing has (its making failed, or it was closed): the step is skipped."""


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def map_memory(size: int, protection: str = "") -> int:
    """The address of `size` new bytes, zero, private; `protection` "", "ro" or "none". KvmError with mmap's errno."""
    if size <= 0 or size >= 1 << 62:
        raise KvmError(errno.EINVAL if size == 0 else errno.ENOMEM, f"mmap of {size} bytes")
    libc = _libc()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    found = libc.mmap(None, room + ALIGNMENT, PROTECTIONS[protection], flags, -1, 0)
    if found is None or found == ctypes.c_void_p(-1).value:
        raise KvmError(ctypes.get_errno(), f"mmap of {size} bytes")
    address = int(-(-found // ALIGNMENT) * ALIGNMENT)
    # Nothing of ours lies around the memory: an access beside it must find it missing.
    if address > found:
        libc.munmap(found, address - found)
    if found + ALIGNMENT > address:
        libc.munmap(address + room, found + ALIGNMENT - address)
    return address


def unmap_memory(address: int, size: int) -> int:
    """munmap: 0, or an errno."""
    return 0 if _libc().munmap(address, size) == 0 else ctypes.get_errno()


class Client:
    """One scenario's client, with one descriptor of `/dev/kvm`, named "kvm".

    `patience_ms` bounds how long a vCPU may stay in KVM_RUN; `cut_short` counts the runs that ended that way before
    the step's own time was over.
    """

    def __init__(self, backend: Backend, guests: Mapping[str, bytes], patience_ms: int) -> None:
        self.backend = backend
        self.guests = guests
        self.patience_ms = patience_ms
        self.cut_short = 0
        self.memory = ProcessMemory()
        self.names: dict[str, int] = {KVM: backend.open()}
        self.areas: dict[str, memoryview] = {}
        self._fds: list[str] = []
        self._memories: dict[str, int] = {}
        self._all_fds: list[int] = [self.names[KVM]]
        self.buffer = map_memory(BUFFER_BYTES)
        self.scratch = map_memory(SCRATCH_BYTES)

    # ---- names

    def number(self, name: str) -> int:
        """What a name stands for: a descriptor, or the address of client memory."""
        value = self.names.get(name)
        if value is None:
            raise Undefined(name)
        return value

    def name_fd(self, name: str, fd: int) -> None:
        """A descriptor gets a name; the name is closed at the scenario's end, the last one first."""
        self.names[name] = fd
        self._all_fds.append(fd)

    def expect_fd(self, name: str) -> None:
        """The scenario's end closes `name`, if it is one by then."""
        self._fds.append(name)

    def close(self, name: str) -> int:
        """close(2) of what `name` stands for: 0, or an errno. The name is gone either way."""
        fd = self.number(name)
        if name in self._fds:
            self._fds.remove(name)
        del self.names[name]
        return self._close(fd)

    def _close(self, fd: int) -> int:
        try:
            self.backend.close(fd)
        except KvmError as error:
            return error.errno or errno.EIO
        if fd in self._all_fds:
            self._all_fds.remove(fd)
        return 0

    # ---- client memory

    def map(self, name: str, size: int, protection: str) -> int:
        """New client memory: 0, or mmap's errno."""
        try:
            self.names[name] = map_memory(size, protection)
        except KvmError as error:
            return error.errno or errno.ENOMEM
        self._memories[name] = size
        return 0

    def unmap(self, name: str) -> int:
        """munmap of client memory: 0, or an errno."""
        address = self.number(name)
        size = self._memories.pop(name, 0)
        del self.names[name]
        self.backend.memory_gone(address, size)
        return unmap_memory(address, size)

    def poke(self, address: int, data: bytes) -> None:
        """Writes client memory, through the argument buffer, as the recording program did."""
        self._fill(data)
        self.memory.write(address, data)

    def peek(self, address: int, size: int) -> bytes:
        """Reads client memory."""
        return self.memory.read(address, size)

    # ---- ioctls: (return value, errno), -1 with an errno where the backend refuses

    def ioctl(self, fd: int, request: int, argument: int = 0) -> tuple[int, int]:
        """An ioctl with a number, or an address, as its argument."""
        try:
            return self.backend.ioctl(fd, request, argument & 0xFFFF_FFFF_FFFF_FFFF), 0
        except KvmError as error:
            return -1, error.errno or errno.EIO

    def exchange(self, fd: int, request: int, data: bytes, out: int = 0) -> tuple[int, int, bytes]:
        """An ioctl whose argument points at `data`; the first `out` bytes of it afterwards, also where it failed."""
        data = data.ljust(out, b"\0")
        self._fill(data)
        result, error = self.ioctl(fd, request, self.buffer)
        return result, error, ctypes.string_at(self.buffer, out)

    def _fill(self, data: bytes) -> None:
        if len(data) > BUFFER_BYTES:
            raise UsageError(f"{len(data)} bytes in one step: {BUFFER_BYTES} are allowed")
        ctypes.memmove(self.buffer, data, len(data))

    def map_run(self, name: str) -> None:
        """Maps the `kvm_run` area of the vCPU `name`, where it is one."""
        fd = self.names.get(name)
        if fd is not None:
            self.areas[name] = self.backend.kvm_run(fd)

    def area(self, name: str) -> memoryview:
        """The `kvm_run` area of a vCPU; it stays when the descriptor is closed."""
        area = self.areas.get(name)
        if area is None:
            raise Undefined(name)
        return area

    def run(self, fd: int, timeout_ms: int) -> tuple[int, int]:
        """KVM_RUN, interrupted after `timeout_ms` (or after the client's patience, where that is shorter)."""
        allowed = min(timeout_ms, self.patience_ms)
        with Alarm(self.backend, fd, allowed) as alarm:
            result = self.ioctl(fd, KVM_RUN)
        self.cut_short += alarm.rang and allowed < timeout_ms
        return result

    # ---- the scenario's end

    def finish(self) -> None:
        """Closes what is open, the last one made first, then gives the memory back."""
        for name in reversed(self._fds):
            if name in self.names:
                self._close(self.names.pop(name))
        # A name that was given twice leaves its first descriptor without one.
        for fd in reversed(self._all_fds[:]):
            self._close(fd)
        self.areas.clear()
        for name in list(self._memories):
            if name in self.names:
                self.unmap(name)
        unmap_memory(self.buffer, BUFFER_BYTES)
        unmap_memory(self.scratch, SCRATCH_BYTES)
