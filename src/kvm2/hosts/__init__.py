"""Hosts: who answers the ioctls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm2.errors import EnvironmentFault

if TYPE_CHECKING:
    from pathlib import Path

    from kvm2.hosts.backend import Backend

REAL = ("/dev/kvm", "kvm")


def backend_of(host: str | Path, working_caps: bool = False) -> Backend:
    """Who answers for a host, before /dev/kvm is opened on it."""
    if str(host) in REAL:
        raise EnvironmentFault(
            "/dev/kvm of this machine cannot be opened by this version of kvm2, which speaks to described hosts only: "
            "give the name of one (`kvm2 hosts` lists them), or a TOML file"
        )
    from kvm2.hosts.soft import open_soft

    return open_soft(host, working_caps)


def host_names() -> list[str]:
    """The names of the described hosts that come with kvm2."""
    from kvm2.softkvm import profile

    return profile.names()
