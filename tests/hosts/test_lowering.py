"""KVM_CREATE_VM2 lowered for a mainline kernel answers as a kernel that has it: calls, findings, and what follows."""

import errno
import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm2.abi import ioctls as io
from kvm2.abi import vm2
from kvm2.abi.findings import KERNEL, LIBRARY
from kvm2.abi.vm2 import (
    ArchCapabilities,
    Arm64Granule,
    Arm64PhysaddrSize,
    Arm64SveVls,
    DryRun,
    MachineType,
    MaxVcpus,
    Negotiate,
)
from kvm2.errors import KvmError
from kvm2.hosts.lowering import Lowered
from kvm2.hosts.soft import open_soft
from kvm2.kvm import Kvm
from kvm2.softkvm import profile
from kvm2.softkvm.door import SoftKvm

from ..memory_image import Fenced
from .soft_kernel import SoftKernel, lowered

HOSTS = ("max-4k-6.12", "max-16k-6.12", "max-4k-6.1", "a64fx-4k", "cortex-a57-4k", "max-4k-protected", "apple-m1")
NEEDS_SET, FOLLOW = 1, 2


def kernels(name):
    """(lowered, native): the same host without and with KVM_CREATE_VM2."""
    return Kvm(lowered(name), "/dev/kvm"), Kvm(open_soft(name), name)


def vls(*words):
    return Arm64SveVls(vls=(*words, *[0] * (8 - len(words))))


def outcome(kvm, attributes):
    """What creation came to: the values in force, or errno and findings without the words of who said so."""
    try:
        with kvm.create_vm2(attributes) as vm:
            return [vm.get_attr(kind) for kind in (1, 2, 6, 7, 8, 9)], [plain(f) for f in vm.notes]
    except KvmError as error:
        return error.errno, [plain(finding) for finding in error.findings]


def plain(finding):
    return replace(finding, message=finding.message.removeprefix(LIBRARY))


def lists():
    """Lists of attributes that a host may take or not, one thing at a time and in pairs."""
    sizes = [Arm64PhysaddrSize(physaddr_bits=n) for n in (0, 31, 32, 33, 36, 40, 44, 48, 52, 53, 64, 65)]
    sets = [vls(word) for word in (0, 0b1, 0b11, 0b101, 0b1011, 0xFFFF, 0x1FFFF)] + [vls(1, 1)]
    words = [ArchCapabilities(capabilities=(word,)) for word in (0, NEEDS_SET, 4, 1 << 63)]
    skipped = ArchCapabilities(flags=2, capabilities=(4,))
    others = [MaxVcpus(max_vcpus=n) for n in (0, 1, 512, 513)] + [MachineType(machine_type=n) for n in (0, 1, 2, 64)]
    single = [*sizes, *sets, *words, skipped, *others]
    yield []
    yield from ([one] for one in single)
    yield from ([first, second] for first, second in itertools.permutations(single[::3], 2))


@pytest.mark.parametrize("name", HOSTS)
def test_the_same_findings_and_values(name):
    low, native = kernels(name)
    limit, fixed = profile.load(name).ipa_limit, "fixed-id-registers" in profile.load(name).quirks
    for attributes in lists():
        if fixed and any(isinstance(one, ArchCapabilities) and one.capabilities[0] > FOLLOW for one in attributes):
            continue  # the finding's mask lacks PARANGE_FOLLOWS_IPA there, which only a kernel can give
        if limit < 40 and any(isinstance(one, Arm64PhysaddrSize) for one in attributes) is False:
            attributes = [*attributes, Arm64PhysaddrSize(physaddr_bits=limit)]
        assert outcome(low, attributes) == outcome(native, attributes), attributes


@pytest.mark.parametrize("name", ("x86-64", "x86-64-snp", "s390x", "powerpc"))
def test_the_same_on_other_architectures(name):
    low, native = kernels(name)
    for attributes in [[], *([MachineType(machine_type=n)] for n in range(6)), [MaxVcpus(max_vcpus=2)], [vls(1)]]:
        try:
            native.create_vm2(attributes).close()
            expected = 0
        except KvmError as error:
            expected = error.errno
        try:
            low.create_vm2(attributes).close()
            got = 0
        except KvmError as error:
            got = error.errno
            assert all(finding.by for finding in error.findings)
        assert got == expected, attributes


@pytest.mark.parametrize("name", HOSTS)
def test_the_description(name):
    low, native = kernels(name)
    mine, theirs = dict(low.describe()), dict(native.describe())
    page = profile.load(name).page_shift
    granule = mine.pop(8)
    assert (granule.default, granule.min, granule.max, granule.mask) == (page, page, page, 1 << page)
    del theirs[8]
    if "fixed-id-registers" in profile.load(name).quirks:
        assert mine.pop(1).mask == theirs.pop(1).mask & ~FOLLOW
    assert mine == theirs


def test_a_granule_other_than_the_kernels_page_size_is_the_librarys_refusal():
    low, _ = kernels("max-4k-6.12")
    with pytest.raises(KvmError) as caught:
        low.create_vm2([Arm64Granule(page_shift=14)])
    assert [(f.by, f.name, f.mask) for f in caught.value.findings] == [("library", "EOPNOTSUPP", 1 << 12)]
    assert low.create_vm2([Arm64Granule(page_shift=12)]).get_attr(8).page_shift == 12


def test_the_bytes_that_reach_the_kernel():
    raw = SoftKernel(profile.load("neoverse-n1-4k"))
    kvm = Kvm(Lowered(raw), "/dev/kvm")
    asked = []
    original = raw.ioctl
    raw.ioctl = lambda fd, request, arg=0: asked.append((request, arg)) or original(fd, request, arg)
    kvm.create_vm2(physaddr_bits=44, max_vcpus=2)
    assert asked[-1] == (io.KVM_CREATE_VM, 44)
    asked.clear()
    kvm.dry_run(physaddr_bits=44)
    assert asked == []  # the kernel's capabilities say it


def test_a_refusal_of_the_kernel_itself_is_said_to_be_the_kernels():
    class Refusing(SoftKernel):
        def ioctl(self, fd, request, arg=0):
            if request == io.KVM_CREATE_VM and arg == 44:
                raise KvmError(self.number)
            return super().ioctl(fd, request, arg)

    raw = Refusing(profile.load("neoverse-n1-4k"))
    kvm = Kvm(Lowered(raw), "/dev/kvm")
    for number, expected in ((errno.EINVAL, errno.EOPNOTSUPP), (errno.ENOMEM, errno.ENOMEM)):
        raw.number = number
        with pytest.raises(KvmError) as caught:
            kvm.create_vm2(physaddr_bits=44)
        assert caught.value.errno == expected
        assert [f.by for f in caught.value.findings] == ["kernel"]
        assert caught.value.findings[0].message.startswith(KERNEL)


class Full(SoftKernel):
    """A kernel that makes no VM but the scratch ones, with `number`."""

    number = 0

    def ioctl(self, fd, request, arg=0):
        if request == io.KVM_CREATE_VM and self.number:
            raise KvmError(self.number)
        return super().ioctl(fd, request, arg)


@pytest.mark.parametrize(("number", "limits"), ((errno.EINVAL, (32, 48)), (errno.EMFILE, (0, 0))))
def test_the_kernels_refusal_points_at_what_was_asked(number, limits):
    raw = Full(profile.load("neoverse-n1-4k"))
    kvm = Kvm(Lowered(raw), "/dev/kvm")
    kvm.describe()  # asks the kernel what it offers
    raw.number = number
    size = Arm64PhysaddrSize(physaddr_bits=44)
    paths = []
    for call in (
        lambda: kvm.create_vm2([MaxVcpus(max_vcpus=2), size]),
        lambda: kvm.create_vm2([MaxVcpus(max_vcpus=2)]),
        lambda: kvm.create_vm2_fixed(physaddr_bits=44),
        lambda: kvm.create_vm2([size, Negotiate()]).commit(),
        lambda: kvm.create_vm2([Negotiate()]).commit([size]),
    ):
        with pytest.raises(KvmError) as caught:
            call()
        (found,) = caught.value.findings
        assert (found.by, found.min, found.max) == ("kernel", *limits)
        paths.append(found.path)
    assert paths == [
        "attrs[1].physaddr_bits",
        "physaddr_bits",
        "arm64.ipa_size",
        "physaddr_bits",
        "attrs[0].physaddr_bits",
    ]


def test_a_kernel_with_protected_vms_has_them_as_machine_type_1():
    host = replace(profile.load("max-4k-protected"), vm_types=0b11)
    raw = SoftKernel(host)
    low, native = Kvm(Lowered(raw), "/dev/kvm"), Kvm(SoftKvm(host), "native")
    assert low.describe()[6] == native.describe()[6] and low.describe()[6].mask == 0b11
    asked = []
    original = raw.ioctl
    raw.ioctl = lambda fd, request, arg=0: asked.append((request, arg)) or original(fd, request, arg)
    for attributes in ([MachineType(machine_type=n), Arm64PhysaddrSize(physaddr_bits=52)] for n in range(4)):
        assert outcome(low, attributes) == outcome(native, attributes)
    assert [arg for request, arg in asked if request == io.KVM_CREATE_VM] == [52, 1 << 31 | 52]
    with low.create_vm(1 << 31) as vm:
        assert (vm.get_attr(6).machine_type, vm.get_attr(2).physaddr_bits) == (1, 52)


@pytest.mark.parametrize("name", ("neoverse-n1-4k", "x86-64"))
def test_vms_and_vcpus_have_no_calls_of_the_system(name):
    for kvm in kernels(name):
        vm = kvm.create_vm2()
        handles = [vm] if name == "x86-64" else [vm, vm.create_vcpu()]
        for handle in handles:
            for call in (
                lambda handle=handle: handle.ioctl(io.KVM_CREATE_VM2, address_of([])),
                lambda handle=handle: handle.ioctl(io.KVM_CREATE_VM2, address_of([DryRun()])),
                lambda handle=handle: handle.ioctl(io.KVM_CREATE_VM2_FIXED, vm2.CreateVm2Fixed()),
                lambda handle=handle: handle.ioctl(io.KVM_DESCRIBE_VM2, vm2.DescribeVm2()),
            ):
                with pytest.raises(KvmError) as caught:
                    call()
                assert caught.value.name == ("ENOTTY" if name == "x86-64" else "EINVAL")
                assert not caught.value.findings
                if kvm.name == "/dev/kvm":
                    assert "is a call on /dev/kvm; this descriptor is a VM" in caught.value.reason.replace("vCPU", "VM")


def test_what_is_arm64s_is_said_to_be_on_x86():
    low, _ = kernels("x86-64")
    for call, said in (
        (lambda: low.create_vm2(sve="vcpu"), "bits 0 and 1 are arm64's, x86_64 has none yet"),
        (
            lambda: low.create_vm2_fixed(physaddr_bits=40),
            "the fixed structure are arm64's, this kernel is x86_64; leave",
        ),
    ):
        with pytest.raises(KvmError, match=said):
            call()


def test_a_protected_kernel_gives_its_limit_and_says_so():
    low, _ = kernels("max-4k-protected")
    with pytest.raises(KvmError) as caught:
        low.create_vm2(physaddr_bits=40)
    assert (caught.value.findings[0].min, caught.value.findings[0].max) == (52, 52)
    with low.create_vm(36) as vm:
        assert vm.get_attr(2).physaddr_bits == 52


def test_a_kernel_before_4_20_has_one_size():
    old = replace(profile.load("cortex-a57-4k"), type_word="none", create_vm2=0)
    raw = SoftKernel(old)
    raw.profile = replace(raw.profile, caps={n: v for n, v in raw.profile.caps.items() if n != 165})
    kvm = Kvm(Lowered(raw), "/dev/kvm")
    assert kvm.create_vm2(physaddr_bits=40).get_attr(2).physaddr_bits == 40
    with pytest.raises(KvmError) as caught:
        kvm.create_vm2(physaddr_bits=36)
    assert "older than 4.20" in caught.value.findings[0].message


# ---- what follows from creation


@pytest.mark.parametrize("name", ("max-4k-6.12", "a64fx-4k", "max-4k-6.1"))
def test_sve_rules(name):
    """Every order of INIT, SET VLS, FINALIZE, GET_REG_LIST on VMs of each kind: the same errno as natively."""
    whole = sum(1 << vq - 1 for vq in profile.load(name).sve_vqs)
    kinds = {
        "named": [vls(0b11)],
        "whole": [vls(whole)],
        "vcpu": [ArchCapabilities(capabilities=(NEEDS_SET,))],
        "none": [],
    }
    steps = {
        "init": lambda vcpu: vcpu.init(["psci_0_2", "sve"]),
        "vls": lambda vcpu: vcpu.set_reg("sve_vls", (0b1).to_bytes(64, "little")),
        "finalize": lambda vcpu: vcpu.finalize("sve"),
        "list": lambda vcpu: len(vcpu.reg_list()),
        "get": lambda vcpu: vcpu.get_reg("sve_vls"),
        "z": lambda vcpu: vcpu.get_reg("z0") and 0,
    }
    low, native = kernels(name)
    for attributes in kinds.values():
        for order in itertools.product(steps, repeat=3):
            mine, theirs = (
                played(kvm, attributes, [steps[name] for name in ("init", *order)]) for kvm in (low, native)
            )
            assert mine == theirs, (attributes, order)


def played(kvm, attributes, steps):
    answers = []
    with kvm.create_vm2(attributes) as vm, vm.create_vcpu() as vcpu:
        for step in steps:
            try:
                answers.append(step(vcpu))
            except KvmError as error:
                answers.append(error.name)
        answers.append(vm.check_extension("ARM_SVE"))
    return answers


def test_parange_follows_the_ipa_size():
    low, native = kernels("max-4k-6.12")
    for size in (32, 36, 39, 40, 48, 52):
        values = []
        for kvm in (low, native):
            vm = kvm.create_vm2(physaddr_bits=size, parange_follows_ipa=True)
            vcpu = vm.create_vcpu()
            vcpu.init()
            values.append(vcpu.regs["ID_AA64MMFR0_EL1"])
        assert values[0] == values[1], size


def test_parange_that_the_kernel_fixes():
    low, _ = kernels("max-4k-6.1")
    with pytest.raises(KvmError) as caught:
        low.create_vm2(parange_follows_ipa=True)
    assert "lets nobody change PARange" in str(caught.value)


def test_the_vcpus_of_a_vm_are_counted():
    low, native = kernels("neoverse-n1-4k")
    for kvm in (low, native):
        vm = kvm.create_vm2(max_vcpus=2)
        vm.create_vcpu(0)
        with pytest.raises(KvmError) as caught:
            vm.create_vcpu(2)
        assert caught.value.errno == errno.EINVAL
        vm.create_vcpu(1)
        assert vm.check_extension("MAX_VCPUS") == vm.check_extension("MAX_VCPU_ID") == 2
        assert kvm.create_vm(40).check_extension("MAX_VCPUS") == 512


# ---- the negotiation phase


def test_negotiation():
    for kvm in kernels("neoverse-n1-4k"):
        vm = kvm.create_vm2([Negotiate(), Arm64PhysaddrSize(physaddr_bits=36)])
        fd = vm.fd
        assert vm.get_attr(2).physaddr_bits == 36
        for call in (
            lambda vm=vm: vm.create_vcpu(),
            lambda vm=vm: vm.map(0, 4096),
            lambda vm=vm: vm.preferred_target(),
        ):
            with pytest.raises(KvmError) as caught:
                call()
            assert caught.value.errno == errno.ENOEXEC
        with pytest.raises(KvmError) as caught:
            vm.ioctl(0xAE77)
        assert caught.value.errno == errno.EINVAL
        vm.set_attrs([MaxVcpus(max_vcpus=3)])
        assert vm.check_extension("MAX_VCPUS") == 3
        with pytest.raises(KvmError) as caught:
            vm.set_attrs([Arm64PhysaddrSize(physaddr_bits=52)])
        assert caught.value.errno == errno.EOPNOTSUPP
        assert vm.commit([DryRun()]) == ()
        vm.commit([Arm64PhysaddrSize(physaddr_bits=44)])
        assert (vm.fd, vm.get_attr(2).physaddr_bits, vm.get_attr(9).max_vcpus) == (fd, 44, 3)
        vm.create_vcpu()
        for call in (vm.commit, vm.set_attrs):
            with pytest.raises(KvmError) as caught:
                call()
            assert caught.value.errno == errno.EBUSY


def test_a_commit_that_is_refused_leaves_the_vm_configuring():
    low, _ = kernels("apple-m1")
    vm = low.create_vm2([Negotiate()])
    with pytest.raises(KvmError):
        vm.commit()  # the default of 40 does not fit
    vm.commit([Arm64PhysaddrSize(physaddr_bits=36)])
    assert vm.get_attr(2).physaddr_bits == 36


def test_what_is_closed_while_configuring_is_gone():
    low, _ = kernels("neoverse-n1-4k")
    before = low.backend.raw.fds()
    low.create_vm2([Negotiate()]).close()
    assert low.backend.raw.fds() == before


# ---- nothing is left behind


@pytest.mark.parametrize(
    "attributes",
    (
        [Arm64PhysaddrSize(physaddr_bits=60)],
        [vm2.Report(records=0x10, capacity=1)],
        [DryRun()],
        [DryRun(), Negotiate()],
        [vm2.Report(records=0x10, capacity=1), Arm64PhysaddrSize(physaddr_bits=60)],
        [vm2.Report(records=0x10, capacity=4), ArchCapabilities(flags=2, capabilities=(4,))],
    ),
)
def test_a_failed_or_dry_creation_leaves_no_descriptor(attributes):
    low, native = kernels("neoverse-n1-4k")
    before = low.backend.raw.fds()
    results = []
    for kvm in (low, native):
        try:
            results.append(kvm.ioctl(io.KVM_CREATE_VM2, address_of(attributes)))
        except KvmError as error:
            results.append(error.name)
    if isinstance(results[0], int) and results[0]:
        low.backend.close(results[0])
        results = [0, 0]
    assert results[0] == results[1]
    assert low.backend.raw.fds() == before


KEEP = []


def address_of(attributes):
    from kvm2.negotiation import list_of

    KEEP.append(list_of(attributes))
    return KEEP[-1].address


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_bytes_get_the_same_errno_as_natively(data):
    """Bytes at random on a lowered kernel and on one that has the call."""
    from kvm2.abi.wire import encode
    from kvm2.handle import Buffer

    name = data.draw(st.sampled_from(HOSTS))
    low, native, fence = FUZZED.get(name) or FUZZED.setdefault(name, fenced(name))
    known = [Arm64PhysaddrSize(physaddr_bits=36), vls(1), MaxVcpus(max_vcpus=2), MachineType(), ArchCapabilities()]
    attributes = data.draw(st.lists(st.sampled_from(known), max_size=4))
    buffer = Buffer(len(encode(attributes, 0)))
    image = bytearray(encode(attributes, buffer.address))
    # Not the number of entries and not the pointers: what they would lead to changes between two calls.
    places = [*range(4), 6, 7, *range(16 + 8 * len(attributes), len(image))]
    for _ in range(data.draw(st.integers(0, 3))):
        image[data.draw(st.sampled_from(places))] = data.draw(st.integers(0, 255))
    fence.buffers[:] = [buffer]
    answers = []
    for kvm in (low, native):
        buffer._array[: len(image)] = bytes(image)
        try:
            fd = kvm.ioctl(io.KVM_CREATE_VM2, buffer)
            if fd:
                kvm.backend.close(fd)
            answers.append(min(fd, 1))
        except KvmError as error:
            answers.append((error.errno, [(f.attr_index, f.attr_type, f.error, f.offset) for f in error.findings]))
    assert answers[0] == answers[1]


FUZZED = {}


def fenced(name):
    """Both kinds of kernel, for arguments that are wrong on purpose."""
    fence, low = Fenced([]), lowered(name)
    low.memory = fence
    return Kvm(low, "/dev/kvm"), Kvm(SoftKvm(profile.load(name), fence), name), fence


# ---- lists that were seen before


def test_a_list_seen_before_makes_another_vm_alike():
    low, _ = kernels("neoverse-n1-4k")
    made = [low.create_vm2(physaddr_bits=36, max_vcpus=2) for _ in range(3)]
    assert len({vm.fd for vm in made}) == 3 and len(low.backend._decided) == 1
    for vm in made:
        assert (vm.get_attr(2).physaddr_bits, vm.get_attr(9).max_vcpus, vm.notes) == (36, 2, ())
        with pytest.raises(KvmError):
            vm.create_vcpu(2)


def test_a_kernel_that_refuses_later_is_heard():
    raw = SoftKernel(profile.load("neoverse-n1-4k"))
    kvm = Kvm(Lowered(raw), "/dev/kvm")
    kvm.create_vm2(physaddr_bits=36)
    answer, raw.ioctl = raw.ioctl, None

    def full(fd, request, arg=0):
        if request == io.KVM_CREATE_VM:
            raise KvmError(errno.EMFILE)
        return answer(fd, request, arg)

    raw.ioctl = full
    with pytest.raises(KvmError) as caught:
        kvm.create_vm2(physaddr_bits=36)
    assert [f.by for f in caught.value.findings] == ["kernel"] and "ulimit" in str(caught.value)
    raw.ioctl = answer
    kvm.create_vm2(physaddr_bits=36)


def test_a_note_is_given_every_time():
    low, _ = kernels("neoverse-n1-4k")
    skipped = ArchCapabilities(flags=2, capabilities=(4,))
    assert [len(low.create_vm2([skipped]).notes) for _ in range(3)] == [1, 1, 1]
    assert low.create_vm2().notes == ()


def test_attributes_outside_of_a_vouched_buffer_are_read_every_time():
    """The same bytes of the list itself; what its pointer leads to has changed meanwhile."""
    from kvm2.abi.wire import OUTER_SIZE, encode_packed
    from kvm2.handle import Buffer
    from kvm2.softkvm.memory import Vouched

    low, _ = kernels("neoverse-n1-4k")
    whole = Buffer(encode_packed([bytes(8)], 0))
    whole._array[:] = encode_packed([bytes(8)], whole.address)
    for bits in (36, 44, 60):
        whole._array[OUTER_SIZE + 8 : OUTER_SIZE + 16] = Arm64PhysaddrSize(physaddr_bits=bits).pack()
        with Vouched(whole.address, OUTER_SIZE + 8):
            if bits == 60:
                with pytest.raises(KvmError):
                    low.ioctl(io.KVM_CREATE_VM2, whole)
            else:
                fd = low.ioctl(io.KVM_CREATE_VM2, whole)
                assert low.backend.ipa_bits_of(fd) == bits
    assert not low.backend._decided
