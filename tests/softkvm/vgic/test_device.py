"""The device attributes of both vGICs: what userspace saves and restores, and when it may.

The expected values were given by Linux 6.12 on live arm64 kernels (oracle shapes max-4k-6.12 and max-4k-gicv2).
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator

import pytest

import kvm2
from kvm2.abi import gic_registers as regs
from kvm2.abi import ioctls
from kvm2.abi import sysregs as sr
from kvm2.abi import vgic_attrs as va
from kvm2.abi.structs_arm64 import ArmDeviceAddr

from .gic import (
    ADDR,
    CPU,
    CTRL,
    DIST,
    LEVELS,
    NR_IRQS,
    RAM,
    REDIST,
    SYSREGS,
    V2_CPU,
    V2_DIST,
    V2_HOST,
    V3_DIST,
    V3_HOST,
    Gic,
    machine,
    refused,
)

IIDR = 0x4B00343B
SAVE_PENDING = va.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES


@pytest.fixture
def v3() -> Iterator[Gic]:
    with machine("v3", (0, 1)) as gic:
        assert gic.set(NR_IRQS, 0, 96) == ""
        gic.start()
        yield gic


@pytest.fixture
def v2() -> Iterator[Gic]:
    with machine("v2", (0, 1)) as gic:
        assert gic.set(NR_IRQS, 0, 96) == ""
        gic.place()
        yield gic


def there(gic: Gic, group: int, size: int) -> set[int]:
    return {at for at in range(0, size, 4) if gic.has(group, at) == ""}


def test_the_registers_that_there_are_depend_on_the_number_of_interrupts() -> None:
    with machine("v3", (0,)) as gic:
        few = there(gic, DIST, 0x1000)
        assert 0x100 in few and 0x104 not in few and 0x41C in few and 0x420 not in few, "private interrupts only"
        assert gic.set(NR_IRQS, 0, 96) == ""
        more = there(gic, DIST, 0x1000)
        assert {0x104, 0x108, 0x45C} <= more and not {0x10C, 0x460} & more
        assert there(gic, REDIST, 0x100) == {0, 4, 8, 12, 0x14, *range(0x70, 0x80, 4), 0xA0, 0xA4, 0xB0, 0xB4, 0xC0}
        assert gic.has(DIST, 1) == gic.has(REDIST, 0x10402) == "ENXIO"


@pytest.mark.parametrize(
    ("number", "expected"), [(31, "EINVAL"), (63, "EINVAL"), (65, "EINVAL"), (1024, "EINVAL"), (992, ""), (64, "")]
)
def test_how_many_interrupts(number: int, expected: str) -> None:
    with machine("v3", (0,)) as gic:
        assert gic.get(NR_IRQS, 7) == 32
        assert gic.set(NR_IRQS, 0, number) == expected
        if not expected:
            assert gic.set(NR_IRQS, 0, number) == "EBUSY" and gic.get(NR_IRQS, 0) == number
        assert gic.init() == "" and gic.set(NR_IRQS, 0, 64) == "EBUSY"
        assert gic.get(NR_IRQS, 0) == (256 if expected else number)


def test_what_a_gicv3_answers_before_it_is_initialised() -> None:
    with machine("v3", (0,)) as gic:
        assert gic.get(DIST, 0) == gic.set(DIST, 0) == gic.get(SYSREGS, sr.ICC_PMR_EL1) == gic.get(LEVELS, 0) == "EBUSY"
        assert gic.set(CTRL, SAVE_PENDING) == "ENXIO"
        assert gic.set(CTRL, 1) == gic.set(99, 0) == gic.get(CTRL, 0) == gic.get(CPU, 0) == "ENXIO"
        assert gic.get(ADDR, V3_DIST) == va.VGIC_ADDR_UNDEF
        assert gic.get(ADDR, V2_DIST) == gic.set(ADDR, V2_DIST) == "ENXIO"


def test_a_gicv2_initialises_itself_when_its_state_is_looked_at() -> None:
    with machine("v2", (0,)) as gic:
        assert not gic.soft.vgic.initialized
        assert gic.get(DIST, 8) == IIDR and gic.soft.vgic.initialized
        assert gic.set(CTRL, SAVE_PENDING) == gic.get(REDIST, 0) == "ENXIO"


def test_userspace_writes_the_revision_and_nothing_else_of_iidr(v3: Gic, v2: Gic) -> None:
    for gic in (v3, v2):
        written = [gic.set(DIST, 8, IIDR & ~0xF000 | revision << 12) for revision in range(5)]
        assert written == ["EINVAL", "EINVAL", "", "", "EINVAL"]
        assert gic.set(DIST, 8, IIDR ^ 1) == "EINVAL"
        assert gic.set(DIST, 8, IIDR & ~0xF000 | 2 << 12) == "" and gic.get(DIST, 8) == 0x4B00243B
    assert v3.redist(0, 0) == 0, "revision 2 has no invalidation registers"
    assert v3.set(DIST, 0xC, 1) == "EINVAL" and v3.set(DIST, 0xC, 0) == ""


def test_groups_of_a_gicv2_are_restored_by_those_only_who_know_of_them(v2: Gic) -> None:
    assert v2.set(DIST, 0x84, 0xFF) == "" and v2.get(DIST, 0x84) == 0
    assert v2.set(DIST, 8, IIDR) == "" and v2.set(DIST, 0x84, 0xFF) == ""
    assert v2.get(DIST, 0x84) == 0xFF


def test_a_latch_and_a_line_are_saved_separately(v3: Gic) -> None:
    assert v3.set(DIST, 0xC08, 0) == "" == v3.set(LEVELS, 32, 0b11)
    assert v3.get(LEVELS, 32) == 0b11 and v3.get(DIST, 0x204) == 0
    assert v3.set(DIST, 0x204, 0b110) == "" and v3.get(DIST, 0x204) == 0b110
    assert v3.read(0x0800_0000 + 0x204) == 0b111, "the guest sees both"
    assert v3.set(DIST, 0x204, 0b100) == "" and v3.get(DIST, 0x204) == 0b100, "the whole latch is written"
    assert v3.set(DIST, 0x284, 0b100) == "" and v3.get(DIST, 0x284) == 0 and v3.get(DIST, 0x204) == 0b100
    for attr in (5, 31, 1 << 10):
        assert v3.get(LEVELS, attr) == v3.set(LEVELS, attr) == "EINVAL"
    assert v3.has(LEVELS, 1 << 10) == "ENXIO" and v3.has(LEVELS, 5) == ""
    assert v3.set(LEVELS, 0, 0xFFFFFFFF) == "" and v3.get(LEVELS, 0) == 0xFFFF0000, "SGIs have no line"
    assert v3.get(LEVELS, 1 << 32) == 0 and v3.get(LEVELS, 5 << 32) == "EINVAL"


def test_pending_sgis_of_a_gicv2_come_from_the_vcpu_itself(v2: Gic) -> None:
    at = 1 << 32
    assert v2.set(DIST, at | 0x200, 2) == ""
    assert (v2.get(DIST, at | 0x200), v2.get(DIST, at | 0xF20)) == (2, 0x200)
    assert v2.set(DIST, at | 0x280, 2) == "" and v2.get(DIST, at | 0xF20) == 0
    assert v2.get(DIST, 2 << 32) == "EINVAL"


def test_the_cpu_interfaces_registers_are_kept_as_written_until_the_vcpu_runs(v3: Gic) -> None:
    registers = (sr.ICC_PMR_EL1, sr.ICC_BPR0_EL1, sr.ICC_BPR1_EL1, sr.ICC_CTLR_EL1, sr.ICC_SRE_EL1)
    assert [v3.get(SYSREGS, enc) for enc in registers] == [0, 0, 0, 0x8C00, 7]
    for enc, value in ((sr.ICC_PMR_EL1, 0x1F7), (sr.ICC_BPR0_EL1, 1), (sr.ICC_BPR1_EL1, 0xF0), (sr.ICC_AP1R0_EL1, 5)):
        assert v3.set(SYSREGS, enc, value) == ""
    wanted = [0xF7, 1, 0, 0x8C00, 7]
    assert [v3.get(SYSREGS, enc) for enc in registers] == wanted
    assert v3.get(SYSREGS, sr.ICC_AP1R0_EL1) == 5 and v3.get(SYSREGS, 1 << 32 | sr.ICC_AP1R0_EL1) == 0
    assert v3.run(0) == ""
    assert [v3.get(SYSREGS, enc) for enc in registers] == [0xF0, 2, 3, 0x8C00, 7]


def test_the_active_state_of_the_timers_interrupts_is_the_machines_own_once_the_vcpu_ran(v3: Gic) -> None:
    timers, other = 1 << 27 | 1 << 30, 1 << 20
    assert v3.set(REDIST, 0x10300, timers | other) == "" and v3.redist(0, 0x10300) == timers | other
    assert v3.set(REDIST, 0x10380, timers | other) == "" and v3.run(0) == ""
    assert v3.set(REDIST, 0x10300, timers | other) == "" and v3.redist(0, 0x10300) == other
    assert v3.set(REDIST, 1 << 32 | 0x10300, timers) == "" and v3.redist(1, 0x10300) == timers


def test_interrupts_that_were_restored_go_on_where_they_were(v3: Gic) -> None:
    """As vgic_irq.c's `test_restore_active`: active, pending and enabled state, active priorities, then the guest."""
    bits = 0b111 << 8
    for at, value in ((0x104, bits), (0x304, 0b011 << 8), (0x204, 0b110 << 8), (0, 2)):
        assert v3.set(DIST, at, value) == ""
    for enc, value in ((sr.ICC_PMR_EL1, 0xF8), (sr.ICC_IGRPEN1_EL1, 1), (sr.ICC_AP1R0_EL1, 1 << 2 | 1 << 4)):
        assert v3.set(SYSREGS, enc, value) == ""
    assert v3.set(DIST, 0x428, 0xF7_2010) == "" and v3.get(DIST, 0x428) == 0xF0_2010, "five bits of priority"
    cpu = v3.soft.vgic.cpus()[0]
    face = cpu.interface
    assert face.running() == 0x10 and not cpu.irq_line, "40 is active at 0x10, 41 at 0x20"
    face.end(1, 40)
    assert face.running() == 0x20 and not cpu.irq_line and v3.get(DIST, 0x304) == 1 << 9
    face.end(1, 41)
    assert cpu.irq_line and face.acknowledge(1) == (41, 0), "it was active and pending"
    face.end(1, 41)
    assert face.acknowledge(1) == (42, 0) and face.running() == 0xF0
    face.end(1, 42)
    assert v3.get(DIST, 0x304) == v3.get(DIST, 0x204) == 0 and not cpu.irq_line


def test_what_the_cpu_interface_cannot_have_is_refused(v3: Gic) -> None:
    for enc, value, expected in (
        (sr.ICC_CTLR_EL1, 0x8C03, ""),
        (sr.ICC_CTLR_EL1, 0x8D00, "EINVAL"),  # 6 bits of priority
        (sr.ICC_CTLR_EL1, 0x9400, "EINVAL"),  # IDbits 2
        (sr.ICC_CTLR_EL1, 0xCC00, "EINVAL"),  # SEIS
        (sr.ICC_CTLR_EL1, 0x0C00, "EINVAL"),  # not A3V
        (sr.ICC_SRE_EL1, 6, "EINVAL"),
        (sr.ICC_SRE_EL1, 1, ""),
        (sr.ICC_AP0R1_EL1, 0, "EINVAL"),
        (sr.ICC_IAR1_EL1, 0, "ENOENT"),
        (sr.ICC_BPR1_EL1, 7, ""),
    ):
        assert v3.set(SYSREGS, enc, value) == expected, (hex(enc), hex(value))
    assert v3.get(SYSREGS, sr.ICC_CTLR_EL1) == 0x8C03 and v3.get(SYSREGS, sr.ICC_BPR1_EL1) == 1, "CBPR: group 0's"
    assert v3.has(SYSREGS, sr.ICC_AP0R1_EL1) == "" and v3.has(SYSREGS, sr.ICC_IAR1_EL1) == "ENXIO"


def test_the_cpu_interface_of_a_gicv2_as_userspace_sees_it(v2: Gic) -> None:
    assert there(v2, CPU, 0x2000) == {0, 4, 8, 0x1C, 0xD0, 0xD4, 0xD8, 0xDC, 0xFC}
    for at, value, back in (
        (0, 0xFFFFFFFF, 0x21F),
        (4, 0x3F, 0x1F),
        (8, 9, 1),
        (0x1C, 4, 4),
        (0xD0, 6, 6),
        (0xD4, 6, 0),
    ):
        assert v2.set(CPU, at, value) == "" and v2.get(CPU, at) == back, hex(at)
    assert v2.get(CPU, 0xFC) == 0x04B2043B and v2.get(CPU, 1 << 32) == 0 and v2.get(CPU, 0xC) == 0
    assert v2.set(CPU, 0xD0, 0) == "" and v2.run(0) == ""
    assert [v2.get(CPU, at) for at in (8, 0x1C)] == [2, 4], "raised to the smallest"


@pytest.mark.parametrize("model", ["v2", "v3"])
def test_nothing_of_the_state_while_a_vcpu_runs(model: str) -> None:
    with machine(model, (0, 1)) as gic:
        gic.place()
        assert gic.init() == ""
        gic.ram.write(0, b"\x00\x00\x00\x14")  # b .
        runner = threading.Thread(target=lambda: refused(gic.vcpus[0].run_once))
        runner.start()
        try:
            deadline = time.monotonic() + 30
            while gic.get(DIST, 0) != "EBUSY" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert gic.get(DIST, 0) == gic.set(DIST, 0) == "EBUSY"
            assert gic.get(NR_IRQS, 0) == 256 and gic.has(DIST, 0) == ""
        finally:
            gic.vcpus[0].kick()
            runner.join(30)
        assert not runner.is_alive() and isinstance(gic.get(DIST, 0), int)


def test_no_vgic_while_a_vcpu_runs_or_after_one_ran() -> None:
    with kvm2.open(V3_HOST) as kvm, kvm.create_vm2() as vm:
        vm.map(RAM, 0x10000).write(0, b"\x00\x00\x00\x14")
        vcpu = vm.create_vcpu(0)
        vcpu.init()
        vcpu.regs.pc = RAM
        soft = kvm.backend.inspect(vm.fd)
        with soft.vcpus[0].lock:
            other: list[str] = []
            thread = threading.Thread(target=lambda: other.append(refused(vm.create_device, "vgic-v3")))
            thread.start()
            thread.join(30)
        assert other == ["EBUSY"]
        soft.ran = True
        assert refused(vm.create_device, "vgic-v3") == "EBUSY"


def test_the_older_calls_make_and_place_a_gicv2() -> None:
    with kvm2.open(V3_HOST) as kvm, kvm.create_vm2() as vm:
        assert refused(vm.ioctl, ioctls.KVM_CREATE_IRQCHIP, 0) == "ENODEV"
    with kvm2.open(V2_HOST) as kvm, kvm.create_vm2() as vm:
        place = ArmDeviceAddr(id=V2_DIST, addr=0x0800_0000)
        assert refused(vm.ioctl, ioctls.KVM_ARM_SET_DEVICE_ADDR, place) == "ENODEV", "there is no vGIC yet"
        assert vm.ioctl(ioctls.KVM_CREATE_IRQCHIP, 0) == 0
        assert refused(vm.ioctl, ioctls.KVM_CREATE_IRQCHIP, 0) == "EEXIST" == refused(vm.create_device, "vgic-v2")
        for id, address, expected in (
            (V2_DIST, 0x0800_0000, ""),
            (V2_DIST, 0x0800_0000, "EEXIST"),
            (V2_CPU, 0x0801_0800, "EINVAL"),
            (V2_CPU, 1 << 50, "E2BIG"),
            (V2_CPU, 0x0801_0000, ""),
            (2, 0, "ENODEV"),
            (1 << 16, 0, "ENODEV"),
        ):
            assert refused(vm.ioctl, ioctls.KVM_ARM_SET_DEVICE_ADDR, ArmDeviceAddr(id=id, addr=address)) == expected


def test_one_vfio_device_which_nothing_can_be_added_to() -> None:
    with kvm2.open(V3_HOST) as kvm, kvm.create_vm2() as vm:
        device = vm.create_device("vfio")
        assert device is not None
        assert refused(vm.create_device, "vfio") == "EBUSY"
        reader, writer = os.pipe()
        try:
            fd = reader.to_bytes(4, "little")
            assert device.has_device_attr(1, 1) and device.has_device_attr(1, 2) and not device.has_device_attr(1, 3)
            assert refused(device.get_device_attr, 1, 1, 4) == "EPERM"
            assert refused(device.set_device_attr, 1, 1, fd) == "EINVAL"
            assert refused(device.set_device_attr, 1, 2, fd) == "ENOENT"
            assert refused(device.set_device_attr, 1, 1, b"\xff" * 4) == "EBADF"
        finally:
            os.close(reader)
            os.close(writer)
        device.close()
        assert refused(vm.create_device, "vfio") == ""


def test_frames_of_the_registry_do_not_overlap() -> None:
    for frame in (*regs.FRAMES, regs.GICC_USER):
        found = sorted((register.offset, register.offset + register.length) for register in frame)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(found))
        assert found[-1][1] <= frame.size and all(start % 4 == end % 4 == 0 for start, end in found)
