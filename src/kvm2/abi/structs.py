"""Structures of linux/kvm.h that arm64 and x86-64 share: memory, vCPUs, capabilities, registers, devices.

Interrupts are in `structs_irq`, the architectures' own in `structs_arm64` and `structs_x86*`, kvm_run in `exits`.

>>> OneReg(id=0x6030000000100000, addr=0x1000).SIZE, EnableCap(cap=168, args=(1, 0, 0, 0)).SIZE
(16, 104)
"""

from __future__ import annotations

from typing import Annotated

from kvm2.abi.layout import CHAR, U8, U32, U64, Array, Structure, field, s16, u8, u16, u32, u64

Words4 = Annotated[tuple[int, ...], Array(U64, 4)]
"""Four u64."""


class UserspaceMemoryRegion(Structure, c_name="kvm_userspace_memory_region"):
    """A memory slot: guest physical memory backed by a range of the caller's address space."""

    slot: u32 = field(default=0, doc="bits 15:0 the slot, bits 31:16 the address space (0 on arm64)")
    flags: u32 = field(default=0, doc="KVM_MEM_*")
    guest_phys_addr: u64 = field(default=0, doc="first byte in guest physical space; page aligned")
    memory_size: u64 = field(default=0, doc="bytes; 0 deletes the slot")
    userspace_addr: u64 = field(default=0, doc="first byte in the caller's address space")


class UserspaceMemoryRegion2(Structure, c_name="kvm_userspace_memory_region2"):
    """A memory slot that may also be backed by guest_memfd (KVM_CAP_USER_MEMORY2)."""

    slot: u32 = field(default=0, doc="bits 15:0 the slot, bits 31:16 the address space")
    flags: u32 = field(default=0, doc="KVM_MEM_*")
    guest_phys_addr: u64 = field(default=0, doc="first byte in guest physical space; page aligned")
    memory_size: u64 = field(default=0, doc="bytes; 0 deletes the slot")
    userspace_addr: u64 = field(default=0, doc="first byte in the caller's address space")
    guest_memfd_offset: u64 = field(default=0, doc="first byte in the guest_memfd, with KVM_MEM_GUEST_MEMFD")
    guest_memfd: u32 = field(default=0, doc="the guest_memfd, with KVM_MEM_GUEST_MEMFD")
    pad1: u32 = 0
    pad2: Annotated[tuple[int, ...], Array(U64, 14)] = (0,) * 14


KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_GUEST_MEMFD = 1 << 2


class DirtyLog(Structure, c_name="kvm_dirty_log"):
    """Where KVM_GET_DIRTY_LOG writes a slot's bitmap."""

    slot: u32 = field(default=0, doc="bits 15:0 the slot, bits 31:16 the address space")
    padding1: u32 = 0
    dirty_bitmap: u64 = field(default=0, doc="-> one bit per host page of the slot, rounded up to whole u64")


class ClearDirtyLog(Structure, c_name="kvm_clear_dirty_log"):
    """Which dirty bits KVM_CLEAR_DIRTY_LOG clears."""

    slot: u32 = field(default=0, doc="bits 15:0 the slot, bits 31:16 the address space")
    num_pages: u32 = field(default=0, doc="pages; a multiple of 64, or up to the slot's end")
    first_page: u64 = field(default=0, doc="first page, relative to the slot; a multiple of 64")
    dirty_bitmap: u64 = field(default=0, doc="-> bitmap; bit 0 is first_page")


class DirtyGfn(Structure, c_name="kvm_dirty_gfn"):
    """One entry of a dirty ring (KVM_CAP_DIRTY_LOG_RING)."""

    flags: u32 = field(default=0, doc="KVM_DIRTY_GFN_F_*")
    slot: u32 = field(default=0, doc="bits 15:0 the slot, bits 31:16 the address space")
    offset: u64 = field(default=0, doc="page, relative to the slot")


KVM_DIRTY_GFN_F_DIRTY = 1 << 0
KVM_DIRTY_GFN_F_RESET = 1 << 1
KVM_DIRTY_GFN_F_MASK = 3
KVM_DIRTY_LOG_PAGE_OFFSET = 64
KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1


class MemoryAttributes(Structure, c_name="kvm_memory_attributes"):
    """Attributes (private or shared) of a range of guest physical memory."""

    address: u64 = field(default=0, doc="first byte in guest physical space")
    size: u64 = field(default=0, doc="bytes")
    attributes: u64 = field(default=0, doc="KVM_MEMORY_ATTRIBUTE_*")
    flags: u64 = field(default=0, doc="must be 0")


KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3


class CreateGuestMemfd(Structure, c_name="kvm_create_guest_memfd"):
    """A file of guest-only memory."""

    size: u64 = field(default=0, doc="bytes; page aligned")
    flags: u64 = field(default=0, doc="must be 0")
    reserved: Annotated[tuple[int, ...], Array(U64, 6)] = (0,) * 6


class PreFaultMemory(Structure, c_name="kvm_pre_fault_memory"):
    """A range to be mapped before the guest touches it."""

    gpa: u64 = field(default=0, doc="in: first byte; out: first byte not done")
    size: u64 = field(default=0, doc="in: bytes; out: bytes left")
    flags: u64 = field(default=0, doc="must be 0")
    padding: Annotated[tuple[int, ...], Array(U64, 5)] = (0,) * 5


class CoalescedMmioZone(Structure, c_name="kvm_coalesced_mmio_zone"):
    """A range whose writes are collected in the coalesced ring."""

    addr: u64 = field(default=0, doc="first byte")
    size: u32 = field(default=0, doc="bytes")
    pio: u32 = field(default=0, doc="1: port I/O (x86)")


class CoalescedMmio(Structure, c_name="kvm_coalesced_mmio"):
    """One write in the coalesced ring."""

    phys_addr: u64 = 0
    len: u32 = 0
    pio: u32 = 0
    data: Annotated[bytes, Array(U8, 8)] = bytes(8)


class CoalescedMmioRing(Structure, c_name="kvm_coalesced_mmio_ring"):
    """The head of the coalesced ring, at page KVM_COALESCED_MMIO_PAGE_OFFSET of the vCPU's mapping."""

    first: u32 = 0
    last: u32 = 0


class EnableCap(Structure, c_name="kvm_enable_cap"):
    """A capability to be switched on."""

    cap: u32 = field(default=0, doc="KVM_CAP_*")
    flags: u32 = field(default=0, doc="must be 0")
    args: Words4 = field(doc="what the capability takes", default=(0, 0, 0, 0))
    pad: Annotated[bytes, Array(U8, 64)] = bytes(64)


class MpState(Structure, c_name="kvm_mp_state"):
    """Whether a vCPU runs."""

    mp_state: u32 = field(default=0, doc="KVM_MP_STATE_*")


KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3
KVM_MP_STATE_SIPI_RECEIVED = 4
KVM_MP_STATE_STOPPED = 5
KVM_MP_STATE_CHECK_STOP = 6
KVM_MP_STATE_OPERATING = 7
KVM_MP_STATE_LOAD = 8
KVM_MP_STATE_AP_RESET_HOLD = 9
KVM_MP_STATE_SUSPENDED = 10


class SignalMask(Structure, c_name="kvm_signal_mask"):
    """The head of a signal mask for the time in KVM_RUN; the mask follows at once."""

    len: u32 = field(default=0, doc="bytes of the mask that follows; must be sizeof(sigset_t) of the kernel, 8")


class RegList(Structure, c_name="kvm_reg_list"):
    """The head of a list of register ids; n u64 follow."""

    n: u64 = field(default=0, doc="in: room in ids; out: how many there are (E2BIG where there is less room)")


class OneReg(Structure, c_name="kvm_one_reg"):
    """One register."""

    id: u64 = field(default=0, doc="KVM_REG_*; its size is in bits 55:52")
    addr: u64 = field(default=0, doc="-> the value")


class Translation(Structure, c_name="kvm_translation"):
    """A guest virtual address and what it means."""

    linear_address: u64 = field(default=0, doc="in")
    physical_address: u64 = field(default=0, doc="out")
    valid: u8 = 0
    writeable: u8 = 0
    usermode: u8 = 0
    pad: Annotated[bytes, Array(U8, 5)] = bytes(5)


class CreateDevice(Structure, c_name="kvm_create_device"):
    """A device inside the kernel."""

    type: u32 = field(default=0, doc="in: KVM_DEV_TYPE_*")
    fd: u32 = field(default=0, doc="out: the device's fd")
    flags: u32 = field(default=0, doc="in: 0 or KVM_CREATE_DEVICE_TEST (only ask)")


KVM_CREATE_DEVICE_TEST = 1
KVM_DEV_TYPE_VFIO = 4
KVM_DEV_TYPE_ARM_VGIC_V2 = 5
KVM_DEV_TYPE_ARM_VGIC_V3 = 7
KVM_DEV_TYPE_ARM_VGIC_ITS = 8
KVM_DEV_TYPE_ARM_PV_TIME = 10


class DeviceAttr(Structure, c_name="kvm_device_attr"):
    """One attribute of a device, a VM or a vCPU."""

    flags: u32 = field(default=0, doc="no flag is defined")
    group: u32 = field(default=0, doc="defined by the device")
    attr: u64 = field(default=0, doc="defined by the group")
    addr: u64 = field(default=0, doc="-> the value")


class ClockData(Structure, c_name="kvm_clock_data"):
    """The paravirtual clock of an x86 VM."""

    clock: u64 = field(default=0, doc="nanoseconds")
    flags: u32 = field(default=0, doc="KVM_CLOCK_*")
    pad0: u32 = 0
    realtime: u64 = 0
    host_tsc: u64 = 0
    pad: Annotated[tuple[int, ...], Array(U32, 4)] = (0,) * 4


class EncRegion(Structure, c_name="kvm_enc_region"):
    """A range of the caller's memory that an encrypted guest uses."""

    addr: u64 = 0
    size: u64 = field(default=0, doc="bytes")


class StatsHeader(Structure, c_name="kvm_stats_header"):
    """The head of the file behind a statistics fd; offsets are from its start."""

    flags: u32 = 0
    name_size: u32 = field(default=0, doc="bytes of each name, with its NUL")
    num_desc: u32 = field(default=0, doc="how many statistics there are")
    id_offset: u32 = 0
    desc_offset: u32 = 0
    data_offset: u32 = 0


class StatsDesc(Structure, c_name="kvm_stats_desc"):
    """One statistic; its name follows, name_size bytes."""

    flags: u32 = field(default=0, doc="type 3:0, unit 7:4, base 11:8")
    exponent: s16 = field(default=0, doc="of the base")
    size: u16 = field(default=0, doc="u64 values")
    offset: u32 = field(default=0, doc="of the values from data_offset")
    bucket_size: u32 = field(default=0, doc="of a linear histogram")
    name: Annotated[bytes, Array(CHAR, 0)] = b""
