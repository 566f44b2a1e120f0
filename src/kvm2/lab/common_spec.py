"""The largest VM that every one of several hosts can give, with the host that sets each limit, tried on each of them.

>>> from kvm2.softkvm.profile import load
>>> common = common_spec([load("apple-m1"), load("graviton3")])
>>> common.values["physaddr_bits"], common.reasons["physaddr_bits"]
(36, 'apple-m1 has 36 (PARange 0b0001)')
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvm2.abi.vm2 import KVM_CREATE_VM2_LIST, Vm2AttrInfo
from kvm2.errors import KvmError, UsageError
from kvm2.names import FEATURES
from kvm2.softkvm import sve
from kvm2.softkvm.limits import GRANULE_NAMES, limits_of
from kvm2.softkvm.typeword import word_of
from kvm2.spec import LARGEST_VQ, VmSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from kvm2.kvm import Kvm
    from kvm2.softkvm.limits import Limits
    from kvm2.softkvm.profile import Profile


@dataclass
class Common:
    """`values`: what a VM can be on every host (physaddr_bits, page_shift, sve in bits, max_vcpus, gic, features);
    `reasons`: why it is no more; `conflicts`: what they cannot agree on, so there is no such VM; `checked`: host ->
    "yes", or why it refuses."""

    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)
    checked: dict[str, str] = field(default_factory=dict)
    spec: VmSpec | None = None

    @property
    def ok(self) -> bool:
        """Whether there is such a VM, and every host took it."""
        return not self.conflicts and all(answer == "yes" for answer in self.checked.values())


def common_spec(hosts: Sequence[Profile], real: Mapping[str, Callable[[], Kvm]] | None = None) -> Common:
    """The largest common VM of the hosts, created on each as described; on those in `real`, by name, on the Kvm that is
    opened there. A real kernel has no stage-2 granule but its page size."""
    real = real or {}
    found = Common()
    arches = {host.arch for host in hosts}
    if len(arches) > 1:
        found.conflicts.append("architectures: " + ", ".join(f"{host.name} is {host.arch}" for host in hosts))
        return found
    limits = [limits_of(host) for host in hosts]
    if arches == {"arm64"}:
        _granule_and_size(found, limits, real)
        _sve(found, hosts)
        _gic(found, hosts)
        _features(found, hosts)
    _least(found, "max_vcpus", [(host.name, host.max_vcpus) for host in hosts])
    _machine_types(found, limits)
    if not found.conflicts:
        found.spec = VmSpec(
            physaddr_bits=found.values.get("physaddr_bits"),
            sve=found.values.get("sve") or None,
            page_shift=found.values.get("page_shift") if _page_sizes(limits) > 1 else None,
            max_vcpus=found.values["max_vcpus"],
        )
        found.checked = {host.name: _try(host, found.spec, real.get(host.name)) for host in hosts}
    return found


def _page_sizes(limits: Sequence[Limits]) -> int:
    return len({one.page_shift for one in limits})


def _least(found: Common, name: str, each: list[tuple[str, int]]) -> None:
    host, value = min(each, key=lambda one: one[1])
    found.values[name] = value
    alike = len({number for _, number in each}) == 1
    found.reasons[name] = f"every host has {value}" if alike else f"{host} has {value}"


def _granule_and_size(found: Common, limits: Sequence[Limits], real: Container[str]) -> None:
    """The granule is the page size where all have the same, else the common one with the largest IPA size."""
    if _page_sizes(limits) == 1:
        choices = {limits[0].page_shift}
        why = "every host's page size"
    else:
        choices = set.intersection(*(_granules(one, real) for one in limits))
        pages = ", ".join(f"{one.profile.name} {GRANULE_NAMES[one.page_shift]}" for one in limits)
        why = f"the page sizes differ ({pages}): every host has it at stage 2"
    if not choices:
        each = ", ".join(f"{one.profile.name}: {_granule_names(sorted(_granules(one, real)))}" for one in limits)
        found.conflicts.append(f"granule: none is common ({each})")
        return
    granule = max(sorted(choices), key=lambda shift: min(one.ipa_limit(shift) for one in limits))
    found.values["page_shift"], found.reasons["page_shift"] = granule, why
    most, least = (
        min(limits, key=lambda one: one.ipa_limit(granule)),
        max(limits, key=lambda one: one.ipa_least(granule)),
    )
    high, low = most.ipa_limit(granule), least.ipa_least(granule)
    if low > high:
        found.conflicts.append(
            f"IPA size: {least.profile.name} gives {low} bits and more ({least.why_ipa(granule)}), "
            f"{most.profile.name} at most {high} ({most.why_ipa(granule)})"
        )
        return
    found.values["physaddr_bits"] = high
    found.reasons["physaddr_bits"] = f"{most.profile.name} has {high} ({most.why_ipa(granule)})"


def _granules(limits: Limits, real: Container[str]) -> set[int]:
    return {limits.page_shift} if limits.profile.name in real else set(limits.granules)


def _granule_names(shifts: Sequence[int]) -> str:
    return ", ".join(GRANULE_NAMES[shift] for shift in shifts) or "none"


def _sve(found: Common, hosts: Sequence[Profile]) -> None:
    """A VM's lengths are the host's own up to a maximum: the largest up to which all hosts have the same."""
    without = [host.name for host in hosts if not host.sve_vqs]
    if without:
        found.values["sve"], found.reasons["sve"] = 0, f"without SVE: {', '.join(without)}"
        return
    tops = set.intersection(*(set(host.sve_vqs) for host in hosts))
    same = [top for top in tops if len({sve.bitmap(host.sve_vqs, top) for host in hosts}) == 1]
    top = max(same, default=0)
    found.values["sve"] = 128 * top
    odd = sorted({vq for host in hosts for vq in host.sve_vqs if vq > top})
    if not odd:
        found.reasons["sve"] = "every host has the same lengths"
        return
    has = ", ".join(host.name for host in hosts if odd[0] in host.sve_vqs)
    hasnt = ", ".join(host.name for host in hosts if odd[0] not in host.sve_vqs)
    found.reasons["sve"] = f"{128 * odd[0]} bits: on {has}, not on {hasnt}"


def _gic(found: Common, hosts: Sequence[Profile]) -> None:
    common = set.intersection(*(set(host.gic) for host in hosts))
    found.values["gic"] = sorted(common)
    each = ", ".join(f"{host.name}: {', '.join(sorted(host.gic)) or 'none'}" for host in hosts)
    found.reasons["gic"] = "every host has the same" if len({frozenset(h.gic) for h in hosts}) == 1 else each


def _features(found: Common, hosts: Sequence[Profile]) -> None:
    common = frozenset.intersection(*(host.features for host in hosts))
    found.values["features"] = [name for name, bit in FEATURES.items() if bit in common]
    lacking = [
        f"{host.name} has no {name}"
        for name, bit in FEATURES.items()
        if bit not in common and any(bit in host.features for host in hosts)
        for host in hosts
        if bit not in host.features
    ]
    found.reasons["features"] = "; ".join(lacking) or "every host has the same"


def _machine_types(found: Common, limits: Sequence[Limits]) -> None:
    common = limits[0].machine_types
    for one in limits:
        common &= one.machine_types
    found.values["machine_types"] = common
    same = len({one.machine_types for one in limits}) == 1
    each = ", ".join(f"{one.profile.name}: {one.machine_types:#x}" for one in limits)
    found.reasons["machine_types"] = "every host has the same" if same else each


def _try(host: Profile, spec: VmSpec, opener: Callable[[], Kvm] | None) -> str:
    """A dry run, and the VM; on a host without KVM_CREATE_VM2 what its type word can say of it."""
    from kvm2.kvm import Kvm
    from kvm2.softkvm.door import SoftKvm

    with opener() if opener is not None else Kvm(SoftKvm(host), host.name) as kvm:
        try:
            if host.create_vm2 & KVM_CREATE_VM2_LIST:
                # The lengths are asked for one by one: a host may not describe its own.
                lengths = {7: Vm2AttrInfo(type=7, mask=sve.bitmap(host.sve_vqs, LARGEST_VQ))}
                attributes = spec.attributes(lengths)
                kvm.dry_run(attributes)
                kvm.create_vm2(attributes).close()
                return "yes"
            if isinstance(spec.physaddr_bits, int) and host.mode != "protected":
                kvm.create_vm(word_of(host.type_word).encode(spec.physaddr_bits)).close()
            else:
                kvm.create_vm(0).close()
        except (KvmError, UsageError) as error:
            return str(error)
    beyond = spec.page_shift is not None and spec.page_shift != host.page_shift
    return "no KVM_CREATE_VM2: its granule is its page size" if beyond else "yes"
