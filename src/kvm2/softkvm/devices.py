"""KVM_CREATE_DEVICE and KVM_CREATE_IRQCHIP: the devices that the kernel has inside a VM, and their descriptors."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, Protocol

from kvm2.abi import ioctls as io
from kvm2.abi.structs import (
    KVM_DEV_TYPE_ARM_VGIC_ITS,
    KVM_DEV_TYPE_ARM_VGIC_V2,
    KVM_DEV_TYPE_ARM_VGIC_V3,
    KVM_DEV_TYPE_VFIO,
    CreateDevice,
    DeviceAttr,
)
from kvm2.abi.vgic_attrs import VGIC_V2_MAX_CPUS
from kvm2.errors import KvmError
from kvm2.softkvm.vgic.state import Vgic

if TYPE_CHECKING:
    from kvm2.softkvm.vm import Vm
    from kvm2.softkvm.vm_fd import VmFd

KVM_CREATE_DEVICE_TEST = 1
TYPES: Final = {
    KVM_DEV_TYPE_VFIO: "vfio",
    KVM_DEV_TYPE_ARM_VGIC_V2: "v2",
    KVM_DEV_TYPE_ARM_VGIC_V3: "v3",
    KVM_DEV_TYPE_ARM_VGIC_ITS: "its",
}


class KernelDevice(Protocol):
    """The attributes of one device; a refusal is a KvmError."""

    def has(self, attr: DeviceAttr) -> None:
        """KVM_HAS_DEVICE_ATTR: ENXIO where there is none such."""

    def get(self, attr: DeviceAttr) -> None:
        """KVM_GET_DEVICE_ATTR: writes the value to the client's memory."""

    def put(self, attr: DeviceAttr) -> None:
        """KVM_SET_DEVICE_ATTR: takes the value from there."""

    def release(self) -> None:
        """Its descriptor is closed; most devices stay part of their VM."""


class DeviceFd:
    """The descriptor of a device."""

    def __init__(self, vm_fd: VmFd, device: KernelDevice) -> None:
        self.vm_fd, self.device = vm_fd, device
        self._calls = {
            io.KVM_HAS_DEVICE_ATTR: device.has,
            io.KVM_GET_DEVICE_ATTR: device.get,
            io.KVM_SET_DEVICE_ATTR: device.put,
        }
        vm_fd.hold()

    def ioctl(self, request: int, arg: int) -> int:
        """`kvm_device_ioctl`: EIO on a dead or foreign VM, ENOTTY for an unknown request."""
        vm = self.vm_fd.vm
        vm.check_alive()
        if vm.eventfds.irqfds is not None:
            vm.eventfds.catch_up()
        call = self._calls.get(request)
        if call is None:
            raise KvmError(errno.ENOTTY, f"{request:#x} is no ioctl of a device")
        call(DeviceAttr.unpack(vm.memory.read(arg, DeviceAttr.SIZE)))
        return 0

    def release(self) -> None:
        """The last descriptor is closed."""
        self.device.release()
        self.vm_fd.drop()


def create(vm_fd: VmFd, arg: int) -> int:
    """`kvm_ioctl_create_device`: ENODEV for a type that this host does not have, and what `_create_vgic` refuses. The
    new descriptor is written into the client's structure."""
    vm = vm_fd.vm
    request = CreateDevice.unpack(vm.memory.read(arg, CreateDevice.SIZE))
    kind = TYPES.get(request.type)
    if kind is None or (kind != "vfio" and kind not in vm.profile.gic):
        have = "".join(f", vGIC{gic} (type {number})" for number, gic in TYPES.items() if gic in vm.profile.gic)
        raise KvmError(errno.ENODEV, f"device type {request.type}: this host has VFIO (type {KVM_DEV_TYPE_VFIO}){have}")
    if request.flags & KVM_CREATE_DEVICE_TEST:
        return 0
    with vm.lock:
        fd = vm_fd.door.install(DeviceFd(vm_fd, _create(vm, kind)))
    vm.memory.write(arg, CreateDevice(request.type, fd, request.flags).pack())
    return 0


def create_irqchip(vm: Vm) -> int:
    """KVM_CREATE_IRQCHIP: a GICv2 without a descriptor. ENODEV where the host cannot give guests one."""
    if "v2" not in vm.profile.gic:
        raise KvmError(
            errno.ENODEV, "KVM_CREATE_IRQCHIP makes a GICv2, which this host has not: KVM_CREATE_DEVICE makes a GICv3"
        )
    with vm.lock:
        _create_vgic(vm, "v2")
    return 0


def set_device_addr(vm: Vm, arg: int) -> int:
    """KVM_ARM_SET_DEVICE_ADDR: the older way to place a GICv2."""
    from kvm2.softkvm.vgic import device_v2

    return device_v2.set_device_addr(vm, arg)


def _create(vm: Vm, kind: str) -> KernelDevice:
    # Imported where they are needed: most VMs that are made have no device.
    from kvm2.softkvm.vfio import VfioDevice
    from kvm2.softkvm.vgic.device_v2 import VgicV2Device
    from kvm2.softkvm.vgic.device_v3 import VgicV3Device
    from kvm2.softkvm.vgic.its_device import ItsDevice

    if kind == "vfio":
        return VfioDevice(vm)
    if kind == "its":
        return ItsDevice(vm)
    vgic = _create_vgic(vm, kind)
    return VgicV2Device(vgic) if kind == "v2" else VgicV3Device(vgic)


def _create_vgic(vm: Vm, kind: str) -> Vgic:
    """kvm_vgic_create: EBUSY while a vCPU runs or after one ran, EEXIST for a second vGIC, E2BIG with more vCPUs than
    it serves."""
    with vm.vcpus_held():
        if vm.vgic is not None:
            raise KvmError(errno.EEXIST, f"this VM has a vGIC{vm.irqchip} already")
        if vm.ran:
            raise KvmError(errno.EBUSY, "a vCPU of this VM has run: make the vGIC before")
        if kind == "v2" and len(vm.vcpus) > VGIC_V2_MAX_CPUS:
            raise KvmError(errno.E2BIG, f"{len(vm.vcpus)} vCPUs: a GICv2 serves {VGIC_V2_MAX_CPUS}")
        vm.vgic = Vgic(vm, kind)
        return vm.vgic
