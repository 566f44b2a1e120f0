"""What a described host takes of each creation attribute: worked out once per host, then only looked up.

>>> from kvm2.softkvm import profile
>>> m1 = limits_of(profile.load("apple-m1"))
>>> m1.ipa_limit(None), m1.capabilities, sorted(m1.plans)
(36, 2, [1, 2, 3, 4, 5, 6, 7, 8, 9])
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from kvm2.abi import vm2
from kvm2.abi.attrs import Plan, plans_for
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from kvm2.softkvm.profile import Profile

MIN_IPA_BITS, DEFAULT_IPA_BITS = 32, vm2.ARM64_DEFAULT_IPA_BITS
UNCAPPED = 48  # bits that every granule reaches without LPA2
GRANULE_NAMES = {12: "4K", 14: "16K", 16: "64K"}


class Limits(NamedTuple):
    """A host's limits. Sizes in bits, granules as shifts; `sve_sets` are the sets of vector lengths that can be had,
    smallest first, as the first word of a VLS register (bit vq-1)."""

    profile: Profile
    arch: str
    plans: dict[int, Plan]
    page_shift: int
    granules: tuple[int, ...]
    ipa_limits: dict[int, int]
    one_size: str  # why every VM gets the limit; "" where it can choose
    capabilities: int
    sve_sets: tuple[int, ...]
    machine_types: int  # enumeration: bit n = value n; s390: the bits that may be set
    max_vcpus: int
    max_vcpu_id: int
    offers: int

    @property
    def is_arm64(self) -> bool:
        """Whether the arm64 attributes exist here."""
        return self.arch == "arm64"

    def ipa_limit(self, granule: int | None) -> int:
        """The largest IPA size with a stage-2 granule; None: the host's page size."""
        return self.ipa_limits.get(granule or self.page_shift, 0)

    def ipa_least(self, granule: int | None) -> int:
        """The smallest IPA size: some hosts give their limit to everyone."""
        return self.ipa_limit(granule) if self.one_size else MIN_IPA_BITS

    def sve_set(self) -> int:
        """The host's whole set of vector lengths, 0 without SVE."""
        return self.sve_sets[-1] if self.sve_sets else 0

    def why_ipa(self, granule: int | None) -> str:
        """What sets the IPA limit, for people."""
        shift = granule or self.page_shift
        if self.one_size:
            return self.one_size
        if self.ipa_limit(granule) < self.profile.pa_bits:
            capped = self.ipa_limit(granule) == UNCAPPED
            return f"{GRANULE_NAMES[shift]} granule" + (" without LPA2" if capped else "")
        return f"PARange {self.profile.parange:#06b}"

    def demand(self, bits: int, *, on_vm: bool = False) -> None:
        """A bare errno, as from a kernel that does not know the ioctl, unless this host offers it: EINVAL on /dev/kvm
        and on arm64's VMs, ENOTTY on the VMs of the other architectures (kvm_arch_vm_ioctl)."""
        if not self.offers & bits:
            error = unknown_on_vm(self.arch) if on_vm else errno.EINVAL
            raise KvmError(error, f"{self.profile.name} has no such call: ask KVM_CAP_CREATE_VM2 first")


def unknown_on_vm(arch: str) -> int:
    """The errno of a request that no VM of this architecture knows (`kvm_arch_vm_ioctl`)."""
    return errno.EINVAL if arch == "arm64" else errno.ENOTTY


def limits_of(profile: Profile) -> Limits:
    """The limits of a host. The same object for the same profile."""
    known = _CACHE.get(id(profile))
    if known is not None and known.profile is profile:
        return known
    if len(_CACHE) >= _CACHE_SIZE:
        _CACHE.clear()
    limits = _CACHE[id(profile)] = _work_out(profile)
    return limits


_CACHE_SIZE = 64
_CACHE: dict[int, Limits] = {}


def _work_out(profile: Profile) -> Limits:
    arm64 = profile.arch == "arm64"
    sets, word = [], 0
    for vq in sorted(profile.sve_vqs):
        word |= 1 << (vq - 1)
        sets.append(word)
    capabilities = vm2.KVM_CREATE_VM_ARM64_PARANGE_FOLLOWS_IPA if arm64 and profile.parange_can_follow else 0
    if sets:
        capabilities |= vm2.KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS
    granules = tuple(sorted(profile.granules)) if arm64 else ()
    return Limits(
        profile=profile,
        arch=profile.arch,
        plans=plans_for(profile.arch, bool(profile.create_vm2 & vm2.KVM_CREATE_VM2_NEGOTIATION)),
        page_shift=profile.page_shift,
        granules=granules,
        ipa_limits={shift: profile.ipa_limit_for(shift) for shift in granules},
        one_size=profile.one_size,
        capabilities=capabilities,
        sve_sets=tuple(sets),
        machine_types=machine_types(profile),
        max_vcpus=profile.max_vcpus,
        max_vcpu_id=profile.max_vcpu_id,
        offers=profile.create_vm2,
    )


def machine_types(profile: Profile) -> int:
    """The host's machine types as a mask: bit n = the value n; on s390 the bits that a value may have.

    Where a host file does not say: powerpc has its default, HV and PR; s390 has UCONTROL; the others the type 0.
    """
    if profile.vm_types:
        return profile.vm_types | (profile.arch != "s390x")
    return {"powerpc": 0b111, "s390x": 0b1}.get(profile.arch, 0b1)
