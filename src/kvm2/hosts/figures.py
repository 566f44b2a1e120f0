"""What this machine's KVM says of itself, for people: figures with where each is from, and every capability."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvm2.abi import caps, ioctls
from kvm2.errors import KvmError
from kvm2.hosts.why import X86_VM_TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvm2.hosts.lowering import Lowered

CHECKED = "KVM_CHECK_EXTENSION"


def capabilities(host: Lowered) -> Mapping[str, int]:
    """Every capability that the kernel does not answer with 0; a negative value is an errno."""
    found: dict[str, int] = {}
    fd = host.open()
    try:
        for name, number in caps.CAPABILITIES.items():
            try:
                value = host.raw.ioctl(fd, ioctls.KVM_CHECK_EXTENSION, number)
            except KvmError as error:
                value = -(error.errno or 0)
            if value:
                found[name] = value
    finally:
        host.close(fd)
    return found


def figures(host: Lowered) -> list[tuple[str, str, str]]:
    """(what, value, where it is from) of each figure that people look for."""
    kernel, system = host.kernel, os.uname()
    found = [
        ("kernel", f"{system.sysname} {system.release}", "uname"),
        ("architecture", host.arch, "uname"),
        ("page size", f"{(1 << kernel.page_shift) >> 10}K", "sysconf"),
        ("vCPUs (ids)", f"{kernel.max_vcpus} ({kernel.max_vcpu_id})", "KVM_CAP_MAX_VCPUS, KVM_CAP_MAX_VCPU_ID"),
        ("recommended vCPUs", str(kernel.cpus), "KVM_CAP_NR_VCPUS"),
        ("memory slots", str(kernel.nr_memslots), "KVM_CAP_NR_MEMSLOTS"),
        ("KVM_CREATE_VM2", "by the library: kernels have none", "kvm2"),
    ]
    if host.arch != "arm64":
        return [*found, ("VM types", _types(kernel.vm_types), "KVM_CAP_VM_TYPES")]
    lengths = ", ".join(str(128 * vq) for vq in kernel.sve_vqs)
    return [
        *found,
        ("IPA limit", f"{kernel.ipa_limit} bits", "KVM_CAP_ARM_VM_IPA_SIZE"),
        ("VMs may choose their size", "no: " + kernel.one_size if kernel.one_size else "yes", "KVM_CREATE_VM"),
        ("PARange of guests", f"{kernel.parange} ({kernel.pa_bits} bits)", "a vCPU's ID_AA64MMFR0_EL1"),
        ("PARange can be lowered", "yes" if kernel.follows else "no", "KVM_SET_ONE_REG"),
        ("SVE lengths", f"{lengths} bits" if lengths else "no SVE", "a vCPU's KVM_REG_ARM64_SVE_VLS"),
    ]


def _types(mask: int) -> str:
    return ", ".join(
        f"{bit} {X86_VM_TYPES.get(bit, '?').partition(' ')[0]}" for bit in range(32) if (mask | 1) >> bit & 1
    )
