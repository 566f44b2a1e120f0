"""The attributes that both vGICs have: addresses, the number of interrupts, control (vgic-kvm-device.c)."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from kvm2.abi import vgic_attrs as va
from kvm2.errors import KvmError
from kvm2.softkvm.vgic import regions

if TYPE_CHECKING:
    from kvm2.abi.structs import DeviceAttr
    from kvm2.softkvm.vgic.state import Vgic

U32_SIZE, U64_SIZE = 4, 8


def none_such(attr: DeviceAttr) -> KvmError:
    """ENXIO: this device has no such attribute."""
    return KvmError(errno.ENXIO, f"attribute {attr.attr:#x} of group {attr.group}: this vGIC has none such")


class VgicDevice:
    """The device attributes of a vGIC: what both models have. Subclasses add the registers.

    `has`, `get` and `put` answer KVM_HAS_DEVICE_ATTR, KVM_GET_DEVICE_ATTR and KVM_SET_DEVICE_ATTR; a refusal is a
    KvmError.
    """

    # Attributes of the ADDR group: the frame's name, its field in `Vgic`, alignment and size in bytes.
    frames: Mapping[int, tuple[str, str, int, int]] = MappingProxyType({})
    # (group, attribute) that are there beside registers and NR_IRQS, which takes any attribute.
    known: frozenset[tuple[int, int]] = frozenset()

    def __init__(self, vgic: Vgic) -> None:
        self.vgic, self.vm = vgic, vgic.vm

    # ---- the client's memory

    def read_value(self, attr: DeviceAttr, size: int) -> int:
        """The value at the attribute's address; EFAULT."""
        return int.from_bytes(self.vm.memory.read(attr.addr, size), "little")

    def write_value(self, attr: DeviceAttr, size: int, value: int) -> None:
        """Gives the client a value; EFAULT."""
        self.vm.memory.write(attr.addr, value.to_bytes(size, "little"))

    # ---- the three calls

    def has(self, attr: DeviceAttr) -> None:
        """KVM_HAS_DEVICE_ATTR."""
        if attr.group != va.KVM_DEV_ARM_VGIC_GRP_NR_IRQS and (attr.group, attr.attr) not in self.known:
            raise none_such(attr)

    def get(self, attr: DeviceAttr) -> None:
        """vgic_get_common_attr."""
        if attr.group == va.KVM_DEV_ARM_VGIC_GRP_ADDR:
            self._get_address(attr)
        elif attr.group == va.KVM_DEV_ARM_VGIC_GRP_NR_IRQS:
            self.write_value(attr, U32_SIZE, self.vgic.nr_spis + va.VGIC_NR_PRIVATE_IRQS)
        else:
            raise none_such(attr)

    def put(self, attr: DeviceAttr) -> None:
        """vgic_set_common_attr."""
        if attr.group == va.KVM_DEV_ARM_VGIC_GRP_ADDR:
            self._set_address(attr)
        elif attr.group == va.KVM_DEV_ARM_VGIC_GRP_NR_IRQS:
            self._set_nr_irqs(self.read_value(attr, U32_SIZE))
        elif attr.group == va.KVM_DEV_ARM_VGIC_GRP_CTRL:
            self._control(attr)
        else:
            raise none_such(attr)

    def release(self) -> None:
        """The vGIC stays part of its VM."""

    # ---- addresses

    def _get_address(self, attr: DeviceAttr) -> None:
        if attr.attr not in self.frames:
            raise none_such(attr)
        self.write_value(attr, U64_SIZE, getattr(self.vgic, self.frames[attr.attr][1]))

    def _set_address(self, attr: DeviceAttr) -> None:
        """kvm_vgic_addr: the value is read first."""
        address = self.read_value(attr, U64_SIZE)
        with self.vm.lock:
            if attr.attr not in self.frames:
                raise none_such(attr)
            self.set_base(attr.attr, address)

    def set_base(self, kind: int, address: int) -> None:
        """Gives a frame its address. KvmError: EEXIST, EINVAL for alignment, E2BIG beyond the IPA limit."""
        name, field, alignment, size = self.frames[kind]
        regions.check_range(self.vm, name, getattr(self.vgic, field), address, alignment, size)
        setattr(self.vgic, field, address)

    # ---- the rest

    def _set_nr_irqs(self, number: int) -> None:
        if number < va.VGIC_MIN_IRQS or number > va.VGIC_MAX_RESERVED or number % va.VGIC_IRQS_STEP:
            raise KvmError(
                errno.EINVAL,
                f"{number} interrupts: a vGIC has {va.VGIC_MIN_IRQS} to {va.VGIC_MAX_RESERVED // 32 * 32}, a multiple "
                f"of {va.VGIC_IRQS_STEP}",
            )
        with self.vm.lock:
            if self.vgic.nr_spis:
                raise KvmError(
                    errno.EBUSY,
                    f"this vGIC has {self.vgic.nr_spis + va.VGIC_NR_PRIVATE_IRQS} interrupts: the number is set once, "
                    "before CTRL_INIT",
                )
            self.vgic.nr_spis = number - va.VGIC_NR_PRIVATE_IRQS

    def _control(self, attr: DeviceAttr) -> None:
        if attr.attr == va.KVM_DEV_ARM_VGIC_CTRL_INIT:
            with self.vm.lock:
                self.vgic.init()
        else:
            self.control(attr)

    def control(self, attr: DeviceAttr) -> None:
        """What a model has beside CTRL_INIT."""
        raise none_such(attr)
