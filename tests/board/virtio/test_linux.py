"""Linux's own drivers at work on the devices: Debian's kernel on the software KVM."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import time

import pytest

import kvm2
from kvm2.board.virtio import Blk, Console, Net, Rng, parse_link
from kvm2.errors import EnvironmentFault
from kvm2.lab.linux import Session, linux_files
from kvm2.spec import MemoryRange, VmSpec

from .test_net import has_user_network

pytestmark = pytest.mark.slow

MIB = 1 << 20
SECONDS = 400.0  # on a machine that does much else
HOST = "cortex-a72-4k"
SPEC = VmSpec(physaddr_bits="auto", memory=(MemoryRange(1 << 40, 512 * MIB),))


@pytest.fixture
def start():
    """start(devices, **options) -> a Session at its prompt."""
    try:
        files = linux_files()
    except EnvironmentFault as error:
        pytest.skip(f"Debian's arm64 kernel cannot be had: {error}")
    with kvm2.open(HOST) as kvm:
        running = []

        def start(*devices, **options):
            running.append(Session(kvm, files, SPEC, virtio=devices, **options))
            running[-1].wait_for_prompt(SECONDS)
            return running[-1]

        yield start
        for session in running:
            devices = [device for name, device in session.machine.devices.items() if name.startswith("virtio")]
            assert not any(device.fault for device in devices)
            session.close()


def ask(session, line):
    output, status = session.command(line, SECONDS)
    assert status == 0, output
    return output


def until(true):
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(64 * MIB))
    return path


def test_disk(start, image):
    linux = start(Blk(image, serial="KVM2DISK"), cpus=2)
    assert ask(linux, "cat /sys/block/vda/serial") == "KVM2DISK"
    assert ask(linux, "cat /sys/block/vda/size /sys/block/vda/queue/physical_block_size") == "131072\n4096\n"
    # Several writers at once, and back past the page cache.
    ask(linux, "for i in 1 2 3 4; do dd if=/dev/urandom of=/dev/vda bs=64k seek=$((i*100)) count=64 & done; wait; sync")
    sums = ask(linux, "for i in 1 2 3 4; do dd if=/dev/vda bs=64k skip=$((i*100)) count=64 iflag=direct | md5sum; done")
    there = image.read_bytes()
    pieces = [there[n * 100 << 16 :][: 64 << 16] for n in (1, 2, 3, 4)]
    assert re.findall("[0-9a-f]{32}", sums) == [hashlib.md5(piece).hexdigest() for piece in pieces]
    assert len({*pieces}) == 4
    # The driver goes and comes again.
    driver = "/sys/bus/virtio/drivers/virtio_blk"
    ask(linux, f"echo virtio0 > {driver}/unbind && [ ! -e /dev/vda ] && echo virtio0 > {driver}/bind")
    assert ask(linux, "dd if=/dev/vda bs=64k skip=100 count=64 2> /dev/null | md5sum").startswith(
        hashlib.md5(pieces[0]).hexdigest()
    )
    # A file system that gives space back.
    ask(linux, "mke2fs /dev/vda > /dev/null && mount /dev/vda /mnt && fstrim -v /mnt && umount /mnt")
    assert image.stat().st_blocks * 512 < 8 * MIB


def test_console(start):
    heard = bytearray()
    console = Console(heard.extend, cols=90, rows=30)
    linux = start(console, Rng())
    assert ask(linux, "stty size < /dev/hvc0") == "30 90\n"
    console.resize(100, 40)
    assert ask(linux, "sleep 1; stty size < /dev/hvc0") == "40 100\n"
    ask(linux, "(setsid sh < /dev/hvc0 > /dev/hvc0 2>&1 &)")
    console.feed(b"stty -echo -icanon; echo $((6 * 7))\n")
    until(lambda: b"42\r\n" in heard)
    console.feed(b"head -c 100000 | md5sum\n")
    time.sleep(1)
    data = bytes(b"0123456789abcdef" * 6250)
    sent = 0
    while sent < len(data):
        sent += console.feed(data[sent : sent + 5000])
        time.sleep(0.02)
    until(lambda: hashlib.md5(data).hexdigest().encode() in heard)
    assert ask(linux, "dd if=/dev/hwrng bs=512 count=4 2> /dev/null | wc -c") == "2048\n"


def test_network(start, tmp_path):
    qemu = shutil.which("qemu-system-aarch64")
    if qemu is None or not has_user_network(qemu):
        pytest.skip("needs a QEMU with -netdev user and stream (7.2 or newer)")
    path = tmp_path / "wire"
    linux = start(Net(parse_link(f"unix:{path},server"), mac="52:54:00:01:02:03"))
    ask(linux, "ip link set eth0 up")
    assert ask(linux, "cat /sys/class/net/eth0/address /sys/class/net/eth0/carrier") == "52:54:00:01:02:03\n0\n"
    command = [qemu, "-M", "none", "-display", "none", "-monitor", "none", "-serial", "none", "-netdev", "user,id=u"]
    command += ["-netdev", f"stream,id=s,server=off,addr.type=unix,addr.path={path}"]
    command += [word for i, n in enumerate("us") for word in ("-netdev", f"hubport,id=h{i},hubid=0,netdev={n}")]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            until(lambda: ask(linux, "cat /sys/class/net/eth0/carrier") == "1\n")
            assert "10.0.2.15" in ask(linux, "udhcpc -i eth0 -n -q 2>&1")
            ask(linux, "ip addr add 10.0.2.15/24 dev eth0")
            assert "3 packets received" in ask(linux, "ping -c 3 10.0.2.2")
        finally:
            process.kill()
    until(lambda: ask(linux, "cat /sys/class/net/eth0/carrier") == "0\n")
