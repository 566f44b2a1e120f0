"""PSCI and SMCCC calls: versions, power states, answers, filter, exits."""

import pytest

from kvm2.abi import onereg
from kvm2.abi import sysregs as sr
from kvm2.abi.structs import DeviceAttr
from kvm2.abi.structs_arm64 import SmcccFilter
from kvm2.softkvm import psci, smccc, vm_arm
from kvm2.softkvm.hypercall_result import Hypercall, Result, SystemEvent

from .vcpus import AARCH32, BASE, POWER_OFF, PSCI, VALUE, Client, enable_cap, make_vm, name_of

NEW, OLD = "max-4k-6.12", "max-4k-6.1"
MINUS_1, MINUS_2, MINUS_4, MINUS_6 = ((1 << 64) - value for value in (1, 2, 4, 6))
X0, PC, PSTATE = 0x6030000000100000, 0x6030000000100040, 0x6030000000100042


def vcpus(count=1, host=NEW, features=PSCI):
    vm = make_vm(host)
    clients = [Client(vm, number) for number in range(count)]
    for client in clients:
        client.init(features)
    return clients


def call(client, function, *args, **kwargs):
    return smccc.call(client.vcpu, function, (*args, 0, 0, 0)[:3], **kwargs)


def answer(client, function, *args):
    result = call(client, function, *args)
    assert result.exit is None and not result.wait
    return result.values[0]


def version(client, value):
    client.set(onereg.KVM_REG_ARM_PSCI_VERSION, value)


@pytest.mark.parametrize(("value", "features"), [(2, MINUS_1), (0x10000, 0), (0x10001, 0)])
def test_each_version_says_its_number(value, features):
    (vcpu,) = vcpus()
    version(vcpu, value)
    assert answer(vcpu, 0x84000000) == value
    assert answer(vcpu, 0x8400000A, 0x84000000) == features


@pytest.mark.parametrize(
    ("function", "in_1_0", "in_1_1"),
    [
        *((number, 0, 0) for number in (0x84000000, 0x84000001, 0xC4000001, 0x84000002, 0x84000003, 0xC4000003)),
        *((number, 0, 0) for number in (0x84000004, 0xC4000004, 0x84000006, 0x84000008, 0x84000009, 0x8400000A)),
        (0x80000000, 0, 0),
        (0x84000012, MINUS_1, 0),
        (0xC4000012, MINUS_1, 0),
        *((number, MINUS_1, MINUS_1) for number in (0x8400000E, 0xC400000E, 0x84000005, 0xC4000002, 0xC4000008, 0)),
        *((number, MINUS_1, MINUS_1) for number in (0x84000013, 0xC4000006, 0x95C1BA5E, 0x80000001)),
    ],
)
def test_features(function, in_1_0, in_1_1):
    (vcpu,) = vcpus()
    version(vcpu, 0x10000)
    assert answer(vcpu, 0x8400000A, function) == in_1_0
    version(vcpu, 0x10001)
    assert answer(vcpu, 0x8400000A, function) == in_1_1


def test_cpu_on_resets_the_target_with_entry_context_and_byte_order():
    first, second = vcpus(2)
    second.set_mp_state(5)
    second.set(X0 + 2, 99)
    result = call(first, 0xC4000003, 1, 0x40001000, 0xFFFFFFFF_00000001, big_endian=True)
    assert result == Result.of(0)
    assert second.mp_state() == 0
    assert second.get(PC) == 0x40001000
    assert second.get(X0) == 0xFFFFFFFF_00000001
    assert second.get(X0 + 2) == 0
    assert second.sys(sr.SCTLR_EL1) >> 25 & 1
    assert answer(first, 0xC4000003, 1, 0, 0) == MINUS_4
    assert answer(first, 0xC4000003, 0, 0, 0) == MINUS_4
    assert answer(first, 0xC4000003, 2, 0, 0) == MINUS_2
    assert answer(first, 0xC4000003, 1 << 31 | 1, 0, 0) == MINUS_2


def test_32_bit_cpu_on_takes_the_low_halves():
    first, second = vcpus(2)
    second.set_mp_state(5)
    assert answer(first, 0x84000003, 0xFFFFFFFF_00000001, 0xFFFFFFFF_40000000, 0xFFFFFFFF_00000007) == 0
    assert (second.get(PC), second.get(X0)) == (0x40000000, 7)


def test_cpu_on_of_an_aarch32_vcpu_enters_thumb_code():
    first, second = vcpus(2, "cortex-a57-4k", PSCI | AARCH32)
    second.set_mp_state(5)
    first.set(PSTATE, 0x13)
    assert answer(first, 0xC4000003, 1, 0x1001, 0) == MINUS_1  # 64-bit functions are not for AArch32
    assert call(first, 0x84000003, 1, 0x1001, 5, big_endian=True) == Result.of(0)
    assert (second.get(PC), second.get(PSTATE)) == (0x1000, 0x1D3 | 1 << 5 | 1 << 9)


def test_a_waiting_reset_survives_until_somebody_looks_or_runs():
    first, second = vcpus(2)
    second.set_mp_state(5)
    assert answer(first, 0xC4000003, 1, 0x1234, 0) == 0
    second.vcpu.dirty = False
    assert second.vcpu.before_entry()
    assert second.vcpu.dirty
    assert second.vcpu.state.pc == 0x1234
    second.vcpu.dirty = False
    assert not second.vcpu.before_entry()
    assert not second.vcpu.dirty


def test_affinity_info():
    first, second = vcpus(2)
    for level, wanted, expected in (
        (0, 0, 0),
        (0, 1, 0),
        (0, 2, MINUS_2),
        (1, 7, 0),
        (3, 5, 0),
        (4, 0, MINUS_2),
        (1, 0x100, MINUS_2),
    ):
        assert answer(first, 0xC4000004, wanted, level) == expected, (level, wanted)
    second.set_mp_state(5)
    assert answer(first, 0xC4000004, 1, 0) == 1
    assert answer(first, 0xC4000004, 1, 1) == 0
    assert answer(first, 0xC4000004, 1 << 31, 0) == MINUS_2
    assert answer(first, 0x84000004, 1 << 40, 0) == 0


def test_cpu_off_and_suspend():
    (vcpu,) = vcpus()
    assert call(vcpu, 0xC4000001) == Result((0, 0, 0, 0), wait=True)
    assert answer(vcpu, 0x84000002) == 0
    assert vcpu.vcpu.stopped()
    assert answer(vcpu, 0xC4000002) == MINUS_1


@pytest.mark.parametrize(("function", "event"), [(0x84000008, 1), (0x84000009, 2)])
def test_system_off_and_reset_stop_everything(function, event):
    first, second = vcpus(2)
    assert call(first, function) == Result((MINUS_6, 0, 0, 0), exit=SystemEvent(event, 1, 0))
    assert (first.mp_state(), second.mp_state()) == (5, 5)


@pytest.mark.parametrize(
    ("kind", "works"), [(0, True), (1, False), (0x7FFFFFFF, False), (0x80000000, True), (0xFFFFFFFF, True)]
)
def test_system_reset2(kind, works):
    (vcpu,) = vcpus()
    result = call(vcpu, 0xC4000012, kind)
    assert result == (Result((MINUS_6,), exit=SystemEvent(2, 1, 1)) if works else Result.of(-2))
    version(vcpu, 0x10000)
    assert answer(vcpu, 0xC4000012, 0) == MINUS_1


def test_system_suspend_is_the_vmms_to_enable():
    (vcpu,) = vcpus()
    assert answer(vcpu, 0xC400000E) == MINUS_1
    enable_cap(vcpu.vm, 216)
    assert call(vcpu, 0xC400000E) == Result(exit=SystemEvent(5))
    assert call(vcpu, 0x8400000E) == Result(exit=SystemEvent(5), narrow=True)
    assert vcpu.mp_state() == 0
    assert answer(vcpu, 0x8400000A, 0xC400000E) == 0


def test_without_psci_0_2_there_is_the_ancient_interface():
    first, second = vcpus(2, features=0)
    assert answer(first, 0x84000000) == MINUS_1
    assert answer(first, 0x84000008) == MINUS_1
    assert answer(first, 0x95C1BA60, 1, 0x1000, 0) == MINUS_2  # on already: no code of its own for that
    second.set_mp_state(5)
    assert answer(first, 0x95C1BA60, 1, 0x1000, 3) == 0
    assert (second.get(PC), second.get(X0)) == (0x1000, 3)
    assert answer(first, 0x95C1BA5F) == 0
    assert first.vcpu.stopped()
    assert answer(vcpus()[0], 0x95C1BA5F) == MINUS_1


def test_architecture_calls():
    (vcpu,) = vcpus()
    assert answer(vcpu, 0x80000000) == 0x10001
    assert answer(vcpu, 0xFFFFFFFF_80000000) == 0x10001  # W0 is the function
    levels = {id_: vcpu.get(id_) for id_ in (onereg.fw(1), onereg.fw(2), onereg.fw(3))}
    told = {0: MINUS_1, 1: 0, 2: 1}
    assert answer(vcpu, 0x80000001, 0x80008000) == told[levels[onereg.fw(1)]]
    assert answer(vcpu, 0x80000001, 0x80003FFF) == told[levels[onereg.fw(3)]]
    assert answer(vcpu, 0x80000001, 0x80007FFF) == MINUS_1
    vcpu.set_sys(sr.ID_AA64PFR1_EL1, vcpu.sys(sr.ID_AA64PFR1_EL1) & ~0xF0)
    assert answer(vcpu, 0x80000001, 0x80007FFF) == MINUS_2
    assert answer(vcpu, 0x80000001, 0xC5000020) == 0
    assert answer(vcpu, 0x80000001, 0x12345678) == MINUS_1
    assert answer(vcpu, 0x80008000) == MINUS_1


def test_vendor_and_time_services():
    (vcpu,) = vcpus()
    assert call(vcpu, 0x8600FF01).values == (0xB66FB428, 0xE911C52E, 0x564BCAA9, 0x743A004D)
    assert answer(vcpu, 0x86000000) == 3
    clock = call(vcpu, 0x86000001, 0).values
    assert 0 < clock[0] < 1 << 31 and len(clock) == 4
    assert answer(vcpu, 0x86000001, 2) == MINUS_1
    assert answer(vcpu, 0xC5000020, 0xC5000021) == MINUS_1
    assert answer(vcpu, 0xC5000021) == MINUS_1
    vcpu.set(onereg.KVM_REG_ARM_VENDOR_HYP_BMAP, 1)
    assert (answer(vcpu, 0x86000000), answer(vcpu, 0x86000001)) == (1, MINUS_1)
    vcpu.set(onereg.KVM_REG_ARM_VENDOR_HYP_BMAP, 0)
    assert answer(vcpu, 0x8600FF01) == MINUS_1


def test_random_numbers():
    (vcpu,) = vcpus()
    assert answer(vcpu, 0x84000050) == 0x10000
    assert answer(vcpu, 0x84000051, 0xC4000053) == 0
    assert answer(vcpu, 0x84000051, 0x84000054) == MINUS_1
    assert call(vcpu, 0x84000052).values == (0x00E0210D, 0xEB118443, 0x44527080, 0x4C5A4E55)
    for function, width in ((0x84000053, 32), (0xC4000053, 64)):
        for bits in (0, 1, width, 3 * width):
            status, *words = call(vcpu, function, bits).values
            number = words[0] << 2 * width | words[1] << width | words[2]
            assert status == 0 and number >> bits == 0
        assert call(vcpu, function, 3 * width + 1) == Result.of(-2)
    assert len({call(vcpu, 0xC4000053, 64).values for _ in range(4)}) == 4
    vcpu.set(onereg.KVM_REG_ARM_STD_BMAP, 0)
    assert answer(vcpu, 0x84000050) == MINUS_1


def test_smc_is_a_call_now_and_was_none():
    (vcpu,) = vcpus()
    assert smccc.smc(vcpu.vcpu, 0, 0x84000000, (0, 0, 0)) == Result.of(0x10001)
    assert smccc.smc(vcpu.vcpu, 1, 0x84000000, (0, 0, 0)) == Result((MINUS_1,))
    (old,) = vcpus(host=OLD)
    assert smccc.smc(old.vcpu, 0, 0x84000000, (0, 0, 0)) == Result((MINUS_1,))
    assert answer(old, 0x84000000) == 0x10001


def set_filter(client, base, count, action, pad=b"", group=0, attr=0):
    record = SmcccFilter(base=base, nr_functions=count, action=action, pad=pad.ljust(15, b"\0"))
    client.memory.write(VALUE, record.pack())
    client.memory.write(BASE, DeviceAttr(group=group, attr=attr, addr=VALUE).pack())
    vm_arm.set_device_attr(client.vm, BASE)


@pytest.mark.parametrize(
    ("base", "count", "action", "expected"),
    [
        (0x86000000, 1, 1, ""),
        (0, 0xFFFFFFFF, 1, "EEXIST"),  # the architecture's range lies in it
        (0x8000FFFF, 1, 1, "EEXIST"),
        (0xC0000000, 1, 2, "EEXIST"),
        (0xC0010000, 1, 2, ""),
        (0xFFFFFFFF, 1, 2, ""),
        (0xFFFFFFFF, 2, 2, "EINVAL"),
        (0x86000000, 0, 1, "EINVAL"),
        (0x86000000, 1, 3, "EINVAL"),
    ],
)
def test_filter_ranges(base, count, action, expected):
    (vcpu,) = vcpus()
    assert name_of(set_filter, vcpu, base, count, action) == expected
    if not expected:
        assert name_of(set_filter, vcpu, base, count, action) == "EEXIST"


def test_the_filter_decides_before_the_services():
    (vcpu,) = vcpus()
    set_filter(vcpu, 0x84000000, 1, 1)
    set_filter(vcpu, 0x84000001, 0x10, 2)
    set_filter(vcpu, 0x12345678, 1, 2)
    set_filter(vcpu, 0x22345678, 1, 0)
    assert answer(vcpu, 0x84000000) == MINUS_1
    assert call(vcpu, 0x84000008) == Result(exit=Hypercall(0x84000008, 0))
    assert smccc.smc(vcpu.vcpu, 0, 0x12345678, (0, 0, 0)) == Result(exit=Hypercall(0x12345678, 1))
    assert answer(vcpu, 0x22345678) == MINUS_1
    assert answer(vcpu, 0x80000000) == 0x10001
    assert name_of(set_filter, vcpu, 0x1, 1, 1, b"\1") == "EINVAL"
    assert name_of(set_filter, vcpu, 0x1, 1, 1, b"", 0, 1) == "ENXIO"
    assert name_of(set_filter, vcpu, 0x1, 1, 1, b"", 1, 0) == "ENXIO"
    vcpu.vm.ran = True
    assert name_of(set_filter, vcpu, 0x1, 1, 1) == "EBUSY"
    assert name_of(set_filter, vcpus(host=OLD)[0], 0x1, 1, 1) == "EINVAL"


def test_a_vcpu_that_starts_off_is_switched_on():
    vm = make_vm(NEW)
    first, second = Client(vm, 0), Client(vm, 1)
    first.init(PSCI)
    second.init(PSCI | POWER_OFF)
    assert second.vcpu.stopped()
    assert answer(first, psci.CPU_ON | psci.BIT_64, 1, 0x8000, 0) == 0
    assert not second.vcpu.stopped()
