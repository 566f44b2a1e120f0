"""What an entry may know of the host that it is played on, all of it asked of the host through the KVM API.

So a rule such as "40 is refused where the limit is lower" judges a host that nobody thought of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvm2.abi import caps
from kvm2.lab.scenarios import Answer, Scenario, Step
from kvm2.names import DEVICES

if TYPE_CHECKING:
    from kvm2.lab.catalogue.expressions import Facts

# Every fact by name, with what it is: `kvm2 scenarios` shows it, and entries may use nothing else.
MEANINGS = {
    "arch": "the architecture: arm64, x86_64, s390x, powerpc",
    "page": "bytes in a page of the host",
    "vm2": "KVM_CAP_CREATE_VM2: bit 0 list, 1 fixed structure, 2 negotiation, 3 description",
    "log2": "1 where type 32 of KVM_CREATE_VM asks for 32 bits, as in mainline since 4.20",
    "limit": "KVM_CAP_ARM_VM_IPA_SIZE: the largest IPA size in bits",
    "default": "the IPA size that type 0 asks for",
    "smallest": "the smallest IPA size in bits",
    "protected": "1 where one IPA size is given whatever is asked for (pKVM)",
    "granules": "bit n: stage-2 pages of 1 << n bytes can be had",
    "capabilities": "bits of the attribute ARCH_CAPABILITIES that can be set",
    "machine_types": "bit n: machine type n can be had",
    "max_vcpus": "KVM_CAP_MAX_VCPUS",
    "max_vcpu_id": "KVM_CAP_MAX_VCPU_ID: ids are below it",
    "writable_masks": "KVM_CAP_ARM_SUPPORTED_REG_MASK_RANGES: kernels since 6.7",
    "memslots": "KVM_CAP_NR_MEMSLOTS",
    "sve": "KVM_CAP_ARM_SVE",
    "vls": "the host's SVE vector lengths: bit vq-1 is a length of vq * 128 bits",
    "mte": "KVM_CAP_ARM_MTE",
    "ptrauth": "KVM_CAP_ARM_PTRAUTH_ADDRESS and _GENERIC both",
    "el1_32bit": "KVM_CAP_ARM_EL1_32BIT",
    "gic_v2": "1 where KVM_CREATE_DEVICE has a GICv2",
    "gic_v3": "1 where KVM_CREATE_DEVICE has a GICv3",
    "gic_attributes": "1 where the GICv3 has its attributes, so that it can be placed in memory",
    "mmfr0": "ID_AA64MMFR0_EL1 of a vCPU",
    "pfr0": "ID_AA64PFR0_EL1 of a vCPU",
    "isar0": "ID_AA64ISAR0_EL1 of a vCPU",
    "isar1": "ID_AA64ISAR1_EL1 of a vCPU",
    "midr": "MIDR_EL1 of a vCPU",
}
CAPABILITIES = {
    "vm2": 1024,
    "limit": caps.KVM_CAP_ARM_VM_IPA_SIZE,
    "max_vcpus": caps.KVM_CAP_MAX_VCPUS,
    "max_vcpu_id": caps.KVM_CAP_MAX_VCPU_ID,
    "writable_masks": caps.KVM_CAP_ARM_SUPPORTED_REG_MASK_RANGES,
    "memslots": caps.KVM_CAP_NR_MEMSLOTS,
    "sve": caps.KVM_CAP_ARM_SVE,
    "mte": caps.KVM_CAP_ARM_MTE,
    "ptrauth": caps.KVM_CAP_ARM_PTRAUTH_ADDRESS,
    "ptrauth2": caps.KVM_CAP_ARM_PTRAUTH_GENERIC,
    "el1_32bit": caps.KVM_CAP_ARM_EL1_32BIT,
}
REGISTERS = {
    "mmfr0": "ID_AA64MMFR0_EL1",
    "pfr0": "ID_AA64PFR0_EL1",
    "isar0": "ID_AA64ISAR0_EL1",
    "isar1": "ID_AA64ISAR1_EL1",
    "midr": "MIDR_EL1",
}
# What entries may call by name beside the facts: devices, and the capabilities of linux/kvm.h.
CONSTANTS: Mapping[str, Any] = {
    **{name.replace("-", "_"): number for name, number in DEVICES.items()},
    **caps.CAPABILITIES,
}


def questions(arch: str) -> Scenario:
    """The scenario that asks a host for its facts."""
    steps: list[Step] = [{"op": "check_ext", "fd": "kvm", "cap": number} for number in CAPABILITIES.values()]
    steps.append({"op": "describe"})
    if arch == "arm64":
        # The default of 40, where the host has it; 32 bits are had everywhere where it has not.
        steps += [{"op": "create_vm", "id": "vm", "type": 0}, {"op": "create_vm", "id": "vm", "type": 32}]
        steps += [
            {"op": "create_device", "vm": "vm", "id": "test", "type": DEVICES[name], "flags": 1}
            for name in ("vgic-v2", "vgic-v3")
        ]
        steps += [
            {"op": "create_vm", "id": "third", "type": 0},
            {"op": "create_vm", "id": "third", "type": 32},
            {"op": "create_device", "vm": "third", "id": "gic", "type": DEVICES["vgic-v3"], "flags": 0},
            {"op": "dev_attr", "verb": "has", "dev": "gic", "group": 0, "attr": 2, "data": ""},
        ]
        steps += _vcpu("plain", 0, ["psci_0_2"])
        steps += [{"op": "get_register", "vcpu": "plain", "register": name} for name in REGISTERS.values()]
        steps += [
            {"op": "create_vm", "id": "second", "type": 0},
            {"op": "create_vm", "id": "second", "type": 32},
            *_vcpu("vector", 0, ["psci_0_2", "sve"], "second"),
            {"op": "get_register", "vcpu": "vector", "register": "sve_vls"},
        ]
    return Scenario("facts", tuple(steps))


def _vcpu(name: str, number: int, features: list[str], vm: str = "vm") -> list[Step]:
    return [
        {"op": "create_vcpu", "vm": vm, "id": name, "vcpu_id": number},
        {"op": "init", "vm": vm, "vcpu": name, "features": features},
    ]


def read(answers: tuple[Answer, ...], arch: str, page: int) -> Facts:
    """The facts in the answers to `questions`."""
    asked = questions(arch).steps
    values = [_value(answer) for answer in answers]
    found: dict[str, Any] = dict(zip(CAPABILITIES, values, strict=False))
    generic = found.pop("ptrauth2")
    found["ptrauth"] = int(bool(found["ptrauth"] and generic))
    rows = _described(answers[len(CAPABILITIES)])
    size = rows.get("ARM64_PHYSADDR_SIZE", {})
    found |= {
        "arch": arch,
        "page": page,
        "default": size.get("def", 40 if arch == "arm64" else 0),
        "smallest": size.get("min", 32 if arch == "arm64" else 0),
        "protected": int(bool(size) and size["min"] == size["max"] != 32),
        "granules": rows.get("ARM64_GRANULE", {}).get("mask", page if arch == "arm64" else 0),
        "capabilities": rows.get("ARCH_CAPABILITIES", {}).get("mask", 0),
        "machine_types": rows.get("MACHINE_TYPE", {}).get("mask", 0),
    }
    registers = {step["register"]: value for step, value in zip(asked, values, strict=True) if "register" in step}
    found |= {fact: registers.get(name, 0) for fact, name in REGISTERS.items()}
    found["vls"] = registers.get("sve_vls", 0)
    types = [answer for step, answer in zip(asked, answers, strict=True) if step.get("type") == 32]
    found["log2"] = int(types[:1] == [[0, 0]])
    devices = {step["type"]: answer for step, answer in zip(asked, answers, strict=True) if step.get("flags")}
    has = [answer for step, answer in zip(asked, answers, strict=True) if step.get("verb") == "has"]
    found["gic_attributes"] = int(has == [[0, 0]])
    for fact, name in (("gic_v2", "vgic-v2"), ("gic_v3", "vgic-v3")):
        found[fact] = int(devices.get(DEVICES[name]) == [0, 0])
    return found


def _value(answer: Answer) -> int:
    """The number in an answer: its output where that is one, else what the ioctl returned; 0 where it was refused."""
    if not isinstance(answer, list) or answer[1]:
        return 0
    return int(answer[2]) if len(answer) > 2 and isinstance(answer[2], int) else int(answer[0])


def _described(answer: Answer) -> Mapping[str, Mapping[str, int]]:
    return answer[2] if isinstance(answer, list) and len(answer) > 2 and isinstance(answer[2], dict) else {}
