"""A device of a VM (KVM_CREATE_DEVICE): a GIC, an ITS; it is set up by device attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm2.handle import DeviceAttributes

if TYPE_CHECKING:
    from kvm2.vm import Vm


class Device(DeviceAttributes):
    """One in-kernel device; `type` is its KVM_DEV_TYPE_ number."""

    def __init__(self, vm: Vm, fd: int, type: int) -> None:
        super().__init__(vm.backend, fd, vm._memories)
        self.vm = vm
        self.type = type
