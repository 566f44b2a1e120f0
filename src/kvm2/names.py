"""Names that people may write for numbers: capabilities, vCPU features, devices."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, TypeVar

from kvm2.abi import structs_arm64 as arm
from kvm2.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

T = TypeVar("T")

ATTRIBUTES = "attributes (objects of kvm2.abi.vm2, such as Arm64PhysaddrSize)"

FEATURES = {
    "power_off": arm.KVM_ARM_VCPU_POWER_OFF,
    "el1_32bit": arm.KVM_ARM_VCPU_EL1_32BIT,
    "psci_0_2": arm.KVM_ARM_VCPU_PSCI_0_2,
    "pmu_v3": arm.KVM_ARM_VCPU_PMU_V3,
    "sve": arm.KVM_ARM_VCPU_SVE,
    "ptrauth_address": arm.KVM_ARM_VCPU_PTRAUTH_ADDRESS,
    "ptrauth_generic": arm.KVM_ARM_VCPU_PTRAUTH_GENERIC,
    "has_el2": arm.KVM_ARM_VCPU_HAS_EL2,
}
# KVM_IRQCHIP_* of x86-64.
IRQCHIPS = {"pic-master": 0, "pic-slave": 1, "ioapic": 2}
# KVM_DEV_TYPE_* of linux/kvm.h that an arm64 host may have; "vfio" is everywhere.
DEVICES = {"vfio": 4, "vgic-v2": 5, "vgic-v3": 7, "vgic-its": 8}


def lookup(name: str | int, table: Mapping[str, int], what: str) -> int:
    """The number of a name; numbers are taken as they are. UsageError with the nearest names otherwise."""
    if isinstance(name, int):
        return name
    article = "an" if what[0] in "aeiou" else "a"
    if not isinstance(name, str):
        raise UsageError(f"{name!r} is not {article} {what}: give its name or its number")
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(list(table)[:12])}"
    raise UsageError(f"{name!r} is not {article} {what}: {hint}")


def listed(items: Iterable[T], of: str) -> list[T]:
    """The items; UsageError where there is nothing to go through.

    >>> listed((1, 2), "MSRs")
    [1, 2]
    """
    try:
        return list(items)
    except TypeError:
        raise UsageError(f"{items!r} is not a list of {of}") from None


def capability(name: str | int) -> int:
    """The number of a KVM_CAP_*; the prefix may be left out.

    >>> capability("ARM_VM_IPA_SIZE")
    165
    """
    if isinstance(name, int):
        return name
    from kvm2.abi.caps import CAPABILITIES

    if not isinstance(name, str):
        return lookup(name, CAPABILITIES, "capability")
    full = name.upper() if name.upper().startswith("KVM_CAP_") else f"KVM_CAP_{name.upper()}"
    return lookup(full, CAPABILITIES, "capability")


def capability_words(args: tuple[int, ...]) -> tuple[int, ...]:
    """The four words of `struct kvm_enable_cap`."""
    if len(args) > 4:
        raise UsageError(f"KVM_ENABLE_CAP takes up to 4 words, not {len(args)}")
    return args + (0,) * (4 - len(args))


def device_type(name: str | int) -> int:
    """The KVM_DEV_TYPE_* of a device.

    >>> device_type("vgic-v3")
    7
    """
    return lookup(name, DEVICES, "device")


def feature_bits(features: Iterable[str | int]) -> tuple[int, ...]:
    """The seven words of `struct kvm_vcpu_init` for vCPU features by name or bit number.

    >>> feature_bits(["psci_0_2", 4])[0]
    20
    """
    words = [0] * 7
    for feature in listed(features, "vCPU features"):
        name = feature.lower().removeprefix("kvm_arm_vcpu_") if isinstance(feature, str) else feature
        bit = lookup(name, FEATURES, "vCPU feature")
        if not 0 <= bit < 32 * len(words):
            raise UsageError(f"vCPU feature {bit}: allowed are bits 0 to {32 * len(words) - 1}")
        words[bit // 32] |= 1 << bit % 32
    return tuple(words)
