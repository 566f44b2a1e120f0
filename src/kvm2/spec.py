"""What a VM is asked to be, in a user's terms, and the attributes that say it to KVM_CREATE_VM2.

The policies `auto` and `max` ask the host (KVM_DESCRIBE_VM2) or the memory map; nothing is ever rounded or cut off:
a size that does not fit is left for the host to refuse, with its finding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kvm2.abi.vm2 import (
    ARM64_DEFAULT_IPA_BITS,
    KVM_ARM_SELECT_IPA,
    KVM_ARM_SVE_CAPABLE,
    KVM_CREATE_VM_ARM64_PARANGE_FOLLOWS_IPA,
    KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS,
    ArchCapabilities,
    Arm64Granule,
    Arm64PhysaddrSize,
    Arm64SveVls,
    CreateVm2Fixed,
    CreateVm2FixedArm64,
    MachineType,
    MaxVcpus,
    Negotiate,
)
from kvm2.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvm2.abi.layout import Structure
    from kvm2.abi.vm2 import Vm2AttrInfo

# The smallest IPA size that KVM gives (ARM64_MIN_PARANGE_BITS), where a host does not describe its own.
MIN_IPA_BITS = 32
QUADWORD_BITS = 128
LARGEST_VQ = 16

IpaBits = int | Literal["auto", "max"] | None
Sve = int | Literal["vcpu"] | None


@dataclass(frozen=True)
class MemoryRange:
    """`size` bytes of guest memory from guest physical address `base`."""

    base: int
    size: int

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.base + self.size

    def __str__(self) -> str:
        return f"{self.size:#x}@{self.base:#x}"


@dataclass(frozen=True)
class VmSpec:
    """A VM, as KVM_CREATE_VM2 can be asked for it. None means: say nothing, take the host's default.

    - `physaddr_bits`: bits of the IPA space, "auto" (the smallest that holds `memory`), "max" (the host's limit).
    - `sve`: the longest vector in bits (attribute 7: the host's lengths up to it), or "vcpu" (attribute 1 bit 0: each
      vCPU must set its lengths).
    - `page_shift`: 12, 14 or 16, the stage-2 granule. `max_vcpus`, `machine_type`: attributes 9 and 6.
    - `parange_follows_ipa`: attribute 1 bit 1. `negotiate`: leave the VM in the configuring state.

    >>> [type(attr).__name__ for attr in VmSpec(physaddr_bits=36, max_vcpus=4).attributes({})]
    ['Arm64PhysaddrSize', 'MaxVcpus']
    """

    physaddr_bits: IpaBits = None
    sve: Sve = None
    page_shift: int | None = None
    max_vcpus: int | None = None
    machine_type: int | None = None
    parange_follows_ipa: bool = False
    negotiate: bool = False
    memory: tuple[MemoryRange, ...] = ()

    def __post_init__(self) -> None:
        _check_word("page_shift", self.page_shift, 32)
        _check_word("max_vcpus", self.max_vcpus, 32)
        _check_word("machine_type", self.machine_type, 64)
        for name in ("parange_follows_ipa", "negotiate"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} = {getattr(self, name)!r}: allowed are True and False")
        if not isinstance(self.memory, list | tuple) or not all(isinstance(one, MemoryRange) for one in self.memory):
            raise UsageError(f"memory = {self.memory!r}: allowed are MemoryRange(base, size), any number in a tuple")
        if self.physaddr_bits not in ("auto", "max"):
            _check_word("physaddr_bits", self.physaddr_bits, 32, "or 'auto' or 'max'")
        if self.sve != "vcpu" and self.sve is not None:
            largest = QUADWORD_BITS * LARGEST_VQ
            if not _is_number(self.sve) or self.sve % QUADWORD_BITS or not QUADWORD_BITS <= self.sve <= largest:
                raise UsageError(
                    f"sve = {self.sve!r}: allowed are multiples of {QUADWORD_BITS} bits up to {largest}, or 'vcpu'"
                )

    @property
    def needs_description(self) -> bool:
        """Whether `attributes` looks at what the host says of itself."""
        return self.physaddr_bits in ("auto", "max") or _is_number(self.sve)

    def attributes(self, described: Mapping[int, Vm2AttrInfo]) -> list[Structure]:
        """The attribute list. `described` is `Kvm.describe()`; it is only looked at where `needs_description`."""
        found: list[Structure] = []
        words = KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS * (self.sve == "vcpu")
        words |= KVM_CREATE_VM_ARM64_PARANGE_FOLLOWS_IPA * self.parange_follows_ipa
        if words:
            found.append(ArchCapabilities(capabilities=(words,)))
        if self.physaddr_bits is not None:
            found.append(Arm64PhysaddrSize(physaddr_bits=self.resolve_ipa_bits(described)))
        if isinstance(self.sve, int):
            found.append(Arm64SveVls(vls=(lengths_up_to(self.sve, described),) + (0,) * 7))
        if self.page_shift is not None:
            found.append(Arm64Granule(page_shift=self.page_shift))
        if self.machine_type is not None:
            found.append(MachineType(machine_type=self.machine_type))
        if self.max_vcpus is not None:
            found.append(MaxVcpus(max_vcpus=self.max_vcpus))
        if self.negotiate:
            found.append(Negotiate())
        return found

    def fixed(self, described: Mapping[int, Vm2AttrInfo]) -> CreateVm2Fixed:
        """The same in KVM_CREATE_VM2_FIXED's structure; UsageError names what it has no field for."""
        beyond = [
            name
            for name in ("page_shift", "max_vcpus", "machine_type", "parange_follows_ipa", "negotiate")
            if getattr(self, name) not in (None, False)
        ]
        if beyond:
            raise UsageError(
                f"struct kvm_create_vm2_fixed has no field for {', '.join(beyond)}: "
                "it carries the IPA size and SVE; use the attribute list (without fixed)"
            )
        capabilities = ipa_size = 0
        if self.physaddr_bits is not None:
            capabilities |= KVM_ARM_SELECT_IPA
            ipa_size = self.resolve_ipa_bits(described)
            _check_word("physaddr_bits", ipa_size, 8, "in the one byte of the fixed structure")
        if self.sve is not None:
            capabilities |= KVM_ARM_SVE_CAPABLE
        vlen = self.sve if isinstance(self.sve, int) else 0
        words = CreateVm2FixedArm64(capabilities=capabilities, sve_vlen=vlen, ipa_size=ipa_size).pack()
        return CreateVm2Fixed(version=0, words=words.ljust(120, b"\0"))

    def resolve_ipa_bits(self, described: Mapping[int, Vm2AttrInfo]) -> int:
        """The number that `physaddr_bits` stands for on a described host; 40 where nothing is asked for."""
        if self.physaddr_bits is None:
            return ARM64_DEFAULT_IPA_BITS
        if isinstance(self.physaddr_bits, int):
            return self.physaddr_bits
        size = described.get(2)
        if size is None:
            raise UsageError(
                f"physaddr_bits = '{self.physaddr_bits}': on this host a VM's size cannot be chosen "
                "(KVM_DESCRIBE_VM2 has no ARM64_PHYSADDR_SIZE); leave physaddr_bits out"
            )
        if self.physaddr_bits == "max":
            return size.max
        if not self.memory:
            raise UsageError("physaddr_bits = 'auto' needs the memory map: give memory, a number, or 'max'")
        return max(smallest_ipa_bits(self.memory), size.min)


def smallest_ipa_bits(memory: Iterable[MemoryRange]) -> int:
    """The bits that the highest address of a memory map needs.

    >>> smallest_ipa_bits([MemoryRange(1 << 30, 64 << 20), MemoryRange(1 << 40, 1 << 20)])
    41
    """
    return max((piece.end - 1).bit_length() for piece in memory)


def lengths_up_to(bits: int, described: Mapping[int, Vm2AttrInfo]) -> int:
    """The VLS word with the host's vector lengths up to `bits`, and `bits` itself, whether the host has it or not.

    Without it the host's refusal would become a silently smaller maximum.
    """
    host = described[7].mask if 7 in described else 0
    top = 1 << (bits // QUADWORD_BITS - 1)
    return host & (top - 1) | top


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_word(name: str, value: object, bits: int, also: str = "") -> None:
    if value is not None and (not _is_number(value) or not 0 <= int(str(value)) < 1 << bits):
        raise UsageError(f"{name} = {value!r}: allowed are whole numbers from 0 to {(1 << bits) - 1} {also}".rstrip())
