"""The file system that Linux starts with: busybox, a script as the first process, the drivers of the board's devices.

What differs from one start to the next (a command to run, the size of the terminal) comes in a second archive behind
the first (`settings`): the kernel unpacks both, so the first is made once and kept.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvm2.errors import EnvironmentFault
from kvm2.lab.cpio import Tree
from kvm2.lab.kernel_package import in_order, members

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PROMPT = "kvm2:/# "
# Drivers of what the board has, and the file systems of disks. crc32c_generic is what ext4 asks the kernel's crypto
# layer for by name: no file says that it depends on it. What a kernel has built in is not among its modules.
DRIVERS = ("virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "virtio_console", "crc32c_generic", "ext4")
PLACES = ("bin", "dev", "etc", "lib/modules", "mnt", "proc", "root", "run", "sys", "tmp", "var")
LINKS = {"sbin": "bin", "usr": ".", "var/run": "../run"}
BUSYBOX_MEMBER = "usr/bin/busybox"
SETTINGS = "etc/kvm2"
MARK = "\x1e"  # RECORD SEPARATOR: what surrounds the output of a command

# busybox's shell prefers its own poweroff, halt and reboot to any file, and these only signal the first process. It
# would take a signal no sooner than its child has ended, so the shell is none: start-stop-daemon forks it away, and it
# says in /run/ended that it has. (With `&` it would ignore Ctrl-C for ever.)
INIT = """#!/bin/sh
export PATH=/bin HOME=/root TERM=linux PS1='kvm2:\\w# '
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir /dev/pts /dev/shm
mount -t devpts pts /dev/pts
ln -s /proc/self/fd /dev/fd
[ -r /etc/kvm2 ] && . /etc/kvm2
cd /lib/modules
load() {
    while read -r name needed; do
        [ "$name" = "$1" ] || continue
        for module in $needed $name; do
            [ -e /sys/module/$module ] || insmod $module.ko
        done
    done < order
}
for node in /proc/device-tree/virtio_mmio@*; do
    [ -e $node ] && load virtio_mmio && break
done
for device in /sys/bus/virtio/devices/*; do
    [ -e $device ] || break
    read -r alias < $device/modalias
    case $alias in
    virtio:d00000001*) load virtio_net ;;
    virtio:d00000002*) load virtio_blk; load crc32c_generic; load ext4 ;;
    virtio:d00000003*) load virtio_console ;;
    virtio:d00000004*) load virtio_rng ;;
    esac
done
end() {
    cd /
    sync
    umount -a -r 2> /dev/null
    exec /bin/busybox $1 -f
}
trap 'end poweroff' USR1 USR2
trap 'end reboot' TERM
hostname kvm2
ip link set lo up
cd /
if [ -n "$KVM2_COMMAND" ]; then
    stty raw -echo
    mark=$(printf '\\036')
    printf '%s' "$mark$KVM2_TOKEN$mark"
    sh -c "$KVM2_COMMAND" < /dev/null 2>&1
    printf '%s' "$mark$KVM2_TOKEN $?$mark"
    end poweroff
fi
[ -n "$KVM2_ROWS" ] && stty rows $KVM2_ROWS cols $KVM2_COLUMNS
[ -n "$KVM2_PLAIN" ] && stty -echo
mkfifo /run/ended
exec 3<> /run/ended
start-stop-daemon -S -b -p /run/shell -a /bin/setsid -- cttyhack sh -c "sh $KVM2_SHELL; echo > /run/ended"
read -r line <&3
end poweroff
"""


@dataclass(frozen=True, slots=True)
class Parts:
    """What the archive is made of: busybox, modules by name, and for each driver the names in the order of loading."""

    busybox: bytes
    modules: Mapping[str, bytes]
    order: Mapping[str, tuple[str, ...]]


def parts_of(modules: Mapping[str, bytes], busybox: Path) -> Parts:
    """What goes into the archive, from a kernel's modules and busybox's package."""
    order = {name: tuple(in_order((name,), modules)) for name in DRIVERS if name in modules}
    program = next((data for path, _, data in members(busybox) if path == BUSYBOX_MEMBER), None)
    if program is None:
        raise EnvironmentFault(f"{busybox}: there is no busybox in it")
    return Parts(program, in_order(DRIVERS, modules), order)


def build(parts: Parts) -> bytes:
    """The archive, not compressed: on an emulated core unpacking takes longer than copying."""
    tree = Tree()
    for place in PLACES:
        tree.directory(place)
    for path, target in LINKS.items():
        tree.link(path, target)
    tree.file("bin/busybox", parts.busybox, 0o755)
    for name in applets(parts.busybox):
        tree.link(f"bin/{name}", "busybox")
    tree.file("init", INIT.encode(), 0o755)
    tree.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    tree.file("etc/group", b"root:x:0:\n")
    for name, data in parts.modules.items():
        tree.file(f"lib/modules/{name}.ko", data)
    lines = [" ".join((name, *needed[:-1])) for name, needed in parts.order.items()]
    tree.file("lib/modules/order", "".join(f"{line}\n" for line in lines).encode())
    return tree.pack()


def applets(busybox: bytes) -> tuple[str, ...]:
    """The programs that are in a busybox, by the sorted table of names in it; EnvironmentFault where there is none."""
    found: list[str] = []
    start = busybox.find(b"\0[\0[[\0") + 1
    while start and (end := busybox.find(b"\0", start)) > 0:
        name = busybox[start:end].decode("ascii", "replace")
        if found and name <= found[-1]:
            break
        found.append(name)
        start = end + 1
    if "sh" not in found or "mount" not in found:
        raise EnvironmentFault("this busybox has no table of its programs, or no sh and mount: another one is needed")
    return tuple(name for name in found if name != "busybox")


def settings(values: Mapping[str, str]) -> bytes:
    """A second archive: variables for the first process, by the names that INIT knows."""
    tree = Tree()
    tree.directory("etc")
    tree.file(SETTINGS, "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items()).encode())
    return tree.pack()
