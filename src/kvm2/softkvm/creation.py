"""Creating a VM: from the client's bytes to a `VmConfig`, or to findings. One path for the list, the fixed structure,
the `type` word that is a pointer, and (with `softkvm.negotiation`) the negotiation phase.

Order: all reads; every check; the report, if the list has one; then, and only then, something may come into being.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from kvm2.abi import vm2
from kvm2.abi.attrs import Decoded, Found, ReportArea, in_order
from kvm2.abi.findings import NO_ATTR, RECORD_SIZE, Finding
from kvm2.abi.fixed import SVE_VLEN, Fixed, decode_fixed, fixed_finding
from kvm2.abi.wire import decode
from kvm2.errors import KvmError
from kvm2.softkvm.checks import AFTER, each_alone, together
from kvm2.softkvm.describe import describe_vm2
from kvm2.softkvm.limits import Limits, limits_of
from kvm2.softkvm.typeword import word_of
from kvm2.softkvm.vmconfig import CAPABILITIES, PHYSADDR, SVE_VLS, Configuring, VmConfig, Wish, config_of

if TYPE_CHECKING:
    from kvm2.softkvm.memory import Memory
    from kvm2.softkvm.profile import Profile

__all__ = ["Configuring", "VmConfig", "create_vm", "create_vm2", "create_vm2_fixed", "describe_vm2"]

REPORT, DRY_RUN, NEGOTIATE = (
    vm2.KVM_CREATE_VM_ATTR_REPORT,
    vm2.KVM_CREATE_VM_ATTR_DRY_RUN,
    vm2.KVM_CREATE_VM_ATTR_NEGOTIATE,
)
_REPORT_OFFSETS = {field.name: field.offset for field in vm2.Report.LAYOUT.fields}
_COUNT_OFFSET, _RECORDS_OFFSET = _REPORT_OFFSETS["count"], _REPORT_OFFSETS["records"]
_MASK = (1 << 64) - 1


class Settled(NamedTuple):
    """What became of a list: the wishes that hold, and every finding in order."""

    wishes: dict[int, Wish]
    findings: tuple[Finding, ...]

    @property
    def refused(self) -> bool:
        """Whether a finding is an error."""
        return any(finding.error for finding in self.findings)


Finish = Callable[[Settled, "VmConfig | None", bool], tuple[Finding, ...]]
"""What a host that is more than its limits adds to the findings, before the report is written: a real kernel has the
last word. It gets what became of the list, the configuration (None where it is refused, and while negotiating), and
whether the run is dry."""


def as_found(settled: Settled, config: VmConfig | None, dry: bool) -> tuple[Finding, ...]:
    """The limits were the last word."""
    return settled.findings


def create_vm2(profile: Profile, memory: Memory, arg: int, finish: Finish = as_found) -> VmConfig | Configuring | int:
    """KVM_CREATE_VM2: what the VM is to be; 0 for a dry run; a `Configuring` with NEGOTIATE.

    Raises KvmError with every finding, after the report was written; a bare EINVAL where the host has no such call.
    """
    limits = limits_of(profile)
    limits.demand(vm2.KVM_CREATE_VM2_LIST)
    return _create(limits, memory, arg, finish)


def _create(limits: Limits, memory: Memory, arg: int, finish: Finish) -> VmConfig | Configuring | int:
    decoded = decode(memory, arg, limits.plans)
    entries = decoded.entries
    negotiate = NEGOTIATE in entries
    settled = settle(limits, decoded, {}, commit=not negotiate)
    config = None if negotiate or settled.refused else config_of(limits, settled.wishes)
    deliver(memory, decoded.report, finish(settled, config, DRY_RUN in entries))
    if DRY_RUN in entries:
        return 0
    return Configuring(limits, settled.wishes) if config is None else config


def settle(limits: Limits, decoded: Decoded, earlier: dict[int, Wish], *, commit: bool) -> Settled:
    """Checks a list on top of `earlier` wishes: each value alone, and with `commit` the whole."""
    wishes = wishes_of(decoded)
    kept, found, refused = each_alone(limits, wishes)
    if earlier:
        kept = {kind: wish for kind, wish in earlier.items() if kind not in wishes} | kept
    found = decoded.found + found
    if DRY_RUN in decoded.entries and NEGOTIATE in decoded.entries:
        found.append(_dry_negotiation(decoded))
    if commit:
        kept, more = together(limits, kept, decoded.broken | refused, decoded.complete, False)
        found += more
    return Settled(kept, in_order(found) if found else ())


def _dry_negotiation(decoded: Decoded) -> Found:
    index = decoded.entries[DRY_RUN].position
    why = "DRY_RUN and NEGOTIATE exclude each other: a dry run makes nothing that could be configured"
    return Found(AFTER, DRY_RUN, Finding(index, DRY_RUN, errno.EINVAL, 0, DRY_RUN, 0, 0, 0, why))


def wishes_of(decoded: Decoded) -> dict[int, Wish]:
    """The attributes that have a value."""
    skip = vm2.KVM_CREATE_VM_ATTR_SKIP_UNSUPPORTED
    return {
        kind: Wish(entry.values, entry.position, bool(entry.flags & skip))
        for kind, entry in decoded.entries.items()
        if kind not in (REPORT, DRY_RUN, NEGOTIATE)
    }


def deliver(memory: Memory, report: ReportArea | None, findings: tuple[Finding, ...]) -> None:
    """Writes the report and raises the first error, if there is one. A report that cannot be written is EFAULT."""
    if report is not None:
        _write_report(memory, report, findings)
    for finding in findings:
        if finding.error:
            raise KvmError(finding.error, finding.message, findings)


def _write_report(memory: Memory, report: ReportArea, findings: tuple[Finding, ...]) -> None:
    written = findings[: report.capacity]
    where, size = report.records, len(written) * RECORD_SIZE
    try:
        if written:
            memory.write(where, b"".join(finding.record() for finding in written))
        where, size = report.address + _COUNT_OFFSET, 4
        memory.write(where, len(findings).to_bytes(4, sys.byteorder))
    except KvmError as fault:
        why = f"the report cannot be written: {size} bytes at {where & _MASK:#x}"
        lost = Finding(NO_ATTR, REPORT, errno.EFAULT, _RECORDS_OFFSET, where & _MASK, 0, 0, 0, why)
        raise KvmError(errno.EFAULT, why, (*findings, lost)) from fault


def create_vm2_fixed(profile: Profile, memory: Memory, arg: int, finish: Finish = as_found) -> VmConfig:
    """KVM_CREATE_VM2_FIXED: the same through the 128-byte structure. Raises KvmError with every finding."""
    limits = limits_of(profile)
    limits.demand(vm2.KVM_CREATE_VM2_STRUCT_FIXED)
    fixed = decode_fixed(memory, arg, limits.arch)
    wishes, found = _wishes_of_fixed(limits, fixed)
    # A type that was asked for in a wrong way has its finding; its default must not get a second one.
    refused = {place.finding.attr_type for place in found if place.finding.error}
    kept, more, late = each_alone(limits, wishes)
    found += more
    if fixed.complete:
        kept, crossed = together(limits, kept, frozenset(refused | late), True, True)
        found += crossed
    settled = Settled(kept, in_order(found) if found else ())
    config = config_of(limits, kept)
    deliver(memory, None, finish(settled, None if settled.refused else config, False))
    return config


def _wishes_of_fixed(limits: Limits, fixed: Fixed) -> tuple[dict[int, Wish], list[Found]]:
    """The attributes that the structure's fields stand for."""
    wishes: dict[int, Wish] = {}
    found = list(fixed.found)
    if not limits.is_arm64 or not fixed.complete:
        return wishes, found
    wrong = {place.finding.attr_type for place in found}
    if fixed.capabilities & vm2.KVM_ARM_SELECT_IPA and PHYSADDR not in wrong:
        wishes[PHYSADDR] = Wish((fixed.ipa_size,), fixed=True)
    if fixed.capabilities & vm2.KVM_ARM_SVE_CAPABLE:
        if not fixed.sve_vlen:
            wishes[CAPABILITIES] = Wish((vm2.KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS,), fixed=True)
        else:
            lengths = sets_by_length(limits)
            word = lengths.get(fixed.sve_vlen)
            if word is None:
                found.append(Found(0, SVE_VLEN, _no_such_length(limits, fixed.sve_vlen)))
            else:
                wishes[SVE_VLS] = Wish((word,) + (0,) * 7, fixed=True)
    return wishes, found


def sets_by_length(limits: Limits) -> dict[int, int]:
    """The host's sets of vector lengths by their longest, in bits."""
    return {word.bit_length() * 128: word for word in limits.sve_sets}


def _no_such_length(limits: Limits, bits: int) -> Finding:
    lengths = sorted(sets_by_length(limits))
    have = "has " + ", ".join(str(length) for length in lengths) if lengths else "has no SVE"
    low, high = (lengths[0], lengths[-1]) if lengths else (0, 0)
    why = f"sve_vlen = {bits}: this host {have}"
    return fixed_finding(SVE_VLEN, SVE_VLS, errno.EOPNOTSUPP, bits, why, low, high, limits.sve_set())


def create_vm(profile: Profile, memory: Memory, type_word: int) -> VmConfig | Configuring | int:
    """KVM_CREATE_VM: the `type` word, in the encoding that this host's kernel speaks.

    A bare EINVAL where it is refused; a `pointer` to a list goes the way of KVM_CREATE_VM2, findings and all.
    """
    limits = limits_of(profile)
    word = word_of(profile.type_word)
    if word.is_pointer(type_word):
        return _create(limits, memory, type_word, as_found)
    bits, machine = word.decode(type_word, limits)
    sve = bool(limits.sve_sets)
    shift, vcpus, ids = limits.page_shift, limits.max_vcpus, limits.max_vcpu_id
    return VmConfig(bits, shift, machine, False, False, None, vcpus, ids, False, sve, limits.arch)
