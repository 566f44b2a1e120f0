"""What a host's name stands for where scenarios are played, and which process plays them there.

A described host and a TOML file are the software KVM; `/dev/kvm` is this machine's kernel; `oracle:SHAPE` is a live
arm64 kernel in an emulated machine. This is the only place that tells them apart.

>>> place_of("max-16k-6.12").page_size, place_of("apple-m1").kind
(16384, 'described')
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from kvm2.hosts import is_real

DESCRIBED, KERNEL, ORACLE = "described", "kernel", "oracle"
ORACLE_PREFIX = "oracle:"


@dataclass(frozen=True, slots=True)
class Place:
    """One host to play on. `name` is what was asked for, `machine` its bare name, which the rules' globs are about.

    `command` starts a worker (`lab.worker` has the protocol); `page_size` is the host's, in bytes.
    """

    name: str
    machine: str
    kind: str
    arch: str
    page_size: int
    command: tuple[str, ...]

    @property
    def is_real(self) -> bool:
        """Whether a kernel answers, and not the software KVM."""
        return self.kind != DESCRIBED


def place_of(host: str) -> Place:
    """The place of a host's name; HostError or EnvironmentFault where there is none."""
    if is_real(host):
        return _kernel(host)
    if host.startswith(ORACLE_PREFIX):
        return _oracle(host, host.removeprefix(ORACLE_PREFIX))
    from kvm2.softkvm import profile

    found = profile.load(host)
    return Place(host, found.name, DESCRIBED, found.arch, 1 << found.page_shift, command_of(host))


def command_of(host: str) -> tuple[str, ...]:
    """The command of a worker that plays on `host`; nothing about the host is checked."""
    if host.startswith(ORACLE_PREFIX):
        return (sys.executable, "-m", "kvm2.lab.oracle.bridge", host.removeprefix(ORACLE_PREFIX))
    return (sys.executable, "-m", "kvm2.lab.worker")


def _kernel(host: str) -> Place:
    import mmap
    import platform

    from kvm2.hosts import backend_of
    from kvm2.hosts.kernel import machine_arch

    backend_of(host)  # EnvironmentFault, with what to do, where this machine's KVM cannot be opened
    node = platform.node() or "this-machine"
    return Place(host, node, KERNEL, machine_arch(), mmap.PAGESIZE, command_of(host))


def _oracle(host: str, shape: str) -> Place:
    from kvm2.lab.oracle import shapes

    return Place(host, shape, ORACLE, "arm64", shapes.shape(shape).page, command_of(host))
