"""What one host says to the values of a list: each alone, then all together. Pure functions of limits and values.

Alone, a value is refused only where no combination could give it. Together, defaults count too.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from kvm2.abi import vm2
from kvm2.abi.attrs import Found
from kvm2.abi.findings import NO_ATTR, Finding
from kvm2.abi.fixed import CAPABILITIES as FIXED_CAPABILITIES
from kvm2.abi.fixed import IPA_SIZE, SVE_VLEN, fixed_finding
from kvm2.softkvm.limits import DEFAULT_IPA_BITS, GRANULE_NAMES
from kvm2.softkvm.vmconfig import CAPABILITIES, GRANULE, MACHINE, MAX_VCPUS, PHYSADDR, SVE_VLS, Wish

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.softkvm.limits import Limits

AFTER = vm2.KVM_CREATE_VM2_MAX_ATTRS + 1  # the place of cross-checks: after every entry, by type
WORD_BITS = 64
_FIXED_OFFSETS = {CAPABILITIES: FIXED_CAPABILITIES, PHYSADDR: IPA_SIZE, SVE_VLS: SVE_VLEN}
_FOLLOWS = vm2.KVM_CREATE_VM_ARM64_PARANGE_FOLLOWS_IPA
_NEEDS_SET = vm2.KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS


class Refusal(NamedTuple):
    """Why a host cannot give a value: the numbers of the finding, and the text after `field = value`."""

    offset: int
    value: int
    low: int
    high: int
    mask: int
    why: str


def bits_between(low: int, high: int) -> int:
    """The mask with bits low..high, both included, of those below 64."""
    return (1 << min(high + 1, WORD_BITS)) - (1 << min(low, WORD_BITS))


def capabilities_alone(limits: Limits, values: tuple[int, ...], granule: int | None) -> Refusal | None:
    """Bits that this host does not have; VCPU_NEEDS_SET_SVE_VLS needs SVE."""
    word, known = values[0], limits.capabilities
    if not word & ~known:
        return None
    why = f"capabilities[0] = {word:#x}: this host has bits {known:#x}"
    if word & ~known & _NEEDS_SET and limits.is_arm64:
        why += ", and no SVE"
    if word & ~known & _FOLLOWS and limits.is_arm64:
        why += ", and its kernel lets nobody change PARange"
    return Refusal(8, word, 0, known, known, why)


def physaddr_alone(limits: Limits, values: tuple[int, ...], granule: int | None) -> Refusal | None:
    """A size that no granule of this host reaches."""
    bits = values[0] or DEFAULT_IPA_BITS
    for shift in limits.granules:
        if limits.ipa_least(shift) <= bits <= limits.ipa_limit(shift):
            return None
    return physaddr_refusal(limits, values[0], granule)


def physaddr_refusal(limits: Limits, bits: int, granule: int | None) -> Refusal:
    """What this host says to a size (0: the default) that it cannot give with a granule."""
    low, high = limits.ipa_least(granule), limits.ipa_limit(granule)
    asked = f"physaddr_bits = {bits or DEFAULT_IPA_BITS}{'' if bits else ' (default)'}"
    allows = f"{low}..{high}" if low < high else f"only {high}"
    why = f"{asked}: this host allows {allows} ({limits.why_ipa(granule)})"
    return Refusal(4, bits or DEFAULT_IPA_BITS, low, high, bits_between(low, high), why)


def machine_alone(limits: Limits, values: tuple[int, ...], granule: int | None) -> Refusal | None:
    """A machine type that this host does not have; on s390 a bit."""
    value, known = values[0], limits.machine_types
    if limits.arch == "s390x":
        if not value & ~known:
            return None
        return Refusal(8, value, 0, known, known, f"machine_type = {value:#x}: this host has bits {known:#x}")
    if value < WORD_BITS and known >> value & 1:
        return None
    have = ", ".join(str(number) for number in range(WORD_BITS) if known >> number & 1)
    highest = known.bit_length() - 1
    return Refusal(8, value, 0, highest, known, f"machine_type = {value}: this host has {have}")


def lengths_alone(limits: Limits, values: tuple[int, ...], granule: int | None) -> Refusal | None:
    """A set of vector lengths that is not the host's own, cut off at a maximum."""
    if values[0] in limits.sve_sets and not any(values[1:]):
        return None
    word = next((index for index in range(1, 8) if values[index]), 0)
    asked = f"vls[{word}] = {values[word]:#x}"
    if not limits.sve_sets:
        return Refusal(8 + 8 * word, values[word], 0, 0, 0, f"{asked}: this host has no SVE")
    why = f"{asked}: vls[0] can be {sets_text(limits.sve_sets)}"
    return Refusal(8 + 8 * word, values[word], limits.sve_sets[0], limits.sve_set(), limits.sve_set(), why)


def sets_text(sets: tuple[int, ...]) -> str:
    """The sets that can be had, short enough for a record's message; long regular rows get a gap."""
    texts = [f"{word:#x}" for word in sets]
    if len(texts) > 9:
        texts = [*texts[:4], "...", *texts[-4:]]
    return ", ".join(texts)


def granule_alone(limits: Limits, values: tuple[int, ...], granule: int | None) -> Refusal | None:
    """A stage-2 granule that this host's MMU does not have."""
    shift = values[0]
    if not shift or shift in limits.granules:
        return None
    have = ", ".join(f"{known} ({GRANULE_NAMES[known]})" for known in limits.granules)
    mask = sum(1 << known for known in limits.granules)
    return Refusal(
        8, shift, limits.granules[0], limits.granules[-1], mask, f"page_shift = {shift}: this host has {have}"
    )


def vcpus_alone(limits: Limits, values: tuple[int, ...], granule: int | None) -> Refusal | None:
    """More vCPUs than this host takes."""
    if values[0] <= limits.max_vcpus:
        return None
    high = limits.max_vcpus
    return Refusal(8, values[0], 1, high, bits_between(1, high), f"max_vcpus = {values[0]}: this host allows 1..{high}")


ALONE: dict[int, Callable[[Limits, tuple[int, ...], int | None], Refusal | None]] = {
    CAPABILITIES: capabilities_alone,
    PHYSADDR: physaddr_alone,
    MACHINE: machine_alone,
    SVE_VLS: lengths_alone,
    GRANULE: granule_alone,
    MAX_VCPUS: vcpus_alone,
}


def finding(kind: int, wish: Wish | None, fixed: bool, refusal: Refusal, error: int = errno.EOPNOTSUPP) -> Finding:
    """A refusal as a finding: where the value stands in the list or the fixed structure, or that it is in neither."""
    _, value, low, high, mask, why = refusal
    if fixed:
        why = why.replace("physaddr_bits", "ipa_size").replace("capabilities[0]", "capabilities")
        return fixed_finding(_FIXED_OFFSETS.get(kind, 8), kind, error, value, why, low, high, mask)
    position = NO_ATTR if wish is None else wish.position
    return Finding(position, kind, error, refusal.offset, value, low, high, mask, why)


def note(kind: int, wish: Wish, refusal: Refusal) -> Finding:
    """What SKIP_UNSUPPORTED makes of a refusal."""
    return finding(kind, wish, False, refusal._replace(why=f"{refusal.why}; skipped, the default applies"), 0)


def each_alone(limits: Limits, wishes: dict[int, Wish]) -> tuple[dict[int, Wish], list[Found], set[int]]:
    """Every wish by itself: what is left of them, the findings, the types that were refused."""
    granule = wishes[GRANULE].values[0] if GRANULE in wishes else None
    if granule not in limits.ipa_limits:
        granule = None
    found: list[Found] = []
    refused: set[int] = set()
    kept = wishes
    for kind, wish in wishes.items():
        refusal = ALONE[kind](limits, wish.values, granule)
        if refusal is None:
            continue
        if kept is wishes:
            kept = dict(wishes)
        del kept[kind]
        if wish.skip:
            result = note(kind, wish, refusal)
        else:
            result = finding(kind, wish, wish.fixed, refusal)
            refused.add(kind)
        found.append(Found(0 if wish.fixed else wish.position, result.offset, result))
    return kept, found, refused


def together(
    limits: Limits, wishes: dict[int, Wish], refused: frozenset[int], complete: bool, fixed: bool
) -> tuple[dict[int, Wish], list[Found]]:
    """The combination, defaults included: what is left of the wishes, and the findings, by type.

    A type in `refused` has its own finding already; what is not `complete` may have held anything.
    """
    if not limits.is_arm64:
        return wishes, []
    found: list[Found] = []
    both = wishes.get(CAPABILITIES)
    if both is not None and SVE_VLS in wishes and both.values[0] & _NEEDS_SET:
        why = "capabilities[0] bit 0 (VCPU_NEEDS_SET_SVE_VLS) and ARM64_SVE_VLS exclude each other"
        allowed = limits.capabilities & ~_NEEDS_SET
        refusal = Refusal(8, both.values[0], 0, allowed, allowed, why)
        found.append(Found(AFTER, CAPABILITIES, finding(CAPABILITIES, both, fixed, refusal, errno.EINVAL)))
    size, grain = wishes.get(PHYSADDR), wishes.get(GRANULE)
    if PHYSADDR in refused or GRANULE in refused or (size is None and not complete):
        return wishes, found
    bits = size.values[0] if size is not None else 0
    granule = (grain.values[0] or None) if grain is not None else None
    if fits(limits, bits, granule):
        return wishes, found
    if grain is not None and grain.skip and fits(limits, bits, None):
        why = f"page_shift = {granule}: no {bits or DEFAULT_IPA_BITS} bits of IPA with it on this host"
        other = Refusal(8, grain.values[0], *_granules_for(limits, bits), why)
        found.append(Found(AFTER, GRANULE, note(GRANULE, grain, other)))
        return {kind: wish for kind, wish in wishes.items() if kind != GRANULE}, found
    refusal = physaddr_refusal(limits, bits, granule)
    found.append(Found(AFTER, PHYSADDR, finding(PHYSADDR, size, fixed, refusal)))
    return wishes, found


def fits(limits: Limits, bits: int, granule: int | None) -> bool:
    """Whether a size (0: the default) can be had with a granule."""
    return limits.ipa_least(granule) <= (bits or DEFAULT_IPA_BITS) <= limits.ipa_limit(granule)


def _granules_for(limits: Limits, bits: int) -> tuple[int, int, int]:
    shifts = [shift for shift in limits.granules if fits(limits, bits, shift)]
    return min(shifts), max(shifts), sum(1 << shift for shift in shifts)
