"""The device attributes of an ITS, as vgic_its_has_attr, _get_attr and _set_attr answer them."""

from __future__ import annotations

import threading

import pytest

import kvm2
from kvm2.abi import its as abi
from kvm2.abi import vgic_attrs as va

from .its_guest import ITS, QUEUE, RAM, guest, mapc, refused

ADDR, CTRL, REGS = va.KVM_DEV_ARM_VGIC_GRP_ADDR, va.KVM_DEV_ARM_VGIC_GRP_CTRL, va.KVM_DEV_ARM_VGIC_GRP_ITS_REGS
BASE = va.KVM_VGIC_ITS_ADDR_TYPE
UNDEF = (1 << 64) - 1


def word(value: int) -> bytes:
    return value.to_bytes(8, "little")


@pytest.fixture
def bare():
    """An ITS without an address, in a VM without a vGIC."""
    with kvm2.open("max-4k-6.12") as kvm, kvm.create_vm2(physaddr_bits=36) as vm:
        yield vm.create_device("vgic-its")


def test_which_attributes_there_are(bare):
    found = {(group, attr) for group in range(8) for attr in range(10) if bare.has_device_attr(group, attr)}
    assert found == {(ADDR, BASE), *((CTRL, attr) for attr in (0, 1, 2, 4))}
    there = {offset: refused(has, bare, offset) for offset in (0, 4, 2, 8, 0xC, 0x10, 0x18)}
    assert there == {0: "", 4: "", 2: "EINVAL", 8: "", 0xC: "EINVAL", 0x10: "ENXIO", 0x18: "ENXIO"}
    for offset, answer in ((0x80, ""), (0x84, "EINVAL"), (0x138, ""), (0x140, "ENXIO"), (0xFFD0, ""), (0xFFD4, "")):
        assert refused(has, bare, offset) == answer
    assert refused(has, bare, 0x10000) == refused(has, bare, 0x10040) == "ENXIO"
    assert refused(has, bare, 1 << 32) == ""  # the kernel looks at 32 bits


def has(its, offset):
    if not its.has_device_attr(REGS, offset):
        raise kvm2.KvmError(6, "ENXIO")


def test_the_address(bare):
    assert bare.get_device_attr(ADDR, BASE, 8) == word(UNDEF)
    assert refused(bare.get_device_attr, ADDR, 2, 8) == refused(bare.set_device_attr, ADDR, 2, word(0)) == "ENODEV"
    limit = 1 << 36
    for address, answer in (
        (0x1000, "EINVAL"),
        (ITS + 0x8000, "EINVAL"),
        (limit - 0x10000, "E2BIG"),
        (limit, "E2BIG"),
        ((1 << 64) - 0x10000, "EINVAL"),
        (limit - 0x20000, ""),
        (ITS, "EEXIST"),
        (0x1000, "EEXIST"),
    ):
        assert refused(bare.set_device_attr, ADDR, BASE, word(address)) == answer, hex(address)
    assert bare.get_device_attr(ADDR, BASE, 8) == word(limit - 0x20000)


def test_other_groups(bare):
    for group in (1, 2, 3, 5, 6, 7, 9):
        assert refused(bare.get_device_attr, group, 0, 8) == refused(bare.set_device_attr, group, 0, word(0)) == "ENXIO"
    assert refused(bare.get_device_attr, CTRL, 0, 8) == "ENXIO"
    for control in (0, 1, 2, 3, 4, 99):  # what it does not know does nothing
        assert refused(bare.set_device_attr, CTRL, control) == ""


def test_registers_need_an_address(bare):
    assert refused(bare.get_device_attr, REGS, 0, 8) == refused(bare.set_device_attr, REGS, 0, word(0)) == "ENXIO"
    assert refused(bare.get_device_attr, REGS, 0xC, 8) == "EINVAL"
    bare.set_device_attr(ADDR, BASE, word(ITS))
    assert bare.get_device_attr(REGS, abi.GITS_IIDR, 8) == word(0x4B00_043B)
    assert refused(bare.get_device_attr, REGS, 0x10, 8) == "ENXIO"


def test_bad_addresses_of_values():
    with guest() as g:
        for group, attr in ((ADDR, BASE), (REGS, 0)):
            for call in ("KVM_GET_DEVICE_ATTR", "KVM_SET_DEVICE_ATTR"):
                assert refused(g.its._device_attr, call, group, attr, 16) == "EFAULT"


def test_userspace_restores_what_the_guest_cannot_write():
    with guest() as g:
        g.put(abi.GITS_CBASER, QUEUE | abi.VALID)
        for value, answer in ((0x1000, "EINVAL"), (0xFE0 | 0x1F, ""), (0x100_0020, "")):
            assert refused(g.put, abi.GITS_CREADR, value) == answer
        assert g.get(abi.GITS_CREADR) == 0x20
        assert refused(g.put, abi.GITS_IIDR, 1 << 12) == "EINVAL" and refused(g.put, abi.GITS_IIDR, 0) == ""
        for offset in (abi.GITS_TYPER, 0xFFD0):
            before = g.get(offset)
            g.put(offset, UNDEF)
            assert g.get(offset) == before
        g.start()
        assert refused(g.put, abi.GITS_CREADR, 0) == "EBUSY"


def test_a_write_of_cwriter_by_userspace_runs_commands():
    with guest() as g:
        g.start()
        g.vm.write(QUEUE, mapc(3, 1))
        g.put(abi.GITS_CWRITER, 0x20)
        assert g.get(abi.GITS_CREADR) == 0x20 and g.model.collections[3].target == 1


def test_nothing_while_a_vcpu_runs():
    with guest() as g:
        g.start()
        entered, leave = threading.Event(), threading.Event()

        def hold():
            with g.soft.vcpus[1].lock:
                entered.set()
                leave.wait(30)

        other = threading.Thread(target=hold)
        other.start()
        entered.wait(30)
        try:
            answers = [refused(g.control, control) for control in (1, 2, 4)]
            answers += [refused(g.get, 0), refused(g.put, 0, 0)]
            assert answers == ["EBUSY"] * 5
            assert refused(g.control, 0) == "" == refused(g.its.get_device_attr, ADDR, BASE, 8)
        finally:
            leave.set()
            other.join()
        assert refused(g.control, 1) == ""


def test_an_its_that_comes_before_the_vgic_and_one_with_a_gicv2():
    with kvm2.open("max-4k-6.12") as kvm, kvm.create_vm2() as vm:
        vm.map(RAM, 1 << 20)
        vm.create_vcpu(0).init()
        assert vm.check_extension("MSI_DEVID") == 0
        its = vm.create_device("vgic-its")
        assert vm.check_extension("MSI_DEVID") == 1
        vm.create_device("vgic-v3")
        soft = kvm.backend.inspect(vm.fd)
        assert soft.vgic.has_its and soft.vgic.propbaser == 0x580
        its.close()
        assert soft.vgic.has_its  # it is part of the VM
    with kvm2.open("max-4k-gicv2") as kvm, kvm.create_vm2() as vm:
        assert refused(vm.create_device, "vgic-its") == "ENODEV"


def test_without_a_vgic_commands_find_no_interrupts(bare):
    from .its_guest import mapd, mapti, words

    bare.set_device_attr(ADDR, BASE, word(ITS))
    vm = bare.vm
    vm.map(RAM, 8 << 20)
    vm.create_vcpu(0).init()
    for offset, value in (
        (0x80, QUEUE | abi.VALID),
        (0x100, RAM | abi.VALID),
        (0x108, RAM + 0x10000 | abi.VALID),
        (0, 1),
    ):
        bare.set_device_attr(REGS, offset, word(value))
    commands = mapd(1) + mapc(0) + mapti(1, 0, 8192) + words(abi.INVALL) + words(abi.INT, 1) + words(abi.MOVALL)
    vm.write(QUEUE, commands + mapc(0, valid=False))
    bare.set_device_attr(REGS, abi.GITS_CWRITER, word(7 * 32))
    assert bare.get_device_attr(REGS, abi.GITS_CREADR, 8) == word(7 * 32)
