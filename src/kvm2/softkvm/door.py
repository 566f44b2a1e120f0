"""The door: ioctls on descriptors, the only way into the software KVM.

Whatever comes in is bytes at an address of the client's memory; whatever is refused is a `KvmError`. The Python
handles, replayed records, fuzzers and the server for C programs all come through here.
"""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING, Protocol

from kvm2.errors import KvmError
from kvm2.softkvm import guest_ids as ids
from kvm2.softkvm.memory import ProcessMemory
from kvm2.softkvm.system import System
from kvm2.softkvm.vcpu_fd import VcpuFd
from kvm2.softkvm.vm import Vm
from kvm2.softkvm.vm_fd import VmFd

if TYPE_CHECKING:
    from kvm2.softkvm.memory import Memory
    from kvm2.softkvm.profile import Profile

# A new descriptor is never 0, 1 or 2: programs take those for the standard streams, and a dry run answers 0.
FIRST_FD = 3


class File(Protocol):
    """What a descriptor refers to: the system, a VM, a vCPU or a device."""

    def ioctl(self, request: int, arg: int) -> int:
        """Answers one ioctl, or raises KvmError."""
        ...

    def release(self) -> None:
        """The last descriptor of it was closed."""
        ...


class SoftKvm:
    """One described host's `/dev/kvm`, in this process.

    Descriptors are plain numbers that belong to this object and are never used twice. Any thread may call any method.
    `guest_ids` is what guests are shown of the ID registers (`softkvm.guest_ids`): "profile" or "core".
    A process that inherits the object by fork gets EIO from VMs and vCPUs that it did not make, as from the kernel.

    >>> from kvm2.softkvm import profile
    >>> kvm = SoftKvm(profile.load("max-4k-6.12"))
    >>> fd = kvm.open()
    >>> kvm.ioctl(fd, 0xAE00)                # KVM_GET_API_VERSION
    12
    >>> kvm.close(fd)
    """

    def __init__(self, profile: Profile, memory: Memory | None = None, guest_ids: str = ids.PROFILE) -> None:
        self.profile, self.guest_ids = profile, ids.checked(guest_ids)
        self.memory = memory if memory is not None else ProcessMemory()
        self._numbers = itertools.count(FIRST_FD)
        self._files: dict[int, File] = {}

    @property
    def arch(self) -> str:
        """The described host's architecture."""
        return self.profile.arch

    def open(self) -> int:
        """A new descriptor of `/dev/kvm`."""
        return self.install(System(self))

    def install(self, file: File) -> int:
        """A new descriptor for `file` (the door's own objects call this for the VMs and vCPUs that they make)."""
        number = next(self._numbers)
        self._files[number] = file
        return number

    def _file(self, fd: int) -> File:
        file = self._files.get(fd)
        if file is None:
            raise KvmError(errno.EBADF, f"descriptor {fd} is not open here")
        return file

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """`ioctl(fd, request, arg)`: the value that the kernel returns; KvmError where it returns an errno."""
        file = self._files.get(fd)
        if file is None:
            file = self._file(fd)
        return file.ioctl(request & 0xFFFF_FFFF, arg & 0xFFFF_FFFF_FFFF_FFFF)

    def kvm_run(self, fd: int) -> memoryview:
        """The `struct kvm_run` of a vCPU, KVM_GET_VCPU_MMAP_SIZE bytes, shared with it (mmap of the descriptor)."""
        return self._vcpu(fd).map()

    def kick(self, fd: int) -> None:
        """What a signal to the thread in KVM_RUN does: KVM_RUN returns EINTR. Nothing where it is not running."""
        self._vcpu(fd).kick()

    def _vcpu(self, fd: int) -> VcpuFd:
        file = self._file(fd)
        if not isinstance(file, VcpuFd):
            raise KvmError(errno.ENODEV, f"descriptor {fd} is not a vCPU")
        return file

    def inspect(self, fd: int) -> object:
        """The object behind a descriptor (a `Vm`, a `Vcpu`), to look at: pictures, summaries, tests."""
        file = self._file(fd)
        return getattr(file, "subject", file)

    def memory_gone(self, address: int, size: int) -> None:
        """The client is about to unmap `size` bytes at `address` (whole pages of the host). A kernel hears of that by
        itself; here a client that unmaps memory behind a slot without saying so crashes at its guest's next access."""
        subjects = [getattr(file, "subject", None) for file in list(self._files.values())]
        for vm in {getattr(subject, "vm", subject) for subject in subjects}:
            if isinstance(vm, Vm):
                vm.forget_memory(address, size)

    def memory_written(self, fd: int, address: int, size: int) -> None:
        """The client changed `size` bytes of its memory behind a slot of VM `fd`: if they were instructions, the guest
        executes the new ones from its next KVM_RUN on (what a VMM on hardware needs cache maintenance for)."""
        file = self._files.get(fd)
        if isinstance(file, VmFd):
            file.vm.code_written(address, size)

    def close(self, fd: int) -> None:
        """Closes a descriptor; EBADF where it is not open."""
        file = self._files.pop(fd, None)
        if file is None:
            raise KvmError(errno.EBADF, f"descriptor {fd} is not open here")
        file.release()

    def fds(self) -> list[int]:
        """The open descriptors."""
        return list(self._files)
