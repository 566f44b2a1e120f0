"""Hosts: who answers the ioctls."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar, cast

from kvm2.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvm2.hosts.backend import Backend

B = TypeVar("B", bound="Backend")

REAL = ("/dev/kvm", "kvm")

_watchers: list[Callable[[Backend], Backend]] = []


@contextmanager
def watched(wrap: Callable[[Backend], Backend]) -> Iterator[None]:
    """Every backend that is made within the block is wrapped: inside of what lowers for it, and outside."""
    _watchers.append(wrap)
    try:
        yield
    finally:
        _watchers.remove(wrap)


def seen(backend: B) -> B:
    """A backend as those who watch want it; itself where nobody does."""
    for wrap in _watchers:
        backend = cast("B", wrap(backend))  # a wrapper has everything that it wraps has
    return backend


def is_real(host: str | Path) -> bool:
    """Whether a host's name means this machine's kernel."""
    return str(host) in REAL


def backend_of(host: str | Path, working_caps: bool = False, guest_ids: str = "profile") -> Backend:
    """Who answers for a host, before /dev/kvm is opened on it. EnvironmentFault where this machine's KVM cannot be."""
    if is_real(host):
        if working_caps:
            raise UsageError("--working-caps is about the software KVM; a real one executes what it announces")
        from kvm2.hosts.real import open_real

        return seen(open_real(between=seen))
    from kvm2.hosts.soft import open_soft

    return seen(open_soft(host, working_caps, guest_ids))


def host_names() -> list[str]:
    """The names of the described hosts that come with kvm2."""
    from kvm2.softkvm import profile

    return profile.names()
