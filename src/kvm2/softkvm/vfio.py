"""The VFIO device of a VM (virt/kvm/vfio.c): it tells KVM which devices of the host a guest drives. None can be here.

The descriptors that it is given are this process's; none of them is of a device that the described host would have.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from kvm2.errors import KvmError

if TYPE_CHECKING:
    from kvm2.abi.structs import DeviceAttr
    from kvm2.softkvm.vm import Vm

KVM_DEV_VFIO_FILE: Final = 1
KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL = 1, 2


def _none_such(attr: DeviceAttr) -> KvmError:
    return KvmError(errno.ENXIO, f"attribute {attr.attr:#x} of group {attr.group}: the VFIO device has none such")


class VfioDevice:
    """One for each VM, until its descriptor is closed: EBUSY for a second one."""

    def __init__(self, vm: Vm) -> None:
        if vm.has_vfio:
            raise KvmError(errno.EBUSY, "this VM has a VFIO device already: close its descriptor first")
        self._vm = vm
        vm.has_vfio = True

    def has(self, attr: DeviceAttr) -> None:
        """kvm_vfio_has_attr."""
        if attr.group != KVM_DEV_VFIO_FILE or attr.attr not in (KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL):
            raise _none_such(attr)

    def get(self, attr: DeviceAttr) -> None:
        """There is nothing to get: EPERM."""
        raise KvmError(errno.EPERM, "the VFIO device has attributes to set only")

    def put(self, attr: DeviceAttr) -> None:
        """kvm_vfio_set_file: EBADF for a descriptor that is not open, EINVAL or ENOENT for one that is."""
        self.has(attr)
        fd = int.from_bytes(self._vm.memory.read(attr.addr, 4), "little", signed=True)
        try:
            os.fstat(fd)
        except (OSError, OverflowError):
            raise KvmError(errno.EBADF, f"descriptor {fd} is not open in this process") from None
        if attr.attr == KVM_DEV_VFIO_FILE_ADD:
            raise KvmError(errno.EINVAL, f"descriptor {fd} is no VFIO file: a described host has no devices to give")
        raise KvmError(errno.ENOENT, f"descriptor {fd} was not added")

    def release(self) -> None:
        """kvm_vfio_release."""
        self._vm.has_vfio = False
