"""Debian's kernels boot on described hosts: to a shell, with disks, anywhere in memory, and end as they want."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import kvm2
from kvm2.board.virtio import Blk, Net, Rng, parse_link
from kvm2.lab.linux import LinuxFiles, Session
from kvm2.spec import MemoryRange, VmSpec

Files = Callable[[str], LinuxFiles]

MIB = 1 << 20
TIB = 1 << 40
SECONDS = 400.0  # for a boot, on a machine that does much else


def memory(base: int = 1 << 30, size: int = 512 * MIB) -> tuple[MemoryRange, ...]:
    return (MemoryRange(base, size),)


class Case(NamedTuple):
    """A host, a kernel, and what is asked for."""

    host: str
    flavour: str = "6.12-4k"
    base: int = 1 << 30
    bits: int | str = "auto"
    cpus: int = 1
    sve: int | None = None


# What a normal run boots, and all the rest.
SHORT = [Case("cortex-a72-4k")]
LONG = [
    Case("apple-m1"),
    Case("nested-36"),
    Case("cortex-a53-4k"),
    Case("nested-40"),
    Case("raspberry-pi-4"),
    Case("raspberry-pi-5"),
    Case("neoverse-n1-4k"),
    Case("graviton3", cpus=2),
    Case("graviton3", sve=256),
    Case("a64fx", sve=512),
    Case("max-4k-6.12"),
    Case("max-4k-gicv2"),
    Case("graviton3", base=TIB),
    Case("graviton3", base=1 << 47),
    Case("apple-m2", "6.12-16k"),
    Case("lpa2-16k-52", "6.12-16k"),
    Case("cortex-a72-4k", "6.1-4k"),
    Case("neoverse-n1-4k", "6.1-4k", cpus=4),
]


def boot(files: LinuxFiles, case: Case, **options: Any) -> None:
    spec = VmSpec(physaddr_bits=case.bits, memory=memory(case.base), sve=case.sve)  # type: ignore[arg-type]
    with kvm2.open(case.host, guest_ids="core") as kvm, Session(kvm, files, spec, cpus=case.cpus, **options) as linux:
        linux.wait_for_prompt(SECONDS)
        assert linux.command("uname -r", SECONDS) == (f"{files.version}\n", 0)
        assert linux.command("nproc", SECONDS) == (f"{case.cpus}\n", 0)
        ram, _ = linux.command("grep 'System RAM' /proc/iomem", SECONDS)
        assert ram.startswith(f"{case.base:08x}-")
        assert linux.command("(exit 7)", SECONDS) == ("", 7)
        check_sve(linux, case.sve)
        check_peace(linux)
        linux.send("poweroff\n")
        assert linux.wait_for_end(SECONDS).ended == "shutdown"


def check_peace(linux: Session) -> None:
    """The kernel has not complained."""
    said, _ = linux.command("dmesg", SECONDS)
    assert not re.search(r"Oops|Call trace|WARNING:|rcu: INFO|BUG:|lockup", said), said


def check_sve(linux: Session, sve: int | None) -> None:
    """The kernel finds the lengths that were configured: it clears those beyond its own maximum."""
    features, _ = linux.command("grep -m1 Features /proc/cpuinfo", SECONDS)
    assert ("sve" in features.split()) is (sve is not None)
    if sve is None:
        return
    said, _ = linux.command("dmesg | grep -i 'SVE: maximum'", SECONDS)
    assert f"maximum available vector length {sve // 8} bytes per vector" in said


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_boots(debian: Files, case: Case) -> None:
    boot(debian(case.flavour), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG, ids=str)
def test_boots_everywhere(debian: Files, case: Case) -> None:
    boot(debian(case.flavour), case)


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["6.12-4k", "6.1-4k"])
def test_a_disk_is_made_mounted_and_written(debian: Files, flavour: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(16 * MIB))
    data = "".join(f"line {number}\n" for number in range(500))
    with kvm2.open("cortex-a72-4k", guest_ids="core") as kvm:
        options = {"virtio": [Blk(disk), Rng()]}
        with Session(kvm, debian(flavour), VmSpec(physaddr_bits="auto", memory=memory()), **options) as linux:
            linux.wait_for_prompt(SECONDS)
            assert linux.command("mke2fs /dev/vda > /dev/null && mount /dev/vda /mnt", SECONDS)[1] == 0
            assert linux.command("for n in $(seq 0 499); do echo line $n; done > /mnt/lines", SECONDS) == ("", 0)
            assert linux.command("dd if=/dev/hwrng of=/mnt/random bs=512 count=4 2> /dev/null", SECONDS)[1] == 0
            linux.send("poweroff\n")
            assert linux.wait_for_end(SECONDS).ended == "shutdown"
        assert data.encode() in disk.read_bytes(), "written before the power went"
        options = {"virtio": [Blk(disk, readonly=True)]}
        with Session(kvm, debian(flavour), VmSpec(physaddr_bits="auto", memory=memory()), **options) as linux:
            linux.wait_for_prompt(SECONDS)
            assert linux.command("mount -o ro /dev/vda /mnt && cat /mnt/lines", SECONDS) == (data, 0)
            assert linux.command("wc -c < /mnt/random", SECONDS) == ("2048\n", 0)
            assert linux.command("dd if=/dev/zero of=/dev/vda count=1 2> /dev/null", SECONDS)[1] != 0


@pytest.mark.slow
def test_reboot_is_a_reset(debian: Files) -> None:
    spec = VmSpec(physaddr_bits="auto", memory=memory())
    with kvm2.open("cortex-a72-4k", guest_ids="core") as kvm, Session(kvm, debian("6.12-4k"), spec) as linux:
        linux.wait_for_prompt(SECONDS)
        linux.send("reboot\n")
        assert linux.wait_for_end(SECONDS).ended == "reset"


# Eight processes that calculate, fork, and write through pipes, for a minute.
LOAD = """for n in 1 2 3 4 5 6 7 8; do
timeout 60 sh -c 'while :; do dd if=/dev/zero bs=64k count=4 2> /dev/null | sha256sum; done' > /dev/null &
done; wait""".replace("\n", " ")


@pytest.mark.slow
@pytest.mark.parametrize("host", ["cortex-a72-4k", "graviton3", "raspberry-pi-4"])
def test_four_cpus_under_load_for_a_minute(debian: Files, host: str) -> None:
    spec = VmSpec(physaddr_bits="auto", memory=memory())
    with kvm2.open(host, guest_ids="core") as kvm, Session(kvm, debian("6.12-4k"), spec, cpus=4) as linux:
        linux.wait_for_prompt(SECONDS)
        linux.command(LOAD, SECONDS)
        assert linux.command("nproc") == ("4\n", 0)
        busy, _ = linux.command("grep '^cpu[0-3] ' /proc/stat", SECONDS)
        assert all(int(line.split()[1]) + int(line.split()[3]) > 100 for line in busy.splitlines()), busy
        check_peace(linux)


@pytest.mark.slow
def test_two_machines_on_one_cable(debian: Files, tmp_path: Path) -> None:
    cable = f"unix:{tmp_path}/cable"
    spec = VmSpec(physaddr_bits="auto", memory=memory())
    files = debian("6.12-4k")
    with (
        kvm2.open("apple-m1", guest_ids="core") as one,
        kvm2.open("raspberry-pi-4", guest_ids="core") as two,
        Session(one, files, spec, virtio=[Net(parse_link(f"{cable},server"))]) as first,
        Session(two, files, spec, virtio=[Net(parse_link(cable))]) as second,
    ):
        for number, linux in ((1, first), (2, second)):
            linux.wait_for_prompt(SECONDS)
            assert linux.command(f"ip addr add 10.0.0.{number}/24 dev eth0 && ip link set eth0 up", SECONDS)[1] == 0
        said, status = second.command("ping -c 3 -W 30 10.0.0.1", SECONDS)
        assert status == 0 and "3 packets received" in said
        sent, status = first.command("seq 100000 > /tmp/data && httpd -h /tmp && md5sum < /tmp/data", SECONDS)
        assert status == 0
        assert second.command("wget -q -O - http://10.0.0.1/data | md5sum", SECONDS) == (sent, 0)
        assert first.command("wget -q -O - http://10.0.0.2/data", SECONDS)[1] != 0, "nobody serves there"
