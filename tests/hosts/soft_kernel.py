"""A kernel without KVM_CREATE_VM2, on any machine: the software KVM of a described host, as a mainline one.

What it answers is judged by real kernels' records, so a lowering that is right on it is right on them.
"""

from __future__ import annotations

from dataclasses import replace

from kvm2.abi.vm2 import KVM_CAP_CREATE_VM2
from kvm2.errors import KvmError
from kvm2.hosts.lowering import Lowered
from kvm2.softkvm import profile
from kvm2.softkvm.door import SoftKvm


class Nothing:
    """What a reserved descriptor refers to."""

    def ioctl(self, request, arg):
        raise KvmError(25, "nothing is behind this descriptor yet")

    def release(self):
        pass


class SoftKernel(SoftKvm):
    """The software KVM with what `hosts.lowering.RawKvm` asks of a kernel, and every request that reached it."""

    def __init__(self, described) -> None:
        super().__init__(mainline(described))
        self.name, self.page_shift = "/dev/kvm", described.page_shift
        self.requests = []

    def ioctl(self, fd, request, arg=0):
        self.requests.append(request)
        try:
            return super().ioctl(fd, request, arg)
        except KvmError as error:
            raise KvmError(error.errno) from None  # a kernel gives no reasons

    def reserve(self):
        return self.install(Nothing())

    def fill(self, fd, made):
        self._files[fd] = self._files.pop(made)


def mainline(described):
    """The same host with a kernel that never heard of KVM_CREATE_VM2."""
    caps = {number: value for number, value in described.caps.items() if number != KVM_CAP_CREATE_VM2}
    return replace(described, create_vm2=0, caps=caps)


def lowered(name):
    """A lowered kernel of a described host."""
    return Lowered(SoftKernel(profile.load(name) if isinstance(name, str) else name))
