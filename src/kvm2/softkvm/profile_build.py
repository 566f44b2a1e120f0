"""From the merged facts of a host file to a Profile: the answers of its kernel, and what follows from the host."""

from __future__ import annotations

import tomllib
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from kvm2.abi import caps as cap
from kvm2.abi.caps import CAPABILITIES, name_of
from kvm2.softkvm import profile, profile_fields, profile_sources
from kvm2.softkvm import profile_registers as reg
from kvm2.softkvm import profile_rules as rules
from kvm2.softkvm.profile_keys import KERNELS, KEYS, TYPE_WORDS

if TYPE_CHECKING:
    from kvm2.softkvm.profile_file import Facts

_OTHER_VCPUS = 1024
_MEMSLOTS = 32767  # KVM_USER_MEM_SLOTS
_NEGOTIATION, _LIST = 4, 1  # of KVM_CAP_CREATE_VM2


class Kernel(NamedTuple):
    """A kernel's constant answers: capabilities, VM-wide ENABLE_CAPs, writable masks, quirks."""

    caps: dict[int, int]
    enable_caps: frozenset[int]
    writable_masks: dict[int, int]
    quirks: frozenset[str]


@lru_cache(maxsize=8)
def kernel(version: str) -> Kernel:
    """The facts of a kernel version, from kernels/VERSION.toml."""
    data = tomllib.loads((KERNELS / f"{version}.toml").read_text(encoding="utf-8"))
    return Kernel(
        {CAPABILITIES[name]: value for name, value in data["caps"].items()},
        frozenset(CAPABILITIES[name] for name in data["enable_caps"]),
        {reg.encoding(name): mask for name, mask in data.get("writable_masks", {}).items()},
        frozenset(data["quirks"]),
    )


def build(facts: Facts) -> profile.Profile:
    """The profile; HostError where the facts contradict each other."""
    common = _common(facts)
    _check_caps(facts)
    return _arm64(facts, common) if common["arch"] == "arm64" else _creation_only(facts, common)


def _common(facts: Facts) -> dict[str, Any]:
    """The fields that every architecture has, checked against each other."""
    values = facts.values
    arch = values.get("arch", "arm64")
    type_word = values.get("type_word", "log2" if arch == "arm64" else TYPE_WORDS[arch][0])
    if type_word not in TYPE_WORDS[arch]:
        raise facts.wrong("type_word", f"{type_word!r} does not exist on {arch}", ", ".join(TYPE_WORDS[arch]))
    create_vm2 = values.get("create_vm2", 15)
    if create_vm2 & _NEGOTIATION and not create_vm2 & _LIST:
        raise facts.wrong("create_vm2", f"{create_vm2}: the negotiation phase (4) needs the attribute list (1)")
    if values.get("vm_types") and arch != "x86_64":
        raise facts.wrong("vm_types", f"exists on x86_64 only, not on {arch}")
    return {
        "name": facts.path.stem,
        "title": values.get("title", facts.path.stem),
        "arch": arch,
        "kernel": values.get("kernel", "6.12"),
        "basis": values.get("basis", "stated"),
        "type_word": type_word,
        "create_vm2": create_vm2,
        "page_shift": values.get("page_shift", 12),
        "cpus": values.get("cpus", 1),
        "sources": profile_sources.sources(facts),
        "assumed": profile_sources.assumed(facts),
        "bases": facts.bases,
    }


def _check_caps(facts: Facts) -> None:
    computed = rules.COMPUTED if facts.values.get("arch", "arm64") == "arm64" else rules.COMPUTED_ELSEWHERE
    for number in facts.tables["caps"]:
        if number in computed:
            why = f"{name_of(number)} follows from the host's other figures"
            raise facts.wrong("caps", why, "capabilities that no rule gives; state the figure itself")


def _limits(facts: Facts, most: int) -> dict[str, Any]:
    """max_vcpus, max_vcpu_id, nr_memslots; `most`: the vCPUs that the architecture and the GIC allow."""
    values = facts.values
    vcpus = values.get("max_vcpus", most)
    ids = values.get("max_vcpu_id", vcpus)
    if vcpus > most:
        raise facts.wrong("max_vcpus", f"{vcpus} is more than a VM can have here", f"1 to {most}")
    if ids < vcpus:
        raise facts.wrong("max_vcpu_id", f"{ids} leaves no ids for {vcpus} vCPUs", f"{vcpus} and more")
    return {"max_vcpus": vcpus, "max_vcpu_id": ids, "nr_memslots": values.get("nr_memslots", _MEMSLOTS)}


def _arm64(facts: Facts, common: dict[str, Any]) -> profile.Profile:
    profile_fields.check(facts, common["page_shift"])
    registers, gic = facts.registers, facts.values.get("gic", ("v3", "its"))
    fields = _fields(facts, common["page_shift"])
    fields["stated_ipa_limit"] = _stated_ipa_limit(facts, common["page_shift"], fields)
    limits = _limits(facts, rules.max_vcpus(gic))
    answers = _answers(facts, {**common, **limits, "gic": len(gic)}, fields)
    own_only = "own-target-only" in fields["quirks"]
    targets, preferred = rules.targets(registers.get(reg.encoding(reg.MIDR), 0), own_only)
    return profile.Profile(
        **common,
        **limits,
        **fields,
        **answers,
        gic=gic,
        mode=facts.values.get("mode", "vhe"),
        targets=targets,
        preferred_target=preferred,
        registers=dict(registers),
        firmware=facts.tables["firmware"],
        ccsidr=facts.tables["ccsidr"],
    )


def _fields(facts: Facts, page_shift: int) -> dict[str, Any]:
    """What the ID registers say."""
    registers, sve_vqs = facts.registers, facts.values.get("sve_vqs", ())
    quirks = kernel(facts.values.get("kernel", "6.12")).quirks | frozenset(facts.values.get("quirks", ()))
    parange = reg.field_of(registers, reg.MMFR0, 0)
    return {
        "quirks": quirks,
        "parange": parange,
        "pa_bits": rules.PA_BITS[parange],
        "lpa2": "no-lpa2" not in quirks and rules.lpa2(registers, page_shift),
        "granules": rules.granules(registers),
        "vmid_bits": 16 if reg.field_of(registers, reg.MMFR1, 4) == 2 else 8,
        "fwb": reg.field_of(registers, reg.MMFR2, 40) > 0,
        "cnp": reg.field_of(registers, reg.MMFR2, 0) > 0,
        "dic": reg.field_of(registers, reg.CTR, 29, 1) > 0,
        "sve_vqs": sve_vqs,
        "features": rules.features(registers, sve_vqs),
    }


def _answers(facts: Facts, host: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """What the kernel answers to CHECK_EXTENSION, ENABLE_CAP and GET_REG_WRITABLE_MASKS."""
    known, registers = kernel(host["kernel"]), facts.registers
    given = {name: host[name] for name in ("page_shift", "cpus", "gic", "create_vm2", "max_vcpus", "max_vcpu_id")}
    given["nr_memslots"] = host["nr_memslots"]
    rule = rules.ipa_limit(fields["parange"], host["page_shift"], fields["lpa2"])
    given["ipa_limit"] = fields["stated_ipa_limit"] or rule
    given["features"] = sum(1 << bit for bit in fields["features"])
    stated = facts.tables["caps"]
    by_rule = known.enable_caps | ({cap.KVM_CAP_ARM_MTE} if rules.has_mte(registers) else set())
    enable_caps = facts.values.get("enable_caps", by_rule)
    masks = rules.writable_masks(known.writable_masks, registers) | facts.tables["writable_masks"]
    return {
        "caps": {**rules.capabilities(known.caps, given, registers), **stated},
        "vm_caps": {cap.KVM_CAP_MSI_DEVID: 0, **facts.tables["vm_caps"]},
        "enable_caps": frozenset(number for number in enable_caps if stated.get(number) != 0),
        "writable_masks": {enc: mask for enc, mask in masks.items() if mask},
    }


def _stated_ipa_limit(facts: Facts, page_shift: int, fields: dict[str, Any]) -> int:
    """What the kernel gives of what the host has; 0: all of it."""
    rule = rules.ipa_limit(fields["parange"], page_shift, fields["lpa2"])
    limit: int = facts.values.get("ipa_limit", rule)
    if limit > rule:
        raise facts.wrong("ipa_limit", f"{limit} bits: PARange, granule and kernel give {rule}", f"32 to {rule}")
    return limit if limit < rule else 0


def _creation_only(facts: Facts, common: dict[str, Any]) -> profile.Profile:
    """A host of another architecture: it answers KVM_CHECK_EXTENSION and creation."""
    for key in (*facts.values, *(name for name, table in facts.tables.items() if table)):
        if KEYS[key].arm64_only:
            raise facts.wrong(key, f"exists on arm64 hosts only, not on {common['arch']}")
    limits = _limits(facts, facts.values.get("max_vcpus", _OTHER_VCPUS))
    vm_types = facts.values.get("vm_types", 0)
    answers = {
        cap.KVM_CAP_NR_VCPUS: min(common["cpus"], limits["max_vcpus"]),
        cap.KVM_CAP_NR_MEMSLOTS: limits["nr_memslots"],
        cap.KVM_CAP_MAX_VCPUS: limits["max_vcpus"],
        cap.KVM_CAP_MAX_VCPU_ID: limits["max_vcpu_id"],
        cap.KVM_CAP_CHECK_EXTENSION_VM: 1,
        cap.KVM_CAP_VM_TYPES: vm_types,
        cap.KVM_CAP_CREATE_VM2: common["create_vm2"],
    }
    return profile.Profile(
        **common,
        **limits,
        vm_types=vm_types,
        mode="",
        parange=0,
        pa_bits=0,
        granules=(),
        gic=(),
        caps={number: value for number, value in sorted(answers.items()) if value} | facts.tables["caps"],
        vm_caps=facts.tables["vm_caps"],
        targets=(),
        preferred_target=0,
    )
