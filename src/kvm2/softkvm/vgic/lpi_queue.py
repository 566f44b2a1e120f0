"""The LPIs that are pending and enabled at one vCPU, by priority: there may be tens of thousands."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvm2.softkvm.vgic.irq import Irq

SLACK = 64  # entries that are out of date before they are thrown away


class LpiQueue:
    """`members` by number. Who is first is found in the time of a heap, whatever comes and goes.

    >>> from kvm2.softkvm.vgic.lpi import Lpi
    >>> queue, low, high = LpiQueue(), Lpi(8192, None), Lpi(9000, None)
    >>> low.priority, high.priority = 0xA0, 0x20
    >>> queue.add(low), queue.add(high), queue.first().intid
    (None, None, 9000)
    >>> queue.remove(high), queue.first().intid
    (None, 8192)
    """

    __slots__ = ("_heap", "members")

    def __init__(self) -> None:
        self.members: dict[int, Irq] = {}
        # (priority, number): those of interrupts that left, or whose priority changed, are dropped when they come up.
        self._heap: list[tuple[int, int]] = []

    def add(self, irq: Irq) -> None:
        """An interrupt that is to be here, or one that is, and whose priority may have changed."""
        self.members[irq.intid] = irq
        heappush(self._heap, (irq.priority, irq.intid))
        if len(self._heap) > 2 * len(self.members) + SLACK:
            self._heap = [(other.priority, other.intid) for other in self.members.values()]
            heapify(self._heap)

    def remove(self, irq: Irq) -> None:
        """No longer here."""
        self.members.pop(irq.intid, None)

    def first(self) -> Irq | None:
        """The one with the highest priority, the lowest number among equals."""
        heap, members = self._heap, self.members
        while heap:
            priority, intid = heap[0]
            irq = members.get(intid)
            if irq is not None and irq.priority == priority:
                return irq
            heappop(heap)
        return None
