"""One interrupt of a vGIC (`struct vgic_irq`), and the numbers that interrupts have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvm2.softkvm.vgic.state import VgicCpu

NR_SGIS: Final = 16
NR_PRIVATE_IRQS: Final = 32
MAX_SPI: Final = 1019
MIN_LPI: Final = 8192
SPURIOUS: Final = 1023
PRIORITY_BITS: Final = 5  # VGIC_PRI_BITS: of each priority byte, the upper ones
PRIORITY_MASK: Final = 0xFF & ~((1 << 8 - PRIORITY_BITS) - 1)


class Irq:
    """One interrupt's state. Changes are followed by `Vgic.update`, under `Vgic.lock`.

    `cpu` is the vCPU on whose list it is (pending and enabled, or active); `target` the one that it should go to.
    `edge` is its configuration; `line_level` the input of a level-sensitive one. `source` and `active_source` are of
    GICv2's SGIs: which vCPUs sent it (a bitmap), and which one's is active.
    """

    __slots__ = (
        "active",
        "active_source",
        "cpu",
        "edge",
        "enabled",
        "group",
        "hw",
        "intid",
        "line_level",
        "mpidr",
        "owner",
        "pending_latch",
        "priority",
        "source",
        "target",
        "targets",
    )

    def __init__(self, intid: int, target: VgicCpu | None) -> None:
        self.intid = intid
        self.target = target
        self.cpu: VgicCpu | None = None
        self.enabled = intid < NR_SGIS
        # Zeroed memory says VGIC_CONFIG_EDGE; kvm_vgic_vcpu_init makes PPIs level-sensitive, and nobody the SPIs.
        self.edge = not NR_SGIS <= intid < NR_PRIVATE_IRQS
        self.pending_latch = self.line_level = self.active = False
        self.priority = self.group = 0
        self.mpidr = self.targets = 0  # the affinity (v3) or the vCPUs (v2) that an SPI goes to, as the guest wrote it
        self.source = self.active_source = 0
        # A device of the kernel whose input this is (a timer, the PMU): userspace cannot inject it then.
        self.owner: object = None
        self.hw = False  # an interrupt of the host is behind it (a timer's): its active state is not userspace's

    @property
    def pending(self) -> bool:
        """irq_is_pending: latched, or the input of a level-sensitive interrupt is asserted."""
        return self.pending_latch or (self.line_level and not self.edge)

    def __repr__(self) -> str:
        words = [name for name in ("enabled", "pending", "active", "line_level", "edge") if getattr(self, name)]
        return f"<Irq {self.intid} priority {self.priority:#x} {' '.join(words)}>"
