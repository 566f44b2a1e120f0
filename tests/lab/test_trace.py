"""Calls as lines of text and of JSON, and floods of exits as one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvm2.abi import exits, show
from kvm2.abi.findings import Finding
from kvm2.errors import KvmError
from kvm2.hosts.traced import Call
from kvm2.lab.trace import Report, call_lines, exit_key

FOUND = Finding(0, 2, 95, 4, 48, 32, 36, 0, "48 bits: this host allows 32..36")


def ioctl(on: str = "vm#1", name: str = "KVM_CHECK_EXTENSION", **facts: Any) -> Call:
    return Call("ioctl", on, name, **{"result": 0, "seconds": 0.5, **facts})


def ran(address: int, write: int, on: str = "vcpu#1.0", data: bytes = b"A") -> Call:
    values = {"phys_addr": address, "data": data, "len": 1, "is_write": write}
    return ioctl(on, "KVM_RUN", exit=show.Record("KVM_EXIT_MMIO", values), seconds=0.25)


def lines(*calls: Call, code: int = 0, **how: bool) -> list[str]:
    written: list[str] = []
    report = Report(written.append, **how)
    for call in calls:
        report(call)
    report.finish(code)
    assert report.calls == len(calls)
    return "".join(written).splitlines()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (ioctl(argument=show.Named(165, "KVM_CAP_X"), result=36), "{call}(KVM_CAP_X) = 36"),
        (ioctl(argument=[], result=5, made="vm#2", made_fd=5), "{call}([]) = vm#2"),
        (ioctl(result=0, made="device#1", made_fd=5), "{call}() = 0 (device#1)"),
        (ioctl(output={"n": 3}), "{call}() = 0 => {n=3}"),
        (ioctl(result=None, error=KvmError(22)), "{call}() = -1 EINVAL (Invalid argument)"),
        (ioctl(result=None, stopped="KeyboardInterrupt"), "{call}() = ? (KeyboardInterrupt)"),
        (ioctl(thread="cpu 1"), "[cpu 1] {call}() = 0"),
        (ioctl("vcpu#1.0", "KVM_RUN", argument=b"\x90"), "vcpu#1.0 KVM_RUN(reply=90) = 0"),
        (ioctl("", "open", argument="/dev/kvm", made="kvm#1", made_fd=3, result=3), "open(/dev/kvm) = kvm#1"),
        (ioctl("vcpu#1.0", "kick", result=None), "vcpu#1.0 kick()"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_line(call: Call, text: str) -> None:
    assert call_lines(call) == [text.replace("{call}", "vm#1 KVM_CHECK_EXTENSION") + " <0.500000>"]


def test_findings_reasons_and_inner_calls_stand_below() -> None:
    inner = ioctl("kvm#1", "KVM_CREATE_VM", result=None, error=KvmError(22, "the size is above the limit"))
    call = ioctl("kvm#1", "KVM_CREATE_VM2", result=None, error=KvmError(95), findings=(FOUND,), inner=(inner,))
    assert call_lines(call) == [
        "kvm#1 KVM_CREATE_VM2() = -1 EOPNOTSUPP (Operation not supported) <0.500000>",
        f"    EOPNOTSUPP attrs[0].physaddr_bits: {FOUND}",
        "    kvm#1 KVM_CREATE_VM() = -1 EINVAL (Invalid argument) <0.500000>",
        "        the size is above the limit",
    ]


def test_what_is_passed_on_unchanged_is_shown_once() -> None:
    assert len(call_lines(ioctl(inner=(ioctl(seconds=0.1),)))) == 1
    assert len(call_lines(ioctl(inner=(ioctl(result=1),)))) == 2
    assert len(call_lines(ioctl(inner=(ioctl(), ioctl())))) == 3
    explained = ioctl(result=None, error=KvmError(22, "because"), inner=(ioctl(result=None, error=KvmError(22)),))
    assert len(call_lines(explained)) == 2


def test_a_flood_becomes_one_line() -> None:
    flood = [ran(0x9000018, 0), ran(0x9000000, 1, data=b"A"), ran(0x9000018, 0), ran(0x9000000, 1, data=b"B")]
    end = ioctl("vcpu#1.0", "KVM_RUN", exit=show.Record("KVM_EXIT_HLT", {}), seconds=0.25)
    assert lines(*flood, end, ioctl(), summary=True) == [
        "vcpu#1.0 KVM_RUN x 5 => 2 x KVM_EXIT_MMIO read 0x9000018/1, 2 x KVM_EXIT_MMIO write 0x9000000/1, "
        "KVM_EXIT_HLT <1.250000>",
        "vm#1 KVM_CHECK_EXTENSION() = 0 <0.500000>",
    ]
    assert len(lines(*flood, end, ioctl())) == 6


def test_a_single_run_is_shown_whole() -> None:
    assert lines(ran(16, 1), summary=True) == lines(ran(16, 1))


def test_vcpus_are_counted_apart_and_order_is_kept() -> None:
    calls = [ran(1, 1), ran(2, 1, "vcpu#1.1"), ran(1, 1), ran(2, 1, "vcpu#1.1"), ioctl(), ran(1, 1), ran(1, 1)]
    got = [line.partition(" =")[0] for line in lines(*calls, summary=True)]
    assert got == ["vcpu#1.0 KVM_RUN x 2", "vcpu#1.1 KVM_RUN x 2", "vm#1 KVM_CHECK_EXTENSION()", "vcpu#1.0 KVM_RUN x 2"]


def test_refused_runs_are_not_part_of_a_flood() -> None:
    refused = ioctl("vcpu#1.0", "KVM_RUN", result=None, error=KvmError(4))
    assert len(lines(ran(1, 1), ran(1, 1), refused, summary=True)) == 2


def test_ports_are_told_apart() -> None:
    way = show.Named(exits.KVM_EXIT_IO_OUT, "KVM_EXIT_IO_OUT")
    values = {"direction": way, "size": 1, "port": show.Named(0x3F8, "0x3f8"), "count": 1, "data": b"A"}
    assert exit_key(ioctl(exit=show.Record("KVM_EXIT_IO", values))) == "KVM_EXIT_IO out 0x3f8/1"


def test_json_lines() -> None:
    refused = ioctl(result=None, error=KvmError(95, "why"), findings=(FOUND,), argument=[show.Named(1, "ONE")],
                    request=7, arg=8, inner=(ioctl(),))  # fmt: skip
    objects = [json.loads(line) for line in lines(refused, ran(16, 1), ran(16, 1), code=3, as_json=True, summary=True)]
    assert {one["schema"] for one in objects} == {"kvm2.trace/1"}
    first, runs, end = objects
    assert (first["event"], first["on"], first["name"], first["request"], first["arg"]) == (
        "ioctl", "vm#1", "KVM_CHECK_EXTENSION", 7, 8
    )  # fmt: skip
    assert first["argument"] == [{"number": 1, "name": "ONE"}]
    assert (first["result"], first["errno"], first["reason"]) == (None, "EOPNOTSUPP", "why")
    assert first["findings"][0]["path"] == "attrs[0].physaddr_bits" and len(first["inner"]) == 1
    assert runs == {
        "schema": "kvm2.trace/1", "event": "runs", "on": "vcpu#1.0", "count": 2, "seconds": 0.5,
        "exits": [{"exit": "KVM_EXIT_MMIO write 0x10/1", "count": 2}],
    }  # fmt: skip
    assert end == {"schema": "kvm2.trace/1", "event": "end", "exit_code": 3, "calls": 3}


def test_nothing_is_written_after_the_end() -> None:
    written: list[str] = []
    report = Report(written.append)
    report.finish(0)
    report(ioctl())
    assert written == [] and report.calls == 0
