"""GSI routing and MSIs: which interrupt a GSI is (virt/kvm/irqchip.c, arch/arm64/kvm/vgic/vgic-irqfd.c)."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from kvm2.abi import structs_irq as abi
from kvm2.errors import KvmError
from kvm2.softkvm.vgic.irq import MAX_SPI, NR_PRIVATE_IRQS

if TYPE_CHECKING:
    from kvm2.softkvm.vm import Vm

KVM_MAX_IRQ_ROUTES: Final = 4096
KVM_NR_IRQCHIPS: Final = 1
KVM_IRQCHIP_NUM_PINS: Final = MAX_SPI + 1 - NR_PRIVATE_IRQS


class Route(NamedTuple):
    """What a GSI is: SPI 32 + `pin`, or an MSI."""

    pin: int
    msi: abi.Msi | None = None


class Routing:
    """A routing table, which never changes: setting it is replacing it.

    On arm64 a GSI has one route, as there is one irqchip; of several GSIs with the same pin the last one is told of
    its end of interrupt.
    """

    def __init__(self, routes: Mapping[int, Route] = MappingProxyType({})) -> None:
        self.routes = routes
        self.gsi_of_pin = {route.pin: gsi for gsi, route in routes.items() if route.msi is None}


@cache
def default_routing(nr_spis: int) -> Routing:
    """kvm_vgic_setup_default_irq_routing: GSI n is pin n, interrupt 32 + n.

    >>> default_routing(64).routes[8].pin
    8
    """
    return Routing({gsi: Route(gsi) for gsi in range(nr_spis)})


def set_gsi_routing(vm: Vm, arg: int) -> int:
    """KVM_SET_GSI_ROUTING, with or without an interrupt controller: the table is replaced as a whole, or not at all.

    EINVAL: too many, flags, a GSI out of range or twice, a pin or irqchip that there is not, an unknown type.
    """
    head = abi.IrqRouting.unpack(vm.memory.read(arg, abi.IrqRouting.SIZE))
    if head.nr > KVM_MAX_IRQ_ROUTES:
        raise KvmError(errno.EINVAL, f"nr = {head.nr}: a table has up to {KVM_MAX_IRQ_ROUTES} routes")
    if head.flags:
        raise KvmError(errno.EINVAL, f"flags = {head.flags:#x}: none are defined")
    size = abi.IrqRoutingEntry.SIZE
    data = vm.memory.read(arg + abi.IrqRouting.SIZE, head.nr * size) if head.nr else b""
    entries = [abi.IrqRoutingEntry.unpack(data[at : at + size]) for at in range(0, len(data), size)]
    vm.eventfds.routing = Routing(_routes(entries))
    return 0


def _routes(entries: Iterable[abi.IrqRoutingEntry]) -> dict[int, Route]:
    routes: dict[int, Route] = {}
    for entry in entries:
        if entry.gsi >= KVM_MAX_IRQ_ROUTES:
            raise KvmError(errno.EINVAL, f"gsi = {entry.gsi}: they are 0..{KVM_MAX_IRQ_ROUTES - 1}")
        allowed = abi.KVM_MSI_VALID_DEVID if entry.type == abi.KVM_IRQ_ROUTING_MSI else 0
        if entry.flags & ~allowed:
            raise KvmError(errno.EINVAL, f"gsi {entry.gsi}: flags = {entry.flags:#x}, allowed for its type: {allowed}")
        if entry.gsi in routes:
            raise KvmError(errno.EINVAL, f"gsi {entry.gsi} has two routes; there is one irqchip")
        routes[entry.gsi] = _route(entry)
    return routes


def _route(entry: abi.IrqRoutingEntry) -> Route:
    """kvm_set_routing_entry."""
    if entry.type == abi.KVM_IRQ_ROUTING_IRQCHIP:
        to = abi.IrqRoutingIrqchip.unpack(entry.u[: abi.IrqRoutingIrqchip.SIZE])
        if to.pin >= KVM_IRQCHIP_NUM_PINS or to.irqchip >= KVM_NR_IRQCHIPS:
            raise KvmError(
                errno.EINVAL,
                f"gsi {entry.gsi}: irqchip {to.irqchip}, pin {to.pin}: there is irqchip 0 with pins "
                f"0..{KVM_IRQCHIP_NUM_PINS - 1}, which are the SPIs from {NR_PRIVATE_IRQS} on",
            )
        return Route(to.pin)
    if entry.type == abi.KVM_IRQ_ROUTING_MSI:
        msi = abi.IrqRoutingMsi.unpack(entry.u[: abi.IrqRoutingMsi.SIZE])
        return Route(-1, abi.Msi(msi.address_lo, msi.address_hi, msi.data, entry.flags, msi.devid))
    raise KvmError(errno.EINVAL, f"gsi {entry.gsi}: type {entry.type}; arm64 has IRQCHIP (1) and MSI (2)")


def set_irq(vm: Vm, gsi: int, level: bool) -> int:
    """kvm_set_irq: the route's answer, 0 or more; -1 where there is none, or it failed."""
    route = vm.eventfds.routing.routes.get(gsi)
    if route is None:
        return -1
    try:
        return deliver(vm, route, level)
    except KvmError:
        return -1


def deliver(vm: Vm, route: Route, level: bool) -> int:
    """A route's `set` function: vgic_irqfd_set_irq or kvm_set_msi."""
    if route.msi is not None:
        return send_msi(vm, route.msi) if level else -1
    vgic, intid = vm.vgic, route.pin + NR_PRIVATE_IRQS
    if vgic is None or route.pin >= vgic.nr_spis:
        raise KvmError(errno.EINVAL, f"interrupt {intid} is no SPI of this VM")
    vgic.inject(None, intid, level)
    return 0


def send_msi(vm: Vm, msi: abi.Msi) -> int:
    """kvm_set_msi: 1 delivered, 0 where the guest has not mapped it; ENODEV without an ITS."""
    if vm.vgic is None or vm.vgic.model != "v3" or not vm.vgic.has_its:
        raise KvmError(errno.ENODEV, "an MSI goes to an ITS, and this VM has none")
    from kvm2.softkvm.vgic.its import inject_msi

    return inject_msi(vm, msi)


def signal_msi(vm: Vm, arg: int) -> int:
    """KVM_SIGNAL_MSI (kvm_send_userspace_msi): EINVAL without an interrupt controller, or with unknown flags."""
    msi = abi.Msi.unpack(vm.memory.read(arg, abi.Msi.SIZE))
    if not vm.irqchip:
        raise KvmError(errno.EINVAL, "this VM has no interrupt controller: KVM_CREATE_DEVICE makes one")
    if msi.flags & ~abi.KVM_MSI_VALID_DEVID:
        raise KvmError(errno.EINVAL, f"flags = {msi.flags:#x}: known is KVM_MSI_VALID_DEVID (1)")
    return send_msi(vm, msi)
