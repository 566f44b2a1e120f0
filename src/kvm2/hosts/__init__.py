"""Hosts: who answers the ioctls."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from kvm2.hosts.backend import Backend

REAL = ("/dev/kvm", "kvm")


def backend_of(host: str | Path, working_caps: bool = False) -> Backend:
    """Who answers for a host, before /dev/kvm is opened on it."""
    if str(host) in REAL:
        from kvm2.hosts.kernel import Kernel

        return Kernel()
    from kvm2.hosts.soft import open_soft

    return open_soft(host, working_caps)


def host_names() -> list[str]:
    """The names of the described hosts that come with kvm2."""
    from kvm2.softkvm import profile

    return profile.names()
