"""The `/dev/kvm` descriptor: what the system answers before any VM exists."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvm2.abi import ioctls as io
from kvm2.errors import KvmError
from kvm2.softkvm import creation
from kvm2.softkvm.vm import Vm
from kvm2.softkvm.vm_fd import VmFd

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvm2.softkvm.creation import Configuring, VmConfig
    from kvm2.softkvm.door import SoftKvm

KVM_API_VERSION = 12


class System:
    """One descriptor of `/dev/kvm`."""

    def __init__(self, door: SoftKvm) -> None:
        self.door, self.profile, self.memory = door, door.profile, door.memory

    def ioctl(self, request: int, arg: int) -> int:
        """`kvm_dev_ioctl`: an unknown request is EINVAL."""
        if request == io.KVM_CREATE_VM2:
            return self._install(creation.create_vm2(self.profile, self.memory, arg))
        if request == io.KVM_CREATE_VM2_FIXED:
            return self._install(creation.create_vm2_fixed(self.profile, self.memory, arg))
        if request == io.KVM_CREATE_VM:
            return self._install(creation.create_vm(self.profile, self.memory, arg))
        if request == io.KVM_CHECK_EXTENSION:
            return check_extension(self.profile.caps, arg)
        if request == io.KVM_DESCRIBE_VM2:
            return creation.describe_vm2(self.profile, self.memory, arg)
        if request == io.KVM_GET_API_VERSION:
            return _without_argument(arg, KVM_API_VERSION)
        if request == io.KVM_GET_VCPU_MMAP_SIZE:
            return _without_argument(arg, self.profile.vcpu_mmap_size)
        raise KvmError(errno.EINVAL, f"{request:#x} is no ioctl of /dev/kvm on this host")

    def _install(self, config: VmConfig | Configuring | int) -> int:
        if isinstance(config, int):
            return config  # a dry run: 0, which is not a descriptor
        vm = Vm(self.profile, self.memory, config)
        vm.guest_ids = self.door.guest_ids
        return self.door.install(VmFd(vm, self.door))

    def release(self) -> None:
        """Nothing to give back: VMs live on their own."""


def check_extension(caps: Mapping[int, int], cap: int) -> int:
    """`KVM_CHECK_EXTENSION` from a table: 0 for a capability that is not in it; a negative entry is an errno."""
    value = caps.get(cap, 0)
    if value < 0:
        raise KvmError(-value, f"this host's kernel answers capability {cap} with an error")
    return value


def _without_argument(arg: int, value: int) -> int:
    if arg:
        raise KvmError(errno.EINVAL, f"the argument must be 0, not {arg:#x}")
    return value
