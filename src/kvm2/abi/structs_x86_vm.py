"""Structures of x86-64's asm/kvm.h about a whole VM: interrupt chips, timers, filters, Xen.

>>> MsrFilter.SIZE, XenHvmAttr.SIZE, PitState2.SIZE
(392, 72, 112)
"""

from __future__ import annotations

from typing import Annotated

from kvm2.abi.layout import U8, U16, U32, U64, Array, Structure, UnionOf, field, s32, s64, u8, u16, u32, u64


class PicState(Structure, c_name="kvm_pic_state"):
    """An i8259."""

    last_irr: u8 = 0
    irr: u8 = 0
    imr: u8 = 0
    isr: u8 = 0
    priority_add: u8 = 0
    irq_base: u8 = 0
    read_reg_select: u8 = 0
    poll: u8 = 0
    special_mask: u8 = 0
    init_state: u8 = 0
    auto_eoi: u8 = 0
    rotate_on_auto_eoi: u8 = 0
    special_fully_nested_mode: u8 = 0
    init4: u8 = 0
    elcr: u8 = 0
    elcr_mask: u8 = 0


class IoapicState(Structure, c_name="kvm_ioapic_state"):
    """An I/O APIC."""

    base_address: u64 = 0
    ioregsel: u32 = 0
    id: u32 = 0
    irr: u32 = 0
    pad: u32 = 0
    redirtbl: Annotated[tuple[int, ...], Array(U64, 24)] = (0,) * 24


_CHIP = UnionOf(512, (("dummy", Array(U8, 512)), ("pic", PicState), ("ioapic", IoapicState)))


class Irqchip(Structure, c_name="kvm_irqchip"):
    """The state of one interrupt controller in the kernel."""

    chip_id: u32 = field(default=0, doc="0 master PIC, 1 slave PIC, 2 I/O APIC")
    pad: u32 = 0
    chip: Annotated[bytes, _CHIP] = bytes(512)


class PitChannelState(Structure, c_name="kvm_pit_channel_state"):
    """One channel of the i8254."""

    count: u32 = 0
    latched_count: u16 = 0
    count_latched: u8 = 0
    status_latched: u8 = 0
    status: u8 = 0
    read_state: u8 = 0
    write_state: u8 = 0
    write_latch: u8 = 0
    rw_mode: u8 = 0
    mode: u8 = 0
    bcd: u8 = 0
    gate: u8 = 0
    count_load_time: s64 = 0


_Channels = Annotated[tuple[PitChannelState, ...], Array(PitChannelState, 3)]


class PitState(Structure, c_name="kvm_pit_state"):
    """The i8254."""

    channels: _Channels = (PitChannelState(),) * 3


class PitState2(Structure, c_name="kvm_pit_state2"):
    """The i8254, with flags."""

    channels: _Channels = (PitChannelState(),) * 3
    flags: u32 = field(default=0, doc="bit 0 HPET legacy, bit 1 speaker data on")
    reserved: Annotated[tuple[int, ...], Array(U32, 9)] = (0,) * 9


class PitConfig(Structure, c_name="kvm_pit_config"):
    """The i8254 to make."""

    flags: u32 = field(default=0, doc="KVM_PIT_SPEAKER_DUMMY, 1")
    pad: Annotated[tuple[int, ...], Array(U32, 15)] = (0,) * 15


class ReinjectControl(Structure, c_name="kvm_reinject_control"):
    """Whether lost ticks of the i8254 are injected later."""

    pit_reinject: u8 = 0
    reserved: Annotated[bytes, Array(U8, 31)] = bytes(31)


class Interrupt(Structure, c_name="kvm_interrupt"):
    """An external interrupt for a vCPU without an irqchip in the kernel."""

    irq: u32 = 0


class TprAccessCtl(Structure, c_name="kvm_tpr_access_ctl"):
    """Whether accesses to the task-priority register exit."""

    enabled: u32 = 0
    flags: u32 = 0
    reserved: Annotated[tuple[int, ...], Array(U32, 8)] = (0,) * 8


class VapicAddr(Structure, c_name="kvm_vapic_addr"):
    """Where the virtual APIC page is."""

    vapic_addr: u64 = field(default=0, doc="guest physical address")


class HypervEventfd(Structure, c_name="kvm_hyperv_eventfd"):
    """An eventfd for a Hyper-V connection."""

    conn_id: u32 = 0
    fd: s32 = 0
    flags: u32 = field(default=0, doc="KVM_HYPERV_EVENTFD_DEASSIGN, 1")
    padding: Annotated[tuple[int, ...], Array(U32, 3)] = (0,) * 3


class MsrFilterRange(Structure, c_name="kvm_msr_filter_range", padded=True):
    """A range of MSRs and which of them the guest may touch."""

    flags: u32 = field(default=0, doc="bit 0 reads, bit 1 writes")
    nmsrs: u32 = 0
    base: u32 = 0
    bitmap: u64 = field(default=0, doc="-> one bit per MSR, 1 allows")


class MsrFilter(Structure, c_name="kvm_msr_filter", padded=True):
    """Which MSRs the guest may touch."""

    flags: u32 = field(default=0, doc="bit 0: deny what no range names")
    ranges: Annotated[tuple[MsrFilterRange, ...], Array(MsrFilterRange, 16)] = (MsrFilterRange(),) * 16


class PmuEventFilter(Structure, c_name="kvm_pmu_event_filter"):
    """The head of a list of PMU events that are allowed or denied; nevents u64 follow."""

    action: u32 = field(default=0, doc="0 allow, 1 deny")
    nevents: u32 = 0
    fixed_counter_bitmap: u32 = 0
    flags: u32 = field(default=0, doc="bit 0: masked events")
    pad: Annotated[tuple[int, ...], Array(U32, 4)] = (0,) * 4
    events: Annotated[tuple[int, ...], Array(U64, 0)] = ()


class XenHvmConfig(Structure, c_name="kvm_xen_hvm_config"):
    """How Xen guests are served."""

    flags: u32 = field(default=0, doc="KVM_XEN_HVM_CONFIG_*")
    msr: u32 = 0
    blob_addr_32: u64 = 0
    blob_addr_64: u64 = 0
    blob_size_32: u8 = 0
    blob_size_64: u8 = 0
    pad2: Annotated[bytes, Array(U8, 30)] = bytes(30)


class XenEvtchn(Structure, c_name=""):
    """The event channel of kvm_xen_hvm_attr; `deliver` is a port {port, vcpu, priority} or an eventfd {port, fd}."""

    send_port: u32 = 0
    type: u32 = 0
    flags: u32 = field(default=0, doc="KVM_XEN_EVTCHN_*")
    deliver: Annotated[bytes, UnionOf(16, (("padding", Array(U32, 4)),), 4)] = bytes(16)


class XenRunstate(Structure, c_name=""):
    """The runstate of kvm_xen_vcpu_attr."""

    state: u64 = 0
    state_entry_time: u64 = 0
    time_running: u64 = 0
    time_runnable: u64 = 0
    time_blocked: u64 = 0
    time_offline: u64 = 0


class XenTimer(Structure, c_name=""):
    """The timer of kvm_xen_vcpu_attr."""

    port: u32 = 0
    priority: u32 = 0
    expires_ns: u64 = 0


_XEN_HVM = UnionOf(64, (("evtchn", XenEvtchn), ("pad", Array(U64, 8))))
_XEN_VCPU = UnionOf(64, (("runstate", XenRunstate), ("timer", XenTimer), ("pad", Array(U64, 8))))


class XenHvmAttr(Structure, c_name="kvm_xen_hvm_attr"):
    """One attribute of a Xen guest."""

    type: u16 = field(default=0, doc="KVM_XEN_ATTR_TYPE_*")
    pad: Annotated[tuple[int, ...], Array(U16, 3)] = (0,) * 3
    u: Annotated[bytes, _XEN_HVM] = bytes(64)


class XenVcpuAttr(Structure, c_name="kvm_xen_vcpu_attr"):
    """One attribute of a Xen guest's vCPU."""

    type: u16 = field(default=0, doc="KVM_XEN_VCPU_ATTR_TYPE_*")
    pad: Annotated[tuple[int, ...], Array(U16, 3)] = (0,) * 3
    u: Annotated[bytes, _XEN_VCPU] = bytes(64)
