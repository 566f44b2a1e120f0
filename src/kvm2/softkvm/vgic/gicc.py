"""A GICv2's CPU interface: the frame that a guest uses, and KVM_DEV_ARM_VGIC_GRP_CPU_REGS.

To the guest, hardware shows its virtual interface (GICV, Arm IHI 0048, chapter 5.5) under the names of GICC; here it is
`CpuInterface` with these registers in front. Userspace sees what `vgic_mmio_read_vcpuif` makes of it.
"""

from __future__ import annotations

from typing import Final

from kvm2.abi import gic_registers as gic
from kvm2.softkvm.vgic.cpuif import CpuInterface
from kvm2.softkvm.vgic.irq import SPURIOUS
from kvm2.softkvm.vgic.mmio import U32, Access, Handler, Registers, constant, ignore

OTHER_GROUP: Final = 1022  # what is pending is of group 1, and AckCtl is clear
SOURCE_MASK: Final = 7
BPR_MASK: Final = 7
PMR_SHIFT, PMR_MASK = 3, 0x1F  # userspace sees GICH_VMCR.VMPriMask
_FLAGS: Final = (
    ("grpen0", gic.GICC_CTLR_GRP0),
    ("grpen1", gic.GICC_CTLR_GRP1),
    ("ackctl", gic.GICC_CTLR_ACKCTL),
    ("fiqen", gic.GICC_CTLR_FIQEN),
    ("cbpr", gic.GICC_CTLR_CBPR),
    ("eoimode", gic.GICC_CTLR_EOIMODE),
)


def _face(access: Access) -> CpuInterface:
    return access.cpu.interface


def _read_ctlr(access: Access) -> int:
    return sum(bit for name, bit in _FLAGS if getattr(_face(access), name))


def _write_ctlr(access: Access, value: int) -> None:
    for name, bit in _FLAGS:
        setattr(_face(access), name, bool(value & bit))
    access.cpu.refresh()


def _hides_group1(access: Access) -> bool:
    """Whether a group 1 interrupt is next, which IAR and HPPIR do not give away with AckCtl clear."""
    face = _face(access)
    return not face.ackctl and face.highest_pending(0) == SPURIOUS and face.highest_pending(1) != SPURIOUS


def _read_iar(access: Access) -> int:
    if _hides_group1(access):
        return OTHER_GROUP if any(_face(access).lines()) else SPURIOUS
    return _acknowledge(access, None)


def _acknowledge(access: Access, group: int | None) -> int:
    intid, source = _face(access).acknowledge(group)
    return intid | source << gic.GICC_SOURCE_SHIFT


def _read_hppir(access: Access) -> int:
    return OTHER_GROUP if _hides_group1(access) else _face(access).highest_pending(None)


def _named(value: int) -> tuple[int, int]:
    """(number, sender) that a write to EOIR or DIR is about."""
    return value & gic.GICC_INTID_MASK, value >> gic.GICC_SOURCE_SHIFT & SOURCE_MASK


def _write_eoir(access: Access, value: int) -> None:
    intid, source = _named(value)
    irq = access.cpu.listed.get(intid)
    group = irq.group if irq is not None and _face(access).ackctl else 0
    _face(access).end(group, intid, source)


def _write_aeoir(access: Access, value: int) -> None:
    _face(access).end(1, *_named(value))


def _read_apr(access: Access) -> int:
    # 32 levels fit into the first of the four words. Both groups share it.
    return _face(access).ap0r | _face(access).ap1r if access.within < 4 else 0


def _write_apr(access: Access, value: int) -> None:
    if access.within < 4:
        _face(access).ap0r, _face(access).ap1r = value & U32, 0
        access.cpu.refresh()


GUEST: Final = Registers(
    gic.GICC,
    {
        "GICC_CTLR": Handler(_read_ctlr, _write_ctlr),
        "GICC_PMR": Handler(lambda access: _face(access).pmr, lambda access, value: _face(access).set_pmr(value)),
        "GICC_BPR": Handler(lambda access: _face(access).bpr0, lambda access, value: _face(access).set_bpr0(value)),
        "GICC_ABPR": Handler(
            lambda access: _face(access).read_bpr1(), lambda access, value: _face(access).set_bpr1(value)
        ),
        "GICC_IAR": Handler(_read_iar, ignore),
        "GICC_EOIR": Handler(lambda access: 0, _write_eoir),
        "GICC_RPR": Handler(lambda access: _face(access).running(), ignore),
        "GICC_HPPIR": Handler(_read_hppir, ignore),
        "GICC_AIAR": Handler(lambda access: _acknowledge(access, 1), ignore),
        "GICC_AEOIR": Handler(lambda access: 0, _write_aeoir),
        "GICC_AHPPIR": Handler(lambda access: _face(access).highest_pending(1), ignore),
        "GICC_APR": Handler(_read_apr, _write_apr),
        "GICC_IIDR": constant(gic.GICC_ARCH_V2 << gic.GICC_IIDR_ARCH_SHIFT | gic.ARM_IMPLEMENTER),
        "GICC_DIR": Handler(lambda access: 0, lambda access, value: _face(access).deactivate(*_named(value))),
    },
)

# ---- what userspace saves and restores; values are kept as they are until the vCPU runs


def _user_bpr(name: str) -> Handler:
    return Handler(
        lambda access: int(getattr(_face(access), name)),
        lambda access, value: setattr(_face(access), name, value & BPR_MASK),
    )


def _user_pmr(access: Access) -> int:
    return _face(access).pmr >> PMR_SHIFT


def _set_user_pmr(access: Access, value: int) -> None:
    _face(access).pmr = (value & PMR_MASK) << PMR_SHIFT


USER: Final = Registers(
    gic.GICC_USER,
    {
        "GICC_CTLR": Handler(_read_ctlr, _write_ctlr),
        "GICC_PMR": Handler(_user_pmr, _set_user_pmr),
        "GICC_BPR": _user_bpr("bpr0"),
        "GICC_ABPR": _user_bpr("bpr1"),
        "GICC_APR": Handler(_read_apr, _write_apr),
        "GICC_IIDR": constant(
            gic.KVM_PRODUCT_ID << gic.GICC_IIDR_PRODUCT_SHIFT
            | gic.GICC_ARCH_V2 << gic.GICC_IIDR_ARCH_SHIFT
            | gic.ARM_IMPLEMENTER
        ),
    },
)
