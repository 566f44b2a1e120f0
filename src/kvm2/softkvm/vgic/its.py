"""An interrupt translation service: its command queue and its frame of registers, and messages to it by address.

After `vgic-its.c` of arch/arm64/kvm/vgic. What is mapped is in `its_map`, what the commands in the queue do in
`its_commands`, how the state is saved to and restored from guest memory in `its_tables`, what userspace asks for in
`its_device`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi import its as abi
from kvm2.abi.structs_irq import KVM_MSI_VALID_DEVID
from kvm2.errors import KvmError
from kvm2.softkvm import guest_memory
from kvm2.softkvm.vgic import its_commands, lpi
from kvm2.softkvm.vgic.its_map import ID_BITS, ItsMap, initial_baser
from kvm2.softkvm.vgic.state import UNDEF

if TYPE_CHECKING:
    from kvm2.abi.gic_registers import Register
    from kvm2.abi.structs_irq import Msi
    from kvm2.softkvm.vcpu import Vcpu
    from kvm2.softkvm.vm import Vm

QUEUE_PAGE_SHIFT: Final = 12
# LPIs and events that one pass over the command queue looks at. What remains is done at the next access to a register;
# CREADR says how far it got. No driver comes near it: a hostile one would hold its vCPU for minutes.
PASS_BUDGET: Final = 1 << 18

BASER_RO: Final = abi.BASER_ENTRY_SIZE.mask | abi.BASER_TYPE.mask


class Its(ItsMap):
    """One ITS (`struct vgic_its`), and the device on the VM's bus."""

    def __init__(self, vm: Vm) -> None:
        super().__init__(vm)
        self.base = UNDEF
        self.cbaser = self.creadr = self.cwriter = 0

    # ---- the command queue

    def process(self) -> None:
        """vgic_its_process_commands: does what is between CREADR and CWRITER, as far as the budget of a pass goes."""
        self.budget = PASS_BUDGET
        while self.enabled and self.cwriter != self.creadr and self.budget > 0:
            try:
                # A command that cannot be read is left out (Arm IHI 0069, 5.3.2).
                data = guest_memory.read(
                    self.vm, (self.cbaser & abi.CBASER_ADDRESS.mask) + self.creadr, abi.COMMAND_SIZE
                )
            except KvmError:
                data = b""
            if data:
                its_commands.handle(self, data)
            self.spend(1)
            self.creadr += abi.COMMAND_SIZE
            if self.creadr == self._queue_size():
                self.creadr = 0

    def _queue_size(self) -> int:
        return abi.BASER_PAGES.get(self.cbaser) + 1 << QUEUE_PAGE_SHIFT

    # ---- registers

    def read_register(self, register: Register, offset: int, size: int) -> int:
        """What a guest or userspace reads at `offset` of the frame, in `register`."""
        with self.lock:
            self.process()
            value = self._value(register, offset)
        return value >> 8 * (offset & 7 if 8 in register.widths else 0) & (1 << 8 * size) - 1

    def _value(self, register: Register, offset: int) -> int:
        match register.offset:
            case abi.GITS_CTLR:
                quiescent = abi.CTLR_QUIESCENT if self.creadr == self.cwriter else 0
                return quiescent | (abi.CTLR_ENABLED if self.enabled else 0)
            case abi.GITS_IIDR:
                return abi.IIDR_PRODUCT.put(abi.IIDR_ARM, abi.PRODUCT_KVM)
            case abi.GITS_TYPER:
                typer = abi.TYPER_ITT_ENTRY_SIZE.put(abi.TYPER_PHYSICAL, abi.ENTRY_SIZE - 1)
                return abi.TYPER_DEVBITS.put(abi.TYPER_ID_BITS.put(typer, ID_BITS - 1), ID_BITS - 1)
            case abi.GITS_CBASER:
                return self.cbaser
            case abi.GITS_CWRITER:
                return self.cwriter
            case abi.GITS_CREADR:
                return self.creadr
            case abi.GITS_BASER:
                return (self.device_table, self.collection_table, *(0,) * 6)[(offset - abi.GITS_BASER) // 8]
            case _:
                return abi.ID_REGISTERS.get(offset, 0)

    def write_register(self, register: Register, offset: int, size: int, value: int) -> None:
        """A guest's write, or userspace's to a register for which it is the same."""
        with self.lock:
            self.process()
            match register.offset:
                case abi.GITS_CTLR:
                    self._write_ctlr(value)
                case abi.GITS_CBASER if not self.enabled:
                    cbaser = lpi.sanitise(_updated(self.cbaser, offset, size, value), abi.ITS_INNER, abi.ITS_OUTER)
                    self.cbaser = cbaser & ~abi.CBASER_RES0.mask
                    self.creadr = self.cwriter = 0
                case abi.GITS_CWRITER:
                    cwriter = _updated(self.cwriter, offset, size, value) & abi.COMMAND_OFFSET.mask
                    if cwriter < self._queue_size():
                        self.cwriter = cwriter
                        self.process()
                case abi.GITS_BASER if not self.enabled:
                    self._write_baser(offset, size, value)

    def _write_ctlr(self, value: int) -> None:
        enable = bool(value & abi.CTLR_ENABLED)
        if enable and not self.device_table & self.collection_table & self.cbaser & abi.VALID:
            return  # unpredictable while one of them is not valid
        self.enabled = enable
        if not enable:
            self.forget_translations()
        self.process()

    def _write_baser(self, offset: int, size: int, value: int) -> None:
        index = (offset - abi.GITS_BASER) // 8
        if index > 1:
            return
        old = self.collection_table if index else self.device_table
        new = _updated(old, offset, size, value) & ~BASER_RO | initial_baser(0) & abi.BASER_ENTRY_SIZE.mask
        new = abi.BASER_TYPE.put(new, abi.TYPE_COLLECTION if index else abi.TYPE_DEVICE)
        new = abi.BASER_PAGE_SIZE.put(lpi.sanitise(new, abi.ITS_INNER, abi.ITS_OUTER), abi.PAGE_64K)
        if index:
            new &= ~abi.BASER_INDIRECT
        if new == old:
            return  # as a driver does when it resumes
        if index:
            self.collection_table = new
            self.unmap_collections()
        else:
            self.device_table = new
            self.unmap_devices()
        self.forget_translations()

    def reset(self) -> None:
        """vgic_its_reset: KVM_DEV_ARM_ITS_CTRL_RESET."""
        with self.lock:
            self.device_table &= ~abi.VALID
            self.collection_table &= ~abi.VALID
            self.cbaser = self.creadr = self.cwriter = 0
            self.enabled = False
            self.unmap_devices()
            self.unmap_collections()

    def restore_creadr(self, value: int) -> None:
        """Userspace writes GITS_CREADR: KvmError EBUSY while the ITS is on, EINVAL beyond the queue."""
        with self.lock:
            if self.enabled:
                raise KvmError(errno.EBUSY, "GITS_CREADR can be written while the ITS is off only")
            offset = value & abi.COMMAND_OFFSET.mask
            if offset >= self._queue_size():
                raise KvmError(errno.EINVAL, f"GITS_CREADR {offset:#x}: the queue has {self._queue_size():#x} bytes")
            self.creadr = offset

    # ---- a guest's accesses

    def read(self, vcpu: Vcpu, offset: int, size: int) -> int | None:
        """A load from the frame: 0 where no register takes it."""
        register = _taken(offset, size)
        return 0 if register is None else self.read_register(register, offset, size)

    def write(self, vcpu: Vcpu, offset: int, size: int, value: int) -> bool:
        """A store; ignored where no register takes it, GITS_TRANSLATER too: a vCPU has no device id."""
        register = _taken(offset, size)
        if register is not None:
            self.write_register(register, offset, size, value)
        return True


def _taken(offset: int, size: int) -> Register | None:
    register = abi.GITS.at(offset)
    return register if register is not None and size in register.widths and not offset % size else None


def _updated(old: int, offset: int, size: int, value: int) -> int:
    """update_64bit_reg: a 64-bit register after a write to a half of it, or the whole."""
    mask = (1 << 8 * size) - 1
    low = 8 * (offset & 4)
    return (old & ~(mask << low) | (value & mask) << low) & (1 << 64) - 1


# ---- a message by its address


def doorbell(vm: Vm, address: int) -> Its | None:
    """__vgic_doorbell_to_its: the ITS in whose frames `address` lies."""
    devices = vm.bus.at(address, 1)
    device = devices[0][1] if devices else None
    return device if isinstance(device, Its) else None


def inject_msi(vm: Vm, msi: Msi) -> int:
    """vgic_its_inject_msi: a device's message. 1: the LPI is pending; 0: the guest has mapped it to nothing.

    KvmError: ENODEV without an ITS, EINVAL without KVM_MSI_VALID_DEVID or where no ITS has the address, EBUSY while the
    guest has its ITS or LPIs off. Any thread may call it.
    """
    if vm.vgic is None or not vm.vgic.has_its:
        raise KvmError(errno.ENODEV, "this VM has no ITS with a vGICv3: make a KVM_DEV_TYPE_ARM_VGIC_ITS")
    address = msi.address_hi << 32 | msi.address_lo
    its = doorbell(vm, address)
    if its is not None:
        with its.lock:
            known = its.cached(msi.devid, msi.data)
            if known is not None:
                lpi.set_pending(vm.vgic, known, True)
                return 1
    if not msi.flags & KVM_MSI_VALID_DEVID:
        raise KvmError(errno.EINVAL, "an MSI needs KVM_MSI_VALID_DEVID and its device's id (KVM_CAP_MSI_DEVID)")
    if its is None:
        raise KvmError(errno.EINVAL, f"no ITS is at {address:#x}: a message goes to GITS_TRANSLATER, base + 0x10040")
    return int(its.trigger(msi.devid, msi.data))
