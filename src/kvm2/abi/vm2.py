"""KVM_CREATE_VM2: its structures, constants and attributes, each declared once.

The C header, the reference, the fuzz grammar, the schema, the decoder (`abi.wire`) and the software KVM read this file.
The rules of a field here are the ones that hold for every host; what one host allows is `softkvm.creation`'s subject.

>>> Arm64PhysaddrSize(physaddr_bits=36).pack().hex()
'0200000024000000'
>>> ATTRIBUTES[KVM_CREATE_VM_ATTR_ARM64_SVE_VLS].published, ATTRIBUTES[7].c_name
(72, 'kvm_create_vm_attr_arm64_sve_vls')
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple, TypeAlias

from kvm2.abi.layout import CHAR, U8, U64, Array, Structure, UnionOf, field, s32, u8, u16, u32, u64

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

KVM_CAP_CREATE_VM2: Final = 1024
# What KVM_CHECK_EXTENSION(KVM_CAP_CREATE_VM2) answers.
KVM_CREATE_VM2_LIST: Final = 1 << 0
KVM_CREATE_VM2_STRUCT_FIXED: Final = 1 << 1
KVM_CREATE_VM2_NEGOTIATION: Final = 1 << 2
KVM_CREATE_VM2_DESCRIBE: Final = 1 << 3

KVM_CREATE_VM_ATTR_ARCH_CAPABILITIES: Final = 1
KVM_CREATE_VM_ATTR_ARM64_PHYSADDR_SIZE: Final = 2
KVM_CREATE_VM_ATTR_REPORT: Final = 3
KVM_CREATE_VM_ATTR_DRY_RUN: Final = 4
KVM_CREATE_VM_ATTR_NEGOTIATE: Final = 5
KVM_CREATE_VM_ATTR_MACHINE_TYPE: Final = 6
KVM_CREATE_VM_ATTR_ARM64_SVE_VLS: Final = 7
KVM_CREATE_VM_ATTR_ARM64_GRANULE: Final = 8
KVM_CREATE_VM_ATTR_MAX_VCPUS: Final = 9

KVM_CREATE_VM_ATTR_SKIP_UNKNOWN: Final = 1 << 0
KVM_CREATE_VM_ATTR_SKIP_UNSUPPORTED: Final = 1 << 1

KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS: Final = 1 << 0
KVM_CREATE_VM_ARM64_PARANGE_FOLLOWS_IPA: Final = 1 << 1

KVM_CREATE_VM_ARM64_MACHINE_ORDINARY: Final = 0
KVM_CREATE_VM_ARM64_MACHINE_PROTECTED: Final = 1
KVM_CREATE_VM_ARM64_MACHINE_REALM: Final = 2

KVM_ARM_SVE_CAPABLE: Final = 1 << 0
KVM_ARM_SELECT_IPA: Final = 1 << 1

KVM_VM2_ATTR_INFO_VALUE: Final = 1 << 0
KVM_VM2_ATTR_INFO_NEGOTIABLE: Final = 1 << 1

KVM_VM2_FINDING_NO_ATTR: Final = 0xFFFF_FFFF

KVM_CREATE_VM2_MAX_ATTRS: Final = 64
KVM_CREATE_VM2_MAX_ATTR_SIZE: Final = 4096
KVM_CREATE_VM2_MAX_CAPABILITIES: Final = 1024

ARM64_DEFAULT_IPA_BITS: Final = 40

ALL: Final = frozenset({"arm64", "x86_64", "s390x", "powerpc"})
ARM64: Final = frozenset({"arm64"})
SKIP_FLAGS: Final = KVM_CREATE_VM_ATTR_SKIP_UNKNOWN | KVM_CREATE_VM_ATTR_SKIP_UNSUPPORTED


StructureClass: TypeAlias = type[Structure]


class Rule(NamedTuple):
    """What every host demands of a field: EINVAL unless `allows` it. The numbers go into findings."""

    text: str
    allows: Callable[[Any], bool]
    min: int
    max: int
    mask: int = 0


class Attribute(NamedTuple):
    """A row of the registry. Sizes in bytes; `known` is the size field that names exactly what is declared here."""

    type: int
    macro: str
    cls: StructureClass
    arches: frozenset[str]
    rules: Mapping[str, Rule]
    published: int  # the size that was published first: callers with less are refused
    has_value: bool  # GET_ATTR and DESCRIBE have a value for it
    negotiable: bool  # allowed in KVM_VM2_SET_ATTRS and KVM_VM2_COMMIT
    skip: int  # the SKIP_ flags that it may carry
    known: int
    doc: str

    @property
    def c_name(self) -> str:
        """The name of its structure in C."""
        return self.cls.LAYOUT.c_name

    @property
    def constant(self) -> str:
        """The name of its number in C."""
        return f"KVM_CREATE_VM_ATTR_{self.macro}"


ATTRIBUTES: Final[dict[int, Attribute]] = {}


def attribute(
    number: int,
    arches: frozenset[str] = ALL,
    rules: Mapping[str, Rule] | None = None,
    published: int = 0,
    has_value: bool = True,
    negotiable: bool = True,
    skip: int = SKIP_FLAGS,
    known: int = 0,
) -> Callable[[type[Structure]], type[Any]]:
    """Enters a structure into ATTRIBUTES. `published` is given once an attribute has grown."""

    def enter(cls: type[Structure]) -> type[Structure]:
        macro = cls.LAYOUT.c_name.removeprefix("kvm_create_vm_attr_").upper()
        size, text = published or cls.SIZE, " ".join((cls.__doc__ or "").split())
        row = (size, has_value, negotiable, skip, known or cls.SIZE, text)
        ATTRIBUTES[number] = Attribute(number, macro, cls, arches, rules or {}, *row)
        return cls

    return enter


ZERO = Rule("0", lambda value: not value, 0, 0)
IPA_BITS = Rule("0 or 32..64", lambda value: value == 0 or 32 <= value <= 64, 32, 64)
PAGE_SHIFT = Rule("0, 12, 14 or 16", lambda value: value in (0, 12, 14, 16), 12, 16, 1 << 12 | 1 << 14 | 1 << 16)
NOT_EMPTY = Rule("not empty", any, 1, 0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)


class CreateVm2(Structure, c_name="kvm_create_vm2"):
    """The argument of KVM_CREATE_VM2, KVM_VM2_SET_ATTRS and KVM_VM2_COMMIT: a list of attributes."""

    version: u32 = field(doc="0; growth happens through attributes, a version is for a layout that breaks", default=0)
    nr_attrs: u16 = field(doc="entries in attrs; 0: attrs is NULL (no attribute) or ends with a NULL entry", default=0)
    pad: u16 = 0
    attrs: u64 = field(doc="-> array of __u64, each -> one attribute", default=0)


class CreateVm2FixedArm64(Structure, c_name="kvm_create_vm2_fixed_arm64"):
    """The arm64 view of struct kvm_create_vm2_fixed. A field whose capability bit is clear must be zero."""

    capabilities: u64 = field(doc="KVM_ARM_SVE_CAPABLE, KVM_ARM_SELECT_IPA", default=0)
    sve_vlen: u16 = field(doc="largest SVE vector length in bits; 0: each vCPU must set its lengths", default=0)
    ipa_size: u8 = field(doc="log2 of the IPA space; 0: the default, 40", default=0)
    pad: Annotated[bytes, Array(U8, 5)] = bytes(5)


class CreateVm2Fixed(Structure, c_name="kvm_create_vm2_fixed"):
    """The argument of KVM_CREATE_VM2_FIXED. What an architecture does not use must be zero (E2BIG)."""

    version: u64 = field(doc="0", default=0)
    words: Annotated[bytes, UnionOf(120, (("arm64", CreateVm2FixedArm64), ("dummy", Array(U64, 15))))] = field(
        doc="per architecture", default=bytes(120), c_name="dummy"
    )


class DescribeVm2(Structure, c_name="kvm_describe_vm2"):
    """The argument of KVM_DESCRIBE_VM2: which attributes this host takes."""

    version: u32 = field(doc="0", default=0)
    count: u32 = field(
        doc="in: room in entries; out: how many there are (E2BIG, only count written, for less room)", default=0
    )
    entries: u64 = field(doc="-> array of struct kvm_vm2_attr_info, ascending by type", default=0)


class Vm2AttrInfo(Structure, c_name="kvm_vm2_attr_info"):
    """What this host takes of one attribute, the others at their defaults. `def` may lie outside min..max."""

    type: u32 = 0
    flags: u32 = field(doc="KVM_VM2_ATTR_INFO_VALUE, KVM_VM2_ATTR_INFO_NEGOTIABLE", default=0)
    default: u64 = field(doc="what is in force without the attribute; of a set the first word", default=0, c_name="def")
    min: u64 = 0
    max: u64 = 0
    mask: u64 = field(
        doc="sizes and enumerations: bit n = the value n can be had (n < 64); sets: what may be set", default=0
    )
    reserved: u64 = 0


class Vm2Attr(Structure, c_name="kvm_vm2_attr"):
    """The argument of KVM_VM2_GET_ATTR: what a VM really got."""

    type: u32 = field(doc="which attribute", default=0)
    size: u32 = field(doc="in: bytes at attr; out: bytes this host has", default=0)
    attr: u64 = field(doc="-> where the attribute is written, in the form it has in the list", default=0)


class Vm2Finding(Structure, c_name="kvm_vm2_finding"):
    """One record of the report."""

    attr_index: u32 = field(
        doc="position in the list; KVM_VM2_FINDING_NO_ATTR: the list itself, or not in it", default=0
    )
    attr_type: u32 = field(doc="0 where it could not be read", default=0)
    error: s32 = field(doc="errno; 0 for a note", default=0)
    offset: u32 = field(doc="byte offset of the offending field inside the attribute (or the fixed struct)", default=0)
    value: u64 = 0
    min: u64 = 0
    max: u64 = 0
    mask: u64 = 0
    message: Annotated[bytes, Array(CHAR, 144)] = field(
        doc="ASCII, NUL-terminated, zero-filled; advisory: programs use the numbers", default=bytes(144)
    )


class AttrAny(Structure, c_name="kvm_create_vm_attr_any"):
    """What every attribute starts with."""

    type: u32 = field(doc="KVM_CREATE_VM_ATTR_*", default=0)


class AttrHdr(Structure, c_name="kvm_create_vm_attr_hdr"):
    """What every attribute from type 3 on starts with."""

    type: u32 = field(doc="KVM_CREATE_VM_ATTR_*", default=0)
    size: u16 = field(doc="bytes of the whole attribute, header included, a multiple of 8", default=8)
    flags: u16 = field(doc="KVM_CREATE_VM_ATTR_SKIP_UNKNOWN, KVM_CREATE_VM_ATTR_SKIP_UNSUPPORTED", default=0)


@attribute(1, known=64)
class ArchCapabilities(Structure, c_name="kvm_create_vm_attr_arch_capabilities"):
    """VM-wide opt-ins of the architecture."""

    type: u32 = field(default=1)
    size: u16 = field(doc="in bits: 64 for one word; a multiple of 64 up to 1024", default=64)
    flags: u16 = 0
    capabilities: Annotated[tuple[int, ...], Array(U64, 1)] = field(
        doc="arm64: KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS, KVM_CREATE_VM_ARM64_PARANGE_FOLLOWS_IPA", default=(0,)
    )


@attribute(2, ARM64, {"physaddr_bits": IPA_BITS}, skip=0)
class Arm64PhysaddrSize(Structure, c_name="kvm_create_vm_attr_arm64_physaddr_size"):
    """Size of the guest physical (IPA) space. It fixes the VM's stage-2 page-table format."""

    type: u32 = field(default=2)
    physaddr_bits: u32 = field(
        doc="log2 of the IPA space, every whole number from 32 up; 0: the default, 40", default=0
    )


@attribute(3, has_value=False)
class Report(Structure, c_name="kvm_create_vm_attr_report"):
    """Where the host writes every finding."""

    type: u32 = field(default=3)
    size: u16 = field(default=24)
    flags: u16 = 0
    records: u64 = field(doc="-> array of struct kvm_vm2_finding", default=0)
    capacity: u32 = field(doc="room in records; no more are written", default=0)
    count: u32 = field(doc="out: how many findings there are", default=0)


@attribute(4, has_value=False, skip=0)
class DryRun(Structure, c_name="kvm_create_vm_attr_dry_run"):
    """Check everything, create nothing: the call returns 0, which is not a descriptor and reserves nothing."""

    type: u32 = field(default=4)
    size: u16 = field(default=8)
    flags: u16 = 0


@attribute(5, has_value=False, negotiable=False, skip=0)
class Negotiate(Structure, c_name="kvm_create_vm_attr_negotiate"):
    """Create the VM in the configuring state: KVM_VM2_SET_ATTRS, then KVM_VM2_COMMIT."""

    type: u32 = field(default=5)
    size: u16 = field(default=8)
    flags: u16 = 0


@attribute(6)
class MachineType(Structure, c_name="kvm_create_vm_attr_machine_type"):
    """The kind of VM: what the `type` word of KVM_CREATE_VM means on the other architectures."""

    type: u32 = field(default=6)
    size: u16 = field(default=16)
    flags: u16 = 0
    machine_type: u64 = field(
        doc="x86: VM type; s390: bit mask; powerpc: enumeration; arm64: 0 ordinary, 1 protected, 2 realm", default=0
    )


@attribute(7, ARM64, {"vls": NOT_EMPTY})
class Arm64SveVls(Structure, c_name="kvm_create_vm_attr_arm64_sve_vls"):
    """The VM's SVE vector lengths: a vCPU that asks for SVE gets exactly this set, finalised by KVM_ARM_VCPU_INIT."""

    type: u32 = field(default=7)
    size: u16 = field(default=72)
    flags: u16 = 0
    vls: Annotated[tuple[int, ...], Array(U64, 8)] = field(
        doc="bit vq-1 = a length of vq * 128 bits, as in KVM_REG_ARM64_SVE_VLS: the host's set, cut off at a maximum",
        default=(0,) * 8,
    )


@attribute(8, ARM64, {"page_shift": PAGE_SHIFT, "pad": ZERO})
class Arm64Granule(Structure, c_name="kvm_create_vm_attr_arm64_granule"):
    """Granule of the VM's stage-2 tables."""

    type: u32 = field(default=8)
    size: u16 = field(default=16)
    flags: u16 = 0
    page_shift: u32 = field(doc="12, 14 or 16; 0: the host's page size", default=0)
    pad: u32 = 0


@attribute(9, rules={"pad": ZERO})
class MaxVcpus(Structure, c_name="kvm_create_vm_attr_max_vcpus"):
    """How many vCPUs the VM may have: a vCPU id at or above it is EINVAL."""

    type: u32 = field(default=9)
    size: u16 = field(default=16)
    flags: u16 = 0
    max_vcpus: u32 = field(doc="0: the host's maximum", default=0)
    pad: u32 = 0


# `union kvm_create_vm_attr`: each structure as a named member.
UNION_MEMBERS: Final[tuple[tuple[str, type[Structure]], ...]] = (
    ("any", AttrAny),
    ("hdr", AttrHdr),
    *((row.macro.lower(), row.cls) for row in ATTRIBUTES.values()),
)

# Every structure above, in the order of a C header.
STRUCTURES: Final[tuple[type[Structure], ...]] = (
    *(member for _, member in UNION_MEMBERS),
    CreateVm2,
    CreateVm2FixedArm64,
    CreateVm2Fixed,
    DescribeVm2,
    Vm2AttrInfo,
    Vm2Attr,
    Vm2Finding,
)
