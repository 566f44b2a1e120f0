"""The handles on the software KVM: what a Python user does."""

import errno
import gc
import itertools
import re
import struct
import threading
import time
from pathlib import Path

import pytest

import kvm2
from kvm2.abi import vm2

OFF = struct.pack("<III", 0x52800100, 0x72B08000, 0xD4000002)  # PSCI SYSTEM_OFF
SPIN = b"\x00\x00\x00\x14"


@pytest.fixture
def kvm():
    with kvm2.open("neoverse-n1") as kvm:
        yield kvm


def test_system_calls(kvm):
    assert kvm.api_version() == 12
    assert kvm.check_extension("ARM_VM_IPA_SIZE") == kvm.check_extension("KVM_CAP_ARM_VM_IPA_SIZE") == 48
    assert kvm.check_extension(1024) == 15
    assert kvm.vcpu_mmap_size() % 4096 == 0
    with pytest.raises(kvm2.UsageError, match="did you mean KVM_CAP_ARM_VM_IPA_SIZE"):
        kvm.check_extension("ARM_VM_IPA_SIZES")


def test_unknown_names_are_usage_errors(kvm):
    with pytest.raises(kvm2.HostError, match="did you mean"):
        kvm2.open("neoverse-n9")
    with pytest.raises(kvm2.UsageError, match="known: physaddr_bits, sve"):
        kvm.create_vm2(ipa_size=40)
    with pytest.raises(AttributeError):
        kvm2.nothing  # noqa: B018


def test_what_is_no_name_no_list_and_no_data_is_a_usage_error(kvm):
    vm = kvm.create_vm2(physaddr_bits=36)
    ram = vm.map(0, 1 << 16)
    for call, said in (
        (lambda: kvm.check_extension(None), "None is not a capability"),
        (lambda: kvm.check_extension(b"SVE"), "is not a capability"),
        (lambda: vm.create_device(None), "None is not a device"),
        (lambda: vm.create_vcpu().init([None]), "None is not a vCPU feature"),
        (lambda: vm.create_vcpu(1).init(5), "5 is not a list of vCPU features"),
        (lambda: kvm.create_vm2(5), "5 is not a list of attributes"),
        (lambda: kvm.create_vm2_fixed([]), r"\[\] is not a VmSpec"),
        (lambda: vm.set_attrs(5), "5 is not a list of attributes"),
        (lambda: vm.commit(5), "5 is not a list of attributes"),
        (lambda: vm.read(0, -1), "size = -1"),
        (lambda: vm.read("0", 1), "gpa = '0'"),
        (lambda: vm.write(0, "text"), "guest memory takes bytes"),
        (lambda: ram.write(0, [1]), "guest memory takes bytes"),
    ):
        with pytest.raises(kvm2.UsageError, match=said):
            call()


def test_every_public_name_is_there():
    for name in dir(kvm2):
        assert getattr(kvm2, name) is not None
    assert "KvmError" in dir(kvm2)


def test_a_refusal_carries_every_finding(kvm):
    with pytest.raises(kvm2.KvmError) as caught:
        kvm.create_vm2(physaddr_bits=52, sve=256)
    error = caught.value
    assert isinstance(error, OSError) and error.errno == errno.EOPNOTSUPP
    assert [(f.path, f.value, f.max) for f in error.findings] == [
        ("attrs[0].physaddr_bits", 52, 48),
        ("attrs[1].vls[0]", 2, 0),
    ]


def test_findings_come_through_the_report_and_not_only_through_the_exception(kvm):
    inner = kvm.backend.ioctl

    class Bare:
        """A kernel: its ioctls fail with an errno and nothing else."""

        def __getattr__(self, name):
            return getattr(kvm.backend, name)

        def ioctl(self, fd, request, arg=0):
            try:
                return inner(fd, request, arg)
            except kvm2.KvmError as error:
                raise kvm2.KvmError(error.errno) from None

    with kvm2.Kvm(Bare(), "bare") as bare:
        with pytest.raises(kvm2.KvmError) as caught:
            bare.create_vm2(physaddr_bits=52, max_vcpus=99999)
        assert [f.path for f in caught.value.findings] == ["attrs[0].physaddr_bits", "attrs[1].max_vcpus"]
        assert "ask for 48 or fewer" in str(caught.value)


def test_a_list_of_attributes_is_sent_as_it_is(kvm):
    twice = [vm2.MaxVcpus(max_vcpus=2), vm2.MaxVcpus(max_vcpus=2)]
    with pytest.raises(kvm2.KvmError) as caught:
        kvm.create_vm2(twice)
    assert caught.value.errno == errno.EEXIST and caught.value.findings[0].attr_index == 1
    with pytest.raises(kvm2.KvmError) as caught:
        kvm.create_vm2([vm2.Negotiate()] * 65)
    assert caught.value.errno == errno.E2BIG
    with pytest.raises(kvm2.UsageError, match="not an attribute"):
        kvm.create_vm2(["physaddr_bits=40"])
    with pytest.raises(kvm2.UsageError, match="give one of them"):
        kvm.create_vm2([], physaddr_bits=40)


def test_what_the_vm_got(kvm):
    vm = kvm.create_vm2(physaddr_bits=41, max_vcpus=3, page_shift=12)
    assert vm.get_attr(2) == vm2.Arm64PhysaddrSize(physaddr_bits=41)
    assert vm.get_attr(vm2.MaxVcpus).max_vcpus == 3 == vm.check_extension("MAX_VCPUS")
    assert kvm.create_vm(0x28).get_attr(vm2.Arm64PhysaddrSize).physaddr_bits == 40
    for number, code in ((3, errno.EOPNOTSUPP), (99, errno.ENOENT), (0, errno.ENOENT)):
        with pytest.raises(kvm2.KvmError) as caught:
            vm.get_attr(number)
        assert caught.value.errno == code
    with pytest.raises(kvm2.UsageError):
        vm.get_attr(vm2.CreateVm2)


def test_skipped_attributes_are_notes(kvm):
    vm = kvm.create_vm2([vm2.Arm64SveVls(flags=vm2.KVM_CREATE_VM_ATTR_SKIP_UNSUPPORTED, vls=(1,) + (0,) * 7)])
    assert [note.error for note in vm.notes] == [0]


def test_dry_run_gives_no_vm(kvm):
    before = kvm.backend.fds()
    assert kvm.dry_run(physaddr_bits=41) == ()
    with pytest.raises(kvm2.KvmError, match="this host allows"):
        kvm.dry_run(physaddr_bits=52)
    assert kvm.backend.fds() == before


def test_the_negotiation_phase(kvm):
    vm = kvm.create_vm2(negotiate=True)
    with pytest.raises(kvm2.KvmError, match="ENOEXEC"):
        vm.create_vcpu(0)
    vm.set_attrs([vm2.Arm64PhysaddrSize(physaddr_bits=48)])
    with pytest.raises(kvm2.KvmError) as caught:
        vm.set_attrs([vm2.Arm64PhysaddrSize(physaddr_bits=52)])
    assert caught.value.findings
    vm.commit([], dry_run=True)
    vm.commit()
    assert vm.get_attr(2).physaddr_bits == 48
    vm.create_vcpu(0).init()
    with pytest.raises(kvm2.KvmError, match="EBUSY"):
        vm.commit()


def test_a_host_without_create_vm2_says_so(tmp_path):
    file = tmp_path / "mainline.toml"
    file.write_text('base = "neoverse-n1"\ncreate_vm2 = 0\n')
    with kvm2.open(file) as kvm:
        for call in (kvm.create_vm2, kvm.create_vm2_fixed, kvm.describe):
            with pytest.raises(kvm2.KvmError, match="no KVM_CREATE_VM2") as caught:
                call()
            assert caught.value.errno == errno.EINVAL
        assert kvm.create_vm(40)


def test_auto_and_max_on_a_host_that_does_not_describe_itself():
    with kvm2.open("vm2-fixed-only") as kvm:
        limit = kvm.check_extension("ARM_VM_IPA_SIZE")
        assert kvm.create_vm2_fixed(physaddr_bits="max").get_attr(2).physaddr_bits == limit
        small = kvm.create_vm2_fixed(physaddr_bits="auto", memory=(kvm2.MemoryRange(0, 4096),))
        assert small.get_attr(2).physaddr_bits == 32
        with pytest.raises(kvm2.KvmError, match="EINVAL"):
            kvm.create_vm2()


def guest(kvm, code, **wanted):
    vm = kvm.create_vm2(**wanted)
    ram = vm.map(1 << 30, 1 << 16)
    ram.write(0, code)
    vcpu = vm.create_vcpu(0)
    vcpu.init()
    vcpu.regs.pc = 1 << 30
    return vcpu


def test_the_guide_runs(capsys):
    text = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    names = {}
    exec(program, names)
    assert capsys.readouterr().out == "shutdown\n" and names["vcpu"].closed is False


def test_power_off_ends_the_iteration(kvm):
    vcpu = guest(kvm, OFF)
    seen = list(vcpu.run())
    assert [exit.name for exit in seen] == ["shutdown"]


def test_the_reply_arrives(kvm):
    # x1 = 0x09000000; w12 = [x1, #0x18]; x13 = [x1]; off (an SMCCC call, which sets x0 to x3)
    vcpu = guest(kvm, struct.pack("<III", 0xD2A12001, 0xB940182C, 0xF940002D) + OFF)
    replies = {0x09000018: 0x12345678, 0x09000000: 0x1122334455667788}
    for exit in vcpu.run():
        if isinstance(exit, kvm2.Mmio):
            exit.reply(replies[exit.address])
    assert (vcpu.regs.x12, vcpu.regs.x13) == (0x12345678, 0x1122334455667788)


def test_a_kick_gets_a_spinning_guest_back(kvm):
    vcpu = guest(kvm, SPIN)
    for delay in (0, 0.05, 0.2):
        timer = threading.Timer(delay, vcpu.kick)
        timer.start()
        started = time.monotonic()
        assert isinstance(vcpu.run_once(), kvm2.Interrupted)
        timer.join()
        assert time.monotonic() - started < delay + 1


def test_registers_of_a_real_vcpu(kvm):
    vcpu = guest(kvm, OFF)
    vcpu.regs.v[3] = 1 << 100
    vcpu.set_reg("TTBR0_EL1", 0x1000)
    assert vcpu.regs.v[3] == 1 << 100 and vcpu.regs["TTBR0_EL1"] == 0x1000 and vcpu.regs.pstate == 0x3C5
    ids = vcpu.reg_list()
    assert 0x603000000013C038 in ids and len(set(ids)) == len(ids) > 200
    for number in ids[:40]:
        vcpu.get_reg(number)
    assert vcpu.get_events().exception.serror_pending == 0


def test_slots_and_dirty_log(kvm):
    vcpu = guest(kvm, struct.pack("<II", 0xD2A80101, 0xF9000020) + OFF)  # x1 = 0x40080000; [x1] = x0
    ram = vcpu.vm.map(0x4008_0000, 1 << 16, log_dirty=True)
    assert not any(ram.dirty_log())
    list(vcpu.run())
    assert ram.dirty_log()[0] & 1 and not any(ram.dirty_log())
    with pytest.raises(kvm2.KvmError, match="EEXIST"):
        vcpu.vm.map(0x4008_0000, 1 << 16)
    with pytest.raises(kvm2.KvmError, match="EFAULT"):
        vcpu.vm.map(1 << 40, 1 << 16)
    ram.unmap()
    vcpu.vm.map(0x4008_0000, 1 << 16)


def test_writable_masks_and_preferred_target(kvm):
    vm = kvm.create_vm2()
    assert len(vm.writable_masks()) == 192 and any(vm.writable_masks())
    assert vm.preferred_target().target == 5


@pytest.mark.parametrize("order", list(itertools.permutations(("kvm", "vm", "vcpu"))))
def test_close_in_any_order_with_a_guest_that_ran(order):
    kvm = kvm2.open("neoverse-n1")
    vcpu = guest(kvm, OFF)
    handles = {"kvm": kvm, "vm": vcpu.vm, "vcpu": vcpu}
    vcpu.run_once()
    for name in order:
        handles[name].close()
    assert kvm.backend.fds() == []


def test_a_vcpu_runs_after_its_vm_is_closed_and_forgotten(kvm):
    vcpu = guest(kvm, OFF)
    vcpu.vm.close()
    vcpu.vm.rams.clear()
    gc.collect()
    assert vcpu.run_once().name == "shutdown"


def test_nothing_is_left_when_everything_is_forgotten():
    kvm = kvm2.open("neoverse-n1")
    backend = kvm.backend
    guest(kvm, OFF).run_once()
    del kvm
    gc.collect()
    assert backend.fds() == []
