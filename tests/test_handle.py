import errno
import gc

import pytest

from kvm2.abi import ioctls
from kvm2.errors import KvmError, UsageError
from kvm2.kvm import Kvm


@pytest.fixture
def kvm(fake):
    with Kvm(fake, "fake") as kvm:
        yield kvm


def test_every_handle_refuses_after_close(kvm):
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    for handle, call in [
        (vcpu, vcpu.run_once),
        (vcpu, lambda: next(vcpu.run())),
        (vcpu, vcpu.kick),
        (vcpu, lambda: vcpu.regs.pc),
        (vcpu, lambda: vcpu.kvm_run),
        (vm, lambda: vm.map(0, 4096)),
        (vm, lambda: vm.create_vcpu(1)),
        (kvm, kvm.create_vm),
    ]:
        handle.close()
        handle.close()
        assert handle.closed
        with pytest.raises(KvmError, match="closed") as caught:
            call()
        assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
def test_any_order_of_closing_frees_every_descriptor(fake, order):
    kvm = Kvm(fake, "fake")
    vm = kvm.create_vm()
    handles = [kvm, vm, vm.create_vcpu(0)]
    for which in order:
        handles[which].close()
    assert fake.open_fds == set()


def test_forgotten_handles_close_their_descriptors(fake):
    kvm = Kvm(fake, "fake")
    vm = kvm.create_vm()
    vm.create_vcpu(0).vm.create_vcpu(1)
    del kvm, vm
    gc.collect()
    assert fake.open_fds == set()


def test_guest_memory_lives_as_long_as_any_descriptor(fake):
    kvm = Kvm(fake, "fake")
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    ram = vm.map(1 << 30, 1 << 16)
    ram[0:4] = b"kept"
    memories, address = vm._memories, ram.hva
    assert memories[0].address == address
    del ram
    vm.close()
    del vm
    gc.collect()
    assert bytes(memories[0].view[:4]) == b"kept"
    del memories
    vcpu.close()
    kvm.close()


def test_ram_outlives_its_vm(kvm):
    vm = kvm.create_vm()
    ram = vm.map(0, 1 << 16)
    ram.write(8, b"after")
    vm.close()
    assert ram.read(8, 5) == b"after"


def test_a_refused_slot_keeps_no_memory(kvm, fake):
    def refuse(fd, arg):
        raise KvmError(errno.EEXIST, "overlap")

    vm = kvm.create_vm()
    fake.answers[ioctls.KVM_SET_USER_MEMORY_REGION] = refuse
    with pytest.raises(KvmError, match="EEXIST"):
        vm.map(0, 4096)
    assert vm._memories == [] and vm.rams == {}


def test_slots_get_the_lowest_free_number(kvm):
    vm = kvm.create_vm()
    rams = [vm.map(i << 20, 1 << 16) for i in range(3)]
    assert [ram.slot for ram in rams] == [0, 1, 2]
    rams[1].unmap()
    assert vm.map(1 << 30, 1 << 16).slot == 1
    assert vm.map(1 << 31, 1 << 16, slot=77).slot == 77


@pytest.mark.parametrize("gpa", [0, 1 << 30, 0x4000_1000, (1 << 40) - (1 << 21)])
@pytest.mark.parametrize("size", [0x1000, 0x10000, 4 << 20])
def test_host_addresses_suit_every_page_size_and_blocks(kvm, fake, gpa, size):
    ram = kvm.create_vm().map(gpa, size)
    align = 1 << 21 if size >= 1 << 21 else 1 << 16
    assert (ram.hva - gpa) % align == 0
    assert fake.slots[ram.slot] == (gpa, size, ram.hva) and len(ram) == size == len(ram.view)


def test_vm_read_and_write_go_across_slots_and_not_beyond(kvm):
    vm = kvm.create_vm()
    vm.map(0x10000, 0x10000)
    vm.map(0x20000, 0x10000)
    vm.write(0x1FFFE, b"abcd")
    assert vm.read(0x1FFFE, 4) == b"abcd" and vm.rams[1][0:2] == b"cd"
    with pytest.raises(UsageError, match="0x30000 has no memory"):
        vm.write(0x2FFFE, b"abcd")
    assert vm.read(0x2FFFE, 2) == b"\0\0"


def test_ram_counts_from_its_own_start(kvm):
    ram = kvm.create_vm().map(1 << 30, 0x10000)
    with pytest.raises(UsageError, match=r"vm\.write take those"):
        ram.write(1 << 30, b"x")
    for offset, size in ((-1, 1), (0x10000, 1), (0, 0x10001)):
        with pytest.raises(UsageError):
            ram.read(offset, size)
    ram[0xFFFF] = 0x5A
    assert ram[0xFFFF] == 0x5A and ram[-2:] == b"\0\x5a"


@pytest.mark.parametrize("wrong", [0, -4096, 1.5, None])
def test_map_refuses_sizes_that_are_none(kvm, wrong):
    with pytest.raises(UsageError, match="size"):
        kvm.create_vm().map(0, wrong)


def test_an_ioctls_number_and_argument_are_never_cut_off(kvm):
    vm = kvm.create_vm()
    for request, argument in (
        (1 << 32 | 0xAE41, 0),
        (-1, 0),
        ("KVM_RUN", 0),
        (None, 0),
        (0xAE41, 1 << 64),
        (0xAE41, -1 << 64),
    ):
        with pytest.raises(UsageError, match="bits"):
            vm.ioctl(request, argument)
    vm.create_vcpu(0)  # none was made


def test_words_are_never_cut_off(kvm):
    vm = kvm.create_vm()
    for call in (lambda: kvm.create_vm(1 << 64), lambda: vm.create_vcpu(1 << 32), lambda: vm.map(1 << 64, 4096)):
        with pytest.raises(UsageError, match="allowed are whole numbers"):
            call()
