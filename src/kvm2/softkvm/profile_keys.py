"""The keys of a host file: what each may hold, declared once for the reader, the messages and docs/hosts.md.

A check takes what TOML gave and returns what the profile keeps, or raises ValueError with the reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvm2.abi.caps import CAPABILITIES, name_of
from kvm2.softkvm import profile_registers as reg
from kvm2.softkvm.profile_rules import GRANULES, PA_BITS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KERNELS = Path(__file__).parent / "kernels"

ARCHES = ("arm64", "x86_64", "s390x", "powerpc")
MODES = ("vhe", "nvhe", "hvhe", "protected")
BASES = ("recorded", "sourced", "rule", "stated")
TYPE_WORDS = {
    "arm64": ("none", "log2-v3", "log2", "ps", "enum", "delta5", "delta", "pointer"),
    "x86_64": ("x86-64",),
    "s390x": ("s390x",),
    "powerpc": ("powerpc",),
}
GICS = ("v2", "v3", "its")
WITHOUT = ("pauth", "pmu", "el1_32bit", "aarch32", "mte")
FIRMWARE = {"WORKAROUND_1": 1, "WORKAROUND_2": 2, "WORKAROUND_3": 3}

QUIRKS = {
    "no-lpa2": "the kernel does not use LPA2: 48 bits at most with 4K and 16K pages (before 6.8)",
    "own-target-only": "KVM_ARM_VCPU_INIT takes only the target of the host's own core, the preferred one",
    "per-vcpu-features": "vCPU features are checked per vCPU: vCPUs of one VM may differ",
    "fixed-id-registers": "ID registers take only their own value: any change is EINVAL",
    "hardware-caches": "CLIDR_EL1 and CCSIDR are the hardware's own, not made up by the kernel",
    "esr-high-word": "after an injected abort ESR_EL1 has 0xffffffff in its high word",
    "vcpu-id-32bit": "KVM_CREATE_VCPU takes the low 32 bits of its argument and ignores the others",
    "smc-not-handled": "an SMC of the guest returns -1 whatever it asked",
}


class Key(NamedTuple):
    """One key: its check, what is allowed (for messages and the documentation), its meaning."""

    check: Callable[[object], object]
    allowed: str
    meaning: str
    arm64_only: bool = False


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _between(low: int, high: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        number = _integer(value)
        if not low <= number <= high:
            raise ValueError(f"{number} is out of range")
        return number

    return check


def _one_of(*choices: object) -> Callable[[object], object]:
    def check(value: object) -> object:
        if isinstance(value, bool) or value not in choices:
            raise ValueError(f"{value!r} is not one of the choices")
        return value

    return check


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is not a text")
    return value


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is not true or false")
    return value


def _list(item: Callable[[object], object], *, empty: bool = True) -> Callable[[object], tuple[object, ...]]:
    def check(value: object) -> tuple[object, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{value!r} is not a list")
        if not value and not empty:
            raise ValueError("the list is empty")
        items = tuple(item(one) for one in value)
        if len(set(items)) != len(items):
            raise ValueError("an item is given twice")
        return items

    return check


def _ascending(item: Callable[[object], object], *, empty: bool = True) -> Callable[[object], tuple[object, ...]]:
    checked = _list(item, empty=empty)

    def check(value: object) -> tuple[object, ...]:
        items = checked(value)
        if list(items) != sorted(items):  # type: ignore[type-var]
            raise ValueError("the list is not in ascending order")
        return items

    return check


def _table(
    key: Callable[[str], object], item: Callable[[object], object], what: str
) -> Callable[[object], dict[object, object]]:
    def check(value: object) -> dict[object, object]:
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is not a table")
        found: dict[object, object] = {}
        for name, one in value.items():
            try:
                number = key(name)
            except (KeyError, ValueError):
                raise ValueError(f"{name!r} is not {what}") from None
            if number in found:
                raise ValueError(f"{name!r} is given twice under two names")
            try:
                found[number] = item(one)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return found

    return check


def _ccsidr_index(name: str) -> int:
    number = int(name, 0)
    if not 0 <= number <= 13:
        raise ValueError
    return number


def kernels() -> tuple[str, ...]:
    """The kernel versions whose constant answers are known."""
    return tuple(sorted(path.stem for path in KERNELS.glob("*.toml")))


def _described(name: str) -> int:
    """The encoding of a register that a host describes; KeyError for any other."""
    enc = reg.encoding(name)
    if not reg.is_described(enc):
        raise KeyError(name)
    return enc


def _feature_id(name: str) -> int:
    """The encoding of a register that KVM_ARM_GET_REG_WRITABLE_MASKS has a place for; KeyError for any other."""
    enc = reg.encoding(name)
    if enc >> 14 != 3 or enc >> 7 & 15 or enc >> 3 & 15 > 7 or enc >> 11 & 7 not in (0, 1, 3):
        raise KeyError(name)
    return enc


def _capability(name: str) -> int:
    """The number of KVM_CAP_NAME; of one that a 6.12 kernel has no name for, KVM_CAP_<number>. KeyError: neither."""
    number = CAPABILITIES.get(name)
    if number is None:
        digits = name.removeprefix("KVM_CAP_")
        if digits == name or not digits.isdecimal() or name_of(int(digits)) != name:
            raise KeyError(name)
        number = int(digits)
    return number


def _capability_name(value: object) -> int:
    try:
        return _capability(value if isinstance(value, str) else "")
    except KeyError:
        raise ValueError(f"{value!r} is not a KVM_CAP_ name") from None


_U64 = _between(0, (1 << 64) - 1)
_S32 = _between(-4095, (1 << 31) - 1)
_register_table = _table(_described, _U64, "a register that tells hosts apart, by its Arm ARM name or as S3_0_C0_C7_0")
_capability_table = _table(_capability, _S32, "a KVM_CAP_ name")


def _choices(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)


KEYS: dict[str, Key] = {
    "title": Key(_text, "a text", "one line: what this host is"),
    "base": Key(
        _text, "a described host, or a path relative to this file", "the host whose facts this one starts from"
    ),
    "basis": Key(_one_of(*BASES), _choices(BASES), "where the description comes from"),
    "arch": Key(_one_of(*ARCHES), _choices(ARCHES), "hosts other than arm64 answer creation only"),
    "kernel": Key(_text, _choices(kernels()), "the kernel version: its constant answers and its quirks"),
    "mode": Key(_one_of(*MODES), _choices(MODES), "how KVM runs at EL2; protected is pKVM", True),
    "type_word": Key(
        _one_of(*(word for words in TYPE_WORDS.values() for word in words)),
        "; ".join(f"{arch}: {_choices(words)}" for arch, words in TYPE_WORDS.items()),
        "what the type word of KVM_CREATE_VM means on this host",
    ),
    "create_vm2": Key(
        _between(0, 15),
        "0 (a mainline kernel) to 15",
        "KVM_CAP_CREATE_VM2: 1 the attribute list, 2 the fixed struct, 4 the negotiation phase, 8 KVM_DESCRIBE_VM2",
    ),
    "page_shift": Key(_one_of(*GRANULES), _choices(GRANULES), "log2 of the host's page size"),
    "pa_bits": Key(_one_of(*PA_BITS), _choices(PA_BITS), "the PARange field of ID_AA64MMFR0_EL1, in bits", True),
    "granules": Key(
        _ascending(_one_of(*GRANULES), empty=False),
        "a list of " + _choices(GRANULES),
        "the TGran fields, both stages",
        True,
    ),
    "lpa2": Key(_boolean, "true, false", "the TGran fields say 52 bits for the 4K and 16K granules", True),
    "vmid_bits": Key(_one_of(8, 16), "8, 16", "the VMIDBits field of ID_AA64MMFR1_EL1", True),
    "fwb": Key(_boolean, "true, false", "the FWB field of ID_AA64MMFR2_EL1", True),
    "cnp": Key(_boolean, "true, false", "the CnP field of ID_AA64MMFR2_EL1", True),
    "sve_vqs": Key(
        _ascending(_between(1, 16)),
        "a list of 1 to 16",
        "SVE lengths in quadwords of 128 bits; an empty list: no SVE",
        True,
    ),
    "gic": Key(
        _list(_one_of(*GICS)), "a list of " + _choices(GICS), "the interrupt controllers that a guest can have", True
    ),
    "without": Key(
        _list(_one_of(*WITHOUT)),
        "a list of " + _choices(WITHOUT),
        "clears the ID register fields of these features",
        True,
    ),
    "cpus": Key(_between(1, 4096), "1 to 4096", "CPUs online: KVM_CAP_NR_VCPUS"),
    "ipa_limit": Key(
        _between(32, 52),
        "32 to 52, not above what PARange and granule give",
        "KVM_CAP_ARM_VM_IPA_SIZE of a kernel that is built for less (CONFIG_ARM64_PA_BITS)",
        True,
    ),
    "max_vcpus": Key(_between(1, 4096), "1 to 4096 (arm64: 512; with a GICv2 alone: 8)", "KVM_CAP_MAX_VCPUS"),
    "max_vcpu_id": Key(_between(1, 16384), "1 to 16384", "KVM_CAP_MAX_VCPU_ID"),
    "nr_memslots": Key(_between(1, 32767), "1 to 32767", "KVM_CAP_NR_MEMSLOTS"),
    "vm_types": Key(_between(0, (1 << 32) - 1), "a mask of 32 bits", "KVM_CAP_VM_TYPES (x86_64)"),
    "quirks": Key(
        _list(_one_of(*QUIRKS)), _choices(tuple(QUIRKS)), "named differences, besides those of the kernel", True
    ),
    "assumed": Key(_list(_text), "a list of keys", "keys whose value has no source of its own"),
    "enable_caps": Key(
        _list(_capability_name),
        "a list of KVM_CAP_ names",
        "what KVM_ENABLE_CAP takes on a VM, where that is not the kernel's own list",
        True,
    ),
    "registers": Key(
        _register_table,
        "register = 64-bit value: ID registers, MIDR, CTR, CLIDR, DCZID, PMCR, PMCEID, CNTFRQ, ACTLR, AMAIR",
        "what a vCPU with every feature sees after KVM_ARM_VCPU_INIT",
        True,
    ),
    "firmware": Key(
        _table(FIRMWARE.__getitem__, _between(0, 3), _choices(tuple(FIRMWARE))),
        "WORKAROUND_1, _2, _3 = 0 (not available) to 3, as in uapi/asm/kvm.h",
        "KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_n after INIT",
        True,
    ),
    "ccsidr": Key(
        _table(_ccsidr_index, _between(0, (1 << 32) - 1), "a CSSELR value from 0 to 13"),
        "CSSELR = CCSIDR",
        "the cache geometry, where the kernel shows the hardware's",
        True,
    ),
    "caps": Key(
        _capability_table, "KVM_CAP_name = answer (negative: an errno)", "KVM_CHECK_EXTENSION where no rule gives it"
    ),
    "writable_masks": Key(
        _table(_feature_id, _U64, "an ID register, by its Arm ARM name or as S3_0_C0_C7_0"),
        "register = mask of bits; 0: none",
        "KVM_ARM_GET_REG_WRITABLE_MASKS, where it is not the kernel's own",
        True,
    ),
    "vm_caps": Key(_capability_table, "KVM_CAP_name = answer", "KVM_CHECK_EXTENSION on a VM, where it differs"),
    "sources": Key(_table(str, _text, "a key"), "key = a text", "where a figure is from"),
}


def reference() -> str:
    """The keys as a Markdown table, for docs/hosts.md."""
    rows = [
        f"| `{name}` | {key.allowed} | {key.meaning}{' (arm64)' if key.arm64_only else ''} |"
        for name, key in KEYS.items()
    ]
    return "\n".join(["| key | allowed | meaning |", "|---|---|---|", *rows]) + "\n"


def quirk_reference() -> str:
    """The quirks as a Markdown table, for docs/hosts.md."""
    return (
        "\n".join(["| quirk | meaning |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in QUIRKS.items())])
        + "\n"
    )
