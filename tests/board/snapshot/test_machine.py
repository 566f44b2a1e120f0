"""A machine that is saved while its vCPUs send each other interrupts, and goes on elsewhere, or is refused in words."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.execution.rig import RAM, RAM_SIZE, Ran, build

import kvm2
from kvm2.abi.onereg import KVM_REG_ARM_TIMER_CNT
from kvm2.board import snapshot
from kvm2.board.linux import LinuxMachine
from kvm2.board.loader import read_image
from kvm2.board.virtio import Rng
from kvm2.errors import KvmError, UsageError
from kvm2.spec import MemoryRange, VmSpec

DEVICE, SPI = 0x0B00_0000, 8
CPUS, ROUNDS = 4, 1800
SPEC = VmSpec(memory=(MemoryRange(RAM, RAM_SIZE),))


def answer(machine: LinuxMachine) -> LinuxMachine:
    """The test guest's device: a write raises its interrupt, a read lowers it (tests/execution/test_gic.py)."""
    known, line = machine.mmio, machine.line(SPI)

    def mmio(exit) -> None:
        if exit.address != DEVICE:
            return known(exit)
        line(exit.is_write)
        return None if exit.is_write else exit.reply(0)

    machine.mmio = mmio  # type: ignore[method-assign]
    return machine


def make(host: str, spec: VmSpec = SPEC, cpus: int = CPUS, **more) -> LinuxMachine:
    return LinuxMachine(kvm2.open(host), spec, cpus=cpus, **more)


def run_for(machine: LinuxMachine, seconds: float) -> threading.Thread:
    thread = threading.Thread(target=machine.run, kwargs={"timeout": 60})
    thread.start()
    time.sleep(seconds)
    return thread


def stop(machine: LinuxMachine, thread: threading.Thread) -> None:
    machine.finish("interrupted", "", 0)
    thread.join()
    machine.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[int]]]:
    """A snapshot from the midst of the guest's rounds, and what it had reported until then."""
    path = tmp_path_factory.mktemp("saved") / "gic.kvm2"
    machine = answer(make("cortex-a57-4k"))
    image = build("gic", RAM, f"-DCPUS={CPUS}", f"-DROUNDS={ROUNDS}")
    machine.load(read_image(image, machine.memory), params=False)
    thread = run_for(machine, 0.0)
    ran = Ran(machine, None, RAM)  # type: ignore[arg-type]
    while len(ran.out()) < 34 and thread.is_alive():
        time.sleep(0.005)
    snapshot.save(machine, path, {"who": "a test"})
    out = ran.out()
    assert thread.is_alive(), "it was saved while it ran"
    stop(machine, thread)
    yield path, out


def test_it_goes_on_where_it_was_and_so_does_the_original(saved: tuple[Path, list[int]], tmp_path: Path) -> None:
    path, before = saved
    found = snapshot.read(path)
    assert found.state["notes"] == {"who": "a test"} and found.bytes_of_memory < RAM_SIZE
    for round in range(2):  # the second from a snapshot of the first
        machine = answer(snapshot.restore(kvm2.open("cortex-a57-4k"), snapshot.read(path)))
        if round == 0:
            thread = run_for(machine, 0.01)
            path = tmp_path / "again.kvm2"
            snapshot.save(machine, path)
            thread.join()
        else:
            assert machine.run(timeout=60).ended == "shutdown"
        ran = Ran(machine, None, RAM)  # type: ignore[arg-type]
        out = ran.out()
        assert out[: len(before)] == before and not ran.log()
        assert out[-6:-2] == [ROUNDS, *([ROUNDS // 3] * 3)], "no message was lost on the way"
        assert out[-2:] == [0, 0]
        machine.close()


@pytest.mark.parametrize(
    ("host", "named"),
    [
        ("neoverse-n1-4k", ("MIDR_EL1", "ID_AA64PFR0_EL1", "CSV2 0, here 1")),
        ("a57-4k-6.1", ("KVM_REG_ARM_PTIMER_CTL", "no such register")),
        ("apple-m1", ("physaddr_bits", "32..36")),
    ],
)
def test_a_host_that_is_not_alike_is_refused_by_what_differs(saved: tuple[Path, list[int]], host: str, named) -> None:
    with kvm2.open(host) as kvm:
        with pytest.raises(KvmError) as raised:
            snapshot.restore(kvm, snapshot.read(saved[0]))
        text = "\n".join(f"{finding.path} {finding}" for finding in raised.value.findings)
        for word in named:
            assert word in text
        assert all(finding.hint for finding in raised.value.findings)


def test_other_vector_lengths_are_named(tmp_path: Path) -> None:
    path = tmp_path / "sve.kvm2"
    with make("max-4k-6.12", VmSpec(sve=512, memory=SPEC.memory), 1) as machine:
        vcpu = machine.vcpus[0]
        vcpu.set_reg("z7", bytes(range(64)) + bytes(192))
        snapshot.save(machine, path)
    with snapshot.restore(kvm2.open("max-4k-6.12"), snapshot.read(path)) as again:
        assert again.vcpus[0].get_reg("z7")[:64] == bytes(range(64))
        assert again.sve_vls == 0xF
    with pytest.raises(KvmError) as raised:
        snapshot.restore(kvm2.open("a64fx-4k"), snapshot.read(path))
    assert any("sve" in str(finding).lower() or "vls" in finding.path for finding in raised.value.findings)


def test_a_host_that_takes_the_registers_takes_the_snapshot(tmp_path: Path) -> None:
    """The same processor with a smaller limit: a VM of 40 bits does not care."""
    path, toml = tmp_path / "s.kvm2", tmp_path / "smaller.toml"
    toml.write_text('base = "max-4k-6.12"\nipa_limit = 42\n')
    with make("max-4k-6.12", cpus=1) as machine:
        machine.vm.write(RAM, b"here")
        machine.vcpus[0].regs.x5 = 0x55
        snapshot.save(machine, path)
    with kvm2.open(toml) as kvm, snapshot.restore(kvm, snapshot.read(path)) as again:
        assert again.vm.read(RAM, 4) == b"here" and again.vcpus[0].regs.x5 == 0x55
        assert again.ipa_bits == 40


def test_other_devices_and_damage_leave_nothing_open(saved: tuple[Path, list[int]], tmp_path: Path) -> None:
    with kvm2.open("cortex-a57-4k") as kvm:
        open_before = len(kvm.backend.fds())
        with pytest.raises(UsageError, match="devices"):
            snapshot.restore(kvm, snapshot.read(saved[0]), virtio=[Rng()])
        damaged = tmp_path / "damaged"
        data = bytearray(saved[0].read_bytes())
        data[4096 + 100] ^= 1
        damaged.write_bytes(data)
        with pytest.raises(UsageError, match="damaged"):
            snapshot.restore(kvm, snapshot.read(damaged))
        assert len(kvm.backend.fds()) == open_before


def test_the_guest_does_not_notice_the_time_between(tmp_path: Path) -> None:
    path = tmp_path / "s.kvm2"
    with make("max-4k-6.12", cpus=1) as machine:
        snapshot.save(machine, path)
        count = machine.vcpus[0].get_reg("KVM_REG_ARM_TIMER_CNT")
    time.sleep(0.3)
    with snapshot.restore(kvm2.open("max-4k-6.12"), snapshot.read(path)) as again:
        later = again.vcpus[0].get_reg("KVM_REG_ARM_TIMER_CNT")
    saved_count = int(snapshot.read(path).state["vcpus"][0]["registers"][f"{KVM_REG_ARM_TIMER_CNT:#x}"], 16)
    assert saved_count <= count and later - saved_count < 18_000_000, "less than the 0.3 s that it lay in its file"


def test_a_save_that_fails_lets_the_guest_go_on(tmp_path: Path) -> None:
    machine = answer(make("cortex-a57-4k", cpus=1))
    machine.load(read_image(build("gic", RAM, "-DCPUS=1", "-DROUNDS=1"), machine.memory), params=False)
    with pytest.raises(UsageError):
        snapshot.save(machine, tmp_path / "no" / "place")
    assert machine.run(timeout=60).ended == "shutdown"
    machine.close()


def test_a_host_without_the_new_call_restores_what_it_made_by_a_type_word(tmp_path: Path) -> None:
    with kvm2.open("mainline-m1") as kvm:
        with LinuxMachine(kvm, SPEC, vm=kvm.create_vm(36)) as machine:
            snapshot.save(machine, tmp_path / "s")
        with snapshot.restore(kvm, snapshot.read(tmp_path / "s")) as machine:
            assert machine.ipa_bits == 36


def test_a_gicv2s_sgi_keeps_its_senders_and_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "v2.kvm2"
    with make("raspberry-pi-4", cpus=2) as machine:
        assert machine.gic.version == 2 and machine.gic.device is not None
        # GICD_SPENDSGIR0 of vCPU 0: SGI 3, from vCPU 1.
        machine.gic.device.set_device_attr(1, 0xF20, (0x2 << 24).to_bytes(4, "little"))
        snapshot.save(machine, path)
    with snapshot.restore(kvm2.open("raspberry-pi-4"), snapshot.read(path)) as again:
        assert again.gic.device is not None
        assert again.gic.device.get_device_attr(1, 0xF20, 4) == (0x2 << 24).to_bytes(4, "little")
        assert again.gic.device.get_device_attr(1, 0x200, 4) == (1 << 3).to_bytes(4, "little")
