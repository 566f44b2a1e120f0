"""Hosts as people name them in commands about several: described ones, files, and this machine, probed in memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvm2.errors import UsageError
from kvm2.hosts import is_real
from kvm2.lab.probe import Probed, probe, probe_real

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvm2.kvm import Kvm
    from kvm2.softkvm.profile import Profile


def probed_of(host: str, name: str | None = None, *, guests: bool = True, mainline: bool = False) -> Probed:
    """Asks a host for everything. HostError: no such host; EnvironmentFault: no KVM on this machine."""
    if is_real(host):
        return probe_real(guests=guests, mainline=mainline, name=name)
    if mainline:
        raise UsageError("--mainline is about the KVM of this machine; a described host says itself what it has")
    from kvm2.hosts import backend_of

    return probe(backend_of(host), name or called(host), guests=guests)


def called(host: str) -> str:
    """What a host is called: its name, or its file's without .toml.

    >>> called("max-4k-6.1"), called("racks/my-server.toml")
    ('max-4k-6.1', 'my-server')
    """
    return Path(host).name.removesuffix(".toml")


def profile_of(host: str) -> Profile:
    """The description of a host: loaded, or for this machine probed without running a guest."""
    if is_real(host):
        return probe_real(guests=False).profile()
    from kvm2.softkvm import profile

    return profile.load(host)


def real_ones(hosts: Sequence[str], profiles: Sequence[Profile]) -> dict[str, Callable[[], Kvm]]:
    """By the name of its description, how to open each host that is this machine."""
    from kvm2.kvm import open as open_host

    pairs = zip(hosts, profiles, strict=True)
    return {profile.name: partial(open_host, host) for host, profile in pairs if is_real(host)}


def several(hosts: Sequence[str], least: int = 2) -> list[str]:
    """Host names from arguments that may be lists with commas; UsageError where there are too few, or one twice."""
    names = [name.strip() for text in hosts for name in text.split(",") if name.strip()]
    if len(names) < least:
        raise UsageError(f"{len(names)} hosts: give at least {least} (names, files, or /dev/kvm)")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"{', '.join(twice)}: given twice")
    return names
