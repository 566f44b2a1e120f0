"""A GICv3's distributor (`vgic_v3_dist_registers` of vgic-mmio-v3.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi import gic_registers as gic
from kvm2.errors import KvmError
from kvm2.softkvm.vgic.irq import NR_PRIVATE_IRQS
from kvm2.softkvm.vgic.mmio import PER_IRQ, RAZ_WI, U32, Access, Handler, Registers, constant, ignore, v3_pending

if TYPE_CHECKING:
    from kvm2.softkvm.vgic.state import Vgic, VgicCpu

USER_REVISIONS: Final = (2, 3)  # KVM_VGIC_IMP_REV_2 and _3


def find_cpu(vgic: Vgic, affinity: int) -> VgicCpu | None:
    """kvm_mpidr_to_vcpu: the first vCPU with these affinity fields of MPIDR_EL1."""
    return next((cpu for cpu in vgic.cpus() if cpu.affinity == affinity), None)


def _read_ctlr(access: Access) -> int:
    value = gic.GICD_CTLR_ARE | gic.GICD_CTLR_DS
    if access.vgic.enabled:
        value |= gic.GICD_CTLR_ENABLE_GRP1
    return value | (gic.GICD_CTLR_NASSGIREQ if access.vgic.nassgireq else 0)


def _write_ctlr(access: Access, value: int) -> None:
    # nASSGIreq stays clear: SGIs without an active state are a GICv4.1's, which no described host has.
    enable(access.vgic, bool(value & gic.GICD_CTLR_ENABLE_GRP1))


def enable(vgic: Vgic, enabled: bool) -> None:
    """The distributor forwards interrupts from now on, or no more: every pending one is looked at again."""
    if vgic.enabled != enabled:
        vgic.enabled = enabled
        vgic.update_all()


def _read_typer(access: Access) -> int:
    vgic = access.vgic
    value = (vgic.nr_spis + NR_PRIVATE_IRQS) // 32 - 1
    bits = gic.ID_BITS_LPIS if vgic.has_its else gic.ID_BITS_SPIS
    value |= bits - 1 << gic.GICD_TYPER_IDBITS_SHIFT
    return value | (gic.GICD_TYPER_LPIS if vgic.has_its else 0)


def _write_typer2(access: Access, value: int) -> None:
    if access.user and value:
        raise KvmError(errno.EINVAL, f"GICD_TYPER2 = {value:#x}: this host has no GICv4.1, it is 0")


def read_iidr(access: Access) -> int:
    """GICD_IIDR: KVM's product id, the revision of its implementation, Arm."""
    revision = access.vgic.implementation_rev << gic.IIDR_REVISION_SHIFT
    return gic.KVM_PRODUCT_ID << gic.IIDR_PRODUCT_SHIFT | revision | gic.ARM_IMPLEMENTER


def _write_iidr(access: Access, value: int) -> None:
    if access.user:
        set_revision(access, value)


def set_revision(access: Access, value: int) -> None:
    """Userspace writes GICD_IIDR: chooses the revision of the implementation, and nothing else."""
    revision = (value & gic.IIDR_REVISION_MASK) >> gic.IIDR_REVISION_SHIFT
    if (value ^ read_iidr(access)) & ~gic.IIDR_REVISION_MASK or revision not in USER_REVISIONS:
        raise KvmError(
            errno.EINVAL,
            f"GICD_IIDR = {value:#x}: it is {read_iidr(access):#x}, where bits 15:12 can become "
            f"{' or '.join(str(known) for known in USER_REVISIONS)}",
        )
    access.vgic.implementation_rev = revision


def _read_irouter(access: Access) -> int:
    # Aff3 is always 0, and of interrupts that are none nothing is known.
    irqs = access.vgic.spis[access.first - NR_PRIVATE_IRQS :][:1]
    return 0 if access.offset & 4 or not irqs else irqs[0].mpidr


def _write_irouter(access: Access, value: int) -> None:
    if access.offset & 4:
        return
    for irq in access.vgic.spis[access.first - NR_PRIVATE_IRQS :][:1]:
        irq.mpidr = value & gic.IROUTER_AFFINITY
        irq.target = find_cpu(access.vgic, irq.mpidr)
        access.vgic.update(irq)


def read_id(access: Access) -> int:
    """The identification registers: only PIDR2 says something, GICv3."""
    return gic.PIDR2_GICV3 if access.offset & 0xFFFF == gic.PIDR2_OFFSET else 0


def _shared_only(handler: Handler) -> Handler:
    """SGIs and PPIs have their registers in the redistributors: here they read as zero."""

    def read(access: Access) -> int:
        return 0 if access.first < NR_PRIVATE_IRQS else handler.read(access)

    def write(access: Access, value: int) -> None:
        if access.first >= NR_PRIVATE_IRQS:
            handler.write(access, value)

    return Handler(read, write)


REGISTERS: Final = Registers(
    gic.GICD_V3,
    {
        "GICD_CTLR": Handler(_read_ctlr, _write_ctlr),
        "GICD_TYPER": Handler(_read_typer, ignore),
        "GICD_TYPER2": Handler(lambda access: 0, _write_typer2),
        "GICD_IIDR": Handler(read_iidr, _write_iidr),
        "GICD_STATUSR": constant(U32),
        "GICD_ITARGETSR": RAZ_WI,
        "GICD_IGRPMODR": RAZ_WI,
        "GICD_IROUTER": _shared_only(Handler(_read_irouter, _write_irouter)),
        "GICD_IDREGS": Handler(read_id, ignore),
        **{f"GICD_{name}": _shared_only(handler) for name, handler in (PER_IRQ | v3_pending()).items()},
    },
)
