"""QEMU's command line, and what is said where QEMU fails."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from kvm2.errors import EnvironmentFault
from kvm2.lab.oracle import qemu
from kvm2.lab.oracle.shapes import SHAPES, shape

needs_qemu = pytest.mark.skipif(shutil.which(qemu.PROGRAM) is None, reason="needs QEMU, of the package qemu-system-arm")


def test_command_lines_differ_as_the_shapes_do() -> None:
    lines = {name: " ".join(qemu.command_line(one, "K", "I", "M", True)) for name, one in SHAPES.items()}
    assert "gic-version=3" in lines["max-4k-6.12"] and "gic-version=2" not in lines["max-4k-6.12"]
    assert "gic-version=2" in lines["max-4k-gicv2"] and "gic-version=3" not in lines["max-4k-gicv2"]
    assert "virt,virtualization=on,gic-version=3,mte=on" in lines["max-4k-mte"]
    assert lines["max-4k-protected"].endswith(f"{qemu.APPEND} kvm-arm.mode=protected")
    assert "-cpu max,sve256=on,sve512=on " in lines["max-4k-pow2vl"]
    assert lines["max-4k-6.12"] == lines["max-16k-6.12"], "they differ in the kernel alone"


def test_memory_is_shared_only_while_a_state_is_made() -> None:
    one = shape("cortex-a57-4k")
    assert "share=on" in " ".join(qemu.command_line(one, "K", "I", "M", True))
    assert "share=off" in " ".join(qemu.command_line(one, "K", "I", "M", False))
    assert "mem-path=a,,b," in " ".join(qemu.command_line(one, "K", "I", "a,b", False))


def test_a_restored_machine_loads_nothing() -> None:
    assert "-initrd" not in qemu.command_line(shape("cortex-a57-4k"), "K", None, "M", False)
    stub = qemu.stub_kernel()
    assert stub[0x38:0x3C] == b"ARM\x64" and not any(stub[:0x38]) and not any(stub[0x3C:])


def test_without_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFault, match="qemu-system-arm"):
        qemu.Qemu([qemu.PROGRAM])
    with pytest.raises(EnvironmentFault, match="qemu-system-arm"):
        qemu.version()


@needs_qemu
def test_what_qemu_says_is_passed_on_and_nothing_stays_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(EnvironmentFault, match=r"the emulated machine: it(.|\n)*cortex-z1"):
        qemu.Qemu([qemu.PROGRAM, "-M", "virt", "-cpu", "cortex-z1", "-nodefaults", "-display", "none"])
    assert set(os.listdir("/proc/self/fd")) <= before


EMPTY = [qemu.PROGRAM, "-M", "virt", "-cpu", "cortex-a57", "-m", "64M", "-nodefaults", "-display", "none"]


@needs_qemu
def test_a_state_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "devices").write_bytes(b"nonsense" * 99)
    with pytest.raises(EnvironmentFault, match=r"could not be moved|it ended"):
        qemu.Qemu(EMPTY, incoming=tmp_path / "devices")


@needs_qemu
def test_commands_that_qemu_refuses_and_its_end() -> None:
    machine = qemu.Qemu([*EMPTY, "-S"])
    assert machine.ask("query-status")["running"] is False
    with pytest.raises(EnvironmentFault, match=r"nonsense: .*has not been found"):
        machine.ask("nonsense")
    with pytest.raises(EnvironmentFault, match="it ended"):
        machine.ask("query-status")
    machine.kill()
