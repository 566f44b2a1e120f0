"""KVM_DESCRIBE_VM2: which attributes a host takes, before any VM is tried.

>>> from kvm2.softkvm import profile
>>> m1 = {info.type: info for info in attr_infos(limits_of(profile.load("apple-m1")))}
>>> m1[2].default, m1[2].min, m1[2].max, hex(m1[2].mask)
(40, 32, 36, '0x1f00000000')
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, NamedTuple

from kvm2.abi import vm2
from kvm2.abi.findings import NO_ATTR, Finding
from kvm2.errors import KvmError
from kvm2.softkvm.checks import bits_between
from kvm2.softkvm.limits import DEFAULT_IPA_BITS, Limits, limits_of
from kvm2.softkvm.vmconfig import CAPABILITIES, GRANULE, MACHINE, PHYSADDR, SVE_VLS

if TYPE_CHECKING:
    from kvm2.softkvm.memory import Memory
    from kvm2.softkvm.profile import Profile

_HEADER = struct.Struct("=IIQ")
_VERSION = struct.Struct("=I")
_COUNT = struct.Struct("=I")
_COUNT_OFFSET, _ENTRIES_OFFSET = 4, 8


class Span(NamedTuple):
    """What can be had of one attribute, the others at their defaults."""

    default: int
    min: int
    max: int
    mask: int


def span(limits: Limits, kind: int) -> Span:
    """Default, minimum, maximum and mask of an attribute that has a value."""
    if kind == CAPABILITIES:
        return Span(0, 0, limits.capabilities, limits.capabilities)
    if kind == PHYSADDR:
        low, high = limits.ipa_least(None), limits.ipa_limit(None)
        return Span(DEFAULT_IPA_BITS, low, high, bits_between(low, high))
    if kind == MACHINE:
        mask = limits.machine_types
        return Span(0, 0, mask if limits.arch == "s390x" else mask.bit_length() - 1, mask)
    if kind == SVE_VLS:
        return Span(0, limits.sve_sets[0] if limits.sve_sets else 0, limits.sve_set(), limits.sve_set())
    if kind == GRANULE:
        shifts = limits.granules
        return Span(limits.page_shift, shifts[0], shifts[-1], sum(1 << shift for shift in shifts))
    high = limits.max_vcpus
    return Span(high, 1, high, bits_between(1, high))


def attr_infos(limits: Limits) -> tuple[vm2.Vm2AttrInfo, ...]:
    """One entry for each attribute that this host knows, ascending by type."""
    negotiation = bool(limits.offers & vm2.KVM_CREATE_VM2_NEGOTIATION)
    infos = []
    for kind in sorted(limits.plans):
        row = limits.plans[kind].row
        flags = vm2.KVM_VM2_ATTR_INFO_NEGOTIABLE if row.negotiable and negotiation else 0
        numbers = Span(0, 0, 0, 0)
        if row.has_value:
            flags |= vm2.KVM_VM2_ATTR_INFO_VALUE
            numbers = span(limits, kind)
        infos.append(vm2.Vm2AttrInfo(kind, flags, *numbers))
    return tuple(infos)


def describe_vm2(profile: Profile, memory: Memory, arg: int) -> int:
    """KVM_DESCRIBE_VM2: writes the entries and their number, returns 0; with less room E2BIG and only the number."""
    limits = limits_of(profile)
    limits.demand(vm2.KVM_CREATE_VM2_DESCRIBE)
    version, room, entries = _read(memory, arg)
    if version:
        raise _refused(errno.EOPNOTSUPP, 0, "version", version, f"version = {version}: this host knows version 0")
    infos = attr_infos(limits)
    fits = len(infos) <= room
    if fits:
        memory.write(entries, b"".join(info.pack() for info in infos))
    memory.write(arg + _COUNT_OFFSET, _COUNT.pack(len(infos)))
    if not fits:
        why = f"count = {room}: this host has {len(infos)} entries"
        raise _refused(errno.E2BIG, _COUNT_OFFSET, "count", room, why, len(infos))
    return 0


def _read(memory: Memory, arg: int) -> tuple[int, int, int]:
    """version, count, entries; of another version the structure may be shorter."""
    try:
        version, room, entries = _HEADER.unpack(memory.read(arg, _HEADER.size))
    except KvmError:
        (version,) = _VERSION.unpack(memory.read(arg, _VERSION.size))
        if not version:
            raise
        room = entries = 0
    return version, room, entries


def _refused(error: int, offset: int, name: str, value: int, why: str, high: int = 0) -> KvmError:
    hint = "use version 0" if name == "version" else f"give room for {high} entries"
    return KvmError(error, why, (Finding(NO_ATTR, 0, error, offset, value, high, high, 0, why, name, hint),))
