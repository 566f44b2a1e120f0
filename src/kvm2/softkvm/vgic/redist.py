"""A GICv3's redistributor: what each vCPU has of its SGIs and PPIs, and of LPIs (`vgic_v3_rd_registers`)."""

from __future__ import annotations

from typing import Final

from kvm2.abi import gic_registers as gic
from kvm2.softkvm.vgic import lpi
from kvm2.softkvm.vgic.irq import MIN_LPI
from kvm2.softkvm.vgic.mmio import (
    PER_IRQ,
    RAZ_WI,
    U32,
    Access,
    Handler,
    Registers,
    constant,
    ignore,
    merged,
    part,
    v3_pending,
)
from kvm2.softkvm.vgic.mmio_v3 import read_id

REVISION_WITH_INVALIDATE: Final = 3  # KVM_VGIC_IMP_REV_3: INVLPIR, INVALLR and SYNCR are there
PENDBASER_PTZ: Final = 1 << 62
NUMBER_MASK: Final = 0xFFFF


def _read_ctlr(access: Access) -> int:
    value = gic.GICR_CTLR_ENABLE_LPIS if access.cpu.lpis_enabled else 0
    if access.vgic.implementation_rev >= REVISION_WITH_INVALIDATE:
        value |= gic.GICR_CTLR_IR | gic.GICR_CTLR_CES
    return value


def _write_ctlr(access: Access, value: int) -> None:
    if not access.vgic.has_its:
        return
    enable = bool(value & gic.GICR_CTLR_ENABLE_LPIS)
    if enable and not access.cpu.lpis_enabled:
        lpi.enable_lpis(access.cpu)
    elif not enable and access.cpu.lpis_enabled:
        lpi.disable_lpis(access.cpu)


def _read_typer(access: Access) -> int:
    cpu = access.cpu
    value = (cpu.affinity & gic.IROUTER_AFFINITY) << gic.GICR_TYPER_AFFINITY_SHIFT
    value |= (cpu.vcpu.vcpu_id & NUMBER_MASK) << gic.GICR_TYPER_NUMBER_SHIFT
    if access.vgic.has_its:
        value |= gic.GICR_TYPER_PLPIS
    region = cpu.rd_region
    if region is not None and region.is_last(access.vgic, cpu.rd_index):
        value |= gic.GICR_TYPER_LAST
    return part(value, access)


def _read_propbaser(access: Access) -> int:
    return part(access.vgic.propbaser, access)


def _write_propbaser(access: Access, value: int) -> None:
    if not access.cpu.lpis_enabled:  # unpredictable otherwise
        access.vgic.propbaser = lpi.sanitise_propbaser(merged(access.vgic.propbaser, access, value))


def _read_pendbaser(access: Access) -> int:
    return part(access.cpu.pendbaser & ~PENDBASER_PTZ, access)


def _write_pendbaser(access: Access, value: int) -> None:
    if not access.cpu.lpis_enabled:
        access.cpu.pendbaser = lpi.sanitise_pendbaser(merged(access.cpu.pendbaser, access, value))


def _write_invlpir(access: Access, value: int) -> None:
    # The upper word is for the vCPUs of a nested guest.
    intid = value & U32
    if not access.offset & 4 and access.cpu.lpis_enabled and intid >= MIN_LPI:
        lpi.invalidate(access.cpu, intid)


def _write_invallr(access: Access, value: int) -> None:
    if not access.offset & 4 and access.cpu.lpis_enabled:
        lpi.invalidate_all(access.cpu)


# Registers of one word, whose names end in 0 here, and of several.
_ENDINGS: Final = {"IPRIORITYR": "IPRIORITYR", "ICFGR": "ICFGR"}

REGISTERS: Final = Registers(
    gic.GICR,
    {
        "GICR_CTLR": Handler(_read_ctlr, _write_ctlr),
        "GICR_IIDR": constant(gic.KVM_PRODUCT_ID << gic.IIDR_PRODUCT_SHIFT | gic.ARM_IMPLEMENTER),
        "GICR_TYPER": Handler(_read_typer, ignore),
        "GICR_WAKER": RAZ_WI,
        "GICR_PROPBASER": Handler(_read_propbaser, _write_propbaser),
        "GICR_PENDBASER": Handler(_read_pendbaser, _write_pendbaser),
        "GICR_INVLPIR": Handler(lambda access: 0, _write_invlpir),
        "GICR_INVALLR": Handler(lambda access: 0, _write_invallr),
        "GICR_SYNCR": RAZ_WI,  # an invalidation is over before anybody can look
        "GICR_IDREGS": Handler(read_id, ignore),
        "GICR_IGRPMODR0": RAZ_WI,
        "GICR_NSACR": RAZ_WI,
        **{f"GICR_{_ENDINGS.get(name, name + '0')}": handler for name, handler in (PER_IRQ | v3_pending()).items()},
    },
)
