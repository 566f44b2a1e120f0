"""A real KVM: ioctls and shared memory of `/dev/kvm`, without a compiler.

Everything that comes in and goes out is as for the software KVM, so the handles are the same. What only a kernel with
KVM_CREATE_VM2 could answer is not here: `hosts.lowering` stands in front of it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import threading
import weakref
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvm2.abi.ioctls import KVM_GET_VCPU_MMAP_SIZE, KVM_RUN
from kvm2.errors import KvmError
from kvm2.hosts.backend import Runner

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = "/dev/kvm"
PROT_READ, PROT_WRITE = 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_FAILED = ctypes.c_void_p(-1).value


def machine_arch() -> str:
    """The architecture of this machine's kernel, as host files have it."""
    machine = os.uname().machine
    return {"aarch64": "arm64", "ppc64le": "powerpc", "ppc64": "powerpc"}.get(machine, machine)


def _load() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong]
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.tgkill.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int]
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return libc


class Kernel:
    """The KVM of this machine's kernel: a `hosts.backend.Backend`. Descriptors are the process's own, close-on-exec.

    Any thread may call any method. EINTR is retried, as api.rst asks for KVM_CREATE_VM, except in KVM_RUN, where it is
    the answer.
    """

    def __init__(self, path: str = DEVICE) -> None:
        self.path = path
        self._libc = _load()
        self._areas: dict[int, Any] = {}
        self._runners: dict[int, Runner] = {}
        self._kick_signal = _kick_signal(self._libc)

    @property
    def name(self) -> str:
        """The device's path."""
        return self.path

    @property
    def arch(self) -> str:
        """This machine's architecture, in KVM's words: "arm64", "x86_64", "s390x", "powerpc", or uname's own."""
        return machine_arch()

    @property
    def page_shift(self) -> int:
        """log2 of the kernel's page size."""
        return os.sysconf("SC_PAGESIZE").bit_length() - 1

    def reserve(self) -> int:
        """A descriptor that answers no ioctl, until `fill` makes it another. KvmError where there is none left."""
        return self._opened(os.devnull)

    def fill(self, fd: int, made: int) -> None:
        """dup2: `fd` refers to what `made` was, and `made` is closed."""
        os.dup2(made, fd, inheritable=False)
        os.close(made)

    def open(self) -> int:
        """A new descriptor of the device. KvmError with open(2)'s errno."""
        return self._opened(self.path)

    def _opened(self, path: str) -> int:
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise KvmError(error.errno or errno.EIO, f"{path}: {error.strerror}") from None

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """The kernel's answer; KvmError with its errno."""
        if request == KVM_RUN:
            return self._run(fd)
        libc = self._libc
        while True:
            result: int = libc.ioctl(fd, request, arg)
            if result >= 0:
                return result
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise KvmError(number)

    def runner(self, fd: int, explained: Callable[[KvmError], KvmError] | None = None) -> Runner:
        """The shortest way into KVM_RUN of a vCPU, for as long as the descriptor is open; the same for every caller.

        `explained` may say more about an error.
        """
        runner = self._runners.get(fd)
        if runner is None:
            # After an exit the processor's caches and predictors are cold, so each bytecode counts. fcntl.ioctl is to
            # be called without a third argument: for a number it tries two kinds of buffer first, which takes as long
            # as half an exit. Handlers of Python run before it comes back: Ctrl-C arrives as KeyboardInterrupt.
            runner = self._runners[fd] = Runner(fcntl.ioctl, _refused)
        if explained is not None:
            runner.explained = lambda error: explained(_refused(error))
        return runner

    def _run(self, fd: int) -> int:
        runner = self.runner(fd)
        runner.thread = threading.get_ident()
        try:
            return runner.ioctl(fd, KVM_RUN)
        except OSError as error:
            raise _refused(error) from None
        finally:
            runner.thread = 0

    def kvm_run(self, fd: int) -> memoryview:
        """The vCPU's shared area. The view stays valid after the descriptor is closed, without keeping the vCPU."""
        known = self._areas.get(fd)
        if known is not None:
            return memoryview(known).cast("B")
        size = self._mmap_size
        address = self._libc.mmap(None, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if address == _FAILED:
            raise KvmError(ctypes.get_errno(), f"mmap of descriptor {fd}, {size} bytes")
        area = (ctypes.c_ubyte * size).from_address(address)
        weakref.finalize(area, self._libc.munmap, address, size).atexit = False
        self._areas[fd] = area
        return memoryview(area).cast("B")

    @cached_property
    def _mmap_size(self) -> int:
        fd = self.open()
        try:
            return self.ioctl(fd, KVM_GET_VCPU_MMAP_SIZE)
        finally:
            os.close(fd)

    def kick(self, fd: int) -> None:
        """A signal to the thread in KVM_RUN; nothing where there is none (`immediate_exit` is for that)."""
        runner = self._runners.get(fd)
        thread = runner.thread if runner is not None else 0
        if thread:
            # Python's table has the system's number, with which nothing goes wrong where the thread has just ended. A
            # thread that Python did not make may be missing there.
            native = next((one.native_id for one in threading.enumerate() if one.ident == thread), None)
            missed = native is None or self._libc.tgkill(os.getpid(), native, self._kick_signal)
            if missed and runner is not None and runner.thread == thread:
                signal.pthread_kill(thread, self._kick_signal)

    def memory_gone(self, address: int, size: int) -> None:
        """Nothing to do: the kernel's MMU notifier sees it."""

    def memory_written(self, fd: int, address: int, size: int) -> None:
        """Nothing to do on x86-64, whose caches are coherent; on arm64 KVM cleans what it maps executable."""

    def close(self, fd: int) -> None:
        """Closes a descriptor; the area of a vCPU no longer holds it, and reads as zeros."""
        self._runners.pop(fd, None)
        area = self._areas.pop(fd, None)
        if area is not None:
            # The mapping itself holds the vCPU and so the VM: nothing may lie there, and no view may dangle.
            flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
            where, size = ctypes.addressof(area), ctypes.sizeof(area)
            self._libc.mmap(where, size, PROT_READ | PROT_WRITE, flags, -1, 0)
        try:
            os.close(fd)
        except OSError as error:
            raise KvmError(error.errno or errno.EIO, f"descriptor {fd}: {error.strerror}") from None


def _refused(error: OSError) -> KvmError:
    return KvmError(error.errno or errno.EIO)


def _kick_signal(libc: ctypes.CDLL) -> int:
    """A real-time signal with a handler that does nothing: its only effect is KVM_RUN's EINTR.

    Python's own handlers can be set in the main thread only, and would wake it up for every kick; so the C library's
    `abs` handles it. A handler that the program has already is as good, and stays.
    """
    number = int(signal.SIGRTMIN) + 6
    before = libc.signal(number, ctypes.cast(libc.abs, ctypes.c_void_p))
    if before not in (None, 1):  # SIG_DFL, SIG_IGN
        libc.signal(number, before)
    return number
