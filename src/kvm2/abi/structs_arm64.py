"""Structures of arm64's asm/kvm.h, and the constants that go with them.

>>> VcpuInit(target=KVM_ARM_TARGET_GENERIC_V8, features=(1 << KVM_ARM_VCPU_PSCI_0_2, 0, 0, 0, 0, 0, 0)).pack()[:8].hex()
'0500000004000000'
>>> Regs.SIZE, Regs.LAYOUT["fp_regs"].offset
(864, 336)
"""

from __future__ import annotations

from typing import Annotated, Final

from kvm2.abi.layout import U8, U32, U64, U128, Array, Structure, field, u8, u16, u32, u64

KVM_ARM_TARGET_AEM_V8: Final = 0
KVM_ARM_TARGET_FOUNDATION_V8: Final = 1
KVM_ARM_TARGET_CORTEX_A57: Final = 2
KVM_ARM_TARGET_XGENE_POTENZA: Final = 3
KVM_ARM_TARGET_CORTEX_A53: Final = 4
KVM_ARM_TARGET_GENERIC_V8: Final = 5
KVM_ARM_NUM_TARGETS: Final = 6

KVM_ARM_VCPU_POWER_OFF: Final = 0
KVM_ARM_VCPU_EL1_32BIT: Final = 1
KVM_ARM_VCPU_PSCI_0_2: Final = 2
KVM_ARM_VCPU_PMU_V3: Final = 3
KVM_ARM_VCPU_SVE: Final = 4
KVM_ARM_VCPU_PTRAUTH_ADDRESS: Final = 5
KVM_ARM_VCPU_PTRAUTH_GENERIC: Final = 6
KVM_ARM_VCPU_HAS_EL2: Final = 7

KVM_SPSR_EL1: Final = 0
KVM_SPSR_ABT: Final = 1
KVM_SPSR_UND: Final = 2
KVM_SPSR_IRQ: Final = 3
KVM_SPSR_FIQ: Final = 4
KVM_NR_SPSR: Final = 5

KVM_ARM_MAX_DBG_REGS: Final = 16
KVM_VM_TYPE_ARM_IPA_SIZE_MASK: Final = 0xFF


class UserPtRegs(Structure, c_name="user_pt_regs"):
    """The general registers of asm/ptrace.h."""

    regs: Annotated[tuple[int, ...], Array(U64, 31)] = field(doc="X0 to X30", default=(0,) * 31)
    sp: u64 = field(default=0, doc="SP_EL0")
    pc: u64 = 0
    pstate: u64 = 0


class UserFpsimdState(Structure, c_name="user_fpsimd_state"):
    """The SIMD registers of asm/ptrace.h."""

    vregs: Annotated[tuple[bytes, ...], Array(U128, 32)] = field(doc="V0 to V31", default=(bytes(16),) * 32)
    fpsr: u32 = 0
    fpcr: u32 = 0
    reserved: Annotated[tuple[int, ...], Array(U32, 2)] = field(c_name="__reserved", default=(0, 0))


class Regs(Structure, c_name="kvm_regs", padded=True):
    """The core registers. No ioctl takes it on arm64: its offsets / 4 are the ids of the core registers."""

    regs: UserPtRegs = field(default=UserPtRegs())
    sp_el1: u64 = 0
    elr_el1: u64 = 0
    spsr: Annotated[tuple[int, ...], Array(U64, KVM_NR_SPSR)] = field(doc="EL1, ABT, UND, IRQ, FIQ", default=(0,) * 5)
    fp_regs: UserFpsimdState = field(default=UserFpsimdState())


class VcpuInit(Structure, c_name="kvm_vcpu_init"):
    """What a vCPU is to be."""

    target: u32 = field(default=0, doc="KVM_ARM_TARGET_*")
    features: Annotated[tuple[int, ...], Array(U32, 7)] = field(doc="bit map of KVM_ARM_VCPU_*", default=(0,) * 7)


class ArmDeviceAddr(Structure, c_name="kvm_arm_device_addr"):
    """The guest physical address of a device of the old interface."""

    id: u64 = field(default=0, doc="device 31:16 (KVM_ARM_DEVICE_VGIC_V2), address type 15:0")
    addr: u64 = field(default=0, doc="guest physical address")


KVM_ARM_DEVICE_TYPE_SHIFT: Final = 0
KVM_ARM_DEVICE_TYPE_MASK: Final = 0xFFFF
KVM_ARM_DEVICE_ID_SHIFT: Final = 16
KVM_ARM_DEVICE_ID_MASK: Final = 0xFFFF0000
KVM_ARM_DEVICE_VGIC_V2: Final = 0


class GuestDebugArch(Structure, c_name="kvm_guest_debug_arch"):
    """Hardware break- and watchpoints."""

    dbg_bcr: Annotated[tuple[int, ...], Array(U64, 16)] = (0,) * 16
    dbg_bvr: Annotated[tuple[int, ...], Array(U64, 16)] = (0,) * 16
    dbg_wcr: Annotated[tuple[int, ...], Array(U64, 16)] = (0,) * 16
    dbg_wvr: Annotated[tuple[int, ...], Array(U64, 16)] = (0,) * 16


class GuestDebug(Structure, c_name="kvm_guest_debug"):
    """How userspace debugs the guest."""

    control: u32 = field(default=0, doc="KVM_GUESTDBG_*")
    pad: u32 = 0
    arch: GuestDebugArch = field(default=GuestDebugArch())


KVM_GUESTDBG_ENABLE: Final = 1 << 0
KVM_GUESTDBG_SINGLESTEP: Final = 1 << 1
KVM_GUESTDBG_USE_SW_BP: Final = 1 << 16
KVM_GUESTDBG_USE_HW: Final = 1 << 17


class DebugExitArch(Structure, c_name="kvm_debug_exit_arch"):
    """Why the guest stopped for its debugger."""

    hsr: u32 = field(default=0, doc="ESR_EL2[31:0]")
    hsr_high: u32 = field(default=0, doc="ESR_EL2[61:32], with KVM_DEBUG_ARCH_HSR_HIGH_VALID in kvm_run.flags")
    far: u64 = field(default=0, doc="the watched address")


KVM_DEBUG_ARCH_HSR_HIGH_VALID: Final = 1 << 0


class SyncRegs(Structure, c_name="kvm_sync_regs"):
    """kvm_run.s.regs: levels of devices whose interrupt controller is in userspace."""

    device_irq_level: u64 = field(default=0, doc="KVM_ARM_DEV_*")


KVM_ARM_DEV_EL1_VTIMER: Final = 1 << 0
KVM_ARM_DEV_EL1_PTIMER: Final = 1 << 1
KVM_ARM_DEV_PMU: Final = 1 << 2


class PmuEventFilter(Structure, c_name="kvm_pmu_event_filter"):
    """A range of PMU events that is allowed or denied (device attribute KVM_ARM_VCPU_PMU_V3_FILTER)."""

    base_event: u16 = 0
    nevents: u16 = 0
    action: u8 = field(default=0, doc="KVM_PMU_EVENT_ALLOW 0, KVM_PMU_EVENT_DENY 1")
    pad: Annotated[bytes, Array(U8, 3)] = bytes(3)


class VcpuEventsException(Structure, c_name=""):
    """The pending exceptions of kvm_vcpu_events."""

    serror_pending: u8 = field(default=0, doc="an SError is pending")
    serror_has_esr: u8 = field(default=0, doc="serror_esr counts (KVM_CAP_ARM_INJECT_SERROR_ESR)")
    ext_dabt_pending: u8 = field(default=0, doc="in: inject an external data abort (KVM_CAP_ARM_INJECT_EXT_DABT)")
    pad: Annotated[bytes, Array(U8, 5)] = bytes(5)
    serror_esr: u64 = field(default=0, doc="the syndrome's ISS, 24 bits")


class VcpuEvents(Structure, c_name="kvm_vcpu_events"):
    """Exceptions that are pending in a vCPU."""

    exception: VcpuEventsException = field(default=VcpuEventsException())
    reserved: Annotated[tuple[int, ...], Array(U32, 12)] = (0,) * 12


class ArmCopyMteTags(Structure, c_name="kvm_arm_copy_mte_tags"):
    """Memory tags to be copied; one byte per 16-byte granule."""

    guest_ipa: u64 = field(default=0, doc="page aligned")
    length: u64 = field(default=0, doc="bytes of guest memory; a multiple of the page")
    addr: u64 = field(default=0, doc="-> length / 16 bytes of tags")
    flags: u64 = field(default=0, doc="KVM_ARM_TAGS_TO_GUEST 0, KVM_ARM_TAGS_FROM_GUEST 1")
    reserved: Annotated[tuple[int, ...], Array(U64, 2)] = (0, 0)


KVM_ARM_TAGS_TO_GUEST: Final = 0
KVM_ARM_TAGS_FROM_GUEST: Final = 1


class ArmCounterOffset(Structure, c_name="kvm_arm_counter_offset"):
    """The offset of both counters of a VM."""

    counter_offset: u64 = field(default=0, doc="subtracted from the host's counter")
    reserved: u64 = field(default=0, doc="must be 0")


class RegMaskRange(Structure, c_name="reg_mask_range"):
    """Where KVM_ARM_GET_REG_WRITABLE_MASKS writes its masks."""

    addr: u64 = field(default=0, doc="-> KVM_ARM_FEATURE_ID_RANGE_SIZE u64")
    range: u32 = field(default=0, doc="KVM_ARM_FEATURE_ID_RANGE, 0")
    reserved: Annotated[tuple[int, ...], Array(U32, 13)] = (0,) * 13


KVM_ARM_FEATURE_ID_RANGE: Final = 0
KVM_ARM_FEATURE_ID_RANGE_SIZE: Final = 3 * 8 * 8


class SmcccFilter(Structure, c_name="kvm_smccc_filter"):
    """What happens to a range of SMCCC calls (device attribute KVM_ARM_VM_SMCCC_FILTER of the VM)."""

    base: u32 = field(default=0, doc="first function id")
    nr_functions: u32 = 0
    action: u8 = field(default=0, doc="KVM_SMCCC_FILTER_*")
    pad: Annotated[bytes, Array(U8, 15)] = bytes(15)


KVM_SMCCC_FILTER_HANDLE: Final = 0
KVM_SMCCC_FILTER_DENY: Final = 1
KVM_SMCCC_FILTER_FWD_TO_USER: Final = 2
