"""A vGIC's state: its interrupts, which vCPU each is to go to, and who is told when something changes.

After `vgic.c` and `vgic-init.c` of arch/arm64/kvm/vgic. There are no list registers: a vCPU's CPU interface (`cpuif`)
works on the interrupts themselves, so what the kernel folds back after a run is always up to date.

Whoever changes an interrupt holds `Vgic.lock` and calls `update` afterwards.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Final

from kvm2.abi.sysregs import MPIDR_EL1
from kvm2.abi.vgic_attrs import VGIC_ADDR_UNDEF
from kvm2.errors import KvmError
from kvm2.softkvm.vgic.cpuif import CpuInterface
from kvm2.softkvm.vgic.irq import MAX_SPI, MIN_LPI, NR_PRIVATE_IRQS, NR_SGIS, Irq
from kvm2.softkvm.vgic.lpi_queue import LpiQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.softkvm.vcpu import Vcpu
    from kvm2.softkvm.vgic.lpi import Lpi
    from kvm2.softkvm.vgic.mmio import OwnedFrame
    from kvm2.softkvm.vgic.regions import Region
    from kvm2.softkvm.vm import Vm

UNDEF: Final = VGIC_ADDR_UNDEF  # an address that was not set
NR_IRQS_LEGACY: Final = 256  # of a vGIC whose number of interrupts was not set
IMPLEMENTATION_REV: Final = 3  # KVM_VGIC_IMP_REV_LATEST
MPIDR_AFFINITY: Final = 0xFF00FFFFFF


class VgicCpu:
    """What one vCPU has of the interrupt controller (`struct vgic_cpu`).

    `irqs` are its SGIs and PPIs; `listed` those, and SPIs, that are pending and enabled or active here, `lpis` the
    LPIs that are pending and enabled.
    """

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.irqs: list[Irq] = []
        self.listed: dict[int, Irq] = {}
        self.lpis = LpiQueue()
        self.interface = CpuInterface(self)
        self.irq_line = self.fiq_line = False  # what the vCPU was last told
        # The redistributor's frame, and what its LPI registers hold.
        self.rd_base = UNDEF
        self.rd_region: Region | None = None
        self.rd_index = 0
        self.rd_frame: OwnedFrame | None = None
        self.lpis_enabled = False
        self.pendbaser = 0

    @property
    def vgic(self) -> Vgic:
        """The vGIC of the VM; only where it has one."""
        vgic = self.vcpu.vm.vgic
        assert vgic is not None
        return vgic

    @property
    def affinity(self) -> int:
        """The affinity fields of MPIDR_EL1: Aff3 39:32, Aff2 to Aff0 23:0."""
        return self.vcpu.state.sys.get(MPIDR_EL1, 0) & MPIDR_AFFINITY

    @property
    def index(self) -> int:
        """The vCPU's place in the order of creation."""
        return next(at for at, vcpu in enumerate(list(self.vcpu.vm.vcpus.values())) if vcpu is self.vcpu)

    def allocate(self) -> None:
        """vgic_allocate_private_irqs: SGIs are enabled and edge-triggered, PPIs level-sensitive."""
        if not self.irqs:
            self.irqs = [Irq(intid, self) for intid in range(NR_PRIVATE_IRQS)]

    def refresh(self) -> None:
        """Tells the vCPU where an interrupt line of its CPU interface has changed. Under the vGIC's lock."""
        irq, fiq = self.interface.lines()
        if irq != self.irq_line or fiq != self.fiq_line:
            self.irq_line, self.fiq_line = irq, fiq
            self.vcpu.interrupt_lines_changed()


class Vgic:
    """The interrupt controller of a VM (`struct vgic_dist`): `model` is "v2" or "v3".

    Set up as the kernel's: made by `KVM_CREATE_DEVICE`, `initialized` by CTRL_INIT, `ready` at the first KVM_RUN.
    """

    def __init__(self, vm: Vm, model: str) -> None:
        from kvm2.softkvm.vgic.lpi import INITIAL_PROPBASER

        self.vm, self.model = vm, model
        self.lock = threading.RLock()
        self.initialized = self.ready = False
        self.implementation_rev = 0
        self.v2_groups_user_writable = False
        self.nr_spis = 0
        self.spis: list[Irq] = []
        self.dist_base = self.cpu_base = UNDEF
        self.redist_regions: list[Region] = []
        self.enabled = False  # the distributor forwards interrupts
        # Is told, under the lock, when the guest has ended a level-sensitive SPI; None while nobody wants to know.
        self.eoi_notifier: Callable[[Irq], None] | None = None
        self.nassgireq = False
        self.propbaser = INITIAL_PROPBASER if vm.itses else 0  # one for all redistributors
        self.lpis: dict[int, Lpi] = {}

    # ---- set-up

    @property
    def has_its(self) -> bool:
        """vgic_has_its: messages become LPIs."""
        return self.model == "v3" and bool(self.vm.itses)

    def cpus(self) -> list[VgicCpu]:
        """Of every vCPU, in the order of creation."""
        return [vcpu.gic for vcpu in list(self.vm.vcpus.values())]

    def init(self) -> None:
        """vgic_init: the interrupts of the distributor and of each vCPU. Nothing where it was done."""
        from kvm2.softkvm.vgic.lpi import INITIAL_PENDBASER

        if self.initialized:
            return
        if not self.nr_spis:
            self.nr_spis = NR_IRQS_LEGACY - NR_PRIVATE_IRQS
        cpus = self.cpus()
        first = cpus[0] if cpus else None
        with self.lock:
            self.spis = [Irq(NR_PRIVATE_IRQS + number, first) for number in range(self.nr_spis)]
            group = 1 if self.model == "v3" else 0
            for irq in self.spis:
                irq.group = group
            for index, cpu in enumerate(cpus):
                cpu.allocate()
                cpu.interface.reset(self.model)
                if self.model == "v3":
                    cpu.pendbaser = INITIAL_PENDBASER
                for irq in cpu.irqs:
                    irq.group = group
                    irq.mpidr, irq.targets = cpu.affinity, 1 << index
            if not self.implementation_rev:
                self.implementation_rev = IMPLEMENTATION_REV
            self.vm.eventfds.set_default_routing(self.nr_spis)
            self.initialized = True

    def add_cpu(self, cpu: VgicCpu) -> None:
        """kvm_vgic_vcpu_init: a vCPU that is made after the vGIC; EINVAL where its redistributor has no place."""
        from kvm2.softkvm.vgic import regions

        cpu.allocate()
        if self.model == "v3":
            regions.register(self, cpu)

    def lazy_init(self) -> None:
        """vgic_lazy_init: a GICv2 initialises itself when it is first used; EBUSY for a GICv3 that was not."""
        if not self.initialized:
            if self.model != "v2":
                raise KvmError(errno.EBUSY, "the vGICv3 was not initialised: KVM_DEV_ARM_VGIC_CTRL_INIT comes first")
            self.init()

    # ---- interrupts by number

    def irq(self, cpu: VgicCpu | None, intid: int) -> Irq | None:
        """vgic_get_irq: an SGI or PPI of `cpu`, an SPI, an LPI that is mapped; None for a number that is none."""
        if intid < NR_PRIVATE_IRQS:
            return cpu.irqs[intid] if cpu is not None and cpu.irqs else None
        if intid <= MAX_SPI:
            number = intid - NR_PRIVATE_IRQS
            return self.spis[number] if number < len(self.spis) else None
        return self.lpis.get(intid) if intid >= MIN_LPI else None

    # ---- from a change to the vCPU's interrupt line

    def _destination(self, irq: Irq) -> VgicCpu | None:
        """vgic_target_oracle: where the interrupt belongs now; None: on nobody's list."""
        if irq.active:
            return irq.cpu or irq.target
        if irq.enabled and irq.pending:
            return irq.target if self.enabled else None
        return None

    def update(self, irq: Irq) -> None:
        """After a change of `irq`: it goes on the right list, and the vCPUs that are concerned look again."""
        to, old = self._destination(irq), irq.cpu
        if to is not old:
            irq.cpu = to
            if old is not None:
                if irq.intid < MIN_LPI:
                    old.listed.pop(irq.intid, None)
                else:
                    old.lpis.remove(irq)
                old.refresh()
        if to is not None:
            if irq.intid < MIN_LPI:
                to.listed[irq.intid] = irq
            else:
                to.lpis.add(irq)
            to.refresh()
            if not irq.active:
                to.vcpu.interrupt_pending()

    def update_all(self) -> None:
        """After the distributor was enabled or disabled, or a state was restored: every interrupt is looked at."""
        for irq in (*self.spis, *list(self.lpis.values())):
            self.update(irq)
        for cpu in self.cpus():
            for irq in cpu.irqs:
                self.update(irq)

    def inject(self, cpu: VgicCpu | None, intid: int, level: bool, owner: object = None) -> None:
        """kvm_vgic_inject_irq: the input of an interrupt becomes `level`. An edge is latched, a level followed.

        `cpu` is needed for SGIs and PPIs. KvmError(EINVAL) for a number that is none; an interrupt that belongs to a
        device of the kernel ignores others.
        """
        self.lazy_init()
        with self.lock:
            irq = self.irq(cpu, intid)
            if irq is None:
                raise KvmError(
                    errno.EINVAL, f"interrupt {intid}: this vGIC has 0..{NR_PRIVATE_IRQS + self.nr_spis - 1}"
                )
            if irq.owner is not owner:
                return
            if irq.edge:
                if not level:
                    return
                irq.pending_latch = True
            elif irq.line_level == level:
                return
            else:
                irq.line_level = level
            if self.vm.observer is not None:
                self.vm.observe("irq-line", intid=intid, level=int(level), vcpu=cpu.vcpu.vcpu_id if cpu else -1)
            self.update(irq)

    def set_owner(self, cpu: VgicCpu, intid: int, owner: object, hw: bool = False) -> None:
        """kvm_vgic_set_owner: a device of the kernel takes an interrupt; EEXIST where another one has it. `hw` is
        kvm_vgic_map_phys_irq."""
        with self.lock:
            irq = self.irq(cpu, intid)
            if irq is None or intid < NR_SGIS:
                raise KvmError(errno.EINVAL, f"interrupt {intid} cannot be a device's: PPIs and SPIs of this vGIC can")
            if irq.owner is not None and irq.owner is not owner:
                raise KvmError(errno.EEXIST, f"interrupt {intid} is another device's already")
            irq.owner, irq.hw = owner, hw

    def send_sgi(self, to: VgicCpu, intid: int, group1: bool) -> None:
        """vgic_v3_queue_sgi: an SGI from one vCPU to another; a group 1 request does not reach a group 0 interrupt."""
        irq = to.irqs[intid]
        if irq.group and not group1:
            return
        irq.pending_latch = True
        self.update(irq)
