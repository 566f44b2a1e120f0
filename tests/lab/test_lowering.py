"""Every operation of the scenario format: the ioctls it becomes, byte for byte, and the answer it gives."""

from __future__ import annotations

import ctypes
import errno
import struct

import pytest

from kvm2.errors import KvmError, UsageError
from kvm2.lab.client import map_memory, unmap_memory
from kvm2.lab.engine import play
from kvm2.lab.oplist import check, operations
from kvm2.lab.scenarios import Scenario, Step


class Recorder:
    """A KVM that keeps what it is asked, with the bytes behind the argument, and answers from a list."""

    def __init__(self, *answers: int | tuple[int, bytes]) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[int, int, int]] = []
        self.bytes: list[bytes] = []
        self.closed: list[int] = []
        self.area = bytearray(8192)
        self.kicks = 0

    def open(self) -> int:
        return 3

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        self.calls.append((fd, request, arg))
        self.bytes.append(ctypes.string_at(arg, 168) if 1 << 20 < arg < 1 << 48 else b"")
        answer = self.answers.pop(0) if self.answers else 0
        if isinstance(answer, tuple):
            answer, written = answer
            ctypes.memmove(arg, written, len(written))
        if answer < 0:
            raise KvmError(-answer)
        return answer

    def kvm_run(self, fd: int) -> memoryview:
        return memoryview(self.area)

    def kick(self, fd: int) -> None:
        self.kicks += 1

    def memory_gone(self, address: int, size: int) -> None:
        return

    def close(self, fd: int) -> None:
        self.closed.append(fd)


VM: Step = {"op": "create_vm", "id": "vm", "type": 36}
VCPU: Step = {"op": "create_vcpu", "vm": "vm", "id": "v0", "vcpu_id": 0}


def played(kvm: Recorder, *steps: Step) -> list[object]:
    scenario = Scenario("test", steps)
    check(scenario)
    result = play(kvm, scenario, {"g": b"\x01\x02"})
    assert result.faults == ()
    return list(result.answers)


def test_descriptors_are_hidden_and_closed_last_first() -> None:
    kvm = Recorder(7, 8, (0, struct.pack("=III", 5, 9, 0)))
    device: Step = {"op": "create_device", "vm": "vm", "id": "gic", "type": 5, "flags": 0}
    assert played(kvm, VM, VCPU, device) == [[0, 0], [0, 0], [0, 0]]
    assert kvm.calls[:2] == [(3, 0xAE01, 36), (7, 0xAE41, 0)]
    assert kvm.calls[2][:2] == (7, 0xC00CAEE0)
    assert kvm.bytes[2][:12] == struct.pack("=III", 5, 0, 0)
    assert kvm.closed == [9, 8, 7, 3]


def test_a_name_whose_making_failed_skips_the_steps_that_use_it() -> None:
    kvm = Recorder(-errno.EINVAL)
    steps: list[Step] = [VM, VCPU, {"op": "check_ext", "fd": "vm", "cap": 1}, {"op": "close", "id": "vm"}]
    assert played(kvm, *steps) == [[-1, "EINVAL"], "skipped", "skipped", "skipped"]
    assert len(kvm.calls) == 1


def test_a_second_vm_of_the_same_name_is_closed_too() -> None:
    kvm = Recorder(7, 8)
    played(kvm, VM, VM)
    assert kvm.closed == [8, 7, 3]


def test_close_forgets_the_name() -> None:
    kvm = Recorder(7)
    assert played(kvm, VM, {"op": "close", "id": "vm"}, {"op": "close", "id": "vm"}) == [[0, 0], [0, 0], "skipped"]
    assert kvm.closed == [7, 3]


def test_memslot_has_the_address_of_the_client_memory() -> None:
    kvm = Recorder(7)
    slot = {"op": "memslot", "vm": "vm", "slot": 1 << 32 | 2, "flags": 3, "gpa": 0x4000_0000, "size": -1}
    answers = played(
        kvm,
        VM,
        {"op": "mem", "id": "m", "size": 0x10000},
        {**slot, "mem": "m", "hva": 0x1000},
        {**slot, "mem": None, "hva": 0x123456},
        {**slot, "mem": "absent", "hva": 0},
    )
    assert answers == [[0, 0]] * 4 + ["skipped"]
    first, second = (struct.unpack_from("=IIQQQ", data) for data in kvm.bytes[1:3])
    assert first[:4] == (2, 3, 0x4000_0000, (1 << 64) - 1)
    assert first[4] % 0x10000 == 0x1000
    assert second[4] == 0x123456
    assert kvm.calls[1][1] == 0x4020AE46


def test_memslot2_pads() -> None:
    kvm = Recorder(7)
    fields = {"vm": "vm", "slot": 0, "flags": 4, "gpa": 1, "size": 2, "mem": None, "hva": 3, "pad": 9}
    played(kvm, VM, {"op": "memslot2", **fields})
    assert kvm.calls[1][1] == 0x40A0AE49
    assert kvm.bytes[1][:160] == struct.pack("=IIQQQQIIQ", 0, 4, 1, 2, 3, 0, 0, 0, 9) + bytes(104)


def test_registers() -> None:
    kvm = Recorder(7, 8, 0)
    pc, z0 = 0x6030000000100040, 0x6080000000150000
    answers = played(
        kvm,
        VM,
        VCPU,
        {"op": "set_reg", "vcpu": "v0", "id": pc, "data": "1122"},
        {"op": "get_reg", "vcpu": "v0", "id": pc},
        {"op": "get_reg", "vcpu": "v0", "id": z0},
        {"op": "raw_reg_bad_ptr", "vcpu": "v0", "id": pc, "set": True},
    )
    assert answers[2:] == [[0, 0], [0, 0, "00" * 8], [0, 0, "00" * 256], [0, 0]]
    assert [call[1] for call in kvm.calls[2:]] == [0x4010AEAC, 0x4010AEAB, 0x4010AEAB, 0x4010AEAC]
    assert struct.unpack_from("=QQ", kvm.bytes[5]) == (pc, 0x10)


def test_rmw_gives_what_it_wrote_even_where_that_is_refused() -> None:
    class Register(Recorder):
        def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
            if request == 0x4010AEAB:
                address = struct.unpack("=QQ", ctypes.string_at(arg, 16))[1]
                ctypes.memmove(address, struct.pack("=Q", 0xFF), 8)
            return super().ioctl(fd, request, arg)

    step: Step = {"op": "rmw_reg", "vcpu": "v0", "id": 0x603000000013C038, "mask": 0xF, "value": 0x12}
    assert played(Register(7, 8, 0, -errno.EINVAL), VM, VCPU, step)[2] == [-1, "EINVAL", "f200000000000000"]
    assert played(Register(7, 8, -errno.ENOENT), VM, VCPU, step)[2] == [-1, "ENOENT"]


def test_register_list_that_is_too_short_gives_the_count() -> None:
    kvm = Recorder(7, 8, (-errno.E2BIG, struct.pack("=Q", 2)), (0, struct.pack("=QQQ", 2, 0x10, 0x20)))
    steps: list[Step] = [{"op": "reg_list", "vcpu": "v0", "n": 0}, {"op": "reg_list", "vcpu": "v0", "n": 500}]
    assert played(kvm, VM, VCPU, *steps)[2:] == [[-1, "E2BIG", {"n": 2}], [0, 0, {"n": 2, "ids": ["0x10", "0x20"]}]]


class Dump(Recorder):
    """Two registers: one of 256 bytes that ends in zeros, one that cannot be read."""

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        if request == 0x4010AEAB:
            number, address = struct.unpack("=QQ", ctypes.string_at(arg, 16))
            if number == 0:
                raise KvmError(errno.EPERM)
            ctypes.memmove(address, b"\x07" * 10, 10)
            return 0
        return super().ioctl(fd, request, arg)


def test_register_dump_cuts_trailing_zeros_and_tells_errnos() -> None:
    kvm = Dump(7, 8, (0, struct.pack("=QQQ", 2, 0x6080000000150000, 0)))
    answer = played(kvm, VM, VCPU, {"op": "reg_dump", "vcpu": "v0"})[2]
    assert answer == [0, 0, {"6080000000150000": "07" * 10 + "~", "0": "!1"}]


def test_refused_register_dump_shows_what_id_0_gives() -> None:
    answer = played(Dump(7, 8, -errno.ENOEXEC), VM, VCPU, {"op": "reg_dump", "vcpu": "v0"})[2]
    assert answer == [-1, "ENOEXEC", {"0": "!1"}]


def test_raw_buffers_come_back_also_from_a_refused_call() -> None:
    kvm = Recorder((-errno.EINVAL, b"\xaa"), 0)
    steps: list[Step] = [
        {"op": "raw_buf", "fd": "kvm", "nr": 0xAE99, "n": 2},
        {"op": "raw_buf", "fd": "kvm", "nr": 0xAE99, "n": 0, "data": "0102"},
        {"op": "raw_bad_ptr", "fd": "kvm", "nr": 0x4020AE46},
        {"op": "raw", "fd": "kvm", "nr": 0xAE00, "arg": -1},
    ]
    assert played(kvm, *steps) == [[-1, "EINVAL", "aa00"], [0, 0], [0, 0], [0, 0]]
    assert kvm.bytes[1][:2] == b"\x01\x02"
    assert [call[2] for call in kvm.calls[2:]] == [0x10, (1 << 64) - 1]


def test_what_a_short_buffer_does_not_cover_is_what_was_there_before() -> None:
    kvm = Recorder()
    steps: list[Step] = [
        {"op": "raw_buf", "fd": "kvm", "nr": 1, "n": 0, "data": "11" * 8},
        {"op": "raw_buf", "fd": "kvm", "nr": 1, "n": 0, "data": "22"},
    ]
    played(kvm, *steps)
    assert kvm.bytes[1][:8] == b"\x22" + b"\x11" * 7


def test_client_memory() -> None:
    steps: list[Step] = [
        {"op": "mem", "id": "m", "size": 0x3000},
        {"op": "guest", "mem": "m", "off": 0, "name": "g"},
        {"op": "poke", "mem": "m", "off": 2, "data": "ff"},
        {"op": "peek", "mem": "m", "off": 0, "len": 4},
        {"op": "close_mem", "id": "m"},
        {"op": "peek", "mem": "m", "off": 0, "len": 4},
        {"op": "mem", "id": "none", "size": 0},
        {"op": "mem", "id": "ro", "size": 1, "prot": "ro"},
        {"op": "peek", "mem": "ro", "off": 0, "len": 1},
    ]
    memory = [[0, 0], [0, 0], [0, 0], [0, 0, "0102ff00"], [0, 0], "skipped", [-1, "EINVAL"], [0, 0], [0, 0, "00"]]
    assert played(Recorder(), *steps) == memory


def test_memory_that_is_not_there_gives_no_answer_and_the_rest_goes_on() -> None:
    steps: list[Step] = [
        {"op": "mem", "id": "m", "size": 0x1000, "prot": "none"},
        {"op": "poke", "mem": "m", "off": 0, "data": "00"},
        {"op": "check_ext", "fd": "kvm", "cap": 1},
    ]
    result = play(Recorder(), Scenario("test", tuple(steps)), {})
    assert result.answers == ([0, 0], None, [0, 0])
    assert "EFAULT" in result.faults[0]


def test_client_memory_suits_every_page_size_and_has_nothing_behind_it() -> None:
    from kvm2.softkvm.memory import ProcessMemory

    address = map_memory(0x10000)
    try:
        assert address % 0x10000 == 0
        assert ProcessMemory().accessible(address, 0x10000, write=True)
    finally:
        assert unmap_memory(address, 0x10000) == 0


def test_the_run_area_is_decoded_and_may_be_written() -> None:
    class Runs(Recorder):
        def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
            if request == 0xAE80:
                struct.pack_into("=IIQ", self.area, 8, 6, 0, 0)
                struct.pack_into("=QQIB", self.area, 32, 0x1000, 0x55, 4, 1)
            return super().ioctl(fd, request, arg)

    kvm = Runs(7, 8)
    steps: list[Step] = [
        {"op": "run", "vcpu": "v0"},
        {"op": "mmio_data", "vcpu": "v0", "data": "0102"},
        {"op": "immediate_exit", "vcpu": "v0", "value": 1},
        {"op": "run", "vcpu": "v1"},
    ]
    exit = {"exit": "MMIO", "gpa": 0x1000, "data": "5500000000000000", "len": 4, "write": 1}
    assert played(kvm, VM, VCPU, *steps)[2:] == [[0, 0, exit], [0, 0], [0, 0], "skipped"]
    assert bytes(kvm.area[40:42]) == b"\x01\x02"
    assert kvm.area[1] == 1
    assert kvm.kicks == 0


def test_a_run_that_fails_tells_only_the_reason() -> None:
    kvm = Recorder(7, 8, -errno.ENOEXEC)
    assert played(kvm, VM, VCPU, {"op": "run", "vcpu": "v0"})[2] == [-1, "ENOEXEC", {"exit": "UNKNOWN"}]


def test_dirty_logs_device_attributes_and_the_rest_have_their_layouts() -> None:
    kvm = Recorder(7, 8)
    steps: list[Step] = [
        {"op": "dirty_log", "vm": "vm", "slot": 1, "bytes": 8},
        {"op": "clear_dirty", "vm": "vm", "slot": 1, "first": 64, "n": 128, "bytes": 16},
        {"op": "enable_cap", "fd": "vm", "cap": 168, "flags": 0, "args": [1]},
        {"op": "dev_attr", "verb": "get", "dev": "v0", "group": 1, "attr": 2, "data": "aabb"},
        {"op": "vcpu_init", "vcpu": "v0", "target": 5, "features": [4, 0, 0, 0, 0, 0, 0]},
        {"op": "pref_target", "vm": "vm"},
        {"op": "finalize", "vcpu": "v0", "feature": 4},
        {"op": "mp_state", "vcpu": "v0", "verb": "set", "value": 5},
        {"op": "mp_state", "vcpu": "v0", "verb": "get"},
        {"op": "writable_masks", "vm": "vm", "range": 0},
    ]
    answers = played(kvm, VM, VCPU, *steps)[2:]
    outputs = [answer[2] if len(answer) > 2 else None for answer in answers if isinstance(answer, list)]
    masks = "00" * 1536
    expected = ["00" * 8, None, None, "aabb" + "00" * 6, None, "00" * 32, None, None, "05000000", masks]
    assert outputs[:8] == expected[:8]
    assert outputs[9] == masks
    assert struct.unpack_from("=II", kvm.bytes[2]) == (1, 0)
    assert struct.unpack_from("=IIQ", kvm.bytes[3]) == (1, 128, 64)
    assert kvm.bytes[4][:104] == struct.pack("=II4Q", 168, 0, 1, 0, 0, 0) + bytes(64)
    assert struct.unpack_from("=IIQ", kvm.bytes[5]) == (0, 1, 2)
    assert kvm.bytes[6][:32] == struct.pack("=8I", 5, 4, 0, 0, 0, 0, 0, 0)
    requests = [0x4010AE42, 0xC018AEC0, 0x4068AEA3, 0x4018AEE2, 0x4020AEAE, 0x8020AEAF, 0x4004AEC2, 0x4004AE99]
    assert [call[1] for call in kvm.calls[2:]] == [*requests, 0x8004AE98, 0x8040AEB6]


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ({"op": "frob"}, "no operation 'frob'"),
        ("nonsense", "no operation 'nonsense'"),
        ({"op": "create_vm", "id": "vm"}, "create_vm needs 'type'"),
        ({"op": "create_vm", "id": "vm", "type": "36"}, "type = '36' is not a whole number"),
        ({"op": "poke", "mem": "m", "off": 0, "data": "0"}, "an even number of hex digits"),
        ({"op": "run", "vcpu": "v0", "timeout_ms": 0}, "milliseconds above 0"),
    ],
)
def test_a_wrong_step_is_refused_before_anything_runs(step: Step, text: str) -> None:
    with pytest.raises(UsageError, match="scenario 'x', step 0") as raised:
        check(Scenario("x", (step,)))
    assert text in str(raised.value)


def test_the_published_operations_are_all_there() -> None:
    published = """create_vm create_vcpu create_device close check_ext enable_cap raw raw_buf raw_bad_ptr mem close_mem
    poke peek memslot memslot2 guest vcpu_init pref_target finalize mp_state set_reg get_reg rmw_reg raw_reg_bad_ptr
    reg_list reg_dump writable_masks run immediate_exit mmio_data dirty_log clear_dirty dev_attr"""
    in_words = [name for name, one in operations().items() if one.lower.__module__ == "kvm2.lab.lowering_vm2"]
    assert set(operations()) - set(in_words) == set(published.split())
