"""The declarations: sizes and offsets that the interface fixes, and the registry's own consistency."""

import pytest

from kvm2.abi import vm2

SIZES = {
    "kvm_create_vm2": 16,
    "kvm_create_vm2_fixed": 128,
    "kvm_describe_vm2": 16,
    "kvm_vm2_attr_info": 48,
    "kvm_vm2_attr": 16,
    "kvm_vm2_finding": 192,
    "kvm_create_vm_attr_any": 4,
    "kvm_create_vm_attr_hdr": 8,
    "kvm_create_vm_attr_arch_capabilities": 16,
    "kvm_create_vm_attr_arm64_physaddr_size": 8,
    "kvm_create_vm_attr_report": 24,
    "kvm_create_vm_attr_dry_run": 8,
    "kvm_create_vm_attr_negotiate": 8,
    "kvm_create_vm_attr_machine_type": 16,
    "kvm_create_vm_attr_arm64_sve_vls": 72,
    "kvm_create_vm_attr_arm64_granule": 16,
    "kvm_create_vm_attr_max_vcpus": 16,
    "kvm_create_vm2_fixed_arm64": 16,
}
OFFSETS = {
    "kvm_create_vm2": {"version": 0, "nr_attrs": 4, "pad": 6, "attrs": 8},
    "kvm_create_vm2_fixed_arm64": {"capabilities": 0, "sve_vlen": 8, "ipa_size": 10, "pad": 11},
    "kvm_describe_vm2": {"version": 0, "count": 4, "entries": 8},
    "kvm_vm2_attr_info": {"type": 0, "flags": 4, "default": 8, "min": 16, "max": 24, "mask": 32, "reserved": 40},
    "kvm_vm2_attr": {"type": 0, "size": 4, "attr": 8},
    "kvm_vm2_finding": {
        "attr_index": 0,
        "attr_type": 4,
        "error": 8,
        "offset": 12,
        "value": 16,
        "min": 24,
        "max": 32,
        "mask": 40,
        "message": 48,
    },
    "kvm_create_vm_attr_report": {"type": 0, "size": 4, "flags": 6, "records": 8, "capacity": 16, "count": 20},
    "kvm_create_vm_attr_arm64_granule": {"type": 0, "size": 4, "flags": 6, "page_shift": 8, "pad": 12},
}


def test_every_structure_has_its_size():
    assert {cls.LAYOUT.c_name: cls.SIZE for cls in vm2.STRUCTURES} == SIZES


@pytest.mark.parametrize("name", OFFSETS)
def test_offsets(name):
    (cls,) = [cls for cls in vm2.STRUCTURES if cls.LAYOUT.c_name == name]
    assert {field.name: field.offset for field in cls.LAYOUT.fields} == OFFSETS[name]


def test_numbers_and_names_agree():
    for number, row in vm2.ATTRIBUTES.items():
        assert getattr(vm2, row.constant) == number == row.cls().type
        assert row.c_name == f"kvm_create_vm_attr_{row.macro.lower()}"
    assert list(vm2.ATTRIBUTES) == list(range(1, 10))


def test_what_each_attribute_may_be():
    valued = {number for number, row in vm2.ATTRIBUTES.items() if row.has_value}
    fixed = {number for number, row in vm2.ATTRIBUTES.items() if not row.skip}
    everywhere = {number for number, row in vm2.ATTRIBUTES.items() if row.arches == vm2.ALL}
    assert valued == {1, 2, 6, 7, 8, 9}
    assert fixed == {2, 4, 5}
    assert everywhere == {1, 3, 4, 5, 6, 9}
    assert [number for number, row in vm2.ATTRIBUTES.items() if not row.negotiable] == [5]


def test_the_size_field_of_a_new_object_is_what_the_host_knows():
    for row in vm2.ATTRIBUTES.values():
        new = row.cls()
        if hasattr(new, "size"):
            assert new.size == row.known


def test_the_threads_example_is_accepted_bytes():
    caps = vm2.ArchCapabilities(size=64, capabilities=(vm2.KVM_CREATE_VM_ARM64_VCPU_NEEDS_SET_SVE_VLS,))
    assert caps.pack().hex() == "01000000400000000100000000000000"
    assert vm2.Arm64PhysaddrSize(physaddr_bits=52).pack().hex() == "0200000034000000"


def test_the_union_names_every_attribute():
    members = dict(vm2.UNION_MEMBERS)
    assert set(members) == {"any", "hdr", *(row.macro.lower() for row in vm2.ATTRIBUTES.values())}
