"""What a host's name stands for, and who plays there."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from kvm2.errors import EnvironmentFault, UsageError
from kvm2.hosts import real
from kvm2.hosts.kernel import machine_arch
from kvm2.lab.places import command_of, place_of


def test_described_hosts_and_files(tmp_path: Path) -> None:
    found = place_of("apple-m1")
    assert (found.kind, found.arch, found.page_size, found.machine, found.is_real) == (
        "described", "arm64", 16384, "apple-m1", False,
    )  # fmt: skip
    file = tmp_path / "mine.toml"
    file.write_text('title = "Mine"\nbase = "cortex-a53-4k"\n')
    found = place_of(str(file))
    assert (found.name, found.machine, found.page_size) == (str(file), "mine", 4096)
    assert found.command == command_of("apple-m1")


def test_the_oracle_has_a_bridge_and_its_kernels_page() -> None:
    found = place_of("oracle:max-16k-6.12")
    assert (found.kind, found.machine, found.page_size, found.is_real) == ("oracle", "max-16k-6.12", 16384, True)
    assert found.command[1:] == ("-m", "kvm2.lab.oracle.bridge", "max-16k-6.12")
    with pytest.raises(UsageError, match="no-such-shape"):
        place_of("oracle:no-such-shape")


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "refusal", lambda path="/dev/kvm": "")
    found = place_of("/dev/kvm")
    assert (found.kind, found.arch, found.page_size) == ("kernel", machine_arch(), mmap.PAGESIZE)
    monkeypatch.setattr(real, "refusal", lambda path="/dev/kvm": "no KVM: load the module")
    with pytest.raises(EnvironmentFault, match="load the module"):
        place_of("/dev/kvm")


def test_a_host_that_is_not_known() -> None:
    with pytest.raises(UsageError, match="apple-m1"):
        place_of("aple-m1")
