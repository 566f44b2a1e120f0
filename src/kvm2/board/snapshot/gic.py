"""A vGIC's state by its device attributes, as Documentation/virt/kvm/devices/arm-vgic*.rst says it is saved.

Only what a fresh vGIC does not have is written back: the set registers of pending, active and enabled interrupts do.
LPIs and the ITS's tables are in guest memory, which is there before.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from kvm2.abi import its as its_abi
from kvm2.abi import sysregs as sr
from kvm2.abi import vgic_attrs as va
from kvm2.abi.gic_registers import GICD_V2, GICD_V3, GICR, GICR_CTLR_ENABLE_LPIS, PRIVATE, Frame, Register

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm2.board.gic import Gic
    from kvm2.device import Device
    from kvm2.vcpu import Vcpu

# In the order in which they are written: what an interrupt is first, whether it is enabled last.
_KINDS: Final = ("IGROUPR", "ITARGETSR", "IROUTER", "ICFGR", "IPRIORITYR", "ISPENDR", "ISACTIVER", "ISENABLER")
_CLEARED_BEFORE: Final = {"ISENABLER": "ICENABLER"}  # SGIs are enabled from the start
_V2_SGI_SENDERS: Final = ("SPENDSGIR",)
SGIS: Final = 0xFFFF  # of the first word of a register with a bit for each interrupt
# What a CPU interface has; the priority mask and the groups come last, and let interrupts through.
CPU_SYSREGS: Final = (
    *(sr.ICC_SRE_EL1, sr.ICC_CTLR_EL1, sr.ICC_BPR0_EL1, sr.ICC_BPR1_EL1, sr.ICC_AP0R0_EL1, sr.ICC_AP1R0_EL1),
    *(sr.ICC_PMR_EL1, sr.ICC_IGRPEN0_EL1, sr.ICC_IGRPEN1_EL1),
)
_V2_CPU_REGS: Final = ("GICC_BPR", "GICC_ABPR", "GICC_APR", "GICC_PMR", "GICC_CTLR")
_ITS_REGS: Final = (its_abi.GITS_CBASER, its_abi.GITS_CREADR, its_abi.GITS_CWRITER)
_BASERS: Final = tuple(its_abi.GITS_BASER + 8 * number for number in range(8))


class GicState:
    """Saves and restores the vGIC of a machine; no vCPU may run."""

    def __init__(self, gic: Gic, vcpus: list[Vcpu]) -> None:
        self.gic, self.vcpus = gic, vcpus
        assert gic.device is not None  # of a machine that was made, it is there
        self._device: Device = gic.device

    # ---- addresses of registers

    def _vcpu(self, vcpu: Vcpu) -> int:
        """What names a vCPU in the high word of an attribute."""
        if self.gic.version == 2:
            return self.vcpus.index(vcpu) << va.VCPU_SHIFT
        mpidr: int = vcpu.regs["MPIDR_EL1"]
        return (mpidr & 0xFFFFFF | (mpidr >> 32 & 0xFF) << 24) << va.VCPU_SHIFT

    @staticmethod
    def _words(register: Register, first: int, last: int) -> Iterator[int]:
        """The offsets of the words that hold interrupts `first` to `last` - 1, as far as the register has them."""
        start = register.offset + (first - register.first) * register.bits // 8
        end = register.offset + min((last - register.first) * register.bits // 8, register.length)
        yield from range(start, end, 4)

    def _rows(self, frame: Frame, kinds: tuple[str, ...]) -> list[Register]:
        found = []
        for kind in kinds:
            found += [register for register in frame if register.bits and kind in register.name]
        return found

    def _groups(self) -> Iterator[tuple[int, int, Frame, int, int]]:
        """(attribute group, vCPU word, frame, first and last interrupt): the private ones of each vCPU, then SPIs."""
        private = va.KVM_DEV_ARM_VGIC_GRP_DIST_REGS if self.gic.version == 2 else va.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS
        frame = GICD_V2 if self.gic.version == 2 else GICR
        for vcpu in self.vcpus:
            yield private, self._vcpu(vcpu), frame, 0, PRIVATE
        shared = GICD_V2 if self.gic.version == 2 else GICD_V3
        yield va.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0, shared, PRIVATE, self.gic.irqs

    # ---- values

    def _get(self, group: int, attr: int, size: int = 4) -> int:
        return int.from_bytes(self._device.get_device_attr(group, attr, size), "little")

    def _value(self, group: int, attr: int, register: Register, offset: int) -> int:
        value = self._get(group, attr)
        if self.gic.version == 2 and "ISPENDR" in register.name and offset == register.offset:
            # A pending SGI is kept by its senders: setting it here would add this vCPU to them.
            value &= ~SGIS
        return value

    def _set(self, group: int, attr: int, value: int, size: int = 4) -> None:
        self._device.set_device_attr(group, attr, value.to_bytes(size, "little"))

    def _line_levels(self) -> Iterator[int]:
        """The attributes of group LEVEL_INFO: 32 interrupts each."""
        what = va.VGIC_LEVEL_INFO_LINE_LEVEL << va.LINE_LEVEL_INFO_SHIFT
        for vcpu in self.vcpus:
            yield self._vcpu(vcpu) | what
        for intid in range(PRIVATE, self.gic.irqs, 32):
            yield what | intid

    # ---- save

    def save(self) -> dict[str, Any]:
        """Everything, by group and attribute. LPIs and ITS tables go into guest memory by this."""
        state: dict[str, Any] = {"version": self.gic.version, "irqs": self.gic.irqs}
        if self.gic.its_device is not None:
            # First: it writes guest memory, which is saved afterwards.
            state["its"] = _save_its(self.gic.its_device)
            self._device.set_device_attr(va.KVM_DEV_ARM_VGIC_GRP_CTRL, va.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES)
        kinds = (*_KINDS, *_V2_SGI_SENDERS) if self.gic.version == 2 else _KINDS
        state["control"] = self._get(va.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0)
        state["registers"] = [
            [group, vcpu | offset, value]
            for group, vcpu, frame, first, last in self._groups()
            for register in self._rows(frame, kinds)
            for offset in self._words(register, first, last)
            if (value := self._value(group, vcpu | offset, register, offset)) or "ISENABLER" in register.name
        ]
        group = va.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO
        if self.gic.version == 3:
            state["levels"] = [[attr, value] for attr in self._line_levels() if (value := self._get(group, attr))]
        state["cpus"] = [self._save_cpu(vcpu) for vcpu in self.vcpus]
        return state

    def _save_cpu(self, vcpu: Vcpu) -> dict[str, Any]:
        at = self._vcpu(vcpu)
        if self.gic.version == 2:
            group = va.KVM_DEV_ARM_VGIC_GRP_CPU_REGS
            return {name: self._get(group, at | _v2_cpu(name)) for name in _V2_CPU_REGS}
        group, redist = va.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, va.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS
        lpis = {}
        for name in ("GICR_CTLR", "GICR_PROPBASER", "GICR_PENDBASER"):
            offset, length = _place(GICR, name)
            lpis[name] = sum(self._get(redist, at | offset + low) << 8 * low for low in range(0, length, 4))
        return {"system": [[enc, self._get(group, at | enc, 8)] for enc in CPU_SYSREGS], "lpis": lpis}

    # ---- restore

    def restore(self, state: dict[str, Any]) -> None:
        """What `save` gave, into a vGIC that was made alike. KvmError where the host refuses a value."""
        for group, attr, value in state["registers"]:
            clear = self._clears(group, attr)
            if clear is not None:
                self._set(group, clear, (1 << 32) - 1)
            self._set(group, attr, value)
        for attr, value in state.get("levels", ()):
            self._set(va.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, attr, value)
        self._set(va.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, 0, state["control"])
        for vcpu, saved in zip(self.vcpus, state["cpus"], strict=True):
            self._restore_cpu(vcpu, saved)
        if "its" in state and self.gic.its_device is not None:
            _restore_its(self.gic.its_device, state["its"])

    def _clears(self, group: int, attr: int) -> int | None:
        """The attribute that clears what setting this one only adds to."""
        frame = GICD_V2 if self.gic.version == 2 else GICR if group == va.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS else GICD_V3
        register = frame.at(attr & va.OFFSET_MASK)
        if register is None or "ISENABLER" not in register.name:
            return None
        other = next(one for one in frame if one.name == register.name.replace("ISENABLER", "ICENABLER"))
        return attr + other.offset - register.offset

    def _restore_cpu(self, vcpu: Vcpu, saved: dict[str, Any]) -> None:
        at = self._vcpu(vcpu)
        if self.gic.version == 2:
            for name in _V2_CPU_REGS:
                self._set(va.KVM_DEV_ARM_VGIC_GRP_CPU_REGS, at | _v2_cpu(name), saved[name])
            return
        for name in ("GICR_PROPBASER", "GICR_PENDBASER", "GICR_CTLR"):
            value, (offset, length) = saved["lpis"][name], _place(GICR, name)
            if name == "GICR_CTLR" and not value & GICR_CTLR_ENABLE_LPIS:
                continue
            for low in range(0, length, 4):
                attr = at | offset + low
                self._set(va.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, attr, value >> 8 * low & 0xFFFFFFFF)
        for enc, value in saved["system"]:
            self._set(va.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, at | enc, value, 8)


def _place(frame: Frame, name: str) -> tuple[int, int]:
    register = next(one for one in frame if one.name == name)
    return register.offset, register.length


def _v2_cpu(name: str) -> int:
    from kvm2.abi.gic_registers import GICC_USER

    return _place(GICC_USER, name)[0]


def _save_its(device: Device) -> dict[str, Any]:
    device.set_device_attr(va.KVM_DEV_ARM_VGIC_GRP_CTRL, va.KVM_DEV_ARM_ITS_SAVE_TABLES)
    offsets = (its_abi.GITS_CTLR, its_abi.GITS_IIDR, *_ITS_REGS, *_BASERS)
    return {
        f"{offset:#x}": int.from_bytes(device.get_device_attr(va.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset, 8), "little")
        for offset in offsets
    }


def _restore_its(device: Device, saved: dict[str, Any]) -> None:
    """In the order that arm-vgic-its.rst asks for; GITS_CTLR last, as it starts the service."""

    def put(offset: int) -> None:
        device.set_device_attr(va.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset, struct.pack("<Q", saved[f"{offset:#x}"]))

    for offset in (its_abi.GITS_IIDR, its_abi.GITS_CBASER, its_abi.GITS_CREADR, its_abi.GITS_CWRITER, *_BASERS):
        put(offset)
    device.set_device_attr(va.KVM_DEV_ARM_VGIC_GRP_CTRL, va.KVM_DEV_ARM_ITS_RESTORE_TABLES)
    put(its_abi.GITS_CTLR)
