"""Reads a host file: TOML, inheritance, checks; everything wrong is a HostError with file, key, reason and choices."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from kvm2.abi import caps as cap
from kvm2.abi.caps import CAPABILITIES
from kvm2.errors import HostError
from kvm2.softkvm import profile, profile_fields, profile_sources
from kvm2.softkvm import profile_registers as reg
from kvm2.softkvm import profile_rules as rules
from kvm2.softkvm.profile_keys import KERNELS, KEYS, TYPE_WORDS, kernels

if TYPE_CHECKING:
    from pathlib import Path

_TABLES = ("registers", "firmware", "ccsidr", "caps", "vm_caps", "sources")
_OWN = ("title", "base", "basis", "assumed", "without", "sources")  # what a file says about itself alone
_MOST_BASES = 16


@dataclass
class Facts:
    """What a file and its bases say, merged: the nearest file wins, tables merge entry by entry."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    registers: dict[int, int] = field(default_factory=dict)
    tables: dict[str, dict[Any, Any]] = field(default_factory=lambda: {name: {} for name in _TABLES})
    bases: tuple[str, ...] = ()
    own: dict[str, Any] = field(default_factory=dict)  # the keys of this file itself
    base_sources: dict[str, str] = field(default_factory=dict)

    def wrong(self, key: str, reason: str, allowed: str = "") -> HostError:
        """The error about one key of this file."""
        return HostError(f"{self.path}: {key}: {reason}" + (f"; allowed: {allowed}" if allowed else ""))


def unknown_host(name: str) -> HostError:
    """The error for a name that is no described host: with the nearest names."""
    near = difflib.get_close_matches(name, profile.names(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "`kvm2 hosts` lists them"
    return HostError(f"no described host {name!r}: {hint} A file of your own is given by its path")


def read_profile(path: Path) -> profile.Profile:
    """The profile that a host file describes."""
    facts = _facts(path, ())
    if facts.values.get("arch", "arm64") == "arm64":
        return _arm64(facts)
    return _creation_only(facts)


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HostError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise HostError(f"{path}: is not TOML: {error}") from None


def _facts(path: Path, below: tuple[Path, ...]) -> Facts:
    """Reads `path` on top of its bases; `below` are the files that led here."""
    facts = Facts(path)
    own = {key: _checked(facts, key, value) for key, value in _parse(path).items()}
    facts.own = own
    if "base" in own:
        _inherit(facts, own["base"], (*below, path))
    facts.registers |= own.get("registers", {})
    for key, value in own.items():
        if key in _TABLES:
            facts.tables[key] |= value
        else:
            facts.values[key] = value
    profile_fields.apply(facts, own)
    profile_sources.check(facts)
    return facts


def _checked(facts: Facts, key: str, value: object) -> Any:
    if key not in KEYS:
        near = difflib.get_close_matches(key, KEYS, n=1)
        raise facts.wrong(key, "unknown key" + (f": did you mean {near[0]}?" if near else ""), ", ".join(KEYS))
    try:
        checked = KEYS[key].check(value)
    except ValueError as error:
        raise facts.wrong(key, str(error), KEYS[key].allowed) from None
    if key == "kernel" and checked not in kernels():
        raise facts.wrong(key, f"{checked!r} is not described", KEYS[key].allowed)
    return checked


def _inherit(facts: Facts, base: str, chain: tuple[Path, ...]) -> None:
    if "/" in base or base.endswith(".toml"):
        path = facts.path.parent / base
    else:
        path = profile.HOSTS / f"{base}.toml"
        if not path.is_file():
            raise facts.wrong("base", str(unknown_host(base)))
    if path.resolve() in (known.resolve() for known in chain) or len(chain) > _MOST_BASES:
        raise facts.wrong("base", "the hosts are based on each other: " + " -> ".join(p.name for p in (*chain, path)))
    below = _facts(path, chain)
    facts.registers |= below.registers
    facts.bases = (path.stem, *below.bases)
    facts.base_sources = profile_sources.sources(below)
    facts.values |= {key: value for key, value in below.values.items() if key not in _OWN}
    for name in _TABLES:
        if name not in _OWN:
            facts.tables[name] |= below.tables[name]


@lru_cache(maxsize=8)
def kernel_facts(version: str) -> tuple[dict[int, int], frozenset[int], dict[int, int], frozenset[str]]:
    """A kernel's constant answers: capabilities, ENABLE_CAPs, writable masks, quirks."""
    data = _parse(KERNELS / f"{version}.toml")
    return (
        {CAPABILITIES[name]: value for name, value in data["caps"].items()},
        frozenset(CAPABILITIES[name] for name in data["enable_caps"]),
        {reg.encoding(name): mask for name, mask in data.get("writable_masks", {}).items()},
        frozenset(data["quirks"]),
    )


def _common(facts: Facts) -> dict[str, Any]:
    """The fields that every architecture has, checked against each other."""
    values = facts.values
    arch = values.get("arch", "arm64")
    type_word = values.get("type_word", "log2" if arch == "arm64" else TYPE_WORDS[arch][0])
    if type_word not in TYPE_WORDS[arch]:
        raise facts.wrong("type_word", f"{type_word!r} does not exist on {arch}", ", ".join(TYPE_WORDS[arch]))
    create_vm2 = values.get("create_vm2", 15)
    if create_vm2 & 4 and not create_vm2 & 1:
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
        "sources": profile_sources.sources(facts),
        "assumed": profile_sources.assumed(facts),
        "bases": facts.bases,
    }


def _arm64(facts: Facts) -> profile.Profile:
    common = _common(facts)
    registers, values = facts.registers, facts.values
    profile_fields.check(facts, common["page_shift"])
    constant, enable_caps, masks, quirks = kernel_facts(common["kernel"])
    quirks |= frozenset(values.get("quirks", ()))
    gic = values.get("gic", ("v3", "its"))
    parange = reg.field_of(registers, reg.MMFR0, 0)
    granules = rules.granules(registers)
    sve_vqs = values.get("sve_vqs", ())
    features = rules.features(registers, sve_vqs)
    most = rules.max_vcpus(gic)
    limits = {"max_vcpus": values.get("max_vcpus", most), "nr_memslots": values.get("nr_memslots", 32767)}
    limits["max_vcpu_id"] = values.get("max_vcpu_id", limits["max_vcpus"])
    if limits["max_vcpus"] > most or limits["max_vcpu_id"] < limits["max_vcpus"]:
        raise facts.wrong(
            "max_vcpus", f"{limits['max_vcpus']} is too large", f"up to {most} here, and up to max_vcpu_id"
        )
    has_lpa2 = "no-lpa2" not in quirks and rules.lpa2(registers, common["page_shift"])
    given = {
        "page_shift": common["page_shift"],
        "ipa_limit": rules.ipa_limit(parange, common["page_shift"], has_lpa2),
        "cpus": values.get("cpus", 1),
        "gic": len(gic),
        "create_vm2": common["create_vm2"],
        "features": sum(1 << bit for bit in features),
    }
    targets, preferred = rules.targets(registers.get(reg.encoding(reg.MIDR), 0), "own-target-only" in quirks)
    if rules.has_mte(registers):
        enable_caps |= {cap.KVM_CAP_ARM_MTE}
    return profile.Profile(
        **common,
        **limits,
        mode=values.get("mode", "vhe"),
        parange=parange,
        pa_bits=rules.PA_BITS[parange],
        lpa2=has_lpa2,
        granules=granules,
        vmid_bits=16 if reg.field_of(registers, reg.MMFR1, 4) == 2 else 8,
        fwb=reg.field_of(registers, reg.MMFR2, 40) > 0,
        cnp=reg.field_of(registers, reg.MMFR2, 0) > 0,
        dic=reg.field_of(registers, reg.CTR, 29, 1) > 0,
        sve_vqs=sve_vqs,
        gic=gic,
        cpus=given["cpus"],
        caps={**rules.capabilities(constant, {**given, **limits}, registers), **facts.tables["caps"]},
        vm_caps={cap.KVM_CAP_MSI_DEVID: 0, **facts.tables["vm_caps"]},
        enable_caps=enable_caps,
        features=features,
        targets=targets,
        preferred_target=preferred,
        registers=dict(registers),
        writable_masks=rules.writable_masks(masks, registers),
        firmware=facts.tables["firmware"],
        ccsidr=facts.tables["ccsidr"],
        quirks=quirks,
    )


def _creation_only(facts: Facts) -> profile.Profile:
    """A host of another architecture: it answers KVM_CHECK_EXTENSION and creation."""
    common, values = _common(facts), facts.values
    for key in (*values, *(name for name in _TABLES if facts.tables[name])):
        if KEYS[key].arm64_only:
            raise facts.wrong(key, f"exists on arm64 hosts only, not on {common['arch']}")
    numbers = {
        "cpus": (cap.KVM_CAP_NR_VCPUS, 1),
        "max_vcpus": (cap.KVM_CAP_MAX_VCPUS, 1024),
        "max_vcpu_id": (cap.KVM_CAP_MAX_VCPU_ID, values.get("max_vcpus", 1024)),
        "nr_memslots": (cap.KVM_CAP_NR_MEMSLOTS, 32767),
        "vm_types": (cap.KVM_CAP_VM_TYPES, 0),
    }
    chosen = {key: values.get(key, default) for key, (_, default) in numbers.items()}
    answers = {number: chosen[key] for key, (number, _) in numbers.items()}
    answers[cap.KVM_CAP_CREATE_VM2] = common["create_vm2"]
    answers[cap.KVM_CAP_CHECK_EXTENSION_VM] = 1
    known = {number: value for number, value in answers.items() if value} | facts.tables["caps"]
    return profile.Profile(
        **common,
        **chosen,
        mode="",
        parange=0,
        pa_bits=0,
        granules=(),
        gic=(),
        caps=dict(sorted(known.items())),
        vm_caps=facts.tables["vm_caps"],
        targets=(),
        preferred_target=0,
    )
