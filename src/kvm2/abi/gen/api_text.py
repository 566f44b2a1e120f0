"""What `docs/api.rst` says in words: of each call, each attribute, and each errno. Numbers and layouts are generated.

`tests/abi/test_api.py` provokes every errno that is listed here on a described host.
"""

from __future__ import annotations

from typing import Final

INTRO: Final = """
This text is in the manner of Documentation/virt/kvm/api.rst, which it is meant to be added to: it describes the calls
that create a VM from attributes. No kernel has them yet. kvm2 answers them on described hosts, and lowers them to
KVM_CREATE_VM and what follows it on a real ``/dev/kvm``.
"""

GENERAL: Final = """
Whether a kernel has these calls is asked with KVM_CHECK_EXTENSION(KVM_CAP_CREATE_VM2). A kernel without them answers a
request that it does not know with EINVAL, which says nothing: ask first.

All structures have the same layout for 32-bit and 64-bit callers, in native byte order and without implicit padding;
pointers are __u64. Every reserved byte and every pad must be zero, and is checked.

A call that fails has created no file descriptor and changed no VM. Only the report, and fields that are marked as
output, may have been written. All of the caller's memory is read before the first byte is written, each byte once, and
no pointer is kept after the call. New file descriptors are close-on-exec.

Any call may also fail for want of something that is not its own: ENOMEM, EMFILE, and EINTR, after which it can be made
again unchanged.

The errors are classes. EINVAL is what no host could give; EOPNOTSUPP is well-formed and known, but this host cannot
give it; ENOENT is an attribute that this host does not know; E2BIG is something beyond what it knows that is not zero.
"""

# ioctl -> (parameters, what it does).
CALLS: Final[dict[str, tuple[str, str]]] = {
    "KVM_CREATE_VM2": (
        "struct kvm_create_vm2 (in; the report and its count are out)",
        """
Creates a VM from a list of attributes, described below. Attributes that are not in the list have their defaults.
Attributes may stand anywhere in memory, at any alignment and in any order, each at most once.

With ``nr_attrs`` 0 the array, where ``attrs`` is not NULL, ends at its first NULL entry; otherwise exactly ``nr_attrs``
entries are read, and NULL is not allowed among them. A list has at most KVM_CREATE_VM2_MAX_ATTRS entries, an attribute
at most KVM_CREATE_VM2_MAX_ATTR_SIZE bytes.

Everything that is wrong is found, not only the first thing. The call's errno is that of the first finding that is an
error, in this order: the structure itself; the entries by position, within an entry by byte offset; then what is wrong
with the combination, by type. An attribute of type REPORT gets all of them.

The VM has no more than it was asked for: without ARM64_SVE_VLS or KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS the
vCPU feature KVM_ARM_VCPU_SVE is refused, and KVM_CHECK_EXTENSION(KVM_CAP_ARM_SVE) on the VM is 0.
""",
    ),
    "KVM_CREATE_VM2_FIXED": (
        "struct kvm_create_vm2_fixed (in)",
        """
The same from a structure of fixed size, for callers that want the commonest choices only. Its number differs from
KVM_CREATE_VM2 in the size alone.

On arm64 KVM_ARM_SELECT_IPA with ``ipa_size`` stands for the attribute ARM64_PHYSADDR_SIZE. KVM_ARM_SVE_CAPABLE with
``sve_vlen`` stands for ARM64_SVE_VLS with the host's vector lengths up to that one, which must itself be one of them;
with ``sve_vlen`` 0 it stands for KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS. A field whose bit in ``capabilities`` is
clear must be zero. Other architectures use nothing of ``dummy``.
""",
    ),
    "KVM_DESCRIBE_VM2": (
        "struct kvm_describe_vm2 (in/out)",
        """
Tells which attributes this host takes, one struct kvm_vm2_attr_info each, ascending by type. Each entry holds with the
other attributes at their defaults: a granule, for example, may change the largest size.

``def`` is what is in force without the attribute, and may lie outside of ``min`` and ``max``: an arm64 host with 36
bits has the default 40, and a program that asks first learns it before it fails.
""",
    ),
    "KVM_VM2_SET_ATTRS": (
        "struct kvm_create_vm2 (in; the report and its count are out)",
        """
Sets attributes of a VM that was created with the attribute NEGOTIATE and not yet committed. Each value is checked
alone: it is refused only where no combination could give it. Setting an attribute again replaces it. All attributes of
the list are set, or none.

Until KVM_VM2_COMMIT every other ioctl of the VM is ENOEXEC, except KVM_VM2_GET_ATTR and KVM_CHECK_EXTENSION, which
answer for the VM as it is configured so far.
""",
    ),
    "KVM_VM2_GET_ATTR": (
        "struct kvm_vm2_attr (in/out)",
        """
Reads the value in force of an attribute, defaults included, in the form that it has in a list. It works on every VM,
whichever call made it.

``size`` is the room at ``attr``; the kernel's own size is written there. A larger buffer is filled up with zeros. One
that is smaller gets as much as fits, as long as nothing that is not zero is cut off.
""",
    ),
    "KVM_VM2_COMMIT": (
        "struct kvm_create_vm2 (in; the report and its count are out)",
        """
Ends the negotiation phase: sets the attributes of the list, which may be empty, checks the whole, and makes the VM
ready for memory slots, vCPUs and devices. Where it fails the VM stays as it was, still to be configured.
""",
    ),
}

_LIST: Final[dict[str, str]] = {
    "EFAULT": "the structure, the array or an attribute cannot be read; an entry within nr_attrs is NULL; or the "
    "report cannot be written, which comes before every other error",
    "EINVAL": "a pad or a flag is set that must not be; a size is too small or no multiple of 8; a value or a "
    "combination that no host could give",
    "E2BIG": "more attributes, or a longer one, than is allowed; a byte beyond what this host knows is not zero",
    "EEXIST": "the same attribute twice",
    "ENOENT": "this host knows no such attribute",
    "EOPNOTSUPP": "this host cannot give what is asked for, or what the default is; or version is not 0",
}

ERRORS: Final[dict[str, dict[str, str]]] = {
    "KVM_CREATE_VM2": _LIST,
    "KVM_CREATE_VM2_FIXED": {
        "EFAULT": "the structure cannot be read",
        "EINVAL": "a field is set whose bit in capabilities is clear; or a size that no host could give",
        "E2BIG": "a pad, or what this architecture does not use, is not zero",
        "EOPNOTSUPP": "this host cannot give what is asked for, or what the default is; a bit in capabilities is not "
        "known; or version is not 0",
    },
    "KVM_DESCRIBE_VM2": {
        "EFAULT": "the structure or the entries cannot be read or written",
        "E2BIG": "there are more than count entries: only count was written",
        "EOPNOTSUPP": "version is not 0",
    },
    "KVM_VM2_SET_ATTRS": {
        **_LIST,
        "EINVAL": _LIST["EINVAL"] + "; or NEGOTIATE is in the list",
        "EOPNOTSUPP": "no combination on this host gives what is asked for; or version is not 0",
        "EBUSY": "this VM is not being configured, or not any more",
    },
    "KVM_VM2_GET_ATTR": {
        "EFAULT": "the structure cannot be read, or the attribute cannot be written",
        "E2BIG": "size is less than what was first published of the attribute, or would cut off a byte that is not "
        "zero",
        "ENOENT": "this host knows no such attribute",
        "EOPNOTSUPP": "the attribute has no value: REPORT, DRY_RUN, NEGOTIATE",
    },
    "KVM_VM2_COMMIT": {
        **_LIST,
        "EINVAL": _LIST["EINVAL"] + "; or NEGOTIATE is in the list",
        "EBUSY": "this VM is not being configured, or not any more",
    },
}

ATTRIBUTES_INTRO: Final = """
Every attribute starts with its type, its size and its flags. ``size`` counts bytes of the whole attribute, in multiples
of 8; sizes are how an attribute grows. What is shorter than the kernel knows is filled up with zeros, but must not be
shorter than what was first published; what is longer must be zero beyond what the kernel knows (E2BIG).

With KVM_CREATE_VM_ATTR_SKIP_UNKNOWN in its flags an attribute is ignored by a kernel that does not know its type, and
with KVM_CREATE_VM_ATTR_SKIP_UNSUPPORTED its default is used where the kernel cannot give the value. Both leave a note
in the report. Nothing malformed is ever skipped.
"""

# The macro of an attribute -> what its structure's own text does not say.
ATTRIBUTES: Final[dict[str, str]] = {
    "ARCH_CAPABILITIES": """
In this attribute ``size`` counts bits of ``capabilities``: 64 for one word, and multiples of 64 up to
KVM_CREATE_VM2_MAX_CAPABILITIES.

On arm64, with KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS each vCPU with SVE must write KVM_REG_ARM64_SVE_VLS before
KVM_ARM_VCPU_FINALIZE (EPERM). With KVM_CREATE_VM_ARM64_PARANGE_FOLLOWS_IPA vCPUs reset with the largest
ID_AA64MMFR0_EL1.PARange that is not above the size of the guest's address space; otherwise they see the host's.
""",
    "ARM64_PHYSADDR_SIZE": """
A memory slot that ends beyond ``1 << physaddr_bits`` is refused by KVM_SET_USER_MEMORY_REGION; one that ends exactly
there is fine. The largest size of a host is KVM_CHECK_EXTENSION(KVM_CAP_ARM_VM_IPA_SIZE), and may be less than the
default. This attribute has neither size nor flags, and so is never skipped.
""",
    "REPORT": """
At most ``capacity`` records are written; ``count`` becomes the number of findings, which may be more. The report is
written on success, too: it has the notes then. Where it stands in the list does not matter.
""",
    "DRY_RUN": """
Everything is checked as it would be, and the report is written. The answer says nothing about memory or descriptors.
""",
    "NEGOTIATE": """
The list is checked as by KVM_VM2_SET_ATTRS. It cannot be combined with DRY_RUN.
""",
    "MACHINE_TYPE": """
On x86 the types are those of the mask KVM_CHECK_EXTENSION(KVM_CAP_VM_TYPES). On arm64 they are
KVM_CREATE_VM_ARM64_MACHINE_ORDINARY, KVM_CREATE_VM_ARM64_MACHINE_PROTECTED and KVM_CREATE_VM_ARM64_MACHINE_REALM.
""",
    "ARM64_SVE_VLS": """
The set must be the host's own, cut off at some length, as for KVM_REG_ARM64_SVE_VLS. The vCPU feature KVM_ARM_VCPU_SVE
must still be asked for. KVM_ARM_VCPU_FINALIZE, and writing the register, are EPERM then. It cannot be combined with
KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS.
""",
    "ARM64_GRANULE": """
Addresses and sizes of memory slots are multiples of the larger of the host's page and this one. More than 48 bits of
addresses need a granule that has them: 64K, or any with LPA2.
""",
    "MAX_VCPUS": """
KVM_CHECK_EXTENSION of KVM_CAP_MAX_VCPUS and KVM_CAP_MAX_VCPU_ID on the VM follow it.
""",
}

REPORT: Final = """
Each record of a report is one finding: what is wrong, or with error 0 a note (an attribute was skipped, a default is
used). ``attr_index`` is the position in the list; KVM_VM2_FINDING_NO_ATTR is the list itself, or an attribute that is
not in it: the default of 40 bits on a host with 36. ``offset`` is the byte of the field in the attribute. ``value`` is
what was asked for. ``min``, ``max`` and ``mask`` are what this host allows, and all zero where they say nothing.
Programs use the numbers; ``message`` is for people and may change.
"""

EXAMPLE: Final = """
``examples/create_vm2.c`` is a whole program that uses KVM_CREATE_VM2 where it is there and KVM_CREATE_VM where it is
not.
"""
