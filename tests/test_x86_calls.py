"""Lists that grow until they fit, and calls that belong to one architecture; over the fake backend."""

import ctypes
import errno
import struct

import pytest

from kvm2.abi import ioctls_x86 as x86
from kvm2.abi.structs_x86 import CpuidEntry2, MsrEntry, Regs, Sregs
from kvm2.abi.structs_x86 import GuestDebug as X86GuestDebug
from kvm2.abi.structs_x86 import VcpuEvents as X86Events
from kvm2.errors import KvmError, UsageError
from kvm2.kvm import Kvm
from kvm2.x86_calls import MOST_ROOM


@pytest.fixture
def host(fake):
    fake.arch = "x86_64"
    with Kvm(fake, "fake") as host:
        yield host


@pytest.mark.parametrize("count", [0, 1, 256, 257, 5000])
def test_a_list_is_asked_for_with_more_room_until_it_fits(host, fake, count):
    rooms = []

    def answer(fd, arg):
        rooms.append(struct.unpack("=I", ctypes.string_at(arg, 4))[0])
        ctypes.memmove(arg, struct.pack("=I", count), 4)
        if rooms[-1] < count:
            raise KvmError(errno.E2BIG)
        ctypes.memmove(arg + 4, struct.pack(f"={count}I", *range(count)), 4 * count)
        return 0

    fake.answers[x86.KVM_GET_MSR_INDEX_LIST] = answer
    assert host.msr_index_list() == tuple(range(count))
    assert len(rooms) <= 2


def test_a_host_that_is_never_content_is_not_asked_for_ever(host, fake):
    def answer(fd, arg):
        raise KvmError(errno.E2BIG)

    fake.answers[x86.KVM_GET_SUPPORTED_CPUID] = answer
    with pytest.raises(KvmError, match="E2BIG"):
        host.supported_cpuid()
    assert len(fake.calls) < 20 and MOST_ROOM


def test_entries_are_the_registrys_structures(host, fake):
    leaf = CpuidEntry2(7, 1, 1, 2, 3, 4, 5)

    def answer(fd, arg):
        ctypes.memmove(arg, struct.pack("=II", 1, 0) + leaf.pack(), 8 + leaf.SIZE)
        return 0

    fake.answers[x86.KVM_GET_SUPPORTED_CPUID] = answer
    assert host.supported_cpuid() == (leaf,)


def test_a_shorter_answer_for_msrs_is_an_error_that_names_the_msr(host, fake):
    vcpu = host.create_vm().create_vcpu()

    def answer(fd, arg):
        count = struct.unpack("=I", ctypes.string_at(arg, 4))[0]
        sizes.append(count)
        return min(count, 300 - sum(sizes[:-1]))

    sizes = []
    fake.answers[x86.KVM_GET_MSRS] = fake.answers[x86.KVM_SET_MSRS] = answer
    with pytest.raises(KvmError, match=r"stopped at MSR 0x112c, number 46 of 245"):
        vcpu.get_msrs(range(0x1000, 0x1000 + 500))
    assert sizes == [255, 245]
    sizes.clear()
    with pytest.raises(KvmError, match="KVM_SET_MSRS stopped at MSR"):
        vcpu.set_msrs(dict.fromkeys(range(301), 0))
    for wrong in ({1 << 32: 0}, {0: 1 << 64}, {0: -1}):
        with pytest.raises(UsageError, match="whole numbers"):
            vcpu.set_msrs(wrong)
    with pytest.raises(UsageError, match="MsrEntry"):
        vcpu.set_msrs([Regs()])


def test_each_architecture_refuses_the_others_calls_in_words(fake):
    host = Kvm(fake, "fake")
    fake.arch = "x86_64"
    x86_vm = host.create_vm()
    x86_vcpu = x86_vm.create_vcpu()
    for call in (
        x86_vcpu.init,
        x86_vcpu.finalize,
        x86_vcpu.reg_list,
        x86_vm.preferred_target,
        x86_vm.writable_masks,
        lambda: x86_vcpu.get_reg("pc"),
        lambda: x86_vcpu.set_reg("x0", 0),
        lambda: x86_vm.set_counter_offset(0),
        lambda: x86_vm.set_device_addr(0, 0),
    ):
        with pytest.raises(UsageError, match="is a call of arm64, and this host is x86_64"):
            call()
    fake.arch = "arm64"
    arm_vm = host.create_vm()
    arm_vcpu = arm_vm.create_vcpu()
    for call in (
        host.supported_cpuid,
        host.msr_index_list,
        lambda: host.get_msrs([1]),
        arm_vm.get_clock,
        arm_vm.get_pit,
        lambda: arm_vm.get_irqchip("ioapic"),
        lambda: arm_vm.set_tss_addr(0),
        arm_vcpu.get_regs,
        lambda: arm_vcpu.set_sregs(Sregs()),
        arm_vcpu.get_xsave,
        lambda: arm_vcpu.set_msrs({0x10: 0}),
        lambda: arm_vcpu.set_cpuid([]),
        lambda: arm_vcpu.interrupt(3),
        arm_vcpu.nmi,
        arm_vcpu.request_irq_window,
    ):
        with pytest.raises(UsageError, match="is a call of x86_64, and this host is arm64"):
            call()
    assert not [request for _, request, _ in fake.calls if request in {row.number for row in x86.IOCTLS}]


def test_what_is_no_list_never_becomes_an_ioctl(fake):
    fake.arch = "x86_64"
    vcpu = Kvm(fake, "fake").create_vm().create_vcpu()
    before = len(fake.calls)
    with pytest.raises(UsageError, match="5 is not a list of entries"):
        vcpu.set_cpuid(5)
    with pytest.raises(UsageError, match="'apic' is not an irqchip: "):
        vcpu.vm.get_irqchip("apic")
    assert len(fake.calls) == before


def test_a_structure_of_the_wrong_kind_never_becomes_an_ioctl(fake):
    fake.arch = "x86_64"
    vcpu = Kvm(fake, "fake").create_vm().create_vcpu()
    before = len(fake.calls)
    for call, wrong in (
        (vcpu.set_regs, Sregs()),
        (vcpu.set_sregs, Regs()),
        (vcpu.set_events, Regs()),
        (vcpu.set_guest_debug, X86Events()),
        (vcpu.set_events, None),
        (vcpu.vm.set_pit, Regs()),
    ):
        with pytest.raises(UsageError, match=r"takes a kvm2\.abi\.structs_x86"):
            call(wrong)
    with pytest.raises(UsageError, match="does not fit its field"):
        vcpu.set_regs(Regs(rax=1 << 64))
    assert len(fake.calls) == before
    fake.answers[x86.KVM_SET_GUEST_DEBUG] = lambda fd, arg: 0
    vcpu.set_guest_debug(X86GuestDebug(1))
    assert fake.calls[-1][1] == x86.KVM_SET_GUEST_DEBUG
    assert MsrEntry.SIZE == 16
