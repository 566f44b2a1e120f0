"""The guest's interrupt controller, made by KVM_CREATE_DEVICE and its attributes as Documentation/virt/kvm/devices
(arm-vgic.rst, arm-vgic-v3.rst, arm-vgic-its.rst) has them: a GICv3 with an ITS, or a GICv2."""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvm2.abi import vgic_attrs as va
from kvm2.board import linux_layout as layout
from kvm2.errors import EnvironmentFault, KvmError, UsageError

if TYPE_CHECKING:
    from kvm2.device import Device
    from kvm2.vm import Vm


@dataclass(frozen=True)
class Gic:
    """The interrupt controller of a VM: version 2 or 3, how many interrupts it has, and where its frames are."""

    version: int
    irqs: int
    redistributors: tuple[layout.Room, ...] = ()
    its: layout.Room | None = None
    device: Device | None = field(default=None, compare=False)
    its_device: Device | None = field(default=None, compare=False)


def has_device(vm: Vm, kind: str) -> bool:
    """Whether the host makes such devices (KVM_CREATE_DEVICE_TEST)."""
    try:
        vm.create_device(kind, test=True)
    except KvmError as error:
        if error.errno == errno.ENODEV:
            return False
        raise
    return True


def choose_version(vm: Vm, cpus: int, wanted: int | None) -> int:
    """3 where the host has it, else 2; `wanted` is taken where it can be. EnvironmentFault, UsageError otherwise."""
    have = [version for version in (3, 2) if has_device(vm, f"vgic-v{version}")]
    if wanted not in (None, 2, 3):
        raise UsageError(f"GIC version {wanted}: there are 2 and 3")
    if not have or (wanted is not None and wanted not in have):
        asked = f"vGICv{wanted}" if wanted else "vGIC"
        others = " and ".join(f"vGICv{version}" for version in have)
        hint = (
            f"it has {others}: take that, or another host"
            if have
            else "it has none, and Linux needs one: take another host"
        )
        raise EnvironmentFault(f"this host makes no {asked} (KVM_CREATE_DEVICE): {hint}")
    version = wanted or have[0]
    if version == 2 and cpus > va.VGIC_V2_MAX_CPUS:
        other = "a" if 3 in have else "no"
        raise UsageError(f"{cpus} vCPUs: a GICv2 serves {va.VGIC_V2_MAX_CPUS}, and this host has {other} GICv3")
    return version


def make_gic(vm: Vm, cpus: int, irqs: int, version: int | None = None, its: bool | None = None) -> Gic:
    """Make and initialise the GIC of a VM whose vCPUs are all there.

    `irqs` is the number of interrupts (NR_IRQS); `version` None takes the host's best; `its` None makes an ITS where
    the host has one. KvmError where KVM refuses.
    """
    version = choose_version(vm, cpus, version)
    if version == 2:
        if its:
            raise UsageError("an ITS belongs to a GICv3, and this is a GICv2")
        return _make_v2(vm, irqs)
    return _make_v3(vm, cpus, irqs, has_device(vm, "vgic-its") if its is None else its)


def _made(vm: Vm, kind: str) -> Device:
    device = vm.create_device(kind)
    assert device is not None  # only a test gives none
    return device


def _address(device: Device, attr: int, value: int) -> None:
    device.set_device_attr(va.KVM_DEV_ARM_VGIC_GRP_ADDR, attr, struct.pack("=Q", value))


def _initialise(device: Device, irqs: int) -> None:
    device.set_device_attr(va.KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, struct.pack("=I", irqs))
    device.set_device_attr(va.KVM_DEV_ARM_VGIC_GRP_CTRL, va.KVM_DEV_ARM_VGIC_CTRL_INIT)


def _make_v2(vm: Vm, irqs: int) -> Gic:
    device = _made(vm, "vgic-v2")
    _address(device, va.KVM_VGIC_V2_ADDR_TYPE_DIST, layout.GIC_DIST)
    _address(device, va.KVM_VGIC_V2_ADDR_TYPE_CPU, layout.GICV2_CPU)
    _initialise(device, irqs)
    return Gic(2, irqs, device=device)


def _make_v3(vm: Vm, cpus: int, irqs: int, its: bool) -> Gic:
    device = _made(vm, "vgic-v3")
    _address(device, va.KVM_VGIC_V3_ADDR_TYPE_DIST, layout.GIC_DIST)
    regions = layout.redistributors(cpus)
    if len(regions) == 1:
        _address(
            device, va.KVM_VGIC_V3_ADDR_TYPE_REDIST, regions[0].base
        )  # also where the kernel is older than the regions
    else:
        for index, room in enumerate(regions):
            count = room.size // layout.REDIST_SIZE
            _address(device, va.KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION, count << va.RDIST_COUNT_SHIFT | room.base | index)
    _initialise(device, irqs)
    if not its:
        return Gic(3, irqs, regions, device=device)
    translator = _made(vm, "vgic-its")
    _address(translator, va.KVM_VGIC_ITS_ADDR_TYPE, layout.GIC_ITS)
    translator.set_device_attr(va.KVM_DEV_ARM_VGIC_GRP_CTRL, va.KVM_DEV_ARM_VGIC_CTRL_INIT)
    room = layout.Room("ITS", layout.GIC_ITS, layout.GIC_ITS_SIZE)
    return Gic(3, irqs, regions, room, device, translator)
