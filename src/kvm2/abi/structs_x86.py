"""Structures of x86-64's asm/kvm.h: the state of a vCPU.

Interrupt controllers, timers, Xen and the rest of a VM are in `structs_x86_vm`, SEV commands in `structs_sev`.

>>> Sregs.SIZE, Sregs2.SIZE, VcpuEvents.LAYOUT.at("exception_payload").offset, Fpu.SIZE
(312, 320, 56, 416)
"""

from __future__ import annotations

from typing import Annotated

from kvm2.abi.layout import CHAR, U8, U16, U32, U64, Array, Structure, UnionOf, field, u8, u16, u32, u64

Words4 = Annotated[tuple[int, ...], Array(U64, 4)]


class Regs(Structure, c_name="kvm_regs"):
    """The general registers."""

    rax: u64 = 0
    rbx: u64 = 0
    rcx: u64 = 0
    rdx: u64 = 0
    rsi: u64 = 0
    rdi: u64 = 0
    rsp: u64 = 0
    rbp: u64 = 0
    r8: u64 = 0
    r9: u64 = 0
    r10: u64 = 0
    r11: u64 = 0
    r12: u64 = 0
    r13: u64 = 0
    r14: u64 = 0
    r15: u64 = 0
    rip: u64 = 0
    rflags: u64 = 0


class Segment(Structure, c_name="kvm_segment"):
    """A segment register with its hidden part."""

    base: u64 = 0
    limit: u32 = 0
    selector: u16 = 0
    type: u8 = 0
    present: u8 = 0
    dpl: u8 = 0
    db: u8 = 0
    s: u8 = 0
    l: u8 = 0  # noqa: E741  # the kernel's name
    g: u8 = 0
    avl: u8 = 0
    unusable: u8 = 0
    padding: u8 = 0


class Dtable(Structure, c_name="kvm_dtable"):
    """A descriptor-table register."""

    base: u64 = 0
    limit: u16 = 0
    padding: Annotated[tuple[int, ...], Array(U16, 3)] = (0,) * 3


class Sregs(Structure, c_name="kvm_sregs"):
    """Segments, tables, control registers."""

    cs: Segment = field(default=Segment())
    ds: Segment = field(default=Segment())
    es: Segment = field(default=Segment())
    fs: Segment = field(default=Segment())
    gs: Segment = field(default=Segment())
    ss: Segment = field(default=Segment())
    tr: Segment = field(default=Segment())
    ldt: Segment = field(default=Segment())
    gdt: Dtable = field(default=Dtable())
    idt: Dtable = field(default=Dtable())
    cr0: u64 = 0
    cr2: u64 = 0
    cr3: u64 = 0
    cr4: u64 = 0
    cr8: u64 = 0
    efer: u64 = 0
    apic_base: u64 = 0
    interrupt_bitmap: Words4 = field(default=(0,) * 4, doc="the one interrupt that waits for injection")


class Sregs2(Structure, c_name="kvm_sregs2"):
    """The same, with the page-directory pointers instead of the interrupt bitmap (KVM_CAP_SREGS2)."""

    cs: Segment = field(default=Segment())
    ds: Segment = field(default=Segment())
    es: Segment = field(default=Segment())
    fs: Segment = field(default=Segment())
    gs: Segment = field(default=Segment())
    ss: Segment = field(default=Segment())
    tr: Segment = field(default=Segment())
    ldt: Segment = field(default=Segment())
    gdt: Dtable = field(default=Dtable())
    idt: Dtable = field(default=Dtable())
    cr0: u64 = 0
    cr2: u64 = 0
    cr3: u64 = 0
    cr4: u64 = 0
    cr8: u64 = 0
    efer: u64 = 0
    apic_base: u64 = 0
    flags: u64 = field(default=0, doc="bit 0: pdptrs count")
    pdptrs: Words4 = (0,) * 4


class Fpu(Structure, c_name="kvm_fpu"):
    """x87 and SSE registers."""

    fpr: Annotated[bytes, Array(U8, 128)] = bytes(128)
    fcw: u16 = 0
    fsw: u16 = 0
    ftwx: u8 = 0
    pad1: u8 = 0
    last_opcode: u16 = 0
    last_ip: u64 = 0
    last_dp: u64 = 0
    xmm: Annotated[bytes, Array(U8, 256)] = bytes(256)
    mxcsr: u32 = 0
    pad2: u32 = 0


class LapicState(Structure, c_name="kvm_lapic_state"):
    """The registers of the local APIC."""

    regs: Annotated[bytes, Array(CHAR, 0x400)] = bytes(0x400)


class MsrEntry(Structure, c_name="kvm_msr_entry"):
    """One MSR."""

    index: u32 = 0
    reserved: u32 = 0
    data: u64 = 0


class Msrs(Structure, c_name="kvm_msrs"):
    """The head of a list of MSRs; nmsrs entries follow."""

    nmsrs: u32 = 0
    pad: u32 = 0
    entries: Annotated[tuple[MsrEntry, ...], Array(MsrEntry, 0)] = ()


class MsrList(Structure, c_name="kvm_msr_list"):
    """The head of a list of MSR indices; nmsrs u32 follow."""

    nmsrs: u32 = field(default=0, doc="in: room; out: how many there are (E2BIG where there is less room)")
    indices: Annotated[tuple[int, ...], Array(U32, 0)] = ()


class CpuidEntry(Structure, c_name="kvm_cpuid_entry"):
    """One CPUID leaf, old form."""

    function: u32 = 0
    eax: u32 = 0
    ebx: u32 = 0
    ecx: u32 = 0
    edx: u32 = 0
    padding: u32 = 0


class Cpuid(Structure, c_name="kvm_cpuid"):
    """The head of a list of leaves, old form."""

    nent: u32 = 0
    padding: u32 = 0
    entries: Annotated[tuple[CpuidEntry, ...], Array(CpuidEntry, 0)] = ()


class CpuidEntry2(Structure, c_name="kvm_cpuid_entry2"):
    """One CPUID leaf."""

    function: u32 = 0
    index: u32 = 0
    flags: u32 = field(default=0, doc="bit 0: index counts")
    eax: u32 = 0
    ebx: u32 = 0
    ecx: u32 = 0
    edx: u32 = 0
    padding: Annotated[tuple[int, ...], Array(U32, 3)] = (0,) * 3


class Cpuid2(Structure, c_name="kvm_cpuid2"):
    """The head of a list of leaves; nent entries follow."""

    nent: u32 = field(default=0, doc="in: room; out: how many there are (E2BIG where there is less room)")
    padding: u32 = 0
    entries: Annotated[tuple[CpuidEntry2, ...], Array(CpuidEntry2, 0)] = ()


class DebugExitArch(Structure, c_name="kvm_debug_exit_arch"):
    """Why the guest stopped for its debugger."""

    exception: u32 = 0
    pad: u32 = 0
    pc: u64 = 0
    dr6: u64 = 0
    dr7: u64 = 0


class GuestDebugArch(Structure, c_name="kvm_guest_debug_arch"):
    """Debug registers for the host's debugger."""

    debugreg: Annotated[tuple[int, ...], Array(U64, 8)] = (0,) * 8


class GuestDebug(Structure, c_name="kvm_guest_debug"):
    """How userspace debugs the guest."""

    control: u32 = field(default=0, doc="KVM_GUESTDBG_*")
    pad: u32 = 0
    arch: GuestDebugArch = field(default=GuestDebugArch())


class VcpuEventsException(Structure, c_name=""):
    """The exception of kvm_vcpu_events."""

    injected: u8 = 0
    nr: u8 = 0
    has_error_code: u8 = 0
    pending: u8 = 0
    error_code: u32 = 0


class VcpuEventsInterrupt(Structure, c_name=""):
    """The interrupt of kvm_vcpu_events."""

    injected: u8 = 0
    nr: u8 = 0
    soft: u8 = 0
    shadow: u8 = 0


class VcpuEventsNmi(Structure, c_name=""):
    """The NMI of kvm_vcpu_events."""

    injected: u8 = 0
    pending: u8 = 0
    masked: u8 = 0
    pad: u8 = 0


class VcpuEventsSmi(Structure, c_name=""):
    """The SMI of kvm_vcpu_events."""

    smm: u8 = 0
    pending: u8 = 0
    smm_inside_nmi: u8 = 0
    latched_init: u8 = 0


class VcpuEventsTripleFault(Structure, c_name=""):
    """The triple fault of kvm_vcpu_events."""

    pending: u8 = 0


class VcpuEvents(Structure, c_name="kvm_vcpu_events"):
    """Exceptions and interrupts that are pending in a vCPU."""

    exception: VcpuEventsException = field(default=VcpuEventsException())
    interrupt: VcpuEventsInterrupt = field(default=VcpuEventsInterrupt())
    nmi: VcpuEventsNmi = field(default=VcpuEventsNmi())
    sipi_vector: u32 = 0
    flags: u32 = field(default=0, doc="KVM_VCPUEVENT_VALID_*")
    smi: VcpuEventsSmi = field(default=VcpuEventsSmi())
    triple_fault: VcpuEventsTripleFault = field(default=VcpuEventsTripleFault())
    reserved: Annotated[bytes, Array(U8, 26)] = bytes(26)
    exception_has_payload: u8 = 0
    exception_payload: u64 = 0


class Debugregs(Structure, c_name="kvm_debugregs"):
    """The guest's debug registers."""

    db: Words4 = (0,) * 4
    dr6: u64 = 0
    dr7: u64 = 0
    flags: u64 = 0
    reserved: Annotated[tuple[int, ...], Array(U64, 9)] = (0,) * 9


class Xsave(Structure, c_name="kvm_xsave"):
    """The XSAVE area; with KVM_CAP_XSAVE2 more may follow."""

    region: Annotated[tuple[int, ...], Array(U32, 1024)] = (0,) * 1024
    extra: Annotated[tuple[int, ...], Array(U32, 0)] = ()


class Xcr(Structure, c_name="kvm_xcr"):
    """One extended control register."""

    xcr: u32 = 0
    reserved: u32 = 0
    value: u64 = 0


class Xcrs(Structure, c_name="kvm_xcrs"):
    """The extended control registers."""

    nr_xcrs: u32 = 0
    flags: u32 = 0
    xcrs: Annotated[tuple[Xcr, ...], Array(Xcr, 16)] = (Xcr(),) * 16
    padding: Annotated[tuple[int, ...], Array(U64, 16)] = (0,) * 16


class SyncRegs(Structure, c_name="kvm_sync_regs"):
    """kvm_run.s.regs: registers that KVM_RUN reads and writes (KVM_CAP_SYNC_REGS)."""

    regs: Regs = field(default=Regs())
    sregs: Sregs = field(default=Sregs())
    events: VcpuEvents = field(default=VcpuEvents())


class X86Mce(Structure, c_name="kvm_x86_mce"):
    """A machine check."""

    status: u64 = 0
    addr: u64 = 0
    misc: u64 = 0
    mcg_status: u64 = 0
    bank: u8 = 0
    pad1: Annotated[bytes, Array(U8, 7)] = bytes(7)
    pad2: Annotated[tuple[int, ...], Array(U64, 3)] = (0,) * 3


class VmxNestedStateHdrSmm(Structure, c_name=""):
    """The SMM part of kvm_vmx_nested_state_hdr."""

    flags: u16 = 0


class VmxNestedStateHdr(Structure, c_name="kvm_vmx_nested_state_hdr", padded=True):
    """The head of nested VMX state."""

    vmxon_pa: u64 = 0
    vmcs12_pa: u64 = 0
    smm: VmxNestedStateHdrSmm = field(default=VmxNestedStateHdrSmm())
    pad: u16 = 0
    flags: u32 = 0
    preemption_timer_deadline: u64 = 0


class SvmNestedStateHdr(Structure, c_name="kvm_svm_nested_state_hdr"):
    """The head of nested SVM state."""

    vmcb_pa: u64 = 0


_NESTED = UnionOf(120, (("vmx", VmxNestedStateHdr), ("svm", SvmNestedStateHdr), ("pad", Array(U8, 120))))


class NestedState(Structure, c_name="kvm_nested_state"):
    """The head of the state of a nested hypervisor; the data follows, size bytes in all."""

    flags: u16 = field(default=0, doc="KVM_STATE_NESTED_*")
    format: u16 = field(default=0, doc="0 VMX, 1 SVM")
    size: u32 = field(default=0, doc="bytes, head included")
    hdr: Annotated[bytes, _NESTED] = bytes(120)
