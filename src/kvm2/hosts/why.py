"""What a kernel's errno means, by ioctl: the cases that need nothing but the name.

From the kernel's own sources (6.12) and Documentation/virt/kvm/api.rst; an errno that several checks give has all of
them in its line.
"""

from __future__ import annotations

import errno

_INIT_FIRST = "KVM_ARM_VCPU_INIT comes first"
_NOT_FINAL = "a vCPU with SVE needs KVM_ARM_VCPU_FINALIZE(KVM_ARM_VCPU_SVE) first"
_NO_IRQCHIP = "the VM has no interrupt controller in the kernel: create_irqchip() first"
_NO_PIT = "the VM has no PIT in the kernel: create_pit() first"

# What an errno means whatever was asked.
ANYWHERE = {
    errno.EMFILE: "this process has as many open files as it may (ulimit -n)",
    errno.ENFILE: "this machine has as many open files as it may (fs.file-max)",
    errno.EFAULT: "an address in the argument leads to memory that this process may not access",
    errno.EIO: "the VM belongs to another process, or a fault inside it has ended it",
}

WHY: dict[tuple[str, int], str] = {
    ("KVM_CREATE_VM", errno.ENOMEM): "the kernel has no memory for another VM",
    ("KVM_CREATE_VM", errno.EPERM): "this type of VM needs CAP_SYS_ADMIN",
    ("KVM_CREATE_VM", errno.ENOENT): "the kernel module for this type of VM is not loaded",
    ("KVM_CREATE_VM", errno.EBUSY): "another hypervisor has the CPU's virtualisation",
    ("KVM_CREATE_VCPU", errno.EBUSY): "the interrupt controller is initialised: every vCPU must be made before",
    ("KVM_CREATE_VCPU", errno.ENOMEM): "the kernel has no memory for another vCPU",
    ("KVM_CREATE_DEVICE", errno.ENODEV): "this host has no such device for its guests",
    ("KVM_CREATE_DEVICE", errno.EEXIST): "the VM has such a device already",
    ("KVM_CREATE_DEVICE", errno.EBUSY): "a vCPU of this VM has run: its interrupt controller must be made before",
    ("KVM_GET_DIRTY_LOG", errno.ENOENT): "the slot does not exist, or has no LOG_DIRTY_PAGES flag",
    ("KVM_GET_DIRTY_LOG", errno.EINVAL): "no slot can have this number",
    ("KVM_GET_API_VERSION", errno.EINVAL): "it takes no argument",
    ("KVM_GET_VCPU_MMAP_SIZE", errno.EINVAL): "it takes no argument",
    ("KVM_CHECK_EXTENSION", errno.EINVAL): "the kernel answers this capability with an error",
    ("KVM_SET_MP_STATE", errno.EINVAL): "a state that this architecture, or a VM without interrupt controller, has not",
    ("KVM_ARM_GET_REG_WRITABLE_MASKS", errno.EINVAL): "range must be 0 (feature ID registers), the reserved words too",
    ("KVM_CLEAR_DIRTY_LOG", errno.ENOENT): "the slot does not exist, or has no LOG_DIRTY_PAGES flag",
    ("KVM_CLEAR_DIRTY_LOG", errno.EINVAL): "first_page must be a multiple of 64, and num_pages too except at the end",
    (
        "KVM_ENABLE_CAP",
        errno.EINVAL,
    ): "a capability that cannot be enabled here, flags, or an argument it does not take",
    ("KVM_RUN", errno.ENOEXEC): _INIT_FIRST,
    ("KVM_RUN", errno.EPERM): _NOT_FINAL,
    ("KVM_RUN", errno.ENXIO): "an interrupt controller of this VM was never initialised",
    ("KVM_RUN", errno.EFAULT): "the guest needs memory of a slot that this process does not have (unmapped, protected)",
    ("KVM_RUN", errno.ENOSYS): "the guest's access outside memory came without a syndrome: KVM_CAP_ARM_NISV_TO_USER",
    ("KVM_RUN", errno.ENOMEM): "the kernel has no memory for the guest's page tables",
    ("KVM_RUN", errno.EINVAL): "the registers are in a state that no CPU can be in, or kvm_run holds a wrong value",
    ("KVM_ARM_VCPU_INIT", errno.ENOENT): "a feature bit that this kernel does not know",
    ("KVM_ARM_VCPU_INIT", errno.EINVAL): (
        "a feature that this host does not have, half of the pointer authentication pair, features that differ from "
        "the VM's other vCPUs, or a target other than KVM_ARM_PREFERRED_TARGET"
    ),
    ("KVM_ARM_VCPU_FINALIZE", errno.ENOEXEC): _INIT_FIRST,
    ("KVM_ARM_VCPU_FINALIZE", errno.EPERM): "the SVE vector lengths of this vCPU are final already",
    ("KVM_ARM_VCPU_FINALIZE", errno.EINVAL): "only SVE is finalised, on a vCPU that was initialised with it",
    ("KVM_GET_ONE_REG", errno.ENOEXEC): _INIT_FIRST,
    ("KVM_GET_ONE_REG", errno.ENOENT): "this vCPU has no such register",
    ("KVM_GET_ONE_REG", errno.EPERM): _NOT_FINAL,
    ("KVM_GET_ONE_REG", errno.EINVAL): "not the id of a register, or of another size",
    ("KVM_SET_ONE_REG", errno.ENOEXEC): _INIT_FIRST,
    ("KVM_SET_ONE_REG", errno.ENOENT): "this vCPU has no such register",
    ("KVM_SET_ONE_REG", errno.EPERM): "the SVE vector lengths are final (VLS), or are not yet (Z, P, FFR)",
    ("KVM_SET_ONE_REG", errno.EBUSY): "the VM has run: its ID registers and firmware registers are fixed",
    ("KVM_SET_ONE_REG", errno.EINVAL): (
        "a value that this register cannot take: an ID register above the host's, SVE lengths that are not the host's "
        "own up to a maximum, or a wrong size"
    ),
    ("KVM_GET_REG_LIST", errno.ENOEXEC): _INIT_FIRST,
    ("KVM_GET_REG_LIST", errno.EPERM): _NOT_FINAL,
    ("KVM_GET_REG_LIST", errno.E2BIG): "there are more registers than there is room for; n says how many",
    ("KVM_GET_VCPU_EVENTS", errno.ENOEXEC): _INIT_FIRST,
    ("KVM_SET_VCPU_EVENTS", errno.ENOEXEC): _INIT_FIRST,
    ("KVM_SET_SREGS", errno.EINVAL): (
        "control registers that no CPU can have together: paging without protection, long mode without PAE or "
        "EFER.LME, reserved bits of CR4 or EFER, or an APIC base that cannot be"
    ),
    ("KVM_SET_SREGS2", errno.EINVAL): "as KVM_SET_SREGS, or PDPTR flags without PAE paging",
    ("KVM_SET_CPUID2", errno.EINVAL): "CPUID cannot change after KVM_RUN, or names features that this host cannot give",
    ("KVM_SET_CPUID2", errno.E2BIG): "more entries than the kernel takes",
    ("KVM_GET_SUPPORTED_CPUID", errno.E2BIG): "there are more entries than there is room for",
    ("KVM_GET_EMULATED_CPUID", errno.E2BIG): "there are more entries than there is room for",
    ("KVM_GET_MSR_INDEX_LIST", errno.E2BIG): "there are more MSRs than there is room for; nmsrs says how many",
    (
        "KVM_ENABLE_CAP",
        errno.EEXIST,
    ): "the VM has an interrupt controller, or vCPUs, already: this must come before them",
    ("KVM_SMI", errno.ENOTTY): "this kernel has no system management mode (CONFIG_KVM_SMM)",
    ("KVM_SMI", errno.EINVAL): "this kernel has no system management mode (CONFIG_KVM_SMM)",
    ("KVM_CREATE_IRQCHIP", errno.EEXIST): "the VM has an interrupt controller already",
    ("KVM_CREATE_IRQCHIP", errno.EINVAL): "the VM has vCPUs already: create_irqchip() comes before create_vcpu()",
    ("KVM_GET_IRQCHIP", errno.ENXIO): _NO_IRQCHIP,
    ("KVM_SET_IRQCHIP", errno.ENXIO): _NO_IRQCHIP,
    ("KVM_GET_IRQCHIP", errno.EINVAL): "chip_id: 0 is the master PIC, 1 the slave, 2 the IOAPIC",
    ("KVM_SET_IRQCHIP", errno.EINVAL): "chip_id: 0 is the master PIC, 1 the slave, 2 the IOAPIC",
    ("KVM_IRQ_LINE", errno.ENXIO): _NO_IRQCHIP,
    ("KVM_CREATE_PIT2", errno.EEXIST): "the VM has a PIT already",
    ("KVM_CREATE_PIT2", errno.ENOENT): _NO_IRQCHIP,
    ("KVM_CREATE_PIT2", errno.ENXIO): _NO_IRQCHIP,
    ("KVM_GET_PIT2", errno.ENXIO): _NO_PIT,
    ("KVM_SET_PIT2", errno.ENXIO): _NO_PIT,
    ("KVM_GET_LAPIC", errno.EINVAL): _NO_IRQCHIP,
    ("KVM_SET_LAPIC", errno.EINVAL): _NO_IRQCHIP,
    ("KVM_INTERRUPT", errno.EINVAL): "interrupt vectors are 0..255",
    ("KVM_INTERRUPT", errno.ENXIO): "the interrupt controller is in the kernel: raise lines with irq_line()",
    ("KVM_SET_TSS_ADDR", errno.EINVAL): "the three pages must lie below 4 GiB",
    ("KVM_SET_IDENTITY_MAP_ADDR", errno.EINVAL): "the VM has vCPUs already",
}

X86_VM_TYPES = {
    0: "default",
    1: "SW_PROTECTED (CONFIG_KVM_SW_PROTECTED_VM)",
    2: "SEV (kvm_amd with sev=1)",
    3: "SEV_ES (kvm_amd with sev_es=1)",
    4: "SNP (kvm_amd with sev_snp=1)",
    5: "TDX (kvm_intel with tdx=1)",
}
POWERPC_TYPES = {1: "HV (module kvm_hv)", 2: "PR (module kvm_pr)"}


def of_machine_type(arch: str, word: int, offered: int) -> str:
    """Why a kernel that is not arm64 refused a machine type with EINVAL. `offered`: x86's KVM_CAP_VM_TYPES.

    >>> of_machine_type("x86_64", 4, 1)
    'SNP (kvm_amd with sev_snp=1) is not there; this kernel offers 0 (KVM_CAP_VM_TYPES)'
    """
    if arch == "x86_64":
        have = ", ".join(str(bit) for bit in range(32) if (offered | 1) >> bit & 1)
        source = "KVM_CAP_VM_TYPES" if offered else "it has no KVM_CAP_VM_TYPES"
        name = X86_VM_TYPES.get(word, f"VM type {word}")
        return f"{name} is not there; this kernel offers {have} ({source})"
    if arch == "s390x":
        if word & ~1:
            return f"type {word:#x}: only bit 0 (UCONTROL) has a meaning"
        return "UCONTROL needs CAP_SYS_ADMIN, and a kernel with CONFIG_KVM_S390_UCONTROL"
    if arch == "powerpc":
        if word in POWERPC_TYPES:
            return f"{POWERPC_TYPES[word]} is not loaded, or this CPU cannot"
        return f"type {word}: 0 is the default, 1 HV, 2 PR"
    return f"type {word}: {arch} has 0 only"
