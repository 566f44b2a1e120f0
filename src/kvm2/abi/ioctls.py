"""Every KVM ioctl of a 6.12 arm64 kernel, those it shares with x86-64, and the new ones of KVM_CREATE_VM2.

Those that only x86-64 has are in `ioctls_x86`. The constants are full request numbers.

>>> hex(KVM_RUN), hex(KVM_CREATE_VM2), by_number(KVM_ARM_VCPU_INIT, "vcpu").name
('0xae80', '0x4010ae0c', 'KVM_ARM_VCPU_INIT')
>>> by_number(KVM_RUN, "vm") is None
True
"""

from __future__ import annotations

from functools import cache
from typing import Final

from kvm2.abi import structs as s
from kvm2.abi import structs_arm64 as arm
from kvm2.abi import structs_irq as irq
from kvm2.abi import vm2
from kvm2.abi.ioc import ARM64, Declare
from kvm2.abi.ioc import Ioctl as Ioctl  # the row that everybody needs
from kvm2.abi.layout import INT, U64

_call = Declare()

KVM_GET_API_VERSION: Final = _call(
    "KVM_GET_API_VERSION", "", 0x00, None, "system", "The version of the API: 12, for ever.", returns="12"
)
KVM_CREATE_VM: Final = _call(
    "KVM_CREATE_VM", "", 0x01, None, "system", "Makes a VM.", arg="the machine type", returns="a VM fd"
)
KVM_CHECK_EXTENSION: Final = _call(
    "KVM_CHECK_EXTENSION",
    "",
    0x03,
    None,
    "system vm",
    "Whether a capability is there; on a VM, what holds for it.",
    cap="KVM_CAP_CHECK_EXTENSION_VM",
    arg="KVM_CAP_*",
    returns="0, 1, or a number that the capability defines",
)
KVM_GET_VCPU_MMAP_SIZE: Final = _call(
    "KVM_GET_VCPU_MMAP_SIZE", "", 0x04, None, "system", "Bytes to map of each vCPU fd.", returns="bytes"
)
KVM_CREATE_VM2: Final = _call(
    "KVM_CREATE_VM2",
    "w",
    0x0C,
    vm2.CreateVm2,
    "system",
    "Makes a VM from a list of attributes.",
    cap="KVM_CAP_CREATE_VM2",
    returns="a VM fd; 0 with DRY_RUN",
)
KVM_CREATE_VM2_FIXED: Final = _call(
    "KVM_CREATE_VM2_FIXED",
    "w",
    0x0C,
    vm2.CreateVm2Fixed,
    "system",
    "Makes a VM from a structure of fixed size; same nr as KVM_CREATE_VM2, told apart by the size.",
    cap="KVM_CAP_CREATE_VM2",
    returns="a VM fd",
)
KVM_DESCRIBE_VM2: Final = _call(
    "KVM_DESCRIBE_VM2",
    "wr",
    0x0D,
    vm2.DescribeVm2,
    "system",
    "Which attributes this host takes, each with default, minimum, maximum and mask.",
    cap="KVM_CAP_CREATE_VM2",
)
KVM_VM2_SET_ATTRS: Final = _call(
    "KVM_VM2_SET_ATTRS",
    "w",
    0xF0,
    vm2.CreateVm2,
    "vm",
    "Sets attributes of a VM that is in the negotiation phase.",
    cap="KVM_CAP_CREATE_VM2",
)
KVM_VM2_GET_ATTR: Final = _call(
    "KVM_VM2_GET_ATTR", "wr", 0xF1, vm2.Vm2Attr, "vm", "Reads what the VM really got.", cap="KVM_CAP_CREATE_VM2"
)
KVM_VM2_COMMIT: Final = _call(
    "KVM_VM2_COMMIT", "w", 0xF2, vm2.CreateVm2, "vm", "Ends the negotiation phase.", cap="KVM_CAP_CREATE_VM2"
)

KVM_CREATE_VCPU: Final = _call(
    "KVM_CREATE_VCPU", "", 0x41, None, "vm", "Makes a vCPU.", arg="the vCPU's id", returns="a vCPU fd"
)
KVM_GET_DIRTY_LOG: Final = _call(
    "KVM_GET_DIRTY_LOG",
    "w",
    0x42,
    s.DirtyLog,
    "vm",
    "Reads a slot's dirty bitmap, and clears it unless told otherwise.",
)
KVM_SET_USER_MEMORY_REGION: Final = _call(
    "KVM_SET_USER_MEMORY_REGION",
    "w",
    0x46,
    s.UserspaceMemoryRegion,
    "vm",
    "Makes, moves, changes or deletes a memory slot.",
    cap="KVM_CAP_USER_MEMORY",
)
KVM_SET_USER_MEMORY_REGION2: Final = _call(
    "KVM_SET_USER_MEMORY_REGION2",
    "w",
    0x49,
    s.UserspaceMemoryRegion2,
    "vm",
    "The same, with room for guest_memfd.",
    cap="KVM_CAP_USER_MEMORY2",
)
KVM_CREATE_IRQCHIP: Final = _call(
    "KVM_CREATE_IRQCHIP",
    "",
    0x60,
    None,
    "vm",
    "Makes the interrupt controller in the kernel: GICv2 on arm64, PIC, IOAPIC and LAPIC on x86-64.",
    cap="KVM_CAP_IRQCHIP",
)
KVM_IRQ_LINE: Final = _call(
    "KVM_IRQ_LINE", "w", 0x61, irq.IrqLevel, "vm", "Sets the level of an interrupt line.", cap="KVM_CAP_IRQCHIP"
)
KVM_IRQ_LINE_STATUS: Final = _call(
    "KVM_IRQ_LINE_STATUS",
    "wr",
    0x67,
    irq.IrqLevel,
    "vm",
    "The same, and tells whether the interrupt was delivered.",
    cap="KVM_CAP_IRQ_INJECT_STATUS",
)
KVM_REGISTER_COALESCED_MMIO: Final = _call(
    "KVM_REGISTER_COALESCED_MMIO",
    "w",
    0x67,
    s.CoalescedMmioZone,
    "vm",
    "Collects the guest's writes to a range in a ring.",
    cap="KVM_CAP_COALESCED_MMIO",
)
KVM_UNREGISTER_COALESCED_MMIO: Final = _call(
    "KVM_UNREGISTER_COALESCED_MMIO",
    "w",
    0x68,
    s.CoalescedMmioZone,
    "vm",
    "Ends that.",
    cap="KVM_CAP_COALESCED_MMIO",
)
KVM_SET_GSI_ROUTING: Final = _call(
    "KVM_SET_GSI_ROUTING",
    "w",
    0x6A,
    irq.IrqRouting,
    "vm",
    "Replaces the routes of all GSIs.",
    cap="KVM_CAP_IRQ_ROUTING",
    tail=irq.IrqRoutingEntry,
)
KVM_IRQFD: Final = _call("KVM_IRQFD", "w", 0x76, irq.Irqfd, "vm", "Ties an eventfd to a GSI.", cap="KVM_CAP_IRQFD")
KVM_IOEVENTFD: Final = _call(
    "KVM_IOEVENTFD", "w", 0x79, irq.Ioeventfd, "vm", "Ties an eventfd to a guest's write.", cap="KVM_CAP_IOEVENTFD"
)
KVM_ENABLE_CAP: Final = _call(
    "KVM_ENABLE_CAP",
    "w",
    0xA3,
    s.EnableCap,
    "vm",
    "Switches a capability on.",
    cap="KVM_CAP_ENABLE_CAP_VM",
    arches=ARM64,
)
KVM_SIGNAL_MSI: Final = _call(
    "KVM_SIGNAL_MSI", "w", 0xA5, irq.Msi, "vm", "Injects a message-signalled interrupt.", cap="KVM_CAP_SIGNAL_MSI"
)
KVM_ARM_SET_DEVICE_ADDR: Final = _call(
    "KVM_ARM_SET_DEVICE_ADDR",
    "w",
    0xAB,
    arm.ArmDeviceAddr,
    "vm",
    "Sets a GICv2 frame's address (old interface).",
    cap="KVM_CAP_ARM_SET_DEVICE_ADDR",
    arches=ARM64,
)
KVM_ARM_PREFERRED_TARGET: Final = _call(
    "KVM_ARM_PREFERRED_TARGET",
    "r",
    0xAF,
    arm.VcpuInit,
    "vm",
    "The target to give KVM_ARM_VCPU_INIT on this host.",
    arches=ARM64,
)
KVM_ARM_MTE_COPY_TAGS: Final = _call(
    "KVM_ARM_MTE_COPY_TAGS",
    "r",
    0xB4,
    arm.ArmCopyMteTags,
    "vm",
    "Copies memory tags to or from the guest.",
    cap="KVM_CAP_ARM_MTE",
    arches=ARM64,
    returns="bytes copied",
)
KVM_ARM_SET_COUNTER_OFFSET: Final = _call(
    "KVM_ARM_SET_COUNTER_OFFSET",
    "w",
    0xB5,
    arm.ArmCounterOffset,
    "vm",
    "Sets the offset of both counters.",
    cap="KVM_CAP_COUNTER_OFFSET",
    arches=ARM64,
)
KVM_ARM_GET_REG_WRITABLE_MASKS: Final = _call(
    "KVM_ARM_GET_REG_WRITABLE_MASKS",
    "r",
    0xB6,
    arm.RegMaskRange,
    "vm",
    "Which bits of the ID registers userspace may change.",
    cap="KVM_CAP_ARM_SUPPORTED_REG_MASK_RANGES",
    arches=ARM64,
)
KVM_CLEAR_DIRTY_LOG: Final = _call(
    "KVM_CLEAR_DIRTY_LOG",
    "wr",
    0xC0,
    s.ClearDirtyLog,
    "vm",
    "Clears dirty bits, with manual protection on.",
    cap="KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
)
KVM_RESET_DIRTY_RINGS: Final = _call(
    "KVM_RESET_DIRTY_RINGS",
    "",
    0xC7,
    None,
    "vm",
    "Write-protects again what was harvested from the dirty rings.",
    cap="KVM_CAP_DIRTY_LOG_RING",
    returns="entries reset",
)
KVM_CREATE_DEVICE: Final = _call(
    "KVM_CREATE_DEVICE", "wr", 0xE0, s.CreateDevice, "vm", "Makes a device in the kernel.", cap="KVM_CAP_DEVICE_CTRL"
)
KVM_SET_DEVICE_ATTR: Final = _call(
    "KVM_SET_DEVICE_ATTR",
    "w",
    0xE1,
    s.DeviceAttr,
    "device vm vcpu",
    "Sets an attribute of a device, a VM or a vCPU.",
    cap="KVM_CAP_DEVICE_CTRL",
    arches=ARM64,
)
KVM_GET_DEVICE_ATTR: Final = _call(
    "KVM_GET_DEVICE_ATTR",
    "w",
    0xE2,
    s.DeviceAttr,
    "device vcpu",
    "Reads an attribute of a device or a vCPU.",
    cap="KVM_CAP_DEVICE_CTRL",
    arches=ARM64,
)
KVM_HAS_DEVICE_ATTR: Final = _call(
    "KVM_HAS_DEVICE_ATTR",
    "w",
    0xE3,
    s.DeviceAttr,
    "device vm vcpu",
    "Whether there is such an attribute (ENXIO: no).",
    cap="KVM_CAP_DEVICE_CTRL",
    arches=ARM64,
)

KVM_RUN: Final = _call("KVM_RUN", "", 0x80, None, "vcpu", "Runs the guest until it exits; see kvm_run.")
KVM_SET_SIGNAL_MASK: Final = _call(
    "KVM_SET_SIGNAL_MASK", "w", 0x8B, s.SignalMask, "vcpu", "The signal mask for the time in KVM_RUN.", tail=U64
)
KVM_GET_MP_STATE: Final = _call(
    "KVM_GET_MP_STATE", "r", 0x98, s.MpState, "vcpu", "Whether the vCPU runs.", cap="KVM_CAP_MP_STATE"
)
KVM_SET_MP_STATE: Final = _call(
    "KVM_SET_MP_STATE", "w", 0x99, s.MpState, "vcpu", "Starts or stops a vCPU.", cap="KVM_CAP_MP_STATE"
)
KVM_SET_GUEST_DEBUG: Final = _call(
    "KVM_SET_GUEST_DEBUG",
    "w",
    0x9B,
    arm.GuestDebug,
    "vcpu",
    "Single steps, breakpoints and watchpoints.",
    cap="KVM_CAP_SET_GUEST_DEBUG",
    arches=ARM64,
)
KVM_GET_VCPU_EVENTS: Final = _call(
    "KVM_GET_VCPU_EVENTS",
    "r",
    0x9F,
    arm.VcpuEvents,
    "vcpu",
    "Which exceptions are pending.",
    cap="KVM_CAP_VCPU_EVENTS",
    arches=ARM64,
)
KVM_SET_VCPU_EVENTS: Final = _call(
    "KVM_SET_VCPU_EVENTS",
    "w",
    0xA0,
    arm.VcpuEvents,
    "vcpu",
    "Makes exceptions pending.",
    cap="KVM_CAP_VCPU_EVENTS",
    arches=ARM64,
)
KVM_GET_ONE_REG: Final = _call(
    "KVM_GET_ONE_REG", "w", 0xAB, s.OneReg, "vcpu", "Reads a register.", cap="KVM_CAP_ONE_REG", arches=ARM64
)
KVM_SET_ONE_REG: Final = _call(
    "KVM_SET_ONE_REG", "w", 0xAC, s.OneReg, "vcpu", "Writes a register.", cap="KVM_CAP_ONE_REG", arches=ARM64
)
KVM_ARM_VCPU_INIT: Final = _call(
    "KVM_ARM_VCPU_INIT", "w", 0xAE, arm.VcpuInit, "vcpu", "Says what a vCPU is, and resets it.", arches=ARM64
)
KVM_GET_REG_LIST: Final = _call(
    "KVM_GET_REG_LIST",
    "wr",
    0xB0,
    s.RegList,
    "vcpu",
    "The ids of the vCPU's registers.",
    cap="KVM_CAP_ONE_REG",
    arches=ARM64,
    tail=U64,
)
KVM_ARM_VCPU_FINALIZE: Final = _call(
    "KVM_ARM_VCPU_FINALIZE",
    "w",
    0xC2,
    INT,
    "vcpu",
    "Fixes a vCPU feature, with what was set for it (KVM_ARM_VCPU_SVE).",
    cap="KVM_CAP_ARM_SVE",
    arches=ARM64,
)
KVM_GET_STATS_FD: Final = _call(
    "KVM_GET_STATS_FD",
    "",
    0xCE,
    None,
    "vm vcpu",
    "A file with the VM's or vCPU's statistics.",
    cap="KVM_CAP_BINARY_STATS_FD",
    returns="a statistics fd",
)

IOCTLS: Final = tuple(_call.rows)
"""Every ioctl above; those of x86-64 alone are in `ioctls_x86.IOCTLS`, both in `ioctls()`."""


@cache
def ioctls(arch: str | None = None) -> tuple[Ioctl, ...]:
    """Every ioctl that a kernel of `arch` ("arm64", "x86_64") offers; of both, without it."""
    if arch == "arm64":
        return tuple(row for row in IOCTLS if arch in row.arches)
    from kvm2.abi import ioctls_x86

    return tuple(row for row in IOCTLS + ioctls_x86.IOCTLS if arch is None or arch in row.arches)


@cache
def _by_number(arch: str | None) -> dict[tuple[int, str], Ioctl]:
    return {(row.number, kind): row for row in reversed(ioctls(arch)) for kind in row.on}


def by_number(request: int, on: str, arch: str | None = "arm64") -> Ioctl | None:
    """The ioctl with that 32-bit request number on that kind of fd; None: a kernel of `arch` knows no such ioctl."""
    return _by_number(arch).get((request, on))


def named(name: str, arch: str | None = None) -> tuple[Ioctl, ...]:
    """The rows of an ioctl by name: more than one where the architectures differ in payload or kinds of fd."""
    return tuple(row for row in ioctls(arch) if row.name == name)
