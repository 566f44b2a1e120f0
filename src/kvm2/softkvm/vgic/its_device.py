"""What userspace asks of an ITS: the device attributes of KVM_DEV_TYPE_ARM_VGIC_ITS.

After `kvm_arm_vgic_its_ops` of arch/arm64/kvm/vgic/vgic-its.c and Documentation/virt/kvm/devices/arm-vgic-its.rst.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi import its as abi
from kvm2.abi import vgic_attrs as va
from kvm2.errors import KvmError
from kvm2.softkvm.vgic import its_tables, regions
from kvm2.softkvm.vgic.its import Its
from kvm2.softkvm.vgic.lpi import INITIAL_PROPBASER
from kvm2.softkvm.vgic.state import UNDEF

if TYPE_CHECKING:
    from kvm2.abi.gic_registers import Register
    from kvm2.abi.structs import DeviceAttr
    from kvm2.softkvm.vm import Vm

U64_SIZE: Final = 8
WORD_ALIGN, DOUBLE_ALIGN = 4, 8
OFFSET_MASK: Final = 0xFFFFFFFF  # the kernel looks for a register with an unsigned int
CONTROLS: Final = frozenset(
    {
        va.KVM_DEV_ARM_VGIC_CTRL_INIT,
        va.KVM_DEV_ARM_ITS_SAVE_TABLES,
        va.KVM_DEV_ARM_ITS_RESTORE_TABLES,
        va.KVM_DEV_ARM_ITS_CTRL_RESET,
    }
)


class ItsDevice:
    """One ITS of a VM, which may have several: makes it, and answers the calls on its descriptor.

    `has`, `get`, `put` are KVM_HAS_DEVICE_ATTR, KVM_GET_DEVICE_ATTR and KVM_SET_DEVICE_ATTR; a refusal is a KvmError.
    """

    def __init__(self, vm: Vm) -> None:
        """vgic_its_create. The VM's lock is held."""
        self.vm, self.its = vm, Its(vm)
        vm.itses.append(self.its)
        if vm.vgic is not None:
            vm.vgic.propbaser = INITIAL_PROPBASER

    def has(self, attr: DeviceAttr) -> None:
        """vgic_its_has_attr: ENXIO for what it has not, EINVAL for a register that is not aligned."""
        if attr.group == va.KVM_DEV_ARM_VGIC_GRP_ITS_REGS:
            _check_aligned(attr.attr)
            _register(attr.attr)
        elif (attr.group != va.KVM_DEV_ARM_VGIC_GRP_ADDR or attr.attr != va.KVM_VGIC_ITS_ADDR_TYPE) and (
            attr.group != va.KVM_DEV_ARM_VGIC_GRP_CTRL or attr.attr not in CONTROLS
        ):
            raise _none_such(attr)

    def get(self, attr: DeviceAttr) -> None:
        """vgic_its_get_attr: the address, or a register, as 8 bytes."""
        if attr.group == va.KVM_DEV_ARM_VGIC_GRP_ADDR:
            _check_address_type(attr)
            value = self.its.base
        elif attr.group == va.KVM_DEV_ARM_VGIC_GRP_ITS_REGS:
            _check_aligned(attr.attr)
            with self.vm.lock, self.vm.vcpus_held():
                register = self._placed_register(attr.attr)
                value = self.its.read_register(register, attr.attr & OFFSET_MASK, max(register.widths))
        else:
            raise _none_such(attr)
        self.vm.memory.write(attr.addr, value.to_bytes(U64_SIZE, "little"))

    def put(self, attr: DeviceAttr) -> None:
        """vgic_its_set_attr."""
        if attr.group == va.KVM_DEV_ARM_VGIC_GRP_ADDR:
            _check_address_type(attr)
            self._set_address(self._value(attr))
        elif attr.group == va.KVM_DEV_ARM_VGIC_GRP_CTRL:
            self._control(attr.attr)
        elif attr.group == va.KVM_DEV_ARM_VGIC_GRP_ITS_REGS:
            value = self._value(attr)
            _check_aligned(attr.attr)
            with self.vm.lock, self.vm.vcpus_held():
                self._write(self._placed_register(attr.attr), attr.attr & OFFSET_MASK, value)
        else:
            raise _none_such(attr)

    def release(self) -> None:
        """The ITS stays part of its VM."""

    def _value(self, attr: DeviceAttr) -> int:
        return int.from_bytes(self.vm.memory.read(attr.addr, U64_SIZE), "little")

    def _set_address(self, address: int) -> None:
        with self.vm.lock:
            regions.check_range(self.vm, "ITS", self.its.base, address, abi.FRAME_ALIGN, abi.GITS.size)
            self.its.base = address
            self.vm.bus.add(address, abi.GITS.size, self.its)

    def _placed_register(self, offset: int) -> Register:
        if self.its.base == UNDEF:
            raise KvmError(errno.ENXIO, "the ITS has no address yet: KVM_VGIC_ITS_ADDR_TYPE comes first")
        return _register(offset)

    def _write(self, register: Register, offset: int, value: int) -> None:
        """As the guest writes, but for two registers that are read-only to it."""
        if register.offset == abi.GITS_IIDR:
            revision = abi.IIDR_REVISION.get(value)
            if revision:
                raise KvmError(errno.EINVAL, f"GITS_IIDR revision {revision}: tables of revision 0 are known")
        elif register.offset == abi.GITS_CREADR:
            self.its.restore_creadr(value)
        else:
            self.its.write_register(register, offset, max(register.widths), value)

    def _control(self, control: int) -> None:
        """vgic_its_ctrl: what it does not know does nothing, and is no error."""
        if control == va.KVM_DEV_ARM_VGIC_CTRL_INIT:
            return
        with self.vm.lock, self.vm.vcpus_held(), self.its.lock:
            if control == va.KVM_DEV_ARM_ITS_CTRL_RESET:
                self.its.reset()
            elif control == va.KVM_DEV_ARM_ITS_SAVE_TABLES:
                its_tables.save(self.its)
            elif control == va.KVM_DEV_ARM_ITS_RESTORE_TABLES:
                its_tables.restore(self.its)


def _none_such(attr: DeviceAttr) -> KvmError:
    return KvmError(errno.ENXIO, f"attribute {attr.attr:#x} of group {attr.group}: an ITS has none such")


def _check_address_type(attr: DeviceAttr) -> None:
    if attr.attr != va.KVM_VGIC_ITS_ADDR_TYPE:
        raise KvmError(errno.ENODEV, f"address {attr.attr}: an ITS has KVM_VGIC_ITS_ADDR_TYPE (4) only")


def _check_aligned(offset: int) -> None:
    """Registers of 64 bits are accessed as a whole; GITS_CTLR, GITS_IIDR and the identification registers have 32."""
    align = WORD_ALIGN if offset < abi.GITS_TYPER or offset >= abi.GITS_IDREGS else DOUBLE_ALIGN
    if offset % align:
        raise KvmError(errno.EINVAL, f"register offset {offset:#x}: must be a multiple of {align}")


def _register(offset: int) -> Register:
    register = abi.GITS.at(offset & OFFSET_MASK)
    if register is None:
        raise KvmError(errno.ENXIO, f"register offset {offset:#x}: an ITS has no register there")
    return register
