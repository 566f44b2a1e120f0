"""What Linux starts with: from parts that are made here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from kvm2.errors import EnvironmentFault
from kvm2.lab.cpio import Tree
from kvm2.lab.linux import initramfs
from kvm2.lab.linux.initramfs import Parts, applets, build, settings

BUSYBOX = b"\x7fELF...\0more\0[\0[[\0ash\0busybox\0insmod\0mount\0poweroff\0sh\0zcat\0BusyBox is copyrighted\0"
PARTS = Parts(
    BUSYBOX,
    {"failover": b"F", "net_failover": b"N", "virtio_net": b"V", "virtio_mmio": b"M"},
    {"virtio_mmio": ("virtio_mmio",), "virtio_net": ("failover", "net_failover", "virtio_net")},
)


def unpack(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Path to (mode, contents), of an archive or of several behind one another, as the kernel reads them."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while at < len(archive):
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        start = (at + 110 + fields[11] + 3) // 4 * 4
        found[name] = (fields[1], archive[start : start + fields[6]])
        at = (start + fields[6] + 3) // 4 * 4
    return found


def test_programs_modules_in_order_and_the_first_process() -> None:
    found = unpack(build(PARTS))
    assert found["bin/busybox"] == (stat.S_IFREG | 0o755, BUSYBOX)
    assert found["bin/sh"] == (stat.S_IFLNK | 0o777, b"busybox") == found["bin/["]
    assert found["init"][0] == stat.S_IFREG | 0o755 and found["init"][1].startswith(b"#!/bin/sh\n")
    assert found["sbin"][1] == b"bin" and found["usr"][1] == b"."
    assert {"dev", "proc", "sys", "mnt", "tmp", "root"} <= set(found)
    assert found["lib/modules/order"][1] == b"virtio_mmio\nvirtio_net failover net_failover\n"
    assert found["lib/modules/net_failover.ko"][1] == b"N"
    assert build(PARTS) == build(PARTS)


def test_settings_are_read_by_the_first_process(tmp_path: Path) -> None:
    hard = 'it\'s "$HOME" `x`\nand more'
    found = unpack(build(PARTS) + settings({"KVM2_COMMAND": hard, "KVM2_TOKEN": "t"}))
    mode, text = found["etc/kvm2"]
    assert stat.S_ISREG(mode) and ". /etc/kvm2" in found["init"][1].decode()
    script = tmp_path / "settings"
    script.write_bytes(text)
    done = subprocess.run(["sh", "-c", f'. {shlex.quote(str(script))}; printf %s "$KVM2_COMMAND"'], capture_output=True)
    assert done.stdout.decode() == hard


def test_a_busybox_tells_its_programs() -> None:
    assert applets(BUSYBOX) == ("[", "[[", "ash", "insmod", "mount", "poweroff", "sh", "zcat")
    for other in (b"", b"\x7fELF", BUSYBOX.replace(b"mount", b"nount")):
        with pytest.raises(EnvironmentFault, match="another one is needed"):
            applets(other)


def test_drivers_come_with_what_they_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    modules = {
        "virtio_mmio": b"",
        "virtio_net": b"\0depends=net_failover\0",
        "net_failover": b"\0depends=failover\0",
        "failover": b"\0depends=\0",
        "other": b"",
    }
    member = type("Member", (), {})()
    monkeypatch.setattr(initramfs, "members", lambda package: iter([("usr/bin/busybox", member, BUSYBOX)]))
    parts = initramfs.parts_of(modules, tmp_path)
    assert parts.order == PARTS.order and "other" not in parts.modules and parts.busybox == BUSYBOX
    monkeypatch.setattr(initramfs, "members", lambda package: iter([]))
    with pytest.raises(EnvironmentFault, match="there is no busybox in it"):
        initramfs.parts_of(modules, tmp_path)


# Stands in for every program that the first process calls; insmod makes what the kernel would.
PLAYED = """#!/bin/sh
echo "${0##*/} $*" >> "$ROOT/log"
case ${0##*/} in
insmod) mkdir -p "$ROOT/sys/module/${1%.ko}" ;;
start-stop-daemon) echo > "$ROOT/run/ended" ;;
esac
exit 0
"""


def play(tmp_path: Path, devices: tuple[str, ...], variables: str = "") -> list[str]:
    """What the first process calls where the board has such devices: its script, with its places moved."""
    root = tmp_path / "root"
    played = root / "bin"
    played.mkdir(parents=True)
    for name in (
        "mount",
        "mkdir",
        "ln",
        "hostname",
        "ip",
        "stty",
        "start-stop-daemon",
        "sync",
        "umount",
        "insmod",
        "busybox",
    ):
        (played / name).write_text(PLAYED)
        (played / name).chmod(0o755)
    (played / "mkdir").unlink()
    for place in ("lib/modules", "sys/module", "sys/bus/virtio/devices", "proc/device-tree", "dev", "etc", "run"):
        (root / place).mkdir(parents=True)
    (root / "etc/kvm2").write_text(variables)
    (root / "dev/console").touch()
    (root / "lib/modules/order").write_text("virtio_mmio\nvirtio_blk\next4 crc16 jbd2\nvirtio_net failover\n")
    for number, alias in enumerate(devices):
        (root / f"proc/device-tree/virtio_mmio@{number}").mkdir()
        (root / f"sys/bus/virtio/devices/virtio{number}").mkdir()
        (root / f"sys/bus/virtio/devices/virtio{number}/modalias").write_text(f"{alias}\n")
    script = initramfs.INIT.replace("export PATH=/bin", "export").replace("cd /\n", f"cd {root}\n")
    script = re.sub(r"(?<=[\s=])/(?=\w)", f"{root}/", script)
    left = script.replace(str(root), "ROOT").replace("#!/bin/sh", "")
    assert not re.search(r"(?<!\w)/\w", left), "it would reach out of its directory"
    env = {**os.environ, "ROOT": str(root), "PATH": f"{played}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-c", script], env=env, capture_output=True, timeout=20, stdin=subprocess.DEVNULL)
    return (root / "log").read_text().replace(str(root), "").splitlines()


def shell(words: str) -> str:
    """What starts the shell, as it is logged."""
    return (
        next(line for line in initramfs.INIT.splitlines() if line.startswith("start-stop-daemon"))
        .replace('"', "")
        .replace("$KVM2_SHELL", words)
    )


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_the_first_process_loads_what_the_board_has(tmp_path: Path) -> None:
    called = play(tmp_path / "none", ())
    assert not [line for line in called if line.startswith("insmod")]
    assert called[-1] == "busybox poweroff -f" and shell("") in called
    called = play(tmp_path / "some", ("virtio:d00000002v1", "virtio:d00000001v1"))
    loaded = [line.removeprefix("insmod ") for line in called if line.startswith("insmod")]
    assert loaded == [
        "virtio_mmio.ko",
        "virtio_blk.ko",
        "crc16.ko",
        "jbd2.ko",
        "ext4.ko",
        "failover.ko",
        "virtio_net.ko",
    ]
    plain = play(tmp_path / "plain", (), "KVM2_PLAIN=1\nKVM2_SHELL=-v\nKVM2_ROWS=5\nKVM2_COLUMNS=7\n")
    assert plain.index("stty -echo") < plain.index(shell("-v")) and "stty rows 5 cols 7" in plain


def test_the_tree_of_a_settings_archive_is_small() -> None:
    assert set(unpack(settings({"A": "1"}))) == {"etc", "etc/kvm2", "TRAILER!!!"}
    assert len(settings({})) < 1024 and isinstance(Tree().pack(), bytes)
