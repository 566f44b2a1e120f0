import ctypes
import errno
import struct
import threading
import time

import pytest

from kvm2.abi import exits as abi
from kvm2.abi import ioctls, onereg
from kvm2.errors import KvmError, UsageError
from kvm2.exits import Interrupted, MemoryFault, Mmio, SystemEvent
from kvm2.kvm import Kvm
from kvm2.names import feature_bits


@pytest.fixture
def vcpu(fake):
    with Kvm(fake, "fake") as kvm, kvm.create_vm() as vm, vm.create_vcpu(3) as vcpu:
        yield vcpu


def test_run_yields_every_exit_until_one_ends(vcpu, fake, mmio):
    fake.play([mmio(0x9000000, 4, b"A\0\0\0"), mmio(0x9000018, 4)])
    seen = []
    for exit in vcpu.run():
        if isinstance(exit, Mmio) and not exit.is_write:
            exit.reply(0x90)
            assert abi.Mmio.unpack(vcpu.kvm_run, abi.UNION_OFFSET).data[:4] == b"\x90\0\0\0"
        seen.append(exit)
    assert [type(exit) for exit in seen] == [Mmio, Mmio, SystemEvent]
    assert seen[0].value == 0x41


def test_run_once_is_one_run(vcpu, fake, mmio):
    fake.play([mmio(0x1000, 8, b"12345678"), mmio(0x2000, 1)])
    assert vcpu.run_once().data == b"12345678"
    assert vcpu.run_once().address == 0x2000
    assert [request for _, request, _ in fake.calls].count(ioctls.KVM_RUN) == 2


def test_a_kick_before_the_run_is_not_lost_and_counts_once(vcpu, fake, mmio):
    fake.play([mmio(0x1000, 1)])
    vcpu.kick()
    assert fake.kicked.is_set()
    assert isinstance(vcpu.run_once(), Interrupted)
    assert isinstance(vcpu.run_once(), Mmio)


def test_memory_fault_comes_with_an_errno(vcpu, fake):
    def fault(area):
        fake.exit(area, abi.KVM_EXIT_MEMORY_FAULT, abi.MemoryFault(8, 0x1000, 0x1000).pack())
        raise KvmError(errno.EFAULT)

    fake.script = iter([fault])
    assert isinstance(vcpu.run_once(), MemoryFault)


def test_other_errors_are_raised(vcpu, fake):
    def refuse(area):
        raise KvmError(errno.ENOEXEC, "not initialised")

    fake.script = iter([refuse])
    with pytest.raises(KvmError, match="ENOEXEC: not initialised"):
        next(vcpu.run())


def test_close_gets_a_run_in_another_thread_back(fake):
    kvm = Kvm(fake, "fake")
    vcpu = kvm.create_vm().create_vcpu(0)
    entered = threading.Event()

    def spin(area):
        entered.set()
        while not area[abi.IMMEDIATE_EXIT_OFFSET]:
            time.sleep(0.001)
        raise KvmError(errno.EINTR)

    fake.script = iter([spin])
    thread = threading.Thread(target=vcpu.run_once)
    thread.start()
    entered.wait(5)
    vcpu.close()
    thread.join(5)
    assert not thread.is_alive() and vcpu.closed


class Registers:
    """GET/SET_ONE_REG over a dictionary."""

    def __init__(self, fake):
        self.values = {}
        fake.answers[ioctls.KVM_GET_ONE_REG] = self.get
        fake.answers[ioctls.KVM_SET_ONE_REG] = self.set

    def get(self, fd, arg):
        number, address = struct.unpack("=QQ", ctypes.string_at(arg, 16))
        size = onereg.size_of(number)
        ctypes.memmove(address, self.values.get(number, bytes(size)), size)
        return 0

    def set(self, fd, arg):
        number, address = struct.unpack("=QQ", ctypes.string_at(arg, 16))
        self.values[number] = ctypes.string_at(address, onereg.size_of(number))
        return 0


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("x0", 0x6030000000100000),
        ("x30", 0x603000000010003C),
        ("sp", 0x603000000010003E),
        ("pc", 0x6030000000100040),
        ("pstate", 0x6030000000100042),
        ("sp_el1", 0x6030000000100044),
        ("elr_el1", 0x6030000000100046),
        ("spsr_el1", 0x6030000000100048),
        ("v0", 0x6040000000100054),
        ("v31", 0x60400000001000D0),
        ("fpsr", 0x60200000001000D4),
        ("fpcr", 0x60200000001000D5),
        ("z3", 0x6080000000150060),
        ("p15", 0x60500000001505E0),
        ("ffr", 0x6050000000150600),
        ("sve_vls", 0x606000000015FFFF),
        ("ID_AA64MMFR0_EL1", 0x603000000013C038),
        ("id_aa64mmfr0_el1", 0x603000000013C038),
        ("S3_0_C0_C7_0", 0x603000000013C038),
        ("KVM_REG_ARM_TIMER_CNT", 0x603000000013DF1A),
        ("0x6030000000100040", 0x6030000000100040),
    ],
)
def test_register_names_are_those_of_the_kernel(vcpu, fake, name, number):
    registers = Registers(fake)
    size = onereg.size_of(number)
    value = bytes(i % 251 + 1 for i in range(size))
    vcpu.set_reg(name, value)
    assert registers.values == {number: value} and vcpu.get_reg(name) in (value, int.from_bytes(value, "little"))


def test_registers_as_attributes_and_files(vcpu, fake):
    Registers(fake)
    vcpu.regs.pc = 0x4000_0000
    vcpu.regs.x7 = 7
    vcpu.regs.x[8] = 8
    vcpu.regs.v[1] = 1 << 127
    vcpu.regs["TTBR0_EL1"] = 0x1000
    assert vcpu.regs.pc == 0x4000_0000 and vcpu.regs.x[7] == 7 and vcpu.regs.x8 == 8
    assert vcpu.regs.v[1] == 1 << 127 and vcpu.regs["ttbr0_el1"] == 0x1000
    assert vcpu.regs["z0"] == bytes(256)


def test_a_wrong_register_is_never_silent(vcpu, fake):
    Registers(fake)
    with pytest.raises(AttributeError):
        vcpu.regs.x31 = 0
    with pytest.raises(IndexError):
        vcpu.regs.x[31] = 0
    with pytest.raises(UsageError, match="not a register"):
        vcpu.regs["x31"] = 0
    with pytest.raises(UsageError, match="whole numbers"):
        vcpu.regs.x0 = 1 << 64
    with pytest.raises(UsageError, match="has 16 bytes"):
        vcpu.regs["v0"] = b"short"


def test_reg_list_grows_until_it_fits(vcpu, fake):
    ids = (1, 2, 3)

    def get_list(fd, arg):
        room = struct.unpack("=Q", ctypes.string_at(arg, 8))[0]
        ctypes.memmove(arg, struct.pack("=Q", len(ids)), 8)
        if room < len(ids):
            raise KvmError(errno.E2BIG)
        ctypes.memmove(arg + 8, struct.pack("=3Q", *ids), 24)
        return 0

    fake.answers[ioctls.KVM_GET_REG_LIST] = get_list
    assert vcpu.reg_list() == ids


def test_init_names_features_and_takes_the_preferred_target(vcpu, fake):
    inits = []

    def preferred(fd, arg):
        ctypes.memmove(arg, struct.pack("=I7I", 5, *[0] * 7), 32)
        return 0

    def init(fd, arg):
        inits.append(struct.unpack("=I7I", ctypes.string_at(arg, 32)))
        return 0

    fake.answers[ioctls.KVM_ARM_PREFERRED_TARGET] = preferred
    fake.answers[ioctls.KVM_ARM_VCPU_INIT] = init
    vcpu.init()
    vcpu.init(["power_off", "SVE", 33], target=0)
    assert inits == [(5, 1 << 2, *[0] * 6), (0, 1 << 0 | 1 << 4, 1 << 1, *[0] * 5)]
    with pytest.raises(UsageError, match="did you mean sve"):
        vcpu.init(["svee"])
    with pytest.raises(UsageError, match="0 to 223"):
        feature_bits([224])


def test_finalize_passes_the_feature_number(vcpu, fake):
    seen = []
    fake.answers[ioctls.KVM_ARM_VCPU_FINALIZE] = lambda fd, arg: seen.append(ctypes.string_at(arg, 4)) or 0
    vcpu.finalize()
    vcpu.finalize(7)
    assert seen == [struct.pack("=i", 4), struct.pack("=i", 7)]
