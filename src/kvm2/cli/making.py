"""From the options of `spec_options` to a VM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvm2.errors import UsageError
from kvm2.spec import VmSpec

if TYPE_CHECKING:
    from kvm2.kvm import Kvm
    from kvm2.spec import MemoryRange
    from kvm2.vm import Vm

# What the old call has no room for, by option.
_BESIDE_TYPE = {
    "physaddr_bits": "--ipa-bits",
    "sve": "--sve",
    "page_shift": "--granule",
    "max_vcpus": "--max-vcpus",
    "machine_type": "--machine-type",
    "parange_follows_ipa": "--parange-follows-ipa",
}


def spec_of(wanted: dict[str, Any], default_memory: tuple[MemoryRange, ...] = ()) -> VmSpec:
    """The VmSpec that the options ask for."""
    return VmSpec(
        physaddr_bits=wanted["ipa_bits"],
        sve=wanted["sve"],
        page_shift=wanted["granule"],
        max_vcpus=wanted["max_vcpus"],
        machine_type=wanted["machine_type"],
        parange_follows_ipa=wanted["parange_follows_ipa"],
        memory=tuple(wanted["memory"]) or default_memory,
    )


def call_of(wanted: dict[str, Any], spec: VmSpec) -> str:
    """The ioctl that the options choose; UsageError where they contradict each other."""
    if wanted["type_word"] is None:
        return "KVM_CREATE_VM2_FIXED" if wanted["fixed"] else "KVM_CREATE_VM2"
    if wanted["fixed"]:
        raise UsageError("--type is the old KVM_CREATE_VM, --fixed is KVM_CREATE_VM2_FIXED: give one of them")
    beside = [option for name, option in _BESIDE_TYPE.items() if getattr(spec, name) not in (None, False)]
    if beside:
        raise UsageError(f"--type is the old KVM_CREATE_VM, which carries nothing else: leave out {', '.join(beside)}")
    return "KVM_CREATE_VM"


def make_vm(kvm: Kvm, spec: VmSpec, call: str, type_word: int | None) -> Vm:
    """The VM; KvmError with every finding where the host refuses."""
    if call == "KVM_CREATE_VM":
        return kvm.create_vm(type_word or 0)
    return kvm.create_vm2_fixed(spec) if call == "KVM_CREATE_VM2_FIXED" else kvm.create_vm2(spec)
