"""The trace of a run: exits with the guest's PC, interrupts, symbols, its first and last line."""

from __future__ import annotations

import json
import struct

import pytest

import kvm2
from kvm2.board.gic import make_gic
from kvm2.errors import EnvironmentFault, GuestError
from kvm2.lab.run_trace import tracing

RAM = 1 << 30
STORE = 0xB900_0020  # str w0, [x1]
SPI = 1 << 24


def run(where, **how):
    """One MMIO exit of a guest, and an interrupt that is raised and lowered."""
    with tracing(str(where), "neoverse-n1-4k", **how), kvm2.open("neoverse-n1-4k") as kvm, kvm.create_vm2() as vm:
        vm.map(RAM, 1 << 16).write(0x100, struct.pack("<I", STORE))
        with vm.create_vcpu() as vcpu:
            vcpu.init()
            make_gic(vm, 1, 64, 3, False)
            vcpu.regs.pc, vcpu.regs.x1 = RAM + 0x100, 0x0900_0000
            vcpu.run_once()
            vm.irq_line(SPI | 40, True)
            vm.irq_line(SPI | 40, False)


def test_text(tmp_path):
    (tmp_path / "map").write_text(f"{RAM:016x} T _start\n{RAM + 0xF0:016x} t send\n")
    run(tmp_path / "out", system_map=tmp_path / "map")
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[0] == "# neoverse-n1-4k: ioctls, exits and interrupts; symbols of map"
    (ran,) = (line for line in lines if " KVM_RUN(" in line)
    assert "KVM_EXIT_MMIO{phys_addr=0x9000000" in ran and " at send+0x10 <" in ran
    assert [line for line in lines if "irq-line" in line] == [
        "vm#1 irq-line intid=40 (SPI 8) level=1"  # edge-triggered: its end is no event
    ]
    raised = lines.index("vm#1 irq-line intid=40 (SPI 8) level=1")
    assert "KVM_IRQ_LINE" in lines[raised + 1]


def test_json(tmp_path):
    run(tmp_path / "out", as_json=True)
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert {line["schema"] for line in lines} == {"kvm2.trace/1"}
    assert lines[0]["event"] == "start" and lines[0]["interrupts"] is True and lines[0]["symbols"] is None
    (ran,) = (line for line in lines if line.get("name") == "KVM_RUN")
    assert (ran["pc"], ran["symbol"]) == (RAM + 0x100, None)
    interrupts = [line for line in lines if line["event"] == "interrupt"]
    assert [(line["name"], line["intid"], line["interrupt"], line["level"]) for line in interrupts] == [
        ("irq-line", 40, "SPI 8", 1)
    ]
    assert lines[-1] == {"schema": "kvm2.trace/1", "event": "end", "exit_code": 0, "calls": lines[-1]["calls"]}


def test_what_cannot_be(tmp_path, capsys):
    (tmp_path / "stub").write_text(
        "ffffffffffffffff B The real System.map is in the linux-image-<version>-dbg package\n"
    )
    with pytest.raises(GuestError, match=r"Debian's stub .* linux-image-<version>-dbg"):
        run(tmp_path / "out", system_map=tmp_path / "stub")
    with pytest.raises(EnvironmentFault, match="nowhere"):
        run(tmp_path / "nowhere" / "out")
    with tracing("-", "/dev/kvm"):
        pass
    assert "interrupts are the kernel's own affair" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError), tracing(str(tmp_path / "out"), "x", as_json=True):
        _ = 1 // 0
    assert json.loads((tmp_path / "out").read_text().splitlines()[-1])["exit_code"] == 1
