"""Which host runs a guest, by the guest's architecture, and which board is around it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from kvm2.errors import EnvironmentFault, GuestError, UsageError

if TYPE_CHECKING:
    from kvm2.board.loop import Board
    from kvm2.kvm import Kvm
    from kvm2.spec import MemoryRange

NAMES = {"arm64": "AArch64", "x86_64": "x86-64"}


def host_for(host: str | None, wanted: str | None) -> str:
    """The host to use, said aloud where nobody chose it. `wanted` is the guest's architecture, None where it has none.

    This machine's /dev/kvm where it can run that architecture, else the default described host; EnvironmentFault for
    an x86-64 guest where there is no x86-64 KVM.
    """
    from kvm2.cli.options import chosen_host

    if host is not None:
        return chosen_host(host)
    from kvm2.hosts.kernel import DEVICE, machine_arch

    arch = wanted or "arm64"  # what the described hosts run, and what a flat image is taken for
    if arch == machine_arch():
        from kvm2.hosts.real import refusal

        why = refusal()
        if not why:
            print(f"kvm2: host {DEVICE} (it runs {NAMES[arch]}; choose with --host or KVM2_HOST)", file=sys.stderr)
            return DEVICE
    else:
        why = f"this machine's architecture is {machine_arch()}, and KVM runs guests of its own only"
    if arch == "arm64":
        return chosen_host(None)
    raise EnvironmentFault(
        f"an {NAMES[arch]} guest needs the /dev/kvm of an {NAMES[arch]} machine ({why}); described hosts run AArch64"
    )


def check_runs(kvm: Kvm, name: str, wanted: str | None) -> None:
    """GuestError where a host cannot run a guest of this architecture, or runs no guest at all."""
    from kvm2.cli.options import DEFAULT_HOST
    from kvm2.hosts.soft import profile_of

    arch = kvm.arch
    if arch not in NAMES:
        raise GuestError(f"host {kvm.name} is {arch}: kvm2 runs guests for {' and '.join(NAMES.values())}")
    if wanted is not None and wanted != arch:
        other = (
            f"a described host runs it: --host {DEFAULT_HOST}, or leave --host and KVM2_HOST out"
            if wanted == "arm64"
            else "an x86-64 machine's /dev/kvm runs it"
        )
        raise GuestError(
            f"{name} is a guest for {NAMES[wanted]}, and host {kvm.name} is {NAMES[arch]}: KVM runs guests of its own "
            f"architecture only (no {NAMES[wanted]} guests on {NAMES[arch]}); {other}"
        )
    if arch != "arm64" and profile_of(kvm.backend) is not None:
        raise GuestError(
            f"host {kvm.name} is a described {NAMES[arch]} host: the software KVM executes AArch64 only; on an "
            f"{NAMES[arch]} machine --host /dev/kvm runs {NAMES[arch]} guests"
        )


def check_cpus(kvm: Kvm, cpus: int) -> None:
    """UsageError where no VM of this host has so many vCPUs."""
    most = kvm.check_extension("MAX_VCPUS")
    if cpus > most:
        raise UsageError(f"--cpus {cpus}: a VM of {kvm.name} has {most} at most (KVM_CAP_MAX_VCPUS)")


def default_memory(arch: str) -> tuple[MemoryRange, ...]:
    """The RAM that a guest gets when nobody says otherwise."""
    if arch == "x86_64":
        from kvm2.board import x86

        return x86.DEFAULT_MEMORY
    from kvm2.board import machine

    return machine.DEFAULT_MEMORY


def check_memory(arch: str, memory: tuple[MemoryRange, ...]) -> None:
    """UsageError where the board has no place for this RAM."""
    if arch == "x86_64":
        from kvm2.board import x86

        x86.check_memory(memory)
    else:
        from kvm2.board import machine

        machine.check_memory(memory)


def board_for(arch: str, *args: Any, **options: Any) -> Board:
    """The board of an architecture, made with these arguments."""
    if arch == "x86_64":
        from kvm2.board.x86 import X86Machine

        return X86Machine(*args, **options)
    from kvm2.board.machine import Machine

    return Machine(*args, **options)
