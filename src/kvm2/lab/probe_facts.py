"""From what a probe saw to the keys of a host file: which described kernel is nearest, and what has to be said besides.

A host file says only what no rule gives. Whatever it cannot say becomes a note.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvm2.abi import caps as cap
from kvm2.abi import onereg, sysregs
from kvm2.abi.caps import CAPABILITIES, name_of
from kvm2.softkvm import profile_registers as reg
from kvm2.softkvm import profile_rules as rules
from kvm2.softkvm.profile_build import Kernel, kernel
from kvm2.softkvm.profile_keys import kernels
from kvm2.softkvm.sysregs_table import invariants, table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvm2.lab.probe_seen import Seen

_FIRMWARE = {1: "WORKAROUND_1", 2: "WORKAROUND_2", 3: "WORKAROUND_3"}
_LIMITS = {
    "cpus": cap.KVM_CAP_NR_VCPUS,
    "max_vcpus": cap.KVM_CAP_MAX_VCPUS,
    "max_vcpu_id": cap.KVM_CAP_MAX_VCPU_ID,
    "nr_memslots": cap.KVM_CAP_NR_MEMSLOTS,
}
# Answers of a VM that creation and the vGIC decide, and one that a new VM answers with 0 (KVM_CAP_MSI_DEVID).
_OF_A_VM = frozenset((cap.KVM_CAP_MAX_VCPUS, cap.KVM_CAP_MAX_VCPU_ID))


def facts_of(seen: Seen) -> dict[str, Any]:
    """The keys of a host file, in the order in which people read them. Adds to `seen.notes` what has no key."""
    if seen.arch != "arm64":
        return _creation_only(seen)
    version = nearest_kernel(seen)
    known = kernel(version)
    registers = _described_registers(seen)
    facts: dict[str, Any] = {
        "basis": "recorded",
        "arch": "arm64",
        "kernel": version,
        "mode": _mode(seen, registers),
        "type_word": seen.type_word,
        "create_vm2": seen.create_vm2,
        "page_shift": seen.page_shift,
        **({"sve_vqs": list(seen.sve_vqs)} if seen.sve_vqs else {}),
        "gic": list(seen.gic),
        **_limits(seen),
    }
    quirks = [name for name, has in seen.habits.items() if has and name not in known.quirks]
    if quirks:
        facts["quirks"] = sorted(quirks)
    facts |= _ipa_limit(seen, registers, known.quirks | set(quirks))
    facts |= _enable_caps(seen, known, registers)
    if _mode_is_guessed(seen, registers):
        facts["assumed"] = ["mode"]
        seen.notes.append("mode: vhe and hvhe look the same to everybody; described as vhe")
    facts["registers"] = registers
    facts["firmware"] = {_FIRMWARE[number]: value for number, value in seen.firmware.items()}
    if "hardware-caches" in known.quirks | set(quirks):
        facts["ccsidr"] = {str(index): value for index, value in seen.ccsidr.items()}
    facts |= _capabilities(seen, known)
    facts |= _masks(seen, known, registers)
    _unknown_habits(seen, known.quirks)
    _other_registers(seen, version)
    return {key: value for key, value in facts.items() if value != {}}


def _creation_only(seen: Seen) -> dict[str, Any]:
    usual = {cap.KVM_CAP_CHECK_EXTENSION_VM: 1}
    asked = (set(seen.caps) | set(usual)) - rules.COMPUTED_ELSEWHERE
    caps = {number: seen.cap(number) for number in asked if seen.cap(number) != usual.get(number, 0)}
    facts: dict[str, Any] = {
        "basis": "recorded",
        "arch": seen.arch,
        "create_vm2": seen.create_vm2,
        "page_shift": seen.page_shift,
        **_limits(seen),
    }
    if seen.arch == "x86_64":
        facts["vm_types"] = seen.cap(cap.KVM_CAP_VM_TYPES)
    facts |= {"caps": _sayable(seen, _by_name(caps)), "vm_caps": _sayable(seen, _vm_answers(seen, seen.caps))}
    seen.notes.append(
        f"hosts of {seen.arch} answer KVM_CHECK_EXTENSION and creation only: CPUID, MSRs, devices and the rest of this "
        "machine are not described, and no guest runs on the description"
    )
    return {key: value for key, value in facts.items() if value != {}}


# ---- which kernel


def nearest_kernel(seen: Seen) -> str:
    """The described kernel with the fewest differences; one with a habit that this kernel has not is none."""
    costs = {}
    for version in kernels():
        known = kernel(version)
        if not any(seen.habits.get(quirk) is False for quirk in known.quirks):
            costs[version] = _distance(seen, version, known)
    return min(sorted(costs, key=_newest_first), key=lambda version: costs[version])


def _newest_first(version: str) -> tuple[int, ...]:
    return tuple(-int(part) for part in version.split("."))


def _distance(seen: Seen, version: str, known: Kernel) -> int:
    caps = {number for number in _asked(seen) if seen.cap(number) != known.caps.get(number, 0)}
    masks = rules.writable_masks(known.writable_masks, seen.registers)
    quirks = {name for name, has in seen.habits.items() if has and name not in known.quirks}
    extra, missing = _listed(seen, version)
    return (
        len(caps)
        + len(dict(masks.items() ^ seen.writable_masks.items()))
        + len(quirks)
        + len(seen.enable_caps ^ known.enable_caps)
        + len(extra)
        + len(missing)
    )


def _listed(seen: Seen, version: str) -> tuple[set[int], set[int]]:
    """System registers that KVM_GET_REG_LIST has besides a described kernel's, and those of it that are missing."""
    listed = {onereg.parse(one).index for one in seen.reg_list if onereg.parse(one).kind == "sysreg"}
    rows = [row for row in table(version).values() if row.user != "-"]
    timers = {sysregs.CNTV_CTL_EL0, sysregs.CNTVCT_EL0, sysregs.CNTV_CVAL_EL0}
    timers |= {sysregs.CNTP_CTL_EL0, sysregs.CNTP_CVAL_EL0, sysregs.CNTPCT_EL0}
    always = {row.enc for row in rows if row.visible in ("-", "raz", "aa32", "zfr0")}
    known = {row.enc for row in rows} | set(invariants(version))
    return listed - known - timers, (always | set(invariants(version))) - listed - timers


def _other_registers(seen: Seen, version: str) -> None:
    extra, missing = _listed(seen, version)
    for names, how in (
        (extra, "lists registers that Linux {} does not: {}"),
        (missing, "does not list, as {} does: {}"),
    ):
        if names:
            text = ", ".join(sysregs.name_of(enc) for enc in sorted(names))
            seen.notes.append("KVM_GET_REG_LIST " + how.format(version, text) + " (not described)")


# ---- fields


def _described_registers(seen: Seen) -> dict[str, int]:
    """The registers by name."""
    return {sysregs.name_of(enc): value for enc, value in sorted(seen.registers.items())}


def _mode(seen: Seen, registers: Mapping[str, int]) -> str:
    if seen.protected:
        return "protected"
    return "vhe" if _has_vhe(registers) else "nvhe"


def _has_vhe(registers: Mapping[str, int]) -> bool:
    return bool(registers.get(reg.MMFR1, 0) >> 8 & 0xF)


def _mode_is_guessed(seen: Seen, registers: Mapping[str, int]) -> bool:
    return not seen.protected and _has_vhe(registers)


def _limits(seen: Seen) -> dict[str, Any]:
    return {name: seen.cap(number) for name, number in _LIMITS.items() if seen.cap(number) > 0}


def _ipa_limit(seen: Seen, registers: Mapping[str, int], quirks: set[str] | frozenset[str]) -> dict[str, Any]:
    """The limit, where the kernel gives less than the hardware has."""
    encoded = {reg.encoding(name): value for name, value in registers.items()}
    lpa2 = "no-lpa2" not in quirks and rules.lpa2(encoded, seen.page_shift)
    by_rule = rules.ipa_limit(encoded.get(reg.encoding(reg.MMFR0), 0) & 0xF, seen.page_shift, lpa2)
    limit = seen.cap(cap.KVM_CAP_ARM_VM_IPA_SIZE)
    if limit > by_rule:
        seen.notes.append(f"the IPA limit is {limit}, above the {by_rule} bits of the ID registers: described as less")
    return {"ipa_limit": limit} if limit < by_rule else {}


def _enable_caps(seen: Seen, known: Kernel, registers: Mapping[str, int]) -> dict[str, Any]:
    encoded = {reg.encoding(name): value for name, value in registers.items()}
    by_rule = known.enable_caps | ({cap.KVM_CAP_ARM_MTE} if rules.has_mte(encoded) else set())
    gone = {number for number in _asked(seen) if seen.cap(number) == 0 and known.caps.get(number, 0)}
    if seen.enable_caps == by_rule - gone:
        return {}
    return {"enable_caps": [name_of(number) for number in sorted(seen.enable_caps)]}


def _capabilities(seen: Seen, known: Kernel) -> dict[str, Any]:
    caps = {number: seen.cap(number) for number in _asked(seen) if seen.cap(number) != known.caps.get(number, 0)}
    on_vm = _vm_answers(seen, {**seen.caps, cap.KVM_CAP_MSI_DEVID: 0})
    return {"caps": _sayable(seen, _by_name(caps)), "vm_caps": _sayable(seen, on_vm)}


def _vm_answers(seen: Seen, predicted: Mapping[int, int]) -> dict[str, int]:
    """What a VM answers otherwise than the rule says."""
    if not seen.vm_caps:
        return {}
    found = {}
    for number in sorted(set(seen.vm_caps) | set(predicted)):
        value = seen.vm_caps.get(number, 0)
        if number not in _OF_A_VM and value != predicted.get(number, 0):
            found[number] = value
    return _by_name(found)


def _asked(seen: Seen) -> set[int]:
    """The capabilities that no rule gives."""
    return (set(CAPABILITIES.values()) | set(seen.caps)) - rules.COMPUTED


def _by_name(caps: Mapping[int, int]) -> dict[str, int]:
    return {name_of(number): value for number, value in sorted(caps.items())}


def _sayable(seen: Seen, caps: dict[str, int]) -> dict[str, int]:
    for name, value in list(caps.items()):
        if value >= 1 << 31:
            seen.notes.append(f"{name} answers {value:#x}, which no host file can say")
            del caps[name]
    return caps


def _masks(seen: Seen, known: Kernel, registers: Mapping[str, int]) -> dict[str, Any]:
    encoded = {reg.encoding(name): value for name, value in registers.items()}
    by_rule = rules.writable_masks(known.writable_masks, encoded)
    other = {
        enc: seen.writable_masks.get(enc, 0)
        for enc in sorted(by_rule.keys() | seen.writable_masks.keys())
        if seen.writable_masks.get(enc, 0) != by_rule.get(enc, 0)
    }
    return {"writable_masks": {sysregs.name_of(enc): mask for enc, mask in other.items()}}


def _unknown_habits(seen: Seen, of_kernel: frozenset[str]) -> None:
    for name, has in seen.habits.items():
        if has is None:
            how = "as the kernel is described" if name in of_kernel else "described without"
            seen.notes.append(f"quirk {name}: nothing that this host does tells ({how})")
