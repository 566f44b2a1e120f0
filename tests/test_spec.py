import pytest

from kvm2.abi import vm2
from kvm2.errors import UsageError
from kvm2.spec import MemoryRange, VmSpec, lengths_up_to, smallest_ipa_bits

HOST = {
    2: vm2.Vm2AttrInfo(type=2, flags=3, default=40, min=32, max=36, mask=0x1F << 32),
    7: vm2.Vm2AttrInfo(type=7, flags=3, mask=0b1011, max=4),
}


def asked(**wanted):
    return VmSpec(**wanted).attributes(HOST)


def test_nothing_asked_is_nothing_said():
    assert asked() == []
    assert not VmSpec(physaddr_bits=36, sve="vcpu").needs_description


def test_each_word_is_one_attribute():
    found = asked(
        physaddr_bits=33,
        page_shift=14,
        max_vcpus=0,
        machine_type=2,
        sve="vcpu",
        parange_follows_ipa=True,
        negotiate=True,
    )
    assert found == [
        vm2.ArchCapabilities(capabilities=(3,)),
        vm2.Arm64PhysaddrSize(physaddr_bits=33),
        vm2.Arm64Granule(page_shift=14),
        vm2.MachineType(machine_type=2),
        vm2.MaxVcpus(max_vcpus=0),
        vm2.Negotiate(),
    ]


@pytest.mark.parametrize("bits", [0, 1, 31, 40, 52, 64, 296])
def test_a_size_is_passed_on_whatever_it_is(bits):
    assert asked(physaddr_bits=bits) == [vm2.Arm64PhysaddrSize(physaddr_bits=bits)]


@pytest.mark.parametrize(
    ("memory", "bits"),
    [
        ([(0, 4096)], 32),
        ([(1 << 30, 1 << 26)], 32),
        ([(0, 1 << 32)], 32),
        ([(0, (1 << 32) + 1)], 33),
        ([(1 << 35, 1 << 35)], 36),
        ([(1 << 30, 1 << 26), (1 << 40, 1 << 20)], 41),
    ],
)
def test_auto_is_the_smallest_size_that_holds_the_memory(memory, bits):
    ranges = tuple(MemoryRange(*piece) for piece in memory)
    assert VmSpec(physaddr_bits="auto", memory=ranges).resolve_ipa_bits(HOST) == bits


def test_auto_beyond_the_host_is_left_for_the_host_to_refuse():
    assert VmSpec(physaddr_bits="auto", memory=(MemoryRange(1 << 47, 1),)).resolve_ipa_bits(HOST) == 48


def test_max_and_default_and_what_is_missing():
    assert VmSpec(physaddr_bits="max").resolve_ipa_bits(HOST) == 36
    assert VmSpec().resolve_ipa_bits(HOST) == 40
    with pytest.raises(UsageError, match="needs the memory map"):
        VmSpec(physaddr_bits="auto").resolve_ipa_bits(HOST)
    with pytest.raises(UsageError, match=r"size cannot be chosen .* leave physaddr_bits out"):
        VmSpec(physaddr_bits="max").resolve_ipa_bits({})


@pytest.mark.parametrize(("bits", "word"), [(128, 0b1), (256, 0b11), (384, 0b111), (512, 0b1011), (2048, 0x800B)])
def test_vector_lengths_are_the_hosts_up_to_the_one_asked_for_and_that_one(bits, word):
    assert lengths_up_to(bits, HOST) == word
    assert asked(sve=bits) == [vm2.Arm64SveVls(vls=(word,) + (0,) * 7)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"sve": 100},
        {"sve": 0},
        {"sve": 2176},
        {"sve": True},
        {"physaddr_bits": -1},
        {"physaddr_bits": "small"},
        {"physaddr_bits": 1 << 32},
        {"physaddr_bits": True},
        {"max_vcpus": 1.5},
        {"page_shift": -1},
        {"parange_follows_ipa": 2},
        {"negotiate": 1},
        {"memory": 5},
        {"memory": [1]},
    ],
)
def test_what_no_attribute_can_say_is_refused_with_the_allowed_values(wrong):
    with pytest.raises(UsageError, match="allowed are"):
        VmSpec(**wrong)


def test_the_fixed_structure_carries_size_and_sve():
    fixed = VmSpec(physaddr_bits="max", sve=256).fixed(HOST)
    assert vm2.CreateVm2FixedArm64.unpack(fixed.words) == vm2.CreateVm2FixedArm64(3, 256, 36)
    fixed = VmSpec(sve="vcpu").fixed({})
    assert vm2.CreateVm2FixedArm64.unpack(fixed.words) == vm2.CreateVm2FixedArm64(1, 0, 0)
    assert VmSpec().fixed({}).pack() == bytes(128)
    with pytest.raises(UsageError, match="no field for page_shift, max_vcpus"):
        VmSpec(page_shift=14, max_vcpus=1).fixed(HOST)
    with pytest.raises(UsageError, match="0 to 255"):
        VmSpec(physaddr_bits=296).fixed(HOST)


def test_the_highest_address_decides():
    assert smallest_ipa_bits([MemoryRange(0, 1 << 52)]) == 52
