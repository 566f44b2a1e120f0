"""Fixtures: a backend that answers from a table, so that handles and board are tested without a software KVM."""

from __future__ import annotations

import ctypes
import errno
import itertools
import struct
import threading
from collections.abc import Callable, Iterable, Iterator

import pytest

from kvm2.abi import exits, ioctls
from kvm2.errors import KvmError


class FakeBackend:
    """Descriptors count up. `answers` maps a request to a function (fd, arg) -> int; `script` feeds each KVM_RUN."""

    def __init__(self, arch: str = "arm64") -> None:
        self.arch = arch
        self.fds = itertools.count(3)
        self.open_fds: set[int] = set()
        self.calls: list[tuple[int, int, int]] = []
        self.areas: dict[int, bytearray] = {}
        self.script: Iterator[Callable[[bytearray], None]] = iter(())
        self.kicked = threading.Event()
        self.slots: dict[int, tuple[int, int, int]] = {}
        self.answers: dict[int, Callable[[int, int], int]] = {
            ioctls.KVM_CREATE_VM: lambda fd, arg: self.new(),
            ioctls.KVM_CREATE_VCPU: lambda fd, arg: self.new(),
            ioctls.KVM_SET_USER_MEMORY_REGION: self.set_region,
            ioctls.KVM_RUN: self.run,
        }

    def new(self) -> int:
        fd = next(self.fds)
        self.open_fds.add(fd)
        self.areas[fd] = bytearray(3 * 4096)  # kvm_run, the page of port I/O, the coalesced ring
        return fd

    open = new

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        if fd not in self.open_fds:
            raise KvmError(errno.EBADF, f"descriptor {fd} is not open")
        self.calls.append((fd, request, arg))
        if request not in self.answers:
            raise KvmError(errno.EINVAL, f"{request:#x}")
        return self.answers[request](fd, arg)

    def kvm_run(self, fd: int) -> memoryview:
        return memoryview(self.areas[fd])

    def kick(self, fd: int) -> None:
        self.kicked.set()

    def memory_written(self, fd: int, address: int, size: int) -> None:
        pass

    def close(self, fd: int) -> None:
        self.open_fds.remove(fd)

    def set_region(self, fd: int, arg: int) -> int:
        slot, _, gpa, size, address = struct.unpack("=IIQQQ", ctypes.string_at(arg, 32))
        self.slots[slot] = (gpa, size, address)
        return 0

    def run(self, fd: int, arg: int) -> int:
        area = self.areas[fd]
        if area[exits.IMMEDIATE_EXIT_OFFSET]:
            self.exit(area, exits.KVM_EXIT_INTR)
            raise KvmError(errno.EINTR)
        step = next(self.script, None)
        if step is None:
            self.exit(area, exits.KVM_EXIT_SYSTEM_EVENT, exits.SystemEvent(type=1).pack())
        else:
            step(area)
        return 0

    @staticmethod
    def exit(area: bytearray, reason: int, payload: bytes = b"") -> None:
        struct.pack_into("=I", area, exits.EXIT_REASON_OFFSET, reason)
        area[exits.UNION_OFFSET : exits.UNION_OFFSET + len(payload)] = payload

    def play(self, steps: Iterable[tuple[int, bytes]]) -> None:
        """The next runs end with these exits (reason, payload)."""
        self.script = iter([lambda area, step=step: self.exit(area, *step) for step in steps])


def _mmio(address: int, size: int, data: bytes | None = None) -> tuple[int, bytes]:
    """An MMIO exit; a read where `data` is None."""
    payload = exits.Mmio(address, (data or b"").ljust(8, b"\0"), size, int(data is not None)).pack()
    return exits.KVM_EXIT_MMIO, payload


@pytest.fixture
def fake() -> FakeBackend:
    """A backend whose vCPUs play scripted exits."""
    return FakeBackend()


@pytest.fixture
def mmio() -> Callable[..., tuple[int, bytes]]:
    """Makes an MMIO exit for `FakeBackend.play`: (address, size, data of a write or None)."""
    return _mmio


@pytest.fixture
def real_x86() -> Iterator[object]:
    """This machine's /dev/kvm as a `Kvm`; skipped where it is not an x86-64 one that can be opened."""
    import kvm2
    from kvm2.hosts.kernel import machine_arch
    from kvm2.hosts.real import refusal

    if machine_arch() != "x86_64":
        pytest.skip(f"needs an x86-64 /dev/kvm; this machine is {machine_arch()}")
    why = refusal()
    if why:
        pytest.skip(f"needs an x86-64 /dev/kvm: {why}")
    with kvm2.open("/dev/kvm") as kvm:
        yield kvm
