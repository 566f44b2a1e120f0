"""Device attributes, events, debugging, capabilities and the calls on a VM that are about vCPUs."""

import pytest

from kvm2.abi import sysregs as sr
from kvm2.abi.structs import SignalMask, UserspaceMemoryRegion
from kvm2.abi.structs_arm64 import (
    ArmCounterOffset,
    GuestDebug,
    PmuEventFilter,
    RegMaskRange,
    VcpuEvents,
    VcpuEventsException,
)
from kvm2.softkvm import smccc, vm_arm

from .vcpus import BASE, PMU, PSCI, VALUE, Client, enable_cap, give_vgic, make_vm, name_of

NEW, OLD, A57 = "max-4k-6.12", "max-4k-6.1", "cortex-a57-4k"
PC, PSTATE, ELR, SPSR = 0x6030000000100040, 0x6030000000100042, 0x6030000000100046, 0x6030000000100048


def client(host=NEW, features=PSCI, chip=""):
    vcpu = Client(make_vm(host))
    vcpu.init(features)
    give_vgic(vcpu.vm, chip)
    return vcpu


def word(value):
    return value.to_bytes(4, "little")


def test_attributes_that_exist():
    plain, pmu, old = client(), client(features=PSCI | PMU), client(OLD)
    for vcpu, there in ((plain, {(1, 0), (1, 1), (1, 2), (1, 3), (2, 0)}), (old, {(1, 0), (1, 1), (2, 0)})):
        found = {(group, attr) for group in range(5) for attr in range(6) if not name_of(vcpu.attr, "has", group, attr)}
        assert found == there
    assert [name_of(pmu.attr, "has", 0, attr) for attr in range(5)] == ["", "", "", "", "ENXIO"]
    assert name_of(pmu.vcpu.has_device_attr, 16) == "EFAULT"


def test_attributes_of_the_pmu_belong_to_the_vm_now():
    for host, expected in ((NEW, ""), (OLD, "ENXIO")):
        vm = make_vm(host)
        first, second = Client(vm, 0), Client(vm, 1)
        first.init(PSCI | PMU)
        assert name_of(second.attr, "has", 0, 0) == expected


def test_the_pmus_interrupt():
    assert name_of(client().attr, "set", 0, 0, word(23)) == "ENODEV"
    vcpu = client(features=PSCI | PMU)
    assert name_of(vcpu.attr, "set", 0, 0, word(23)) == "EINVAL"  # no interrupt controller in the kernel
    assert name_of(vcpu.attr, "get", 0, 0) == "EINVAL"
    give_vgic(vcpu.vm, "v3")
    assert name_of(vcpu.attr, "get", 0, 0) == "ENXIO"
    for irq, expected in (
        (15, "EINVAL"),
        (1020, "EINVAL"),
        (0xFFFFFFFF, "EINVAL"),
        (23, ""),
        (23, "EBUSY"),
        (24, "EINVAL"),
    ):
        assert name_of(vcpu.attr, "set", 0, 0, word(irq)) == expected, irq
    assert vcpu.attr("get", 0, 0)[:4] == word(23)
    assert name_of(vcpu.attr, "set", 0, 1) == "ENODEV"
    vcpu.vm.vgic.init()
    assert name_of(vcpu.attr, "set", 0, 1) == ""
    assert name_of(vcpu.attr, "set", 0, 1) == "EBUSY"


def test_a_pmu_without_interrupt_controller_needs_no_interrupt():
    vcpu = client(features=PSCI | PMU)
    assert name_of(vcpu.attr, "set", 0, 1) == ""
    assert name_of(vcpu.attr, "set", 0, 2) == "EBUSY"
    assert name_of(client(features=PSCI | PMU).attr, "set", 0, 3, word(8)) == "ENXIO"
    assert name_of(client(features=PSCI | PMU).attr, "set", 0, 4) == "ENXIO"


def test_the_event_filter_decides_what_pmceid_says():
    vcpu = client(features=PSCI | PMU)
    assert vcpu.vcpu.guest_read(sr.PMCEID0_EL0) >> 0x1E & 1
    for first, count, action, expected in ((0xFFFF, 2, 0, "EINVAL"), (0, 1, 2, "EINVAL"), (0x1E, 1, 1, "")):
        record = PmuEventFilter(base_event=first, nevents=count, action=action).pack()
        assert name_of(vcpu.attr, "set", 0, 2, record) == expected
    assert not vcpu.vcpu.guest_read(sr.PMCEID0_EL0) >> 0x1E & 1
    vcpu.attr("set", 0, 2, PmuEventFilter(base_event=0x1E, nevents=1, action=0).pack())
    assert vcpu.vcpu.guest_read(sr.PMCEID0_EL0) >> 0x1E & 1
    vcpu.vm.ran = True
    assert name_of(vcpu.attr, "set", 0, 2, PmuEventFilter(base_event=0, nevents=1).pack()) == "EBUSY"


def test_timer_interrupts():
    vcpu = client()
    assert [vcpu.attr("get", 1, attr)[0] for attr in range(4)] == [27, 30, 28, 26]
    assert name_of(vcpu.attr, "get", 1, 4) == "ENXIO"
    assert name_of(vcpu.attr, "set", 1, 0, word(20)) == "EINVAL"
    give_vgic(vcpu.vm, "v3")
    for irq, attr, expected in ((32, 0, "EINVAL"), (15, 0, "EINVAL"), (20, 4, "ENXIO"), (20, 0, "")):
        assert name_of(vcpu.attr, "set", 1, attr, word(irq)) == expected
    assert vcpu.attr("get", 1, 0)[0] == 20
    vcpu.vm.ran = True
    assert name_of(vcpu.attr, "set", 1, 0, word(21)) == "EBUSY"


def test_stolen_time_lies_in_a_slot():
    vcpu = client()
    region = UserspaceMemoryRegion(slot=0, guest_phys_addr=0x40000000, memory_size=0x1000, userspace_addr=BASE)
    vcpu.vm.set_memory(region)
    vcpu.memory.write(BASE + 0x40, b"\xff" * 64)
    for ipa, expected in ((0x40000020, "EINVAL"), (0x50000000, "EINVAL"), (0x40000040, ""), (0x40000080, "EEXIST")):
        assert name_of(vcpu.attr, "set", 2, 0, ipa.to_bytes(8, "little")) == expected
    assert vcpu.attr("get", 2, 0) == (0x40000040).to_bytes(8, "little")
    vcpu.memory.write(BASE + 0x40, b"\xff" * 64)
    assert smccc.call(vcpu.vcpu, 0xC5000021, (0, 0, 0)).values[0] == 0x40000040
    assert vcpu.memory.read(BASE + 0x40, 64) == bytes(64)
    assert smccc.call(vcpu.vcpu, 0xC5000020, (0xC5000021, 0, 0)).values[0] == 0


def events(vcpu):
    vcpu.vcpu.get_vcpu_events(BASE)
    return VcpuEvents.unpack(vcpu.memory.read(BASE, VcpuEvents.SIZE)).exception


def inject(vcpu, reserved=(0,) * 12, **exception):
    vcpu.memory.write(BASE, VcpuEvents(exception=VcpuEventsException(**exception), reserved=reserved).pack())
    return name_of(vcpu.vcpu.set_vcpu_events, BASE)


def test_serrors_have_a_syndrome_with_ras_only():
    ras, plain = client(), client(A57)
    assert (events(ras).serror_has_esr, events(plain).serror_has_esr) == (1, 0)
    assert inject(plain, serror_pending=1, serror_has_esr=1, serror_esr=5) == "EINVAL"
    assert inject(plain, serror_pending=1) == ""
    assert events(plain).serror_pending == 1
    assert inject(ras, serror_pending=1, serror_has_esr=1, serror_esr=1 << 25) == "EINVAL"
    assert inject(ras, serror_pending=1, serror_has_esr=1, serror_esr=0x1FFFFFF) == ""
    assert (events(ras).serror_pending, events(ras).serror_esr) == (1, 0x1FFFFFF)
    assert inject(ras, serror_pending=1) == ""
    assert events(ras).serror_esr == 1 << 24
    assert inject(ras, pad=b"\1".ljust(5, b"\0")) == "EINVAL"
    assert inject(ras, reserved=(0,) * 11 + (1,)) == "EINVAL"
    ras.init(PSCI)
    assert events(ras).serror_pending == 0


def test_events_need_an_initialised_vcpu():
    vcpu = Client(make_vm(NEW))
    assert name_of(vcpu.vcpu.get_vcpu_events, BASE) == name_of(vcpu.vcpu.set_vcpu_events, 16) == "ENOEXEC"


@pytest.mark.parametrize(
    ("mode", "vector", "ec"), [(0x3C5, 0x200, 0x25), (0x3C4, 0, 0x25), (0x3C0, 0x400, 0x24), (0x10, 0x600, 0x24)]
)
def test_an_external_abort_is_entered_before_the_next_instruction(mode, vector, ec):
    vcpu = client()
    vcpu.set_sys(sr.VBAR_EL1, 0x80000)
    vcpu.set(PC, 0x1000)
    vcpu.set(PSTATE, mode | 0xA0000000)
    vcpu.vcpu.fault_esr, vcpu.vcpu.fault_address = 0x96000010, 0x9000000
    assert inject(vcpu, ext_dabt_pending=1) == ""
    assert vcpu.sys(sr.ESR_EL1) == ec << 26 | 1 << 25 | 0x10
    assert vcpu.sys(sr.FAR_EL1) == 0x9000000
    assert vcpu.get(PC) == 0x1000
    vcpu.vcpu.before_entry()
    assert vcpu.get(PC) == 0x80000 + vector
    assert (vcpu.get(ELR), vcpu.get(SPSR), vcpu.get(PSTATE)) == (0x1000, mode | 0xA0000000, 0xA00003C5)


def test_guest_debug_knows_four_bits():
    vcpu = client()
    for control, expected in ((1, ""), (0x30003, ""), (4, "EINVAL"), (0x40000, "EINVAL")):
        vcpu.memory.write(BASE, GuestDebug(control=control).pack())
        assert name_of(vcpu.vcpu.set_guest_debug, BASE) == expected
    assert vcpu.vcpu.guest_debug is not None and vcpu.vcpu.guest_debug.control == 0x30003
    vcpu.memory.write(BASE, GuestDebug(control=2).pack())
    vcpu.vcpu.set_guest_debug(BASE)
    assert vcpu.vcpu.guest_debug is None


def test_a_signal_mask_has_eight_bytes():
    vcpu = client()
    vcpu.memory.write(BASE, SignalMask(len=8).pack()[:4] + b"\1\2\3\4\5\6\7\x08")
    assert vcpu.vcpu.set_signal_mask(BASE) == 0
    assert vcpu.vcpu.signal_mask == b"\1\2\3\4\5\6\7\x08"
    vcpu.memory.write(BASE, word(16))
    assert name_of(vcpu.vcpu.set_signal_mask, BASE) == "EINVAL"
    assert name_of(vcpu.vcpu.set_signal_mask, 16) == "EFAULT"
    vcpu.vcpu.set_signal_mask(0)
    assert vcpu.vcpu.signal_mask is None


@pytest.mark.parametrize(
    ("cap", "value", "flags", "expected"),
    [
        *((cap, 0, 0, "") for cap in (168, 177, 182, 216, 228)),
        *((cap, 0, 0, "EINVAL") for cap in (0, 205, 170, 229, 1024, 0xFFFFFFFF)),
        *((cap, 0, 1, "EINVAL") for cap in (168, 177, 182, 216, 228)),
        *((168, value, 0, "" if value in (1, 3) else "EINVAL") for value in (1, 2, 3, 4, 5)),
        *((182, value, 0, "" if value < 1 << 32 else "EINVAL") for value in (1, (1 << 32) - 1, 1 << 32)),
        *((228, value, 0, "") for value in (0x1000, 0x200000, 0x40000000)),
        *((228, value, 0, "EINVAL") for value in (0x2000, 0x201000, 1, 1 << 63)),
        *((223, value, 0, "EINVAL") for value in (0, 0x800, 0x1001, 0x3000)),
        *((223, value, 0, "E2BIG") for value in (1 << 21, 1 << 31)),
        (223, 0x10000, 0, "EOPNOTSUPP"),
        (192, 0x10000, 0, "EINVAL"),
        (225, 0, 0, "EINVAL"),
    ],
)
def test_capabilities_of_a_vm(cap, value, flags, expected):
    assert name_of(enable_cap, make_vm(NEW), cap, value, flags) == expected


def test_capabilities_that_come_too_late():
    vm = make_vm("max-4k-mte")
    enable_cap(vm, 205)
    assert vm.arm.mte
    late = make_vm("max-4k-mte")
    Client(late)
    assert name_of(enable_cap, late, 205) == "EINVAL"
    vm.set_memory(UserspaceMemoryRegion(slot=0, guest_phys_addr=0, memory_size=0x1000, userspace_addr=BASE))
    assert name_of(enable_cap, vm, 228, 0x1000) == "EINVAL"
    enable_cap(vm, 177)
    assert vm.return_nisv_to_user


def test_writable_masks():
    vm = make_vm(NEW)
    vm.memory.write(BASE, RegMaskRange(addr=VALUE).pack())
    vm_arm.writable_masks(vm, BASE)
    data = vm.memory.read(VALUE, 192 * 8)
    masks = {index: int.from_bytes(data[8 * index : 8 * index + 8], "little") for index in range(192)}
    assert masks[7 << 3] == vm.profile.writable_masks[sr.ID_AA64MMFR0_EL1]
    assert masks[128 + 1] == vm.profile.writable_masks[sr.CTR_EL0]
    assert masks[64 + 1] == vm.profile.writable_masks[sr.CLIDR_EL1]
    assert sum(map(bool, masks.values())) == len(vm.profile.writable_masks)
    for bad in (RegMaskRange(addr=VALUE, range=1), RegMaskRange(addr=VALUE, reserved=(0,) * 12 + (1,))):
        vm.memory.write(BASE, bad.pack())
        assert name_of(vm_arm.writable_masks, vm, BASE) == "EINVAL"
    vm.memory.write(BASE, RegMaskRange(addr=16).pack())
    assert name_of(vm_arm.writable_masks, vm, BASE) == "EFAULT"
    assert name_of(vm_arm.writable_masks, make_vm(OLD), BASE) == "EINVAL"


def test_counter_offset():
    vcpu = client()
    vcpu.memory.write(BASE, ArmCounterOffset(counter_offset=5, reserved=1).pack())
    assert name_of(vm_arm.set_counter_offset, vcpu.vm, BASE) == "EINVAL"
    vcpu.memory.write(BASE, ArmCounterOffset(counter_offset=5).pack())
    vm_arm.set_counter_offset(vcpu.vm, BASE)
    assert (vcpu.vm.arm.voffset, vcpu.vm.arm.poffset) == (5, 5)
    Client(vcpu.vm, 1)
    assert vcpu.vm.arm.voffset == 5
    assert name_of(vm_arm.set_counter_offset, make_vm(OLD), BASE) == "EINVAL"


def test_preferred_target():
    for host, expected in ((NEW, 5), (A57, 5), ("a57-4k-6.1", 2)):
        vm = make_vm(host)
        vm.memory.write(BASE, b"\xff" * 32)
        vm_arm.preferred_target(vm, BASE)
        assert vm.memory.read(BASE, 32) == word(expected) + bytes(28)
