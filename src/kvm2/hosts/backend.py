"""What the handles ask of whoever answers ioctls: the software KVM in this process, or a kernel.

The arguments are a real kernel's: a file descriptor, the request's number, a number or the address of a structure in
this process. `softkvm.door.SoftKvm` is one; another would call `fcntl.ioctl` and `mmap` on `/dev/kvm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.errors import KvmError


class Runner:
    """A way into KVM_RUN of one vCPU: `ioctl(fd, KVM_RUN)`, which raises OSError where it is refused.

    Whoever calls it says before in `thread` which thread does (`get_ident`; 0: nobody), so that it can be kicked.
    `explained` turns the OSError into a KvmError with what is known.
    """

    __slots__ = ("explained", "ioctl", "thread")

    def __init__(
        self, ioctl: Callable[[int, int], int], explained: Callable[[OSError], KvmError] | None = None
    ) -> None:
        self.ioctl = ioctl
        self.explained = explained
        self.thread = 0


class Backend(Protocol):
    """One KVM: descriptors, ioctls, the vCPU's shared area. Refusals are KvmError with the errno.

    One that has a quicker way into KVM_RUN than `ioctl` may also have `runner(fd) -> Runner`.
    """

    @property
    def arch(self) -> str:
        """The host's architecture: "arm64", "x86_64", "s390x", "powerpc"."""
        ...

    def open(self) -> int:
        """A new descriptor of /dev/kvm."""
        ...

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """The ioctl's result, 0 or more; KvmError(errno) when it is refused."""
        ...

    def kvm_run(self, fd: int) -> memoryview:
        """The shared `kvm_run` area of a vCPU, writable, KVM_GET_VCPU_MMAP_SIZE bytes."""
        ...

    def kick(self, fd: int) -> None:
        """Get a vCPU's KVM_RUN back with EINTR, as a signal to its thread does; it is not lost between two runs."""
        ...

    def memory_gone(self, address: int, size: int) -> None:
        """Memory of this process is about to be unmapped: no guest may reach it any more."""
        ...

    def memory_written(self, fd: int, address: int, size: int) -> None:
        """Memory of this process behind a slot of VM `fd` was changed: the guest must not execute what was there."""
        ...

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        ...


class RawKvm(Backend, Protocol):
    """A kernel as it is. `reserve` and `fill` are for a VM that gets its number before it is made."""

    @property
    def name(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def page_shift(self) -> int: ...

    def reserve(self) -> int:
        """A descriptor that answers nothing yet."""
        ...

    def fill(self, fd: int, made: int) -> None:
        """What descriptor `made` refers to gets the reserved number `fd`; `made` is closed."""
        ...
