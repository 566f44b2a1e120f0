"""KVM_CREATE_DEVICE: which devices the host has.

The vGIC can be created, as on the host; it cannot be configured yet, so the first KVM_RUN finds it unconfigured and
ends the VM, which is what the kernel does too.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvm2.abi import ioctls as io
from kvm2.abi.structs import CreateDevice
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from kvm2.softkvm.vm_fd import VmFd

KVM_CREATE_DEVICE_TEST = 1
VGIC_TYPES = {5: "v2", 7: "v3", 8: "its"}  # KVM_DEV_TYPE_ARM_VGIC_V2, _V3, _ITS


class DeviceFd:
    """The descriptor of a device."""

    def __init__(self, vm_fd: VmFd, kind: str) -> None:
        self.vm_fd, self.kind = vm_fd, kind
        vm_fd.hold()

    def ioctl(self, request: int, arg: int) -> int:
        """`kvm_device_ioctl`: an unknown request is ENOTTY."""
        self.vm_fd.vm.check_alive()
        if request in (io.KVM_SET_DEVICE_ATTR, io.KVM_GET_DEVICE_ATTR, io.KVM_HAS_DEVICE_ATTR):
            raise KvmError(errno.ENXIO, f"the vGIC ({self.kind}) has no attributes here yet: it cannot be configured")
        raise KvmError(errno.ENOTTY, f"{request:#x} is no ioctl of a device")

    def release(self) -> None:
        """The device stays part of its VM."""
        self.vm_fd.drop()


def create(vm_fd: VmFd, arg: int) -> int:
    """`kvm_ioctl_create_device` and `kvm_vgic_create`: ENODEV, EEXIST for a second vGIC, EBUSY after a vCPU ran, E2BIG
    with more vCPUs than it takes. The new descriptor is written into the client's structure."""
    vm = vm_fd.vm
    request = CreateDevice.unpack(vm.memory.read(arg, CreateDevice.SIZE))
    kind = VGIC_TYPES.get(request.type)
    if kind is None or kind not in vm.profile.gic:
        have = ", ".join(f"vGIC{gic} (type {number})" for number, gic in VGIC_TYPES.items() if gic in vm.profile.gic)
        raise KvmError(errno.ENODEV, f"device type {request.type}: this host has {have or 'none'}")
    if request.flags & KVM_CREATE_DEVICE_TEST:
        return 0
    with vm.lock:
        if kind != "its":
            _create_vgic(vm_fd, kind)
        fd = vm_fd.door.install(DeviceFd(vm_fd, kind))
    vm.memory.write(arg, CreateDevice(request.type, fd, request.flags).pack())
    return 0


def _create_vgic(vm_fd: VmFd, kind: str) -> None:
    vm = vm_fd.vm
    if vm.irqchip:
        raise KvmError(errno.EEXIST, f"this VM has a vGIC{vm.irqchip} already")
    if vm.ran:
        raise KvmError(errno.EBUSY, "a vCPU of this VM has run: make the vGIC before")
    if kind == "v2" and len(vm.vcpus) > 8:
        raise KvmError(errno.E2BIG, f"{len(vm.vcpus)} vCPUs: a GICv2 serves 8")
    vm.irqchip = kind
