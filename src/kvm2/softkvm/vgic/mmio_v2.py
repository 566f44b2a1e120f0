"""A GICv2's distributor (`vgic_v2_dist_registers` of vgic-mmio-v2.c)."""

from __future__ import annotations

from typing import Final

from kvm2.abi import gic_registers as gic
from kvm2.softkvm.vgic.irq import NR_PRIVATE_IRQS, NR_SGIS
from kvm2.softkvm.vgic.mmio import PER_IRQ, Access, Handler, Registers, ignore, source_bit, write_group
from kvm2.softkvm.vgic.mmio_v3 import enable, read_iidr, set_revision

SOURCES: Final = 0xFF


def _read_ctlr(access: Access) -> int:
    return gic.GICD_CTLR_V2_ENABLE if access.vgic.enabled else 0


def _write_ctlr(access: Access, value: int) -> None:
    enable(access.vgic, bool(value & gic.GICD_CTLR_V2_ENABLE))


def _read_typer(access: Access) -> int:
    lines = (access.vgic.nr_spis + NR_PRIVATE_IRQS) // 32 - 1
    return lines | len(access.vgic.cpus()) - 1 << gic.GICD_TYPER_CPUS_SHIFT


def _write_iidr(access: Access, value: int) -> None:
    # Userspace that writes this register knows that interrupts can be of group 1.
    if access.user:
        set_revision(access, value)
        access.vgic.v2_groups_user_writable = True


def _write_group(access: Access, value: int) -> None:
    if not access.user or access.vgic.v2_groups_user_writable:
        write_group(access, value)


def _read_targets(access: Access) -> int:
    return sum(irq.targets << 8 * at for at, irq in enumerate(access.irqs()))


def _write_targets(access: Access, value: int) -> None:
    """vgic_mmio_write_target: an SPI goes to the first vCPU that is named, to vCPU 0 where none is."""
    cpus = access.vgic.cpus()
    for at, irq in enumerate(access.irqs()):
        if irq.intid >= NR_PRIVATE_IRQS:
            irq.targets = value >> 8 * at & (1 << len(cpus)) - 1
            irq.target = cpus[(irq.targets & -irq.targets).bit_length() - 1 if irq.targets else 0]
            access.vgic.update(irq)


def _write_sgir(access: Access, value: int) -> None:
    """vgic_mmio_write_sgir: an SGI to the vCPUs of a list, to all others, or to the one that writes."""
    vgic, sender = access.vgic, source_bit(access.cpu)
    cpus = vgic.cpus()
    how = value >> gic.GICD_SGIR_FILTER_SHIFT & 3
    if how == gic.SGIR_TO_TARGETS:
        targets = value >> gic.GICD_SGIR_TARGETS_SHIFT & SOURCES
    elif how == gic.SGIR_TO_OTHERS:
        targets = (1 << len(cpus)) - 1 & ~sender
    elif how == gic.SGIR_TO_SELF:
        targets = sender
    else:
        return
    intid = value % NR_SGIS
    for at, cpu in enumerate(cpus):
        if targets >> at & 1:
            irq = cpu.irqs[intid]
            irq.pending_latch = True
            irq.source |= sender
            vgic.update(irq)


def _read_sgi_sources(access: Access) -> int:
    return sum(irq.source << 8 * at for at, irq in enumerate(access.irqs()))


def _clear_sgi_sources(access: Access, value: int) -> None:
    for at, irq in enumerate(access.irqs()):
        irq.source &= ~(value >> 8 * at) & SOURCES
        if not irq.source:
            irq.pending_latch = False
        access.vgic.update(irq)


def _set_sgi_sources(access: Access, value: int) -> None:
    for at, irq in enumerate(access.irqs()):
        irq.source |= value >> 8 * at & SOURCES
        if irq.source:
            irq.pending_latch = True
        access.vgic.update(irq)


REGISTERS: Final = Registers(
    gic.GICD_V2,
    {
        **{f"GICD_{name}": handler for name, handler in PER_IRQ.items()},
        "GICD_CTLR": Handler(_read_ctlr, _write_ctlr),
        "GICD_TYPER": Handler(_read_typer, ignore),
        "GICD_IIDR": Handler(read_iidr, _write_iidr),
        "GICD_IGROUPR": Handler(PER_IRQ["IGROUPR"].read, _write_group),
        "GICD_ITARGETSR": Handler(_read_targets, _write_targets),
        "GICD_SGIR": Handler(lambda access: 0, _write_sgir),
        "GICD_CPENDSGIR": Handler(_read_sgi_sources, _clear_sgi_sources),
        "GICD_SPENDSGIR": Handler(_read_sgi_sources, _set_sgi_sources),
    },
)
