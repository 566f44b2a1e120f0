"""What a vCPU with every feature of the host shows: ID registers, SVE lengths, firmware, caches, writable masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm2.abi import caps as cap
from kvm2.abi import onereg, sysregs
from kvm2.abi.structs_arm64 import (
    KVM_ARM_VCPU_HAS_EL2,
    KVM_ARM_VCPU_PMU_V3,
    KVM_ARM_VCPU_PSCI_0_2,
    KVM_ARM_VCPU_PTRAUTH_ADDRESS,
    KVM_ARM_VCPU_PTRAUTH_GENERIC,
    KVM_ARM_VCPU_SVE,
)
from kvm2.errors import KvmError, errno_name
from kvm2.lab.probe_seen import errno_of
from kvm2.softkvm.features import SMCCC_SERVICES
from kvm2.softkvm.profile_registers import is_described
from kvm2.softkvm.psci import PSCI_1_1
from kvm2.softkvm.registers_fw import BITMAPS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvm2.lab.probe_seen import Scratch, Seen
    from kvm2.vcpu import Vcpu
    from kvm2.vm import Vm

FIRMWARE = {
    1: onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1,
    2: onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2,
    3: onereg.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_3,
}
_PTRAUTH = (KVM_ARM_VCPU_PTRAUTH_ADDRESS, KVM_ARM_VCPU_PTRAUTH_GENERIC)
# What a vCPU asks for, if the capability says so; pointer authentication is asked for as a pair.
_OFFERS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((KVM_ARM_VCPU_PMU_V3,), (cap.KVM_CAP_ARM_PMU_V3,)),
    ((KVM_ARM_VCPU_SVE,), (cap.KVM_CAP_ARM_SVE,)),
    (_PTRAUTH, (cap.KVM_CAP_ARM_PTRAUTH_ADDRESS, cap.KVM_CAP_ARM_PTRAUTH_GENERIC)),
)
# The number of CCSIDR registers that KVM makes up for every host (CSSELR_MAX); fewer are the hardware's.
MADE_UP_CACHES = 14
_CCSIDR_SET = 1 << 13


def features(scratch: Scratch, seen: Seen) -> tuple[int, ...]:
    """Every feature that a 64-bit vCPU can have at once; a feature that is announced and refused is noted."""
    wanted: list[int] = [KVM_ARM_VCPU_PSCI_0_2]
    for bits, offers in _OFFERS:
        if all(seen.cap(number) > 0 for number in offers):
            if _takes(scratch, (*wanted, *bits)):
                wanted += bits
            else:
                seen.notes.append(f"vCPU features {bits} are announced, but KVM_ARM_VCPU_INIT refuses them")
    return tuple(wanted)


def _takes(scratch: Scratch, wanted: Sequence[int]) -> bool:
    with scratch.vm() as vm, vm.create_vcpu() as vcpu:
        return not errno_of(lambda: vcpu.init(wanted))


def look(seen: Seen, scratch: Scratch) -> tuple[int, ...]:
    """Fills in the registers; returns the features of the vCPU that showed them."""
    bits = features(scratch, seen)
    seen.features = sum(1 << bit for bit in bits)
    with scratch.vm() as vm:
        seen.preferred_target = vm.preferred_target().target
        seen.writable_masks = _masks(vm)
        with vm.create_vcpu() as vcpu:
            vcpu.init(bits)
            if KVM_ARM_VCPU_SVE in bits:
                seen.sve_vqs = _lengths(vcpu)
                vcpu.finalize("sve")
            seen.reg_list = vcpu.reg_list()
            seen.registers = _registers(vcpu, seen)
            seen.firmware = _firmware(vcpu, seen)
            seen.ccsidr, seen.habits["hardware-caches"] = _caches(vcpu, seen)
            _services(vcpu, seen)
    if _takes(scratch, (KVM_ARM_VCPU_PSCI_0_2, KVM_ARM_VCPU_HAS_EL2)):
        seen.notes.append(
            "vCPUs with EL2 (HAS_EL2) can be had: no described kernel has them, so they are not described"
        )
    _memory_tagging(scratch, seen, bits)
    return bits


def _lengths(vcpu: Vcpu) -> tuple[int, ...]:
    value = vcpu.get_reg(onereg.KVM_REG_ARM64_SVE_VLS)
    word = int.from_bytes(value, "little") if isinstance(value, bytes) else value
    return tuple(bit + 1 for bit in range(word.bit_length()) if word >> bit & 1)


def _number(vcpu: Vcpu, reg_id: int) -> int:
    value = vcpu.get_reg(reg_id)
    return value if isinstance(value, int) else int.from_bytes(value, "little")


def _registers(vcpu: Vcpu, seen: Seen) -> dict[int, int]:
    """The registers that a host file can state and that are not zero."""
    found: dict[int, int] = {}
    for reg_id in seen.reg_list:
        reg = onereg.parse(reg_id)
        # CNTVCT_EL0 and the like have ids of system registers too, but no host file describes them.
        if reg.kind != "sysreg" or not is_described(reg.index):
            continue
        try:
            value = _number(vcpu, reg_id)
        except KvmError as error:
            seen.notes.append(f"{reg.name} is listed, but reading it is {error.name}")
            continue
        if value:
            found[reg.index] = value
    return found


def _firmware(vcpu: Vcpu, seen: Seen) -> dict[int, int]:
    found = {}
    for number, reg_id in FIRMWARE.items():
        try:
            value = _number(vcpu, reg_id)
        except KvmError as error:
            seen.notes.append(f"firmware register WORKAROUND_{number} cannot be read ({error.name}): described as 0")
            continue
        if value > 3:
            seen.notes.append(f"firmware register WORKAROUND_{number} is {value:#x}, which no host file can say")
            continue
        found[number] = value
    return found


def _services(vcpu: Vcpu, seen: Seen) -> None:
    """The PSCI version and the hypercall services, which every described kernel has alike."""
    expected = {onereg.KVM_REG_ARM_PSCI_VERSION: PSCI_1_1, **dict(zip(BITMAPS, SMCCC_SERVICES, strict=True))}
    for reg_id, value in expected.items():
        try:
            has = _number(vcpu, reg_id)
        except KvmError:
            has = 0
        if has != value:
            seen.notes.append(f"{onereg.parse(reg_id).name} is {has:#x}, described as {value:#x} on every host")


def _caches(vcpu: Vcpu, seen: Seen) -> tuple[dict[int, int], bool]:
    """The hardware's CCSIDR values, and whether that is what the kernel shows: it takes no other value then."""
    listed = {
        onereg.parse(reg_id).index & 0xFF: reg_id for reg_id in seen.reg_list if onereg.parse(reg_id).kind == "demux"
    }
    values = {csselr: _number(vcpu, reg_id) for csselr, reg_id in listed.items()}
    if len(listed) < MADE_UP_CACHES:
        return values, True
    other = values[0] ^ _CCSIDR_SET
    fixed = bool(errno_of(lambda: vcpu.set_reg(listed[0], other)))
    return (values if fixed else {}), fixed


def _masks(vm: Vm) -> dict[int, int]:
    """KVM_ARM_GET_REG_WRITABLE_MASKS; none where the kernel has no such call."""
    found: dict[int, int] = {}
    try:
        words = vm.writable_masks()
    except KvmError:
        return found
    for index, mask in enumerate(words):
        if mask:
            op1 = (0, 1, 3)[index >> 6]
            found[3 << 14 | op1 << 11 | (index >> 3 & 7) << 3 | index & 7] = mask
    return found


def _memory_tagging(scratch: Scratch, seen: Seen, bits: tuple[int, ...]) -> None:
    """ID_AA64PFR1_EL1 of a VM with memory tagging, which has to be enabled before the first vCPU."""
    if seen.cap(cap.KVM_CAP_ARM_MTE) <= 0:
        return
    with scratch.vm() as vm:
        number = errno_of(lambda: vm.enable_cap("ARM_MTE"))
        if number:
            seen.notes.append(f"KVM_CAP_ARM_MTE is announced, but enabling it is {errno_name(number)}")
            return
        with vm.create_vcpu() as vcpu:
            vcpu.init(bits)
            value = _number(vcpu, onereg.sysreg(sysregs.ID_AA64PFR1_EL1))
    if value:
        seen.registers[sysregs.ID_AA64PFR1_EL1] = value
