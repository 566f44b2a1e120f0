"""What a VM has besides its devices: routes, irqfds, ioeventfds, zones of coalesced MMIO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm2.softkvm.irq_routing import Routing, default_routing

if TYPE_CHECKING:
    from kvm2.softkvm.coalesced import Zone
    from kvm2.softkvm.ioeventfd import IoEventFd
    from kvm2.softkvm.irqfd import Irqfds

NO_ROUTES = Routing()


class Eventfds:
    """Of one VM. `irqfds` is None until the first one; `ioeventfds` and `zones` change under the VM's lock."""

    def __init__(self) -> None:
        self.routing = NO_ROUTES
        self.irqfds: Irqfds | None = None
        self.ioeventfds: list[IoEventFd] = []
        self.zones: list[Zone] = []

    def set_default_routing(self, nr_spis: int) -> None:
        """At the end of vgic_init: what userspace routed before is gone."""
        self.routing = default_routing(nr_spis)

    def catch_up(self) -> None:
        """What was written to the irqfds so far is injected now. With a kernel that happens inside the `write`: whoever
        writes and then asks finds the interrupt."""
        if self.irqfds is not None:
            self.irqfds.drain()

    def release(self) -> None:
        """kvm_irqfd_release: the VM's descriptor was closed (vCPUs may go on)."""
        irqfds, self.irqfds = self.irqfds, None
        if irqfds is not None:
            irqfds.close()

    def close(self) -> None:
        """The VM goes."""
        self.release()
        for one in self.ioeventfds:
            one.eventfd.close()
