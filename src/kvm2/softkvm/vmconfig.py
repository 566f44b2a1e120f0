"""What creation decided for a VM, and what a VM in the negotiation phase was asked for so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvm2.abi import vm2
from kvm2.abi.findings import NO_ATTR

if TYPE_CHECKING:
    from kvm2.softkvm.limits import Limits

CAPABILITIES, PHYSADDR, MACHINE = 1, 2, 6
SVE_VLS, GRANULE, MAX_VCPUS = 7, 8, 9
NO_SET = (0,) * 8


@dataclass(frozen=True)
class VmConfig:
    """What creation fixed. `ipa_bits` (0 where the host is not arm64) and `page_shift` (stage-2 granule) are log2.

    `sve_vls` is the VM's set of vector lengths (8 words, bit vq-1) or None where the VM has none of its own; ids of
    vCPUs are below `max_vcpu_id`. `sve_allowed`: whether KVM_ARM_VCPU_INIT may name the SVE feature.
    """

    ipa_bits: int
    page_shift: int
    machine_type: int = 0
    needs_set_sve_vls: bool = False
    parange_follows_ipa: bool = False
    sve_vls: tuple[int, ...] | None = None
    max_vcpus: int = 0
    max_vcpu_id: int = 0
    made_by_vm2: bool = False
    sve_allowed: bool = False
    arch: str = "arm64"

    def values(self, kind: int) -> tuple[int, ...]:
        """The fields after the header of the attribute that has this VM's value, arrays flattened."""
        if kind == CAPABILITIES:
            word = vm2.KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS * self.needs_set_sve_vls
            return (word | vm2.KVM_CREATE_VM_ARM64_PARANGE_FOLLOWS_IPA * self.parange_follows_ipa,)
        if kind == SVE_VLS:
            return self.sve_vls or NO_SET
        one = {PHYSADDR: self.ipa_bits, MACHINE: self.machine_type, GRANULE: self.page_shift}
        return {PHYSADDR: (one[PHYSADDR],), MACHINE: (one[MACHINE],), GRANULE: (one[GRANULE], 0)}.get(
            kind, (self.max_vcpus, 0)
        )


class Wish(NamedTuple):
    """A value that was asked for: the attribute's fields after the header; `position` in the list it came with.

    `skip`: SKIP_UNSUPPORTED, so the default applies where it cannot be had. `fixed`: it came in the fixed structure.
    """

    values: tuple[int, ...]
    position: int = NO_ATTR
    skip: bool = False
    fixed: bool = False


def unplaced(wishes: dict[int, Wish]) -> dict[int, Wish]:
    """Wishes of an earlier list: in the next one they have no position."""
    return {kind: wish._replace(position=NO_ATTR) for kind, wish in wishes.items()}


def config_of(limits: Limits, wishes: dict[int, Wish]) -> VmConfig:
    """The configuration that wishes ask for, defaults for the rest. Nothing is checked here."""
    word = wishes[CAPABILITIES].values[0] if CAPABILITIES in wishes else 0
    lengths = wishes[SVE_VLS].values if SVE_VLS in wishes else None
    bits = wishes[PHYSADDR].values[0] if PHYSADDR in wishes else 0
    shift = wishes[GRANULE].values[0] if GRANULE in wishes else 0
    vcpus = wishes[MAX_VCPUS].values[0] if MAX_VCPUS in wishes else 0
    needs = bool(word & vm2.KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS)
    return VmConfig(
        (bits or vm2.ARM64_DEFAULT_IPA_BITS) if limits.is_arm64 else 0,
        shift or limits.page_shift,
        wishes[MACHINE].values[0] if MACHINE in wishes else 0,
        needs,
        bool(word & vm2.KVM_CREATE_VM_ARM64_PARANGE_FOLLOWS_IPA),
        lengths,
        vcpus or limits.max_vcpus,
        vcpus or limits.max_vcpu_id,
        True,
        needs or lengths is not None,
        limits.arch,
    )


class Configuring:
    """A VM between NEGOTIATE and KVM_VM2_COMMIT: the values so far. Its owner holds the VM's lock around every use."""

    def __init__(self, limits: Limits, wishes: dict[int, Wish]) -> None:
        self.limits = limits
        self.wishes = unplaced(wishes)
        self.committed: VmConfig | None = None

    @property
    def config(self) -> VmConfig:
        """The VM as configured so far, for GET_ATTR and CHECK_EXTENSION. It may be one that COMMIT refuses."""
        return self.committed or config_of(self.limits, self.wishes)
