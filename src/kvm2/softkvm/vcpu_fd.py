"""The descriptor of a vCPU: which ioctl goes where, one at a time (the kernel's `vcpu->mutex`)."""

from __future__ import annotations

import errno
import mmap
from typing import TYPE_CHECKING

from kvm2.abi import ioctls as io
from kvm2.errors import KvmError
from kvm2.softkvm import coalesced, process
from kvm2.softkvm.run import Execution

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.softkvm.vcpu import Vcpu
    from kvm2.softkvm.vm_fd import VmFd

KVM_RUN = io.KVM_RUN


class VcpuFd:
    """One vCPU's descriptor. It keeps its VM alive, in any order of closing."""

    def __init__(self, vm_fd: VmFd, vcpu: Vcpu) -> None:
        self.vm_fd, self.subject = vm_fd, vcpu
        self._vm = vm_fd.vm
        self._lock = vcpu.lock
        self._area = mmap.mmap(-1, self._vm.profile.vcpu_mmap_size)
        coalesced.share_ring(self._vm, memoryview(self._area))
        self.execution = Execution(self._vm, vcpu, memoryview(self._area), self._lock)
        vcpu.execution = self.execution
        self._vm.executions.append(self.execution)
        vm_fd.hold()
        self._methods: dict[int, Callable[[int], int]] = {
            io.KVM_ARM_VCPU_INIT: vcpu.vcpu_init,
            io.KVM_ARM_VCPU_FINALIZE: vcpu.finalize,
            io.KVM_GET_ONE_REG: vcpu.get_one_reg,
            io.KVM_SET_ONE_REG: vcpu.set_one_reg,
            io.KVM_GET_REG_LIST: vcpu.get_reg_list,
            io.KVM_GET_MP_STATE: vcpu.get_mp_state,
            io.KVM_SET_MP_STATE: vcpu.set_mp_state,
            io.KVM_GET_VCPU_EVENTS: vcpu.get_vcpu_events,
            io.KVM_SET_VCPU_EVENTS: vcpu.set_vcpu_events,
            io.KVM_SET_SIGNAL_MASK: vcpu.set_signal_mask,
            io.KVM_SET_GUEST_DEBUG: vcpu.set_guest_debug,
            io.KVM_HAS_DEVICE_ATTR: vcpu.has_device_attr,
            io.KVM_GET_DEVICE_ATTR: vcpu.get_device_attr,
            io.KVM_SET_DEVICE_ATTR: vcpu.set_device_attr,
        }

    def ioctl(self, request: int, arg: int) -> int:
        """`kvm_vcpu_ioctl`: EIO on a dead or foreign VM, EINVAL for an unknown request."""
        vm = self._vm
        if vm.dead or vm.birth is not process.birth:
            vm.check_alive()
        if vm.eventfds.irqfds is not None:
            vm.eventfds.catch_up()
        if request == KVM_RUN and not arg:
            try:
                with self._lock:
                    return self.execution.run()
            finally:
                if vm.doomed:
                    vm.destroy()  # the last descriptor was closed meanwhile
        method = self._methods.get(request)
        if method is None:
            if request == KVM_RUN:
                raise KvmError(errno.EINVAL, f"KVM_RUN takes no argument, not {arg:#x}")
            raise KvmError(errno.EINVAL, f"{request:#x} is no ioctl of an arm64 vCPU")
        with self._lock:
            return method(arg)

    def map(self) -> memoryview:
        """The shared `struct kvm_run` area."""
        return self.execution.run_area

    def kick(self) -> None:
        """Ends a KVM_RUN that is under way with EINTR."""
        self.execution.kick()

    def release(self) -> None:
        """The vCPU stays part of its VM; the VM goes with its last descriptor."""
        self.vm_fd.drop()
