"""The descriptor of a VM: which ioctl goes where, and how long the VM lives."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from kvm2.abi import caps
from kvm2.abi import ioctls as io
from kvm2.abi.structs import (
    ClearDirtyLog,
    DirtyLog,
    UserspaceMemoryRegion,
    UserspaceMemoryRegion2,
)
from kvm2.errors import KvmError
from kvm2.softkvm import (
    coalesced,
    devices,
    enable_cap,
    ioeventfd,
    irq_line,
    irq_routing,
    irqfd,
    negotiation,
    vm_arm,
)
from kvm2.softkvm.limits import unknown_on_vm
from kvm2.softkvm.vcpu_fd import VcpuFd

if TYPE_CHECKING:
    from kvm2.softkvm.door import SoftKvm
    from kvm2.softkvm.vm import Vm

# Calls of a 6.12 kernel that need the interrupt controller, the timers or the dirty ring, which come with a later step.
LATER = {
    io.KVM_RESET_DIRTY_RINGS: "KVM_RESET_DIRTY_RINGS",
    io.KVM_GET_STATS_FD: "KVM_GET_STATS_FD",
    io.KVM_ARM_MTE_COPY_TAGS: "KVM_ARM_MTE_COPY_TAGS",
}

ARM64 = "arm64"


class VmFd:
    """One VM's descriptor; `hold` and `drop` count what keeps the VM alive: this descriptor, vCPUs, devices."""

    def __init__(self, vm: Vm, door: SoftKvm) -> None:
        self.vm, self.door, self.subject = vm, door, vm
        self._users = 1
        self._users_lock = threading.RLock()  # the collector may close a handle anywhere
        self._methods = _table(vm.config.arch, bool(vm.profile.caps.get(caps.KVM_CAP_USER_MEMORY2, 0)))

    # ---- life

    def hold(self) -> None:
        """One more thing keeps the VM alive."""
        with self._users_lock:
            self._users += 1

    def drop(self) -> None:
        """One thing less; the VM goes with the last."""
        with self._users_lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self.vm.destroy()

    def release(self) -> None:
        """The descriptor was closed (`kvm_vm_release`): its irqfds end, whatever keeps the VM alive."""
        self.vm.eventfds.release()
        self.drop()

    # ---- ioctls

    def ioctl(self, request: int, arg: int) -> int:
        """`kvm_vm_ioctl`: EIO on a dead or foreign VM, ENOEXEC while configuring, and for an unknown request EINVAL on
        arm64, ENOTTY elsewhere (`kvm_arch_vm_ioctl`)."""
        vm = self.vm
        vm.check_alive()
        if vm.eventfds.irqfds is not None:
            vm.eventfds.catch_up()
        method = self._methods.get(request)
        if method is None:
            if vm.config.arch == ARM64 and request in LATER:
                raise KvmError(errno.ENOSYS, f"{LATER[request]}: the software KVM has no interrupt controller yet")
            raise KvmError(unknown_on_vm(vm.config.arch), f"{request:#x} is no ioctl of a VM on this host")
        if vm.configuring is not None and request not in negotiation.WHILE_CONFIGURING:
            raise KvmError(errno.ENOEXEC, "this VM is in the negotiation phase: KVM_VM2_COMMIT makes it ready")
        return method(self, arg)

    def _create_vcpu(self, number: int) -> int:
        if "vcpu-id-32bit" in self.vm.profile.quirks:
            number &= 0xFFFF_FFFF
        vcpu = self.vm.add_vcpu(number)
        return self.door.install(VcpuFd(self, vcpu))

    def _create_no_vcpu(self, number: int) -> int:
        """What creation decided about vCPUs holds on every architecture; there are none but arm64's."""
        self.vm.check_vcpu_id(number)
        raise KvmError(errno.ENOSYS, f"described hosts of {self.vm.config.arch} answer creation only: there is no vCPU")

    def _create_device(self, arg: int) -> int:
        return devices.create(self, arg)

    def _enable_cap(self, arg: int) -> int:
        return enable_cap.enable(self.vm, arg)

    def _set_memory(self, arg: int) -> int:
        data = self.vm.memory.read(arg, UserspaceMemoryRegion.SIZE)
        return self.vm.set_memory(UserspaceMemoryRegion.unpack(data))

    def _set_memory2(self, arg: int) -> int:
        data = self.vm.memory.read(arg, UserspaceMemoryRegion2.SIZE)
        return self.vm.set_memory(UserspaceMemoryRegion2.unpack(data))

    def _get_dirty_log(self, arg: int) -> int:
        log = DirtyLog.unpack(self.vm.memory.read(arg, DirtyLog.SIZE))
        return self.vm.get_dirty_log(log.slot, log.dirty_bitmap)

    def _clear_dirty_log(self, arg: int) -> int:
        return self.vm.clear_dirty_log(ClearDirtyLog.unpack(self.vm.memory.read(arg, ClearDirtyLog.SIZE)))

    def _get_attr(self, arg: int) -> int:
        with self.vm.lock:
            return negotiation.get_attr(self.vm.profile, self.vm.config, self.vm.memory, arg)

    def _set_attrs(self, arg: int) -> int:
        vm = self.vm
        with vm.lock:
            return negotiation.set_attrs(vm.profile, vm.configuring, vm.memory, arg)

    def _commit(self, arg: int) -> int:
        vm = self.vm
        with vm.lock:
            config = negotiation.commit(vm.profile, vm.configuring, vm.memory, arg)
            if not isinstance(config, int):
                vm.configure(config)
        return 0


Method = Callable[[VmFd, int], int]
_EVERYWHERE: dict[int, Method] = {
    io.KVM_CHECK_EXTENSION: lambda fd, cap: fd.vm.check_extension(cap),
    io.KVM_VM2_GET_ATTR: VmFd._get_attr,
    io.KVM_VM2_SET_ATTRS: VmFd._set_attrs,
    io.KVM_VM2_COMMIT: VmFd._commit,
}
_ARM64: dict[int, Method] = {
    io.KVM_CREATE_VCPU: VmFd._create_vcpu,
    io.KVM_CREATE_DEVICE: VmFd._create_device,
    io.KVM_CREATE_IRQCHIP: lambda fd, arg: devices.create_irqchip(fd.vm),
    io.KVM_ARM_SET_DEVICE_ADDR: lambda fd, arg: devices.set_device_addr(fd.vm, arg),
    io.KVM_ENABLE_CAP: VmFd._enable_cap,
    io.KVM_SET_USER_MEMORY_REGION: VmFd._set_memory,
    io.KVM_GET_DIRTY_LOG: VmFd._get_dirty_log,
    io.KVM_CLEAR_DIRTY_LOG: VmFd._clear_dirty_log,
    io.KVM_ARM_PREFERRED_TARGET: lambda fd, arg: vm_arm.preferred_target(fd.vm, arg),
    io.KVM_ARM_SET_COUNTER_OFFSET: lambda fd, arg: vm_arm.set_counter_offset(fd.vm, arg),
    io.KVM_ARM_GET_REG_WRITABLE_MASKS: lambda fd, arg: vm_arm.writable_masks(fd.vm, arg),
    io.KVM_IRQ_LINE: lambda fd, arg: irq_line.irq_line(fd.vm, arg),
    io.KVM_IRQ_LINE_STATUS: lambda fd, arg: irq_line.irq_line(fd.vm, arg, status=True),
    io.KVM_IRQFD: lambda fd, arg: irqfd.irqfd(fd.vm, arg),
    io.KVM_IOEVENTFD: lambda fd, arg: ioeventfd.ioeventfd(fd.vm, arg),
    io.KVM_SET_GSI_ROUTING: lambda fd, arg: irq_routing.set_gsi_routing(fd.vm, arg),
    io.KVM_SIGNAL_MSI: lambda fd, arg: irq_routing.signal_msi(fd.vm, arg),
    io.KVM_REGISTER_COALESCED_MMIO: lambda fd, arg: coalesced.register(fd.vm, arg),
    io.KVM_UNREGISTER_COALESCED_MMIO: lambda fd, arg: coalesced.unregister(fd.vm, arg),
    io.KVM_HAS_DEVICE_ATTR: lambda fd, arg: vm_arm.has_device_attr(fd.vm, arg),
    io.KVM_SET_DEVICE_ATTR: lambda fd, arg: vm_arm.set_device_attr(fd.vm, arg),
}


@cache
def _table(arch: str, user_memory2: bool) -> dict[int, Method]:
    """Which ioctls the VMs of a host have: one table serves them all."""
    if arch != ARM64:
        return _EVERYWHERE | {io.KVM_CREATE_VCPU: VmFd._create_no_vcpu}
    return _EVERYWHERE | _ARM64 | ({io.KVM_SET_USER_MEMORY_REGION2: VmFd._set_memory2} if user_memory2 else {})
