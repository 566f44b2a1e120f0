"""Saving a Linux machine and making it again, here or on another host.

>>> # with machine.paused() inside: the guest goes on afterwards
>>> # save(machine, Path("booted.kvm2"))
>>> # machine = restore(kvm, read(Path("booted.kvm2")))
"""

from __future__ import annotations

import dataclasses
import errno
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from kvm2.abi.findings import Finding
from kvm2.board.linux import LinuxMachine
from kvm2.board.snapshot import file, vcpus
from kvm2.board.snapshot.gic import GicState
from kvm2.board.virtio.mmio import VirtioMmio
from kvm2.errors import KvmError, UsageError
from kvm2.spec import MemoryRange, VmSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kvm2.board.snapshot.file import Snapshot
    from kvm2.board.virtio.device import Device as VirtioDevice
    from kvm2.kvm import Kvm

KIND = "linux"


def save(machine: LinuxMachine, path: Path, notes: dict[str, Any] | None = None) -> Snapshot:
    """Writes `machine` to `path`, whole or not at all; its vCPUs are held meanwhile, and go on.

    `notes` (JSON-able) are kept beside it, for whoever restores: which files were its disks. KvmError where the host
    refuses to give a state; UsageError, EnvironmentFault where the file cannot be written.
    """
    with machine.paused(), ExitStack() as still:
        for device in machine.devices.values():
            if isinstance(device, VirtioMmio):  # a network's thread writes into memory while no vCPU runs
                still.enter_context(device.held())
        gic = GicState(machine.gic, machine.vcpus).save()  # first: it writes LPIs' states into guest memory
        state = {
            "kind": KIND,
            "host": machine.kvm.name,
            "spec": _spec_to_json(machine),
            "ipa_bits": machine.ipa_bits,
            "gic": gic,
            "its": machine.gic.its is not None,
            "vcpus": [vcpus.save(vcpu) for vcpu in machine.vcpus],
            "devices": machine.state(),
            "dtb": machine.dtb.hex(),
            "notes": notes or {},
        }
        return file.write(path, state, [(ram.gpa, ram.view) for ram in machine.rams])


def _spec_to_json(machine: LinuxMachine) -> dict[str, Any]:
    # The size in bits is named, so that another host does not choose its own.
    spec = dataclasses.replace(machine.spec, physaddr_bits=machine.ipa_bits, memory=machine.memory)
    return dataclasses.asdict(spec)


def spec_of(snapshot: Snapshot) -> VmSpec:
    """The VM that a snapshot asks a host for; UsageError where the snapshot is not of a machine that is known here."""
    state = snapshot.state
    if state.get("kind") != KIND:
        raise UsageError(f"{snapshot.path} has a machine of kind {state.get('kind')!r}: this kvm2 restores {KIND!r}")
    memory = tuple(MemoryRange(**piece) for piece in state["spec"]["memory"])
    return VmSpec(**{**state["spec"], "memory": memory})


def restore(
    kvm: Kvm,
    snapshot: Snapshot,
    *,
    sink: Callable[[int], object] | None = None,
    virtio: Sequence[VirtioDevice] = (),
) -> LinuxMachine:
    """A machine that goes on where the snapshot was taken, with `virtio` devices as it had them.

    KvmError where this host cannot be what the guest was running on: creation's own findings for the IPA size and SVE,
    else a finding for each register that differs. UsageError for a damaged file, and for other devices.
    """
    state, spec = snapshot.state, spec_of(snapshot)
    # A host without the new call made the VM by a type word, which carries no more than the size.
    old = not kvm.check_extension("CREATE_VM2") and spec.sve is None
    machine = LinuxMachine(
        kvm,
        spec,
        vm=kvm.create_vm(state["ipa_bits"]) if old else None,
        cpus=len(state["vcpus"]),
        sink=sink,
        virtio=virtio,
        gic=state["gic"]["version"],
        its=state["its"],
    )
    try:
        found = []
        if machine.gic.irqs != state["gic"]["irqs"]:
            raise UsageError(
                f"the snapshot's GIC has {state['gic']['irqs']} interrupts and this machine's {machine.gic.irqs}: "
                "give it the devices that it had"
            )
        file.load_memory(snapshot, {ram.gpa: ram.view for ram in machine.rams})
        for number, (vcpu, saved) in enumerate(zip(machine.vcpus, state["vcpus"], strict=True)):
            found += vcpus.restore(vcpu, saved, counters=number == 0)
        if found:
            raise _refused(kvm, snapshot, found)
        GicState(machine.gic, machine.vcpus).restore(state["gic"])
        machine.restore(state["devices"])
        machine.dtb = bytes.fromhex(state["dtb"])
    except BaseException:
        machine.close()
        raise
    return machine


def _refused(kvm: Kvm, snapshot: Snapshot, found: list[Finding]) -> KvmError:
    # The same difference on every vCPU is said once.
    first: dict[str, Finding] = {}
    for finding in found:
        first.setdefault(finding.known_path.split(".", 1)[1], finding)
    return KvmError(
        errno.EINVAL,
        f"{snapshot.path}, made on {snapshot.state['host']}, cannot go on on {kvm.name}: {len(first)} registers differ",
        tuple(first.values()),
    )
