"""The frames of the GIC in the guest's address space: who answers an access, and the registers of each interrupt.

After `vgic-mmio.c` of arch/arm64/kvm/vgic. Accesses that no register takes (another width, not aligned, an interrupt
that there is not) read as zero and are ignored; nothing in a frame ever reaches userspace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from kvm2.abi.gic_registers import ICFGR_EDGE, Register
from kvm2.softkvm.vgic.irq import NR_PRIVATE_IRQS, NR_SGIS, PRIORITY_MASK, Irq

if TYPE_CHECKING:
    from kvm2.abi.gic_registers import Frame
    from kvm2.softkvm.vcpu import Vcpu
    from kvm2.softkvm.vgic.state import Vgic, VgicCpu

USER_SIZE: Final = 4  # userspace reads and writes words
U32: Final = 0xFFFFFFFF


class Access(NamedTuple):
    """What a handler is told: whose registers, which one, where in its frame, bytes, and whether userspace asks."""

    cpu: VgicCpu
    register: Register
    offset: int
    size: int
    user: bool

    @property
    def vgic(self) -> Vgic:
        return self.cpu.vgic

    @property
    def within(self) -> int:
        """The byte within the register, from its start."""
        return self.offset - self.register.offset

    @property
    def first(self) -> int:
        """The first interrupt that the access is about."""
        return self.register.intid(self.offset)

    def irqs(self) -> list[Irq]:
        """The interrupts that the access is about, in order."""
        first, count = self.first, self.size * 8 // self.register.bits
        if first < NR_PRIVATE_IRQS:
            return self.cpu.irqs[first : first + count]
        return self.vgic.spis[first - NR_PRIVATE_IRQS : first - NR_PRIVATE_IRQS + count]

    def chosen(self, value: int) -> Iterator[Irq]:
        """Those whose bit is set in `value`, of a register with one bit for each."""
        for irq in self.irqs():
            if value & 1:
                yield irq
            value >>= 1


Read = Callable[[Access], int]
Write = Callable[[Access, int], None]


class Handler(NamedTuple):
    """What reading and writing a register does; a write by userspace may be refused with KvmError(EINVAL)."""

    read: Read
    write: Write


def ignore(access: Access, value: int) -> None:
    """vgic_mmio_write_wi."""


def constant(value: int) -> Handler:
    """A register that always reads the same and cannot be written."""
    return Handler(lambda access: value, ignore)


RAZ_WI: Final = constant(0)


class Registers:
    """A frame with what its registers do."""

    def __init__(self, frame: Frame, handlers: Mapping[str, Handler]) -> None:
        self.frame = frame
        self._words = {word: (register, handlers[register.name]) for word, register in frame.words.items()}

    def find(self, vgic: Vgic, offset: int, size: int) -> tuple[Register, Handler] | None:
        """vgic_get_mmio_region: what answers; None where nothing does."""
        found = self._words.get(offset >> 2)
        if found is None:
            return None
        register = found[0]
        if size not in register.widths or offset % size:
            return None
        if register.bits and register.intid(offset) >= NR_PRIVATE_IRQS + vgic.nr_spis:
            return None
        return found

    def read(self, cpu: VgicCpu, offset: int, size: int = USER_SIZE, user: bool = False) -> int:
        """dispatch_mmio_read, vgic_uaccess_read: 0 where there is nothing."""
        vgic = cpu.vgic
        with vgic.lock:
            found = self.find(vgic, offset, size)
            if found is None:
                return 0
            register, handler = found
            return handler.read(Access(cpu, register, offset, size, user)) & (1 << 8 * size) - 1

    def write(self, cpu: VgicCpu, offset: int, value: int, size: int = USER_SIZE, user: bool = False) -> None:
        """dispatch_mmio_write, vgic_uaccess_write."""
        vgic = cpu.vgic
        with vgic.lock:
            found = self.find(vgic, offset, size)
            if found is not None:
                register, handler = found
                handler.write(Access(cpu, register, offset, size, user), value)


class SharedFrame:
    """A frame that is the same for every vCPU: each accesses its own banked registers in it."""

    def __init__(self, registers: Registers) -> None:
        self._registers = registers

    def read(self, vcpu: Vcpu, offset: int, size: int) -> int | None:
        """A guest's load."""
        return self._registers.read(vcpu.gic, offset, size)

    def write(self, vcpu: Vcpu, offset: int, size: int, value: int) -> bool:
        """A guest's store."""
        self._registers.write(vcpu.gic, offset, value, size)
        return True


class OwnedFrame:
    """A frame that belongs to one vCPU, whoever accesses it: a redistributor."""

    def __init__(self, registers: Registers, owner: VgicCpu) -> None:
        self._registers, self._owner = registers, owner

    def read(self, vcpu: Vcpu, offset: int, size: int) -> int | None:
        """A guest's load."""
        return self._registers.read(self._owner, offset, size)

    def write(self, vcpu: Vcpu, offset: int, size: int, value: int) -> bool:
        """A guest's store."""
        self._registers.write(self._owner, offset, value, size)
        return True


def part(value: int, access: Access) -> int:
    """extract_bytes: what an access to a part of a 64-bit register reads of it."""
    return value >> 8 * (access.offset & 7)


def merged(old: int, access: Access, value: int) -> int:
    """update_64bit_reg: a 64-bit register after a write to a half of it, or the whole."""
    at = 8 * (access.offset & 4)
    mask = (1 << 8 * access.size) - 1
    return old & ~(mask << at) | (value & mask) << at


# ---- one bit for each interrupt


def _bits(flags: Iterator[bool] | list[bool]) -> int:
    return sum(1 << at for at, flag in enumerate(flags) if flag)


def _read_group(access: Access) -> int:
    return _bits([bool(irq.group) for irq in access.irqs()])


def write_group(access: Access, value: int) -> None:
    """vgic_mmio_write_group."""
    for at, irq in enumerate(access.irqs()):
        irq.group = value >> at & 1
        access.vgic.update(irq)


def _read_enabled(access: Access) -> int:
    return _bits([irq.enabled for irq in access.irqs()])


def _enable(access: Access, value: int) -> None:
    for irq in access.chosen(value):
        irq.enabled = True
        access.vgic.update(irq)


def _disable(access: Access, value: int) -> None:
    for irq in access.chosen(value):
        irq.enabled = False
        access.vgic.update(irq)


def _read_pending(access: Access) -> int:
    # Userspace saves the latch and the line of a GICv3's interrupts separately (LEVEL_INFO).
    latch_only = access.user and access.vgic.model == "v3"
    return _bits([_is_pending(irq, access.user, latch_only) for irq in access.irqs()])


def _is_pending(irq: Irq, user: bool, latch_only: bool) -> bool:
    if irq.hw and not user:
        return irq.line_level  # the input of the host's interrupt, whatever was latched
    return irq.pending_latch if latch_only else irq.pending


def _is_v2_sgi(access: Access, irq: Irq) -> bool:
    return irq.intid < NR_SGIS and access.vgic.model == "v2"


def _set_pending(access: Access, value: int) -> None:
    for irq in access.chosen(value):
        if _is_v2_sgi(access, irq):
            if not access.user:
                continue  # GICD_ISPENDR0 is read-only for SGIs
            irq.source |= source_bit(access.cpu)  # nobody knows who sent it
        irq.pending_latch = True
        access.vgic.update(irq)


def _clear_pending(access: Access, value: int) -> None:
    for irq in access.chosen(value):
        if _is_v2_sgi(access, irq):
            if not access.user:
                continue
            irq.source = 0
        irq.pending_latch = False
        access.vgic.update(irq)


def source_bit(cpu: VgicCpu) -> int:
    """The bit of a vCPU among the senders of a GICv2's SGI; vCPUs from id 8 on, made before the GIC, have none."""
    return 1 << cpu.vcpu.vcpu_id & 0xFF if cpu.vcpu.vcpu_id < 8 else 0


def _read_active(access: Access) -> int:
    return _bits([irq.active for irq in access.irqs()])


def _change_active(access: Access, value: int, active: bool) -> None:
    """vgic_mmio_change_active. Who sent an active SGI is not known: the one that writes, or vCPU 0."""
    for irq in access.chosen(value):
        if irq.hw and access.user:
            continue
        irq.active = active
        if active and _is_v2_sgi(access, irq):
            irq.active_source = 0 if access.user else access.cpu.vcpu.vcpu_id
        access.vgic.update(irq)


# ---- more bits


def _read_priority(access: Access) -> int:
    return sum(irq.priority << 8 * at for at, irq in enumerate(access.irqs()))


def _write_priority(access: Access, value: int) -> None:
    for at, irq in enumerate(access.irqs()):
        irq.priority = value >> 8 * at & PRIORITY_MASK
        access.vgic.update(irq)


def _read_config(access: Access) -> int:
    return sum(ICFGR_EDGE << 2 * at for at, irq in enumerate(access.irqs()) if irq.edge)


def _write_config(access: Access, value: int) -> None:
    for at, irq in enumerate(access.irqs()):
        if irq.intid >= NR_PRIVATE_IRQS:  # SGIs are edges, and the timers rely on PPIs being levels
            irq.edge = bool(value >> 2 * at & ICFGR_EDGE)
            access.vgic.update(irq)


# By the end of the register's name, which distributors and redistributors share.
PER_IRQ: Final[dict[str, Handler]] = {
    "IGROUPR": Handler(_read_group, write_group),
    "ISENABLER": Handler(_read_enabled, _enable),
    "ICENABLER": Handler(_read_enabled, _disable),
    "ISPENDR": Handler(_read_pending, _set_pending),
    "ICPENDR": Handler(_read_pending, _clear_pending),
    "ISACTIVER": Handler(_read_active, lambda access, value: _change_active(access, value, True)),
    "ICACTIVER": Handler(_read_active, lambda access, value: _change_active(access, value, False)),
    "IPRIORITYR": Handler(_read_priority, _write_priority),
    "ICFGR": Handler(_read_config, _write_config),
}


def v3_pending() -> dict[str, Handler]:
    """ISPENDR and ICPENDR of a GICv3: userspace writes the whole latch into the first, and the second is nothing."""

    def write(access: Access, value: int) -> None:
        _set_pending(access, value)
        if access.user:
            _clear_pending(access, ~value & U32)

    def read_clear(access: Access) -> int:
        return 0 if access.user else _read_pending(access)

    def write_clear(access: Access, value: int) -> None:
        if not access.user:
            _clear_pending(access, value)

    return {"ISPENDR": Handler(_read_pending, write), "ICPENDR": Handler(read_clear, write_clear)}
