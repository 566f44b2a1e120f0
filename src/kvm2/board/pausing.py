"""Which vCPUs of a board may be in the guest: parked while somebody holds them, for a debugger or a snapshot.

A vCPU is parked between two KVM_RUNs and after whatever its last exit left open has been completed (an MMIO exit's
answer is taken up by a KVM_RUN that ends at once): its registers are those of an instruction's boundary.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# A kick is repeated until it has worked: one that arrives just before a KVM_RUN may end an earlier one.
KICK_AGAIN_SECONDS = 0.02


class Pausing:
    """The gate that the threads of a board's vCPUs pass. Any thread may hold and release.

    `kick(vcpu)` gets a vCPU out of its KVM_RUN. Holders are named by any object; a vCPU runs when nobody holds it.
    """

    def __init__(self, kick: Callable[[int], None]) -> None:
        self._kick = kick
        self._changed = threading.Condition()
        self._held: dict[object, set[int]] = {}
        self._out: set[int] = set()  # threads that were started and are parked
        self._threads: dict[int, int] = {}  # vCPU -> the thread that drives it, while there is one
        self._over = False

    # ---- the side of whoever holds

    def hold(self, who: object, vcpus: Iterable[int]) -> None:
        """Hold more vCPUs for `who`, and return when none of them is in the guest.

        A vCPU's own thread may call it: it is out of the guest, and is parked at the end of its exit.
        """
        wanted = set(vcpus)
        self.hold_soon(who, wanted)
        while inside := self._inside(wanted):
            for vcpu in inside:
                self._kick(vcpu)
            with self._changed:
                if self._inside(wanted):
                    self._changed.wait(KICK_AGAIN_SECONDS)

    def hold_soon(self, who: object, vcpus: Iterable[int]) -> None:
        """As `hold`, without waiting and without kicking: for vCPUs that are parked before they enter the guest."""
        with self._changed:
            self._held.setdefault(who, set()).update(vcpus)

    def release(self, who: object, vcpus: Iterable[int] | None = None) -> None:
        """Let go of some of the vCPUs that `who` holds, or of all."""
        with self._changed:
            held = self._held.get(who, set())
            held -= held.copy() if vcpus is None else set(vcpus)
            if not held:
                self._held.pop(who, None)
            self._changed.notify_all()

    def holds(self, who: object) -> frozenset[int]:
        """The vCPUs that `who` holds."""
        with self._changed:
            return frozenset(self._held.get(who, ()))

    def _inside(self, wanted: set[int]) -> set[int]:
        me = threading.get_ident()
        with self._changed:
            return {v for v in wanted if v in self._threads and v not in self._out and self._threads[v] != me}

    # ---- the side of the vCPUs' threads

    @contextmanager
    def driving(self, vcpu: int) -> Iterator[None]:
        """Around the whole life of a vCPU's thread."""
        with self._changed:
            self._threads[vcpu] = threading.get_ident()
        try:
            yield
        finally:
            with self._changed:
                del self._threads[vcpu]
                self._changed.notify_all()

    def park(self, vcpu: int) -> None:
        """Before a KVM_RUN: returns when nobody holds the vCPU, or the run is over."""
        if not self._held:  # the usual case, without the lock; who holds afterwards kicks
            return
        with self._changed:
            self._out.add(vcpu)
            self._changed.notify_all()
            while not self._over and any(vcpu in held for held in self._held.values()):
                self._changed.wait()
            self._out.discard(vcpu)

    def end(self) -> None:
        """The run is over: nobody is parked any more."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
