"""`struct kvm_run`: the area that a vCPU shares with userspace, why it left the guest, and what goes with each reason.

>>> KVM_EXIT_MMIO, EXITS[KVM_EXIT_MMIO].member, EXITS[KVM_EXIT_MMIO].payload is Mmio
(6, 'mmio', True)
>>> run = bytearray(RUN_SIZE)
>>> run[UNION_OFFSET:UNION_OFFSET + Mmio.SIZE] = Mmio(0x9000000, b"A", 1, 1).pack()
>>> Mmio.unpack(run, UNION_OFFSET).phys_addr == 0x9000000, RUN_SIZE
(True, 2352)
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final, NamedTuple

from kvm2.abi.layout import U8, U64, Array, Structure, UnionOf, field, u8, u16, u32, u64
from kvm2.abi.structs_arm64 import DebugExitArch

KVM_EXIT_UNKNOWN: Final = 0
KVM_EXIT_EXCEPTION: Final = 1
KVM_EXIT_IO: Final = 2
KVM_EXIT_HYPERCALL: Final = 3
KVM_EXIT_DEBUG: Final = 4
KVM_EXIT_HLT: Final = 5
KVM_EXIT_MMIO: Final = 6
KVM_EXIT_IRQ_WINDOW_OPEN: Final = 7
KVM_EXIT_SHUTDOWN: Final = 8
KVM_EXIT_FAIL_ENTRY: Final = 9
KVM_EXIT_INTR: Final = 10
KVM_EXIT_SET_TPR: Final = 11
KVM_EXIT_TPR_ACCESS: Final = 12
KVM_EXIT_S390_SIEIC: Final = 13
KVM_EXIT_S390_RESET: Final = 14
KVM_EXIT_DCR: Final = 15
KVM_EXIT_NMI: Final = 16
KVM_EXIT_INTERNAL_ERROR: Final = 17
KVM_EXIT_OSI: Final = 18
KVM_EXIT_PAPR_HCALL: Final = 19
KVM_EXIT_S390_UCONTROL: Final = 20
KVM_EXIT_WATCHDOG: Final = 21
KVM_EXIT_S390_TSCH: Final = 22
KVM_EXIT_EPR: Final = 23
KVM_EXIT_SYSTEM_EVENT: Final = 24
KVM_EXIT_S390_STSI: Final = 25
KVM_EXIT_IOAPIC_EOI: Final = 26
KVM_EXIT_HYPERV: Final = 27
KVM_EXIT_ARM_NISV: Final = 28
KVM_EXIT_X86_RDMSR: Final = 29
KVM_EXIT_X86_WRMSR: Final = 30
KVM_EXIT_DIRTY_RING_FULL: Final = 31
KVM_EXIT_AP_RESET_HOLD: Final = 32
KVM_EXIT_X86_BUS_LOCK: Final = 33
KVM_EXIT_XEN: Final = 34
KVM_EXIT_RISCV_SBI: Final = 35
KVM_EXIT_RISCV_CSR: Final = 36
KVM_EXIT_NOTIFY: Final = 37
KVM_EXIT_LOONGARCH_IOCSR: Final = 38
KVM_EXIT_MEMORY_FAULT: Final = 39

KVM_EXIT_IO_IN: Final = 0
KVM_EXIT_IO_OUT: Final = 1
KVM_SYSTEM_EVENT_SHUTDOWN: Final = 1
KVM_SYSTEM_EVENT_RESET: Final = 2
KVM_SYSTEM_EVENT_CRASH: Final = 3
KVM_SYSTEM_EVENT_WAKEUP: Final = 4
KVM_SYSTEM_EVENT_SUSPEND: Final = 5
KVM_SYSTEM_EVENT_SEV_TERM: Final = 6
KVM_SYSTEM_EVENT_RESET_FLAG_PSCI_RESET2: Final = 1 << 0
KVM_EXIT_FAIL_ENTRY_CPU_UNSUPPORTED: Final = 1 << 0
KVM_HYPERCALL_EXIT_SMC: Final = 1 << 0
KVM_HYPERCALL_EXIT_16BIT: Final = 1 << 1
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3
KVM_INTERNAL_ERROR_EMULATION: Final = 1
KVM_INTERNAL_ERROR_SIMUL_EX: Final = 2
KVM_INTERNAL_ERROR_DELIVERY_EV: Final = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: Final = 4
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: Final = 1 << 0
KVM_MSR_EXIT_REASON_INVAL: Final = 1 << 0
KVM_MSR_EXIT_REASON_UNKNOWN: Final = 1 << 1
KVM_MSR_EXIT_REASON_FILTER: Final = 1 << 2
KVM_NOTIFY_CONTEXT_INVALID: Final = 1 << 0

SYNC_REGS_SIZE_BYTES: Final = 2048
Words16 = Annotated[tuple[int, ...], Array(U64, 16)]


class Hw(Structure, c_name=""):
    """KVM_EXIT_UNKNOWN."""

    hardware_exit_reason: u64 = field(default=0, doc="as the hardware gave it")


class FailEntry(Structure, c_name="", padded=True):
    """KVM_EXIT_FAIL_ENTRY: the vCPU could not enter the guest."""

    hardware_entry_failure_reason: u64 = field(default=0, doc="arm64: KVM_EXIT_FAIL_ENTRY_CPU_UNSUPPORTED")
    cpu: u32 = field(default=0, doc="the physical CPU")


class Ex(Structure, c_name=""):
    """KVM_EXIT_EXCEPTION."""

    exception: u32 = 0
    error_code: u32 = 0


class Io(Structure, c_name=""):
    """KVM_EXIT_IO: the guest read or wrote a port (x86)."""

    direction: u8 = field(default=0, doc="KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT")
    size: u8 = field(default=0, doc="bytes of each access")
    port: u16 = 0
    count: u32 = field(default=0, doc="accesses")
    data_offset: u64 = field(default=0, doc="where the data is, from the start of kvm_run")


class Debug(Structure, c_name=""):
    """KVM_EXIT_DEBUG on arm64."""

    arch: DebugExitArch = field(default=DebugExitArch())


class Mmio(Structure, c_name="", padded=True):
    """KVM_EXIT_MMIO: the guest touched memory that no slot has."""

    phys_addr: u64 = field(default=0, doc="guest physical address")
    data: Annotated[bytes, Array(U8, 8)] = field(default=bytes(8), doc="out for a write; in for a read, before KVM_RUN")
    len: u32 = field(default=0, doc="1, 2, 4 or 8 bytes")
    is_write: u8 = 0


class Hypercall(Structure, c_name=""):
    """KVM_EXIT_HYPERCALL: a hypercall that userspace handles."""

    nr: u64 = field(default=0, doc="arm64: the SMCCC function id")
    args: Annotated[tuple[int, ...], Array(U64, 6)] = (0,) * 6
    ret: u64 = 0
    flags: u64 = field(default=0, doc="arm64: KVM_HYPERCALL_EXIT_*; x86: KVM_EXIT_HYPERCALL_LONG_MODE")


class TprAccess(Structure, c_name=""):
    """KVM_EXIT_TPR_ACCESS (x86)."""

    rip: u64 = 0
    is_write: u32 = 0
    pad: u32 = 0


class InternalError(Structure, c_name=""):
    """KVM_EXIT_INTERNAL_ERROR."""

    suberror: u32 = field(default=0, doc="KVM_INTERNAL_ERROR_*")
    ndata: u32 = field(default=0, doc="words of data that count")
    data: Words16 = (0,) * 16


class EmulationFailure(Structure, c_name=""):
    """KVM_INTERNAL_ERROR_EMULATION, over InternalError."""

    suberror: u32 = field(default=0, doc="KVM_INTERNAL_ERROR_EMULATION")
    ndata: u32 = 0
    flags: u64 = field(default=0, doc="KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES")
    insn_size: u8 = 0
    insn_bytes: Annotated[bytes, Array(U8, 15)] = bytes(15)


class SystemEvent(Structure, c_name=""):
    """KVM_EXIT_SYSTEM_EVENT: the guest asks for a reset, a shutdown or a suspend, or crashed."""

    type: u32 = field(default=0, doc="KVM_SYSTEM_EVENT_*")
    ndata: u32 = field(default=0, doc="words of data that count")
    data: Words16 = field(default=(0,) * 16, doc="data[0] is flags: KVM_SYSTEM_EVENT_RESET_FLAG_PSCI_RESET2")


class Eoi(Structure, c_name=""):
    """KVM_EXIT_IOAPIC_EOI (x86)."""

    vector: u8 = 0


class ArmNisv(Structure, c_name=""):
    """KVM_EXIT_ARM_NISV: an access outside of memory by an instruction without a valid syndrome."""

    esr_iss: u64 = field(default=0, doc="ESR_EL2.ISS")
    fault_ipa: u64 = 0


class Msr(Structure, c_name="", padded=True):
    """KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR."""

    error: u8 = field(default=0, doc="in: 1 injects #GP")
    pad: Annotated[bytes, Array(U8, 7)] = bytes(7)
    reason: u32 = field(default=0, doc="KVM_MSR_EXIT_REASON_*")
    index: u32 = 0
    data: u64 = 0


class Notify(Structure, c_name=""):
    """KVM_EXIT_NOTIFY (x86)."""

    flags: u32 = field(default=0, doc="KVM_NOTIFY_CONTEXT_INVALID")


class MemoryFault(Structure, c_name=""):
    """KVM_EXIT_MEMORY_FAULT: KVM_RUN failed with EFAULT or EHWPOISON because of this range."""

    flags: u64 = field(default=0, doc="KVM_MEMORY_EXIT_FLAG_PRIVATE")
    gpa: u64 = 0
    size: u64 = field(default=0, doc="bytes")


class Hyperv(Structure, c_name="kvm_hyperv_exit"):
    """KVM_EXIT_HYPERV (x86)."""

    type: u32 = field(default=0, doc="1 SynIC, 2 hypercall, 3 debugger")
    pad1: u32 = 0
    u: Annotated[bytes, UnionOf(48, (("words", Array(U64, 6)),))] = bytes(48)


class Xen(Structure, c_name="kvm_xen_exit", padded=True):
    """KVM_EXIT_XEN (x86)."""

    type: u32 = field(default=0, doc="1 hypercall")
    u: Annotated[bytes, UnionOf(72, (("words", Array(U64, 9)),))] = bytes(72)


class Run(Structure, c_name="kvm_run"):
    """The shared area; `exit` is a union, of which EXITS says the member."""

    request_interrupt_window: u8 = 0
    immediate_exit: u8 = field(default=0, doc="in: KVM_RUN returns EINTR at once")
    padding1: Annotated[bytes, Array(U8, 6)] = bytes(6)
    exit_reason: u32 = field(default=0, doc="out: KVM_EXIT_*")
    ready_for_interrupt_injection: u8 = 0
    if_flag: u8 = 0
    flags: u16 = field(default=0, doc="arm64: KVM_DEBUG_ARCH_HSR_HIGH_VALID; x86: KVM_RUN_X86_*")
    cr8: u64 = 0
    apic_base: u64 = 0
    exit: Annotated[bytes, UnionOf(256, (("padding", Array(U8, 256)),))] = field(default=bytes(256), c_name="padding")
    kvm_valid_regs: u64 = 0
    kvm_dirty_regs: u64 = 0
    s: Annotated[bytes, UnionOf(SYNC_REGS_SIZE_BYTES, (("padding", Array(U8, 2048)),))] = bytes(SYNC_REGS_SIZE_BYTES)


RUN_SIZE: Final = Run.SIZE
UNION_OFFSET: Final = Run.LAYOUT.at("exit").offset
IMMEDIATE_EXIT_OFFSET: Final = Run.LAYOUT.at("immediate_exit").offset
EXIT_REASON_OFFSET: Final = Run.LAYOUT.at("exit_reason").offset
FLAGS_OFFSET: Final = Run.LAYOUT.at("flags").offset
SYNC_REGS_OFFSET: Final = Run.LAYOUT.at("s").offset


class Exit(NamedTuple):
    """One exit reason: its number and name, the member of kvm_run's union with its layout, the architectures."""

    number: int
    name: str
    member: str
    payload: type[Structure] | None
    arches: tuple[str, ...]
    doc: str


_ARM, _X86, _BOTH = ("arm64",), ("x86_64",), ("arm64", "x86_64")
_WITH: Final[dict[int, tuple[str, type[Structure] | None, tuple[str, ...], str]]] = {
    KVM_EXIT_UNKNOWN: ("hw", Hw, _X86, "The processor left the guest for a reason KVM does not know."),
    KVM_EXIT_EXCEPTION: ("ex", Ex, _X86, "An exception that KVM does not handle."),
    KVM_EXIT_IO: ("io", Io, _X86, "The guest read or wrote a port."),
    KVM_EXIT_HYPERCALL: ("hypercall", Hypercall, _BOTH, "A hypercall for userspace."),
    KVM_EXIT_DEBUG: ("debug", Debug, _BOTH, "A breakpoint, a watchpoint or a single step."),
    KVM_EXIT_HLT: ("", None, _X86, "The guest halted."),
    KVM_EXIT_MMIO: ("mmio", Mmio, _BOTH, "The guest touched memory that no slot has."),
    KVM_EXIT_IRQ_WINDOW_OPEN: ("", None, _X86, "An interrupt can be injected."),
    KVM_EXIT_SHUTDOWN: ("", None, _X86, "A triple fault."),
    KVM_EXIT_FAIL_ENTRY: ("fail_entry", FailEntry, _BOTH, "The vCPU could not enter the guest."),
    KVM_EXIT_INTR: ("", None, _BOTH, "A signal, or immediate_exit: KVM_RUN returned EINTR."),
    KVM_EXIT_SET_TPR: ("", None, _X86, "The guest lowered its task priority."),
    KVM_EXIT_TPR_ACCESS: ("tpr_access", TprAccess, _X86, "The guest touched its task-priority register."),
    KVM_EXIT_INTERNAL_ERROR: ("internal", InternalError, _BOTH, "KVM could not go on."),
    KVM_EXIT_SYSTEM_EVENT: ("system_event", SystemEvent, _BOTH, "Reset, shutdown, suspend or crash."),
    KVM_EXIT_IOAPIC_EOI: ("eoi", Eoi, _X86, "The end of a level-triggered interrupt."),
    KVM_EXIT_HYPERV: ("hyperv", Hyperv, _X86, "A Hyper-V service."),
    KVM_EXIT_ARM_NISV: ("arm_nisv", ArmNisv, _ARM, "An access outside of memory that cannot be decoded."),
    KVM_EXIT_X86_RDMSR: ("msr", Msr, _X86, "The guest reads an MSR for userspace."),
    KVM_EXIT_X86_WRMSR: ("msr", Msr, _X86, "The guest writes an MSR for userspace."),
    KVM_EXIT_DIRTY_RING_FULL: ("", None, _BOTH, "The dirty ring must be harvested."),
    KVM_EXIT_AP_RESET_HOLD: ("", None, _X86, "An SEV-ES processor waits for its start."),
    KVM_EXIT_X86_BUS_LOCK: ("", None, _X86, "The guest took a bus lock."),
    KVM_EXIT_XEN: ("xen", Xen, _X86, "A Xen hypercall."),
    KVM_EXIT_NOTIFY: ("notify", Notify, _X86, "The guest held the processor too long."),
    KVM_EXIT_MEMORY_FAULT: ("memory_fault", MemoryFault, _BOTH, "Guest memory could not be made available."),
}


def _exits() -> dict[int, Exit]:
    other: tuple[str, None, tuple[str, ...], str] = ("", None, (), "Of another architecture.")
    skip = ("KVM_EXIT_IO_IN", "KVM_EXIT_IO_OUT", "KVM_EXIT_FAIL_ENTRY_CPU_UNSUPPORTED")
    names = [name for name in globals() if name.startswith("KVM_EXIT_") and name not in skip]
    return {number: Exit(number, name, *_WITH.get(number, other)) for name in names for number in [globals()[name]]}


EXITS: Final[Mapping[int, Exit]] = MappingProxyType(_exits())
"""Every exit reason of 6.12 by number; those of other architectures have no payload here."""


def payload_of(reason: int, arch: str = "arm64") -> type[Structure] | None:
    """What lies in kvm_run's union with that reason; None: nothing, or not declared here."""
    if reason == KVM_EXIT_DEBUG and arch == "x86_64":
        from kvm2.abi.structs_x86 import DebugExitArch as DebugX86

        return DebugX86
    return EXITS[reason].payload if reason in EXITS else None


def name_of(reason: int) -> str:
    """The name of an exit reason; "KVM_EXIT_<number>" where 6.12 has none."""
    return EXITS[reason].name if reason in EXITS else f"KVM_EXIT_{reason}"
