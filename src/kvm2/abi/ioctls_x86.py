"""Every KVM ioctl that x86-64 has and arm64 has not, or has in another form (6.12).

>>> from kvm2.abi import ioctls as io
>>> hex(KVM_GET_REGS), hex(KVM_SET_GUEST_DEBUG), hex(io.KVM_SET_GUEST_DEBUG)
('0x8090ae81', '0x4048ae9b', '0x4208ae9b')
"""

from __future__ import annotations

from typing import Final

from kvm2.abi import structs as s
from kvm2.abi import structs_irq as irq
from kvm2.abi import structs_x86 as x
from kvm2.abi import structs_x86_vm as v
from kvm2.abi.ioc import X86_64, Declare, Payload
from kvm2.abi.layout import U32, U64, ULONG

_declare = Declare()


def _call(
    name: str,
    direction: str,
    nr: int,
    payload: Payload,
    on: str,
    doc: str,
    cap: str | None = None,
    *,
    arg: str = "",
    returns: str = "",
    tail: Payload = None,
) -> int:
    return _declare(name, direction, nr, payload, on, doc, cap=cap, arches=X86_64, arg=arg, returns=returns, tail=tail)


# A table: one call a line.
# fmt: off

KVM_GET_MSR_INDEX_LIST: Final = _call(
    "KVM_GET_MSR_INDEX_LIST", "wr", 0x02, x.MsrList, "system", "The MSRs to save and restore.", tail=U32
)
KVM_GET_SUPPORTED_CPUID: Final = _call(
    "KVM_GET_SUPPORTED_CPUID", "wr", 0x05, x.Cpuid2, "system",
    "The CPUID leaves that this host can give a guest.", "KVM_CAP_EXT_CPUID", tail=x.CpuidEntry2,
)
KVM_GET_EMULATED_CPUID: Final = _call(
    "KVM_GET_EMULATED_CPUID", "wr", 0x09, x.Cpuid2, "system",
    "The CPUID leaves that KVM emulates.", "KVM_CAP_EXT_EMUL_CPUID", tail=x.CpuidEntry2,
)
KVM_GET_MSR_FEATURE_INDEX_LIST: Final = _call(
    "KVM_GET_MSR_FEATURE_INDEX_LIST", "wr", 0x0A, x.MsrList, "system",
    "The MSRs that describe features.", "KVM_CAP_GET_MSR_FEATURES", tail=U32,
)
KVM_GET_DEVICE_ATTR: Final = _call(
    "KVM_GET_DEVICE_ATTR", "w", 0xE2, s.DeviceAttr, "system device vcpu",
    "Reads an attribute of the system, a device or a vCPU.", "KVM_CAP_SYS_ATTRIBUTES",
)
KVM_HAS_DEVICE_ATTR: Final = _call(
    "KVM_HAS_DEVICE_ATTR", "w", 0xE3, s.DeviceAttr, "system device vcpu",
    "Whether there is such an attribute (ENXIO: no).", "KVM_CAP_SYS_ATTRIBUTES",
)
KVM_SET_DEVICE_ATTR: Final = _call(
    "KVM_SET_DEVICE_ATTR", "w", 0xE1, s.DeviceAttr, "device vcpu",
    "Sets an attribute of a device or a vCPU.", "KVM_CAP_DEVICE_CTRL",
)
KVM_SET_NR_MMU_PAGES: Final = _call(
    "KVM_SET_NR_MMU_PAGES", "", 0x44, None, "vm",
    "Bounds the memory of shadow page tables.", "KVM_CAP_MMU_SHADOW_CACHE_CONTROL", arg="pages",
)
KVM_SET_TSS_ADDR: Final = _call(
    "KVM_SET_TSS_ADDR", "", 0x47, None, "vm",
    "Where KVM may put three pages of its own (Intel).", "KVM_CAP_SET_TSS_ADDR", arg="a guest physical address",
)
KVM_SET_IDENTITY_MAP_ADDR: Final = _call(
    "KVM_SET_IDENTITY_MAP_ADDR", "w", 0x48, U64, "vm",
    "Where KVM may put one page table of its own (Intel).", "KVM_CAP_SET_IDENTITY_MAP_ADDR",
)
KVM_GET_IRQCHIP: Final = _call(
    "KVM_GET_IRQCHIP", "wr", 0x62, v.Irqchip, "vm", "Reads an interrupt controller.", "KVM_CAP_IRQCHIP"
)
KVM_SET_IRQCHIP: Final = _call(
    "KVM_SET_IRQCHIP", "r", 0x63, v.Irqchip, "vm", "Writes an interrupt controller.", "KVM_CAP_IRQCHIP"
)
KVM_CREATE_PIT: Final = _call("KVM_CREATE_PIT", "", 0x64, None, "vm", "Makes the i8254.", "KVM_CAP_PIT")
KVM_GET_PIT: Final = _call("KVM_GET_PIT", "wr", 0x65, v.PitState, "vm", "Reads the i8254.", "KVM_CAP_PIT")
KVM_SET_PIT: Final = _call("KVM_SET_PIT", "r", 0x66, v.PitState, "vm", "Writes the i8254.", "KVM_CAP_PIT")
KVM_REINJECT_CONTROL: Final = _call(
    "KVM_REINJECT_CONTROL", "", 0x71, v.ReinjectControl, "vm",
    "Whether lost ticks of the i8254 are injected later.", "KVM_CAP_REINJECT_CONTROL",
)
KVM_CREATE_PIT2: Final = _call("KVM_CREATE_PIT2", "w", 0x77, v.PitConfig, "vm", "Makes the i8254.", "KVM_CAP_PIT2")
KVM_SET_BOOT_CPU_ID: Final = _call(
    "KVM_SET_BOOT_CPU_ID", "", 0x78, None, "vm", "Which vCPU boots.", "KVM_CAP_SET_BOOT_CPU_ID", arg="a vCPU id"
)
KVM_XEN_HVM_CONFIG: Final = _call(
    "KVM_XEN_HVM_CONFIG", "w", 0x7A, v.XenHvmConfig, "vm", "How Xen guests are served.", "KVM_CAP_XEN_HVM"
)
KVM_SET_CLOCK: Final = _call(
    "KVM_SET_CLOCK", "w", 0x7B, s.ClockData, "vm", "Sets the guest's clock.", "KVM_CAP_ADJUST_CLOCK"
)
KVM_GET_CLOCK: Final = _call(
    "KVM_GET_CLOCK", "r", 0x7C, s.ClockData, "vm", "Reads the guest's clock.", "KVM_CAP_ADJUST_CLOCK"
)
KVM_GET_PIT2: Final = _call("KVM_GET_PIT2", "r", 0x9F, v.PitState2, "vm", "Reads the i8254.", "KVM_CAP_PIT_STATE2")
KVM_SET_PIT2: Final = _call("KVM_SET_PIT2", "w", 0xA0, v.PitState2, "vm", "Writes the i8254.", "KVM_CAP_PIT_STATE2")
KVM_SET_TSC_KHZ: Final = _call(
    "KVM_SET_TSC_KHZ", "", 0xA2, None, "vm vcpu",
    "Sets the frequency of the time-stamp counter.", "KVM_CAP_TSC_CONTROL", arg="kHz",
)
KVM_GET_TSC_KHZ: Final = _call(
    "KVM_GET_TSC_KHZ", "", 0xA3, None, "vm vcpu",
    "Reads the frequency of the time-stamp counter.", "KVM_CAP_GET_TSC_KHZ", returns="kHz",
)
KVM_ENABLE_CAP: Final = _call(
    "KVM_ENABLE_CAP", "w", 0xA3, s.EnableCap, "vm vcpu", "Switches a capability on.", "KVM_CAP_ENABLE_CAP"
)
KVM_SET_PMU_EVENT_FILTER: Final = _call(
    "KVM_SET_PMU_EVENT_FILTER", "w", 0xB2, v.PmuEventFilter, "vm",
    "Which PMU events the guest may count.", "KVM_CAP_PMU_EVENT_FILTER", tail=U64,
)
KVM_MEMORY_ENCRYPT_OP: Final = _call(
    "KVM_MEMORY_ENCRYPT_OP", "wr", 0xBA, ULONG, "vm", "A command of encrypted memory (SEV)."
)
KVM_MEMORY_ENCRYPT_REG_REGION: Final = _call(
    "KVM_MEMORY_ENCRYPT_REG_REGION", "r", 0xBB, s.EncRegion, "vm", "Pins memory of an encrypted guest."
)
KVM_MEMORY_ENCRYPT_UNREG_REGION: Final = _call(
    "KVM_MEMORY_ENCRYPT_UNREG_REGION", "r", 0xBC, s.EncRegion, "vm", "Ends that."
)
KVM_HYPERV_EVENTFD: Final = _call(
    "KVM_HYPERV_EVENTFD", "w", 0xBD, v.HypervEventfd, "vm",
    "Ties an eventfd to a Hyper-V connection.", "KVM_CAP_HYPERV_EVENTFD",
)
KVM_X86_SET_MSR_FILTER: Final = _call(
    "KVM_X86_SET_MSR_FILTER", "w", 0xC6, v.MsrFilter, "vm", "Which MSRs the guest may touch.", "KVM_CAP_X86_MSR_FILTER"
)
KVM_XEN_HVM_GET_ATTR: Final = _call(
    "KVM_XEN_HVM_GET_ATTR", "wr", 0xC8, v.XenHvmAttr, "vm", "Reads an attribute of a Xen guest.", "KVM_CAP_XEN_HVM"
)
KVM_XEN_HVM_SET_ATTR: Final = _call(
    "KVM_XEN_HVM_SET_ATTR", "w", 0xC9, v.XenHvmAttr, "vm", "Writes an attribute of a Xen guest.", "KVM_CAP_XEN_HVM"
)
KVM_XEN_HVM_EVTCHN_SEND: Final = _call(
    "KVM_XEN_HVM_EVTCHN_SEND", "w", 0xD0, irq.IrqRoutingXenEvtchn, "vm",
    "Sends an event to a Xen guest.", "KVM_CAP_XEN_HVM",
)
KVM_SET_MEMORY_ATTRIBUTES: Final = _call(
    "KVM_SET_MEMORY_ATTRIBUTES", "w", 0xD2, s.MemoryAttributes, "vm",
    "Makes guest memory private or shared.", "KVM_CAP_MEMORY_ATTRIBUTES",
)
KVM_CREATE_GUEST_MEMFD: Final = _call(
    "KVM_CREATE_GUEST_MEMFD", "wr", 0xD4, s.CreateGuestMemfd, "vm",
    "Makes a file of guest-only memory.", "KVM_CAP_GUEST_MEMFD", returns="a guest_memfd",
)
KVM_GET_REGS: Final = _call("KVM_GET_REGS", "r", 0x81, x.Regs, "vcpu", "Reads the general registers.")
KVM_SET_REGS: Final = _call("KVM_SET_REGS", "w", 0x82, x.Regs, "vcpu", "Writes the general registers.")
KVM_GET_SREGS: Final = _call(
    "KVM_GET_SREGS", "r", 0x83, x.Sregs, "vcpu", "Reads segments, tables and control registers."
)
KVM_SET_SREGS: Final = _call(
    "KVM_SET_SREGS", "w", 0x84, x.Sregs, "vcpu", "Writes segments, tables and control registers."
)
KVM_TRANSLATE: Final = _call("KVM_TRANSLATE", "wr", 0x85, s.Translation, "vcpu", "Translates a guest virtual address.")
KVM_INTERRUPT: Final = _call("KVM_INTERRUPT", "w", 0x86, v.Interrupt, "vcpu", "Queues an external interrupt.")
KVM_GET_MSRS: Final = _call(
    "KVM_GET_MSRS", "wr", 0x88, x.Msrs, "system vcpu",
    "Reads MSRs; on /dev/kvm those that describe features.", tail=x.MsrEntry, returns="how many",
)
KVM_SET_MSRS: Final = _call(
    "KVM_SET_MSRS", "w", 0x89, x.Msrs, "vcpu", "Writes MSRs.", tail=x.MsrEntry, returns="how many"
)
KVM_SET_CPUID: Final = _call(
    "KVM_SET_CPUID", "w", 0x8A, x.Cpuid, "vcpu", "Sets the guest's CPUID, old form.", tail=x.CpuidEntry
)
KVM_GET_FPU: Final = _call("KVM_GET_FPU", "r", 0x8C, x.Fpu, "vcpu", "Reads x87 and SSE registers.")
KVM_SET_FPU: Final = _call("KVM_SET_FPU", "w", 0x8D, x.Fpu, "vcpu", "Writes x87 and SSE registers.")
KVM_GET_LAPIC: Final = _call(
    "KVM_GET_LAPIC", "r", 0x8E, x.LapicState, "vcpu", "Reads the local APIC.", "KVM_CAP_IRQCHIP"
)
KVM_SET_LAPIC: Final = _call(
    "KVM_SET_LAPIC", "w", 0x8F, x.LapicState, "vcpu", "Writes the local APIC.", "KVM_CAP_IRQCHIP"
)
KVM_SET_CPUID2: Final = _call(
    "KVM_SET_CPUID2", "w", 0x90, x.Cpuid2, "vcpu", "Sets the guest's CPUID.", "KVM_CAP_EXT_CPUID", tail=x.CpuidEntry2
)
KVM_GET_CPUID2: Final = _call(
    "KVM_GET_CPUID2", "wr", 0x91, x.Cpuid2, "vcpu", "Reads the guest's CPUID.", "KVM_CAP_EXT_CPUID", tail=x.CpuidEntry2
)
KVM_TPR_ACCESS_REPORTING: Final = _call(
    "KVM_TPR_ACCESS_REPORTING", "wr", 0x92, v.TprAccessCtl, "vcpu",
    "Whether accesses to the task priority exit.", "KVM_CAP_VAPIC",
)
KVM_SET_VAPIC_ADDR: Final = _call(
    "KVM_SET_VAPIC_ADDR", "w", 0x93, v.VapicAddr, "vcpu", "Where the virtual APIC page is.", "KVM_CAP_VAPIC"
)
KVM_NMI: Final = _call("KVM_NMI", "", 0x9A, None, "vcpu", "Queues an NMI.", "KVM_CAP_USER_NMI")
KVM_SET_GUEST_DEBUG: Final = _call(
    "KVM_SET_GUEST_DEBUG", "w", 0x9B, x.GuestDebug, "vcpu",
    "Single steps, breakpoints and watchpoints.", "KVM_CAP_SET_GUEST_DEBUG",
)
KVM_X86_SETUP_MCE: Final = _call(
    "KVM_X86_SETUP_MCE", "w", 0x9C, U64, "vcpu", "Sets the machine-check banks up.", "KVM_CAP_MCE"
)
KVM_X86_GET_MCE_CAP_SUPPORTED: Final = _call(
    "KVM_X86_GET_MCE_CAP_SUPPORTED", "r", 0x9D, U64, "system", "What machine checks this host can give.", "KVM_CAP_MCE"
)
KVM_X86_SET_MCE: Final = _call(
    "KVM_X86_SET_MCE", "w", 0x9E, x.X86Mce, "vcpu", "Injects a machine check.", "KVM_CAP_MCE"
)
KVM_GET_VCPU_EVENTS: Final = _call(
    "KVM_GET_VCPU_EVENTS", "r", 0x9F, x.VcpuEvents, "vcpu",
    "Which exceptions and interrupts are pending.", "KVM_CAP_VCPU_EVENTS",
)
KVM_SET_VCPU_EVENTS: Final = _call(
    "KVM_SET_VCPU_EVENTS", "w", 0xA0, x.VcpuEvents, "vcpu",
    "Makes exceptions and interrupts pending.", "KVM_CAP_VCPU_EVENTS",
)
KVM_GET_DEBUGREGS: Final = _call(
    "KVM_GET_DEBUGREGS", "r", 0xA1, x.Debugregs, "vcpu", "Reads the debug registers.", "KVM_CAP_DEBUGREGS"
)
KVM_SET_DEBUGREGS: Final = _call(
    "KVM_SET_DEBUGREGS", "w", 0xA2, x.Debugregs, "vcpu", "Writes the debug registers.", "KVM_CAP_DEBUGREGS"
)
KVM_GET_XSAVE: Final = _call("KVM_GET_XSAVE", "r", 0xA4, x.Xsave, "vcpu", "Reads the XSAVE area.", "KVM_CAP_XSAVE")
KVM_SET_XSAVE: Final = _call("KVM_SET_XSAVE", "w", 0xA5, x.Xsave, "vcpu", "Writes the XSAVE area.", "KVM_CAP_XSAVE")
KVM_GET_XCRS: Final = _call(
    "KVM_GET_XCRS", "r", 0xA6, x.Xcrs, "vcpu", "Reads the extended control registers.", "KVM_CAP_XCRS"
)
KVM_SET_XCRS: Final = _call(
    "KVM_SET_XCRS", "w", 0xA7, x.Xcrs, "vcpu", "Writes the extended control registers.", "KVM_CAP_XCRS"
)
KVM_KVMCLOCK_CTRL: Final = _call(
    "KVM_KVMCLOCK_CTRL", "", 0xAD, None, "vcpu", "Tells the guest that it was stopped.", "KVM_CAP_KVMCLOCK_CTRL"
)
KVM_SMI: Final = _call("KVM_SMI", "", 0xB7, None, "vcpu", "Queues an SMI.", "KVM_CAP_X86_SMM")
KVM_GET_NESTED_STATE: Final = _call(
    "KVM_GET_NESTED_STATE", "wr", 0xBE, x.NestedState, "vcpu",
    "Reads the state of a nested hypervisor.", "KVM_CAP_NESTED_STATE",
)
KVM_SET_NESTED_STATE: Final = _call(
    "KVM_SET_NESTED_STATE", "w", 0xBF, x.NestedState, "vcpu",
    "Writes the state of a nested hypervisor.", "KVM_CAP_NESTED_STATE",
)
KVM_GET_SUPPORTED_HV_CPUID: Final = _call(
    "KVM_GET_SUPPORTED_HV_CPUID", "wr", 0xC1, x.Cpuid2, "system vcpu",
    "The Hyper-V leaves that this host can give.", "KVM_CAP_HYPERV_CPUID", tail=x.CpuidEntry2,
)
KVM_XEN_VCPU_GET_ATTR: Final = _call(
    "KVM_XEN_VCPU_GET_ATTR", "wr", 0xCA, v.XenVcpuAttr, "vcpu",
    "Reads an attribute of a Xen guest's vCPU.", "KVM_CAP_XEN_HVM",
)
KVM_XEN_VCPU_SET_ATTR: Final = _call(
    "KVM_XEN_VCPU_SET_ATTR", "w", 0xCB, v.XenVcpuAttr, "vcpu",
    "Writes an attribute of a Xen guest's vCPU.", "KVM_CAP_XEN_HVM",
)
KVM_GET_SREGS2: Final = _call(
    "KVM_GET_SREGS2", "r", 0xCC, x.Sregs2, "vcpu", "Reads segments, tables and control registers.", "KVM_CAP_SREGS2"
)
KVM_SET_SREGS2: Final = _call(
    "KVM_SET_SREGS2", "w", 0xCD, x.Sregs2, "vcpu", "Writes segments, tables and control registers.", "KVM_CAP_SREGS2"
)
KVM_GET_XSAVE2: Final = _call(
    "KVM_GET_XSAVE2", "r", 0xCF, x.Xsave, "vcpu", "Reads the XSAVE area, all of it.", "KVM_CAP_XSAVE2"
)
KVM_PRE_FAULT_MEMORY: Final = _call(
    "KVM_PRE_FAULT_MEMORY", "wr", 0xD5, s.PreFaultMemory, "vcpu",
    "Maps guest memory before the guest touches it.", "KVM_CAP_PRE_FAULT_MEMORY",
)
# fmt: on

IOCTLS: Final = tuple(_declare.rows)
"""Every ioctl above; `ioctls.ioctls("x86_64")` has those too that arm64 shares."""
