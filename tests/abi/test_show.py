"""Structures and ioctl arguments in words: by their declarations, and whatever the bytes and addresses are."""

from __future__ import annotations

import json
import random
import struct

import pytest

from kvm2.abi import exits, ioctls, show, show_ioctl, structs, vm2, wire
from kvm2.abi.structs_arm64 import KVM_ARM_VCPU_PSCI_0_2, KVM_ARM_VCPU_SVE, VcpuInit
from kvm2.abi.structs_x86 import Regs
from kvm2.errors import KvmError
from kvm2.handle import Buffer
from kvm2.softkvm.memory import ProcessMemory

ROWS = ioctls.ioctls()
MEMORY = ProcessMemory()


def row(name: str, arch: str = "arm64") -> ioctls.Ioctl:
    return ioctls.named(name, arch)[0]


def said(structure: object, arch: str = "arm64") -> str:
    return show.text(show.fields(structure, arch))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("structure", "text"),
    [
        (structs.MpState(10), "{mp_state=KVM_MP_STATE_SUSPENDED}"),
        (structs.MpState(77), "{mp_state=77}"),
        (structs.DeviceAttr(0, 1, 2, 0x10000), "{flags=0, group=1, attr=2, addr=0x10000}"),
        (
            structs.UserspaceMemoryRegion(flags=0x11, memory_size=4096),
            "{slot=0, flags=KVM_MEM_LOG_DIRTY_PAGES|0x10, guest_phys_addr=0, memory_size=4096, userspace_addr=0}",
        ),
        (structs.OneReg(0x6030000000100040, 1 << 40), "{id=regs.pc, addr=0x10000000000}"),
        (structs.EnableCap(168, pad=b"\1" + bytes(63)), "{cap=KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags=0, "
            "args=[0 x 4], pad=01 and 63 zero bytes}"),
        (structs.CreateDevice(7, 5, 1), "{type=KVM_DEV_TYPE_ARM_VGIC_V3, fd=5, flags=KVM_CREATE_DEVICE_TEST}"),
        (
            VcpuInit(5, (1 << KVM_ARM_VCPU_PSCI_0_2 | 1 << KVM_ARM_VCPU_SVE,) + (0,) * 6),
            "{target=KVM_ARM_TARGET_GENERIC_V8, features=[KVM_ARM_VCPU_PSCI_0_2|KVM_ARM_VCPU_SVE, 0 x 6]}",
        ),
        (vm2.Vm2AttrInfo(2, 3, 40, 32, 36), "{type=KVM_CREATE_VM_ATTR_ARM64_PHYSADDR_SIZE, "
            "flags=KVM_VM2_ATTR_INFO_VALUE|KVM_VM2_ATTR_INFO_NEGOTIABLE, def=40, min=32, max=36, mask=0}"),
        (exits.SystemEvent(2, 1, (1,) + (0,) * 15), "{type=KVM_SYSTEM_EVENT_RESET, ndata=1, data=[1, 0 x 15]}"),
        (exits.Io(1, 1, 0x3F8, 1, 4096), "{direction=KVM_EXIT_IO_OUT, size=1, port=0x3f8, count=1, data_offset=4096}"),
    ],
)  # fmt: skip
def test_fields_by_name(structure: object, text: str) -> None:
    assert said(structure) == text


def test_the_architecture_decides_what_a_number_means() -> None:
    machine = vm2.MachineType(machine_type=1)
    assert "machine_type=KVM_CREATE_VM_ARM64_MACHINE_PROTECTED" in said(machine)
    assert "machine_type=1" in said(machine, "x86_64")
    fixed = vm2.CreateVm2Fixed(0, vm2.CreateVm2FixedArm64(2, 0, 36).pack().ljust(120, b"\0"))
    assert said(fixed) == "{version=0, words={capabilities=KVM_ARM_SELECT_IPA, sve_vlen=0, ipa_size=36}}"


def test_json_keeps_every_number() -> None:
    shown = show.plain(show.fields(structs.EnableCap(165, args=(1, 2, 3, 1 << 63))))
    assert shown == {"cap": {"number": 165, "name": "KVM_CAP_ARM_VM_IPA_SIZE"}, "flags": 0, "args": [1, 2, 3, 1 << 63]}
    assert show.plain(show.Record("X", {"data": b"\1\2", "of": [show.Named(1, "one")]})) == {
        "name": "X", "data": "0102", "of": [{"number": 1, "name": "one"}]
    }  # fmt: skip


def test_long_things_are_cut_short() -> None:
    assert show.text(list(range(1, 101))).endswith("16, ... 84 more]")
    assert show.text([0] * 5) == "[0 x 5]" and show.text([]) == "[]" and show.text([3, 0]) == "[3, 0]"
    assert show.text(bytes(range(1, 100))).endswith("... (99 bytes)") and show.text(bytes(40)) == "40 zero bytes"
    assert show.text(65535) == "65535" and show.text(65536) == "0x10000" and show.text(-1) == "-1"


def encoded(*attributes: object, **how: bool) -> Buffer:
    buffer = Buffer(len(wire.encode(attributes, 0, **how)))  # type: ignore[arg-type]
    MEMORY.write(buffer.address, wire.encode(attributes, buffer.address, **how))  # type: ignore[arg-type]
    return buffer


@pytest.mark.parametrize("terminated", [False, True])
def test_every_attribute_of_a_list(terminated: bool) -> None:
    every = [entry.cls() for entry in vm2.ATTRIBUTES.values()]
    buffer = encoded(*every, vm2.AttrHdr(99, 16, 1), terminated=terminated)
    text = show.text(show_ioctl.before(row("KVM_CREATE_VM2"), buffer.address, MEMORY))
    names = [entry.macro for entry in vm2.ATTRIBUTES.values()]
    assert [name for name in names if f"{name}{{" in text or f"{name}," in text] == names
    assert "ARM64_PHYSADDR_SIZE{physaddr_bits=0}" in text and "DRY_RUN, NEGOTIATE, " in text
    assert text.endswith("attribute 99{size=16, flags=KVM_CREATE_VM_ATTR_SKIP_UNKNOWN}]")
    assert show_ioctl.types_of(buffer.address, MEMORY) == {*vm2.ATTRIBUTES, 99}


def test_odd_lists() -> None:
    def shown(outer: vm2.CreateVm2) -> str:
        buffer = Buffer(outer.pack())
        return show.text(show_ioctl.attribute_list(buffer.address, MEMORY))

    short = Buffer(vm2.MaxVcpus(size=8, flags=2).pack())
    array = Buffer(struct.pack("=3Q", 0, 16, short.address))
    assert shown(vm2.CreateVm2(1, 3, 0, array.address)) == (
        "{version=1, attrs=[NULL, unreadable at 0x10, "
        "MAX_VCPUS{size=8, flags=KVM_CREATE_VM_ATTR_SKIP_UNSUPPORTED, max_vcpus=0}]}"
    )
    assert shown(vm2.CreateVm2(0, 2, 0, 16)) == "[unreadable at 0x10]"
    assert shown(vm2.CreateVm2(0, 0, 7, 0)) == "{pad=7, attrs=[]}"
    assert shown(vm2.CreateVm2()) == "[]"
    assert "nr_attrs=65535" in shown(vm2.CreateVm2(0, 65535, 0, array.address))


def test_findings_come_from_the_report() -> None:
    from kvm2.abi.findings import Finding

    found = Finding(0, 2, 95, 4, 48, 32, 36, 0, "48 bits")
    records = Buffer(found.record() * 3)
    report = vm2.Report(records=records.address, capacity=2, count=3)
    assert show_ioctl.findings(encoded(vm2.DryRun(), report).address, MEMORY) == (found, found)
    lost = vm2.Report(records=16, capacity=2, count=3)
    assert show_ioctl.findings(encoded(lost).address, MEMORY) == ()
    assert show_ioctl.findings(encoded(vm2.DryRun()).address, MEMORY) == () == show_ioctl.findings(16, MEMORY)


def test_registers_go_with_their_values() -> None:
    value = Buffer(struct.pack("=Q", 0x40000000))
    one = Buffer(structs.OneReg(0x6030000000100040, value.address).pack())
    assert show.text(show_ioctl.before(row("KVM_SET_ONE_REG"), one.address, MEMORY)) == "{id=regs.pc, value=0x40000000}"
    get = row("KVM_GET_ONE_REG")
    assert show.text(show_ioctl.before(get, one.address, MEMORY)) == "{id=regs.pc}"
    assert show_ioctl.after(get, one.address, MEMORY, "arm64", None, True) == 0x40000000
    assert show_ioctl.after(get, one.address, MEMORY, "arm64", None, False) is None
    bad = Buffer(structs.OneReg(0x6030000000100040, 16).pack())
    assert show.text(show_ioctl.before(row("KVM_SET_ONE_REG"), bad.address, MEMORY)) == (
        "{id=regs.pc, value=unreadable at 0x10}"
    )


def test_lists_behind_a_head() -> None:
    ids = Buffer(struct.pack("=3Q", 2, 0x6030000000100040, 0x603000000013C005))
    out = show_ioctl.after(row("KVM_GET_REG_LIST"), ids.address, MEMORY, "arm64", {"n": 0}, True)
    assert show.text(out) == "{n=2, items=[regs.pc, MPIDR_EL1]}"
    msrs = Buffer(struct.pack("=IIIIQ", 1, 0, 0xC0000080, 0, 0x500))
    assert show.text(show_ioctl.before(row("KVM_SET_MSRS", "x86_64"), msrs.address, MEMORY, "x86_64")) == (
        "{nmsrs=1, items=[{index=0xc0000080, data=0x500}]}"
    )
    mask = Buffer(struct.pack("=IQ", 8, 0x200))
    assert show.text(show_ioctl.before(row("KVM_SET_SIGNAL_MASK"), mask.address, MEMORY)) == "{len=8, items=[512]}"


def test_room_is_not_shown_as_what_lies_there() -> None:
    cpuid = row("KVM_GET_SUPPORTED_CPUID", "x86_64")
    buffer = Buffer(struct.pack("=II", 3, 0) + struct.pack("=10I", *range(1, 11)) * 3)
    asked = show_ioctl.before(cpuid, buffer.address, MEMORY, "x86_64")
    assert show.text(asked) == "{nent=3}"
    out = show_ioctl.after(cpuid, buffer.address, MEMORY, "x86_64", asked, True)
    assert show.text(out).startswith("{nent=3, items=[{function=1, index=2, flags=")
    ids = Buffer(struct.pack("=3Q", 2, 7, 7))
    assert show.text(show_ioctl.before(row("KVM_GET_REG_LIST"), ids.address, MEMORY)) == "{n=2}"
    msrs = Buffer(struct.pack("=IIIIQ", 1, 0, 16, 0, 0))
    read = show_ioctl.before(row("KVM_GET_MSRS", "x86_64"), msrs.address, MEMORY, "x86_64")
    assert show.text(read) == "{nmsrs=1, items=[{index=0x10, data=0}]}", "which MSRs is asked for"


def test_structures_in_lists_are_cut_sooner() -> None:
    assert show.text([{"a": 1}] * 9) == "[{a=1}, {a=1}, {a=1}, {a=1}, ... 5 more]"
    assert len(show.plain([{"a": 1}] * 9)) == 9


def test_registers_are_hexadecimal() -> None:
    assert "rsp=0x7c00" in said(Regs(rsp=0x7C00), "x86_64") and "rip=0," in said(Regs(), "x86_64")
    assert json.dumps(show.plain(show.fields(Regs(rsp=16)))["rsp"]) == "16"


def test_which_way_a_payload_goes() -> None:
    assert show_ioctl.before(row("KVM_GET_REGS", "x86_64"), 16, MEMORY, "x86_64") is None
    for name in ("KVM_SET_IRQCHIP", "KVM_SET_PIT", "KVM_MEMORY_ENCRYPT_REG_REGION"):
        assert row(name, "x86_64").direction == "r" and show_ioctl.is_input(row(name, "x86_64"))
    regs = Buffer(Regs(rip=0xFFF0).pack())
    out = show_ioctl.after(row("KVM_GET_REGS", "x86_64"), regs.address, MEMORY, "x86_64", None, True)
    assert isinstance(out, dict) and out["rip"] == 0xFFF0


@pytest.mark.parametrize("one", ROWS, ids=lambda one: f"{one.name}-{one.arches[0]}")
def test_nothing_that_a_caller_passes_stops_it(one: ioctls.Ioctl) -> None:
    """Random bytes, all ones and no memory at all, of every ioctl: there is always something to show."""
    chance = random.Random(one.number)
    size = one.size + 4096
    for data in (bytes(size), b"\xff" * size, *(chance.randbytes(size) for _ in range(5))):
        buffer = Buffer(data)
        for address in (buffer.address, 0, 16, (1 << 64) - 8):
            for arch in one.arches:
                went_in = show_ioctl.before(one, address, MEMORY, arch)
                for ok in (True, False):
                    out = show_ioctl.after(one, address, MEMORY, arch, went_in, ok)
                    json.dumps(show.plain(out))
                    assert isinstance(show.text(out), str)
                json.dumps(show.plain(went_in))
                assert show.text(went_in)


@pytest.mark.parametrize("arch", ["arm64", "x86_64"])
def test_every_exit(arch: str) -> None:
    chance = random.Random(1)
    for reason in [*exits.EXITS, 9999]:
        for fill in (bytes(8192), b"\xff" * 8192, chance.randbytes(8192)):
            area = bytearray(fill)
            struct.pack_into("=I", area, exits.EXIT_REASON_OFFSET, reason)
            found = show_ioctl.exit_of(memoryview(area), arch)
            assert found.name == exits.name_of(reason)
            json.dumps(show.plain(found))
            show_ioctl.answer_of(memoryview(area))


def test_data_of_an_exit() -> None:
    area = bytearray(8192)

    def left(reason: int, payload: object) -> str:
        struct.pack_into("=I", area, exits.EXIT_REASON_OFFSET, reason)
        area[exits.UNION_OFFSET : exits.UNION_OFFSET + 256] = payload.pack().ljust(256, b"\0")  # type: ignore[attr-defined]
        return show.text(show_ioctl.exit_of(memoryview(area)))

    assert left(exits.KVM_EXIT_MMIO, exits.Mmio(0x9000000, b"Abcdefgh", 1, 1)) == (
        "KVM_EXIT_MMIO{phys_addr=0x9000000, data=41, len=1, is_write=1}"
    )
    assert left(exits.KVM_EXIT_MMIO, exits.Mmio(0x9000018, b"\x90" + bytes(7), 4, 0)) == (
        "KVM_EXIT_MMIO{phys_addr=0x9000018, len=4, is_write=0}"
    )
    assert show_ioctl.answer_of(memoryview(area)) == b"\x90\0\0\0"
    area[4096:4099] = b"kvm"
    assert left(exits.KVM_EXIT_IO, exits.Io(1, 1, 0x3F8, 3, 4096)) == (
        "KVM_EXIT_IO{direction=KVM_EXIT_IO_OUT, size=1, port=0x3f8, count=3, data=6b766d}"
    )
    assert show_ioctl.answer_of(memoryview(area)) is None
    left(exits.KVM_EXIT_IO, exits.Io(0, 1, 0x60, 1, 4096))
    assert show_ioctl.answer_of(memoryview(area)) == b"k"


def test_a_memory_that_refuses_everything() -> None:
    class Gone:
        def read(self, address: int, size: int) -> bytes:
            raise KvmError(14)

    for one in ROWS:
        if one.payload is not None and show_ioctl.is_input(one):
            assert "unreadable at 0x1000" in show.text(show_ioctl.before(one, 0x1000, Gone()))
