"""Snapshots of a running Linux machine: `--save FILE` and `--restore FILE`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvm2.cli.linux_options import Disk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvm2.board.linux import LinuxMachine
    from kvm2.board.snapshot import Snapshot
    from kvm2.board.virtio.device import Device
    from kvm2.kvm import Kvm

# How a run ends whose guest could go on.
UNFINISHED = ("left", "timeout", "interrupted")


def check_save(path: Path) -> None:
    """UsageError, EnvironmentFault where --save names a place for no snapshot: before the guest has run for hours."""
    from kvm2.board.snapshot.file import check_place

    check_place(path)


def save_to(machine: LinuxMachine, path: Path, shown: str, wanted: dict[str, Any]) -> str:
    """Write a snapshot, with the names of what was booted and of its disks beside it; what to say of it."""
    from kvm2.board.snapshot import save

    started = time.monotonic()
    disks = [{"path": str(disk.path.resolve()), "readonly": disk.readonly} for disk in wanted["disk"]]
    shows = wanted["id_registers"] or "core"
    notes = {"guest": shown, "disks": disks, "net": list(wanted["net"]), "id_registers": shows}
    snapshot = save(machine, path, notes)
    mib = snapshot.bytes_of_memory / (1 << 20)
    return f"saved in {path}: {mib:.0f} MiB of memory, {time.monotonic() - started:.2f} s"


def read_snapshot(wanted: dict[str, Any]) -> Snapshot:
    """The snapshot. `wanted` gets its disks, its networks and what its guest is shown, where they are not given."""
    from kvm2.board.snapshot import read

    snapshot = read(wanted["restore"])
    notes = snapshot.state["notes"]
    wanted["disk"] = wanted["disk"] or tuple(Disk(Path(one["path"]), one["readonly"]) for one in notes.get("disks", ()))
    wanted["net"] = wanted["net"] or tuple(notes.get("net", ()))
    wanted["id_registers"] = wanted["id_registers"] or notes.get("id_registers")
    return snapshot


def name_of(snapshot: Snapshot) -> str:
    """The name of the guest in it, for people."""
    return str(snapshot.state["notes"].get("guest", snapshot.path.name))


def machine_of(kvm: Kvm, snapshot: Snapshot, sink: Callable[[int], object], devices: Sequence[Device]) -> LinuxMachine:
    """The machine of a snapshot, on this host; KvmError with every finding where it cannot go on there."""
    from kvm2.board.snapshot import restore

    return restore(kvm, snapshot, sink=sink, virtio=devices)
