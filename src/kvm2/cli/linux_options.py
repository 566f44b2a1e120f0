"""The options of `kvm2 run` that are about Linux, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvm2.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.board.virtio.device import Device

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType

GICS = {"auto": None, "v2": 2, "v3": 3}
FLAVOURS = ("6.12-4k", "6.12-16k", "6.1-4k")  # kvm2.lab.packages.FLAVOURS, without its import; a test compares
READ_ONLY = ",ro"


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk's file; `readonly` where the guest must not write to it."""

    path: Path
    readonly: bool = False


class DiskType(_ParamType):
    """FILE[,ro]."""

    name = "file[,ro]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Disk:
        if isinstance(value, Disk):
            return value
        path = value.removesuffix(READ_ONLY)
        if not path:
            self.fail(f"{value!r}: allowed are FILE and FILE{READ_ONLY}", param, ctx)
        return Disk(Path(path), path != value)


_FILE = click.Path(dir_okay=False, path_type=Path)
_OPTIONS: dict[str, Callable[..., Any]] = {
    "kernel": click.option("--kernel", type=_FILE, help="Boot this arm64 Linux: Image, compressed too, or EFI zboot."),
    "initrd": click.option("--initrd", type=_FILE, help="Linux's first file system."),
    "append": click.option("--append", metavar="TEXT", help="More words for Linux's command line."),
    "flavour": click.option("--flavour", type=click.Choice(FLAVOURS), help="Which kernel `kvm2 run linux` boots."),
    "disk": click.option("--disk", type=DiskType(), multiple=True, help="A disk, /dev/vda and so on; repeatable."),
    "net": click.option(
        "--net", metavar="SOCKET", multiple=True,
        help="A network card, its other end unix:PATH, tcp:HOST:PORT or dgram:A,B (QEMU's -netdev); repeatable.",
    ),
    "gic": click.option("--gic", type=click.Choice(tuple(GICS)), help="Interrupt controller. [default: auto]"),
    "id_registers": click.option(
        "--id-registers", type=click.Choice(("core", "profile")),
        help="What the guest is shown: what the emulated core executes of the host's features, or all. [default: core]",
    ),
    "dtb_out": click.option("--dtb-out", type=_FILE, help="Write the device tree here as well."),
    "save": click.option("--save", type=_FILE, help="Snapshot, by Ctrl-a s, and at Ctrl-a x, --timeout or Ctrl-C."),
    "restore": click.option("--restore", type=_FILE, help="Go on where this snapshot was taken."),
    "no_reboot": click.option("--no-reboot", is_flag=True, help="End where the guest wants to boot again."),
}  # fmt: skip
_ON = {name: f"--{name.replace('_', '-')}" for name in _OPTIONS}

_OF_THE_SNAPSHOT = {
    **{name: _ON[name] for name in ("kernel", "initrd", "append", "flavour", "gic", "dtb_out")},
    "ipa_bits": "--ipa-bits",
    "sve": "--sve",
    "granule": "--granule",
    "max_vcpus": "--max-vcpus",
    "machine_type": "--machine-type",
    "parange_follows_ipa": "--parange-follows-ipa",
    "memory": "--memory",
    "cpus": "--cpus",
    "type_word": "--type",
    "fixed": "--fixed",
}


def linux_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options; in `wanted` under their names."""
    for option in reversed(_OPTIONS.values()):
        command = option(command)
    return command


def check_none(wanted: dict[str, Any]) -> None:
    """UsageError where an option of Linux's is given for another guest."""
    given = [_ON[name] for name in _OPTIONS if wanted[name]]
    if given:
        raise UsageError(f"{', '.join(given)}: for Linux only, with --kernel FILE or as `kvm2 run linux`")


def check_linux(guest: str | None, words: tuple[str, ...], wanted: dict[str, Any]) -> None:
    """UsageError where options contradict each other, or belong to a guest that is no Linux."""
    if wanted["restore"]:
        _check_restore(guest, words, wanted)
    elif guest == "linux":
        named = [_ON[name] for name in ("kernel", "initrd") if wanted[name]]
        if named:
            raise UsageError(f"`kvm2 run linux` has Debian's kernel and an initramfs: leave out {' and '.join(named)}")
    elif guest is not None:
        raise UsageError(
            f"{guest} and --kernel {wanted['kernel']}: give one guest (a COMMAND runs in `kvm2 run linux` only)"
        )
    elif wanted["flavour"]:
        raise UsageError("--flavour is a kernel of `kvm2 run linux`: with --kernel, leave it out")
    others = [option for option in ("--top", "--no-params") if wanted[option[2:].replace("-", "_")]]
    if others:
        raise UsageError(f"{', '.join(others)}: for ELF and flat images; Linux gets a device tree, and RAM by --memory")
    if words and wanted["no_reboot"]:
        raise UsageError("--no-reboot: with a COMMAND the guest never boots again")


def _check_restore(guest: str | None, words: tuple[str, ...], wanted: dict[str, Any]) -> None:
    if guest is not None or words:
        raise UsageError("--restore goes on with the guest of the snapshot: leave GUEST and COMMAND out")
    given = [option for name, option in _OF_THE_SNAPSHOT.items() if wanted[name] not in (None, (), False)]
    if given:
        raise UsageError(f"{', '.join(given)}: the snapshot says it; with --restore, leave it out")


def devices_of(wanted: dict[str, Any]) -> list[Device]:
    """The virtio devices that are asked for, and a source of entropy. UsageError where a file or socket is wrong."""
    from kvm2.board.virtio import Blk, Net, Rng, parse_link

    made: list[Device] = []
    try:
        made += (Blk(disk.path, readonly=disk.readonly) for disk in wanted["disk"])
        made += (Net(parse_link(link)) for link in wanted["net"])
    except BaseException:
        for device in made:
            device.close()
        raise
    return [*made, Rng()]
