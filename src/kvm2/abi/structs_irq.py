"""Structures of linux/kvm.h about interrupts: lines, routes, MSIs, irqfd and ioeventfd.

>>> Irqfd(fd=3, gsi=40).SIZE, Ioeventfd.LAYOUT["flags"].offset
(32, 24)
"""

from __future__ import annotations

from typing import Annotated

from kvm2.abi.layout import U8, U32, Array, Structure, UnionOf, field, s32, u32, u64


class IrqLevel(Structure, c_name="kvm_irq_level"):
    """The level of an interrupt line."""

    irq: u32 = field(
        doc="arm64: type 27:24, vCPU 23:16 and 31:28, number 15:0; x86: GSI. KVM_IRQ_LINE_STATUS: out, status"
    )
    level: u32 = field(default=0, doc="0 or 1")


KVM_ARM_IRQ_VCPU2_SHIFT = 28
KVM_ARM_IRQ_VCPU2_MASK = 0xF
KVM_ARM_IRQ_TYPE_SHIFT = 24
KVM_ARM_IRQ_TYPE_MASK = 0xF
KVM_ARM_IRQ_VCPU_SHIFT = 16
KVM_ARM_IRQ_VCPU_MASK = 0xFF
KVM_ARM_IRQ_NUM_SHIFT = 0
KVM_ARM_IRQ_NUM_MASK = 0xFFFF
KVM_ARM_IRQ_TYPE_CPU = 0
KVM_ARM_IRQ_TYPE_SPI = 1
KVM_ARM_IRQ_TYPE_PPI = 2
KVM_ARM_IRQ_CPU_IRQ = 0
KVM_ARM_IRQ_CPU_FIQ = 1


class Msi(Structure, c_name="kvm_msi"):
    """A message-signalled interrupt."""

    address_lo: u32 = 0
    address_hi: u32 = 0
    data: u32 = 0
    flags: u32 = field(default=0, doc="KVM_MSI_VALID_DEVID")
    devid: u32 = field(default=0, doc="the device's id, with KVM_MSI_VALID_DEVID")
    pad: Annotated[bytes, Array(U8, 12)] = bytes(12)


KVM_MSI_VALID_DEVID = 1 << 0


class Irqfd(Structure, c_name="kvm_irqfd"):
    """An eventfd that raises an interrupt."""

    fd: u32 = field(default=0, doc="an eventfd")
    gsi: u32 = field(default=0, doc="the interrupt")
    flags: u32 = field(default=0, doc="KVM_IRQFD_FLAG_*")
    resamplefd: u32 = field(default=0, doc="the eventfd told at end of interrupt, with KVM_IRQFD_FLAG_RESAMPLE")
    pad: Annotated[bytes, Array(U8, 16)] = bytes(16)


KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE = 1 << 1


class Ioeventfd(Structure, c_name="kvm_ioeventfd"):
    """An eventfd that a guest's write signals."""

    datamatch: u64 = field(default=0, doc="the value to match, with KVM_IOEVENTFD_FLAG_DATAMATCH")
    addr: u64 = field(default=0, doc="where the guest writes")
    len: u32 = field(default=0, doc="1, 2, 4 or 8 bytes; 0: any length")
    fd: s32 = field(default=0, doc="an eventfd")
    flags: u32 = field(default=0, doc="KVM_IOEVENTFD_FLAG_*")
    pad: Annotated[bytes, Array(U8, 36)] = bytes(36)


KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2
KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY = 1 << 3
KVM_IOEVENTFD_VALID_FLAG_MASK = (1 << 5) - 1


class IrqRoutingIrqchip(Structure, c_name="kvm_irq_routing_irqchip"):
    """A route to a pin of an interrupt controller."""

    irqchip: u32 = 0
    pin: u32 = 0


class IrqRoutingMsi(Structure, c_name="kvm_irq_routing_msi"):
    """A route to a message-signalled interrupt."""

    address_lo: u32 = 0
    address_hi: u32 = 0
    data: u32 = 0
    devid: u32 = 0


class IrqRoutingS390Adapter(Structure, c_name="kvm_irq_routing_s390_adapter"):
    """A route to an s390 adapter; here for the size of the union."""

    ind_addr: u64 = 0
    summary_addr: u64 = 0
    ind_offset: u64 = 0
    summary_offset: u32 = 0
    adapter_id: u32 = 0


class IrqRoutingHvSint(Structure, c_name="kvm_irq_routing_hv_sint"):
    """A route to a Hyper-V synthetic interrupt."""

    vcpu: u32 = 0
    sint: u32 = 0


class IrqRoutingXenEvtchn(Structure, c_name="kvm_irq_routing_xen_evtchn"):
    """A route to a Xen event channel."""

    port: u32 = 0
    vcpu: u32 = 0
    priority: u32 = 0


KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2
KVM_IRQ_ROUTING_S390_ADAPTER = 3
KVM_IRQ_ROUTING_HV_SINT = 4
KVM_IRQ_ROUTING_XEN_EVTCHN = 5

_ROUTE = UnionOf(
    32,
    (
        ("irqchip", IrqRoutingIrqchip),
        ("msi", IrqRoutingMsi),
        ("adapter", IrqRoutingS390Adapter),
        ("hv_sint", IrqRoutingHvSint),
        ("xen_evtchn", IrqRoutingXenEvtchn),
        ("pad", Array(U32, 8)),
    ),
)


class IrqRoutingEntry(Structure, c_name="kvm_irq_routing_entry"):
    """One route of a GSI."""

    gsi: u32 = 0
    type: u32 = field(default=0, doc="KVM_IRQ_ROUTING_*; which member of u counts")
    flags: u32 = field(default=0, doc="KVM_MSI_VALID_DEVID")
    pad: u32 = 0
    u: Annotated[bytes, _ROUTE] = bytes(32)


class IrqRouting(Structure, c_name="kvm_irq_routing"):
    """The head of a routing table; nr entries follow. The table replaces the one before."""

    nr: u32 = field(default=0, doc="entries that follow")
    flags: u32 = field(default=0, doc="must be 0")
    entries: Annotated[tuple[IrqRoutingEntry, ...], Array(IrqRoutingEntry, 0)] = ()
