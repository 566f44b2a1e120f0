"""Hosts: who answers the ioctls."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvm2.hosts.backend import Backend

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


def _seen(backend: Backend) -> Backend:
    for wrap in _watchers:
        backend = wrap(backend)
    return backend


def backend_of(host: str | Path, working_caps: bool = False) -> Backend:
    """Who answers for a host, before /dev/kvm is opened on it."""
    if str(host) in REAL:
        from kvm2.hosts.kernel import Kernel

        return _seen(Kernel())
    from kvm2.hosts.soft import open_soft

    return _seen(open_soft(host, working_caps))


def host_names() -> list[str]:
    """The names of the described hosts that come with kvm2."""
    from kvm2.softkvm import profile

    return profile.names()
