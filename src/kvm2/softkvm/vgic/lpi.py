"""LPIs: interrupts by message, whose configuration and pending state lie in guest memory.

After `vgic-its.c`, `vgic-v3.c` and the LPI registers of `vgic-mmio-v3.c` of arch/arm64/kvm/vgic. An ITS maps them
(`its_commands`), a redistributor turns them on and says where the tables are. Everything that changes an LPI takes
`Vgic.lock`; guest memory is read and written as `guest_memory` says.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from kvm2.abi import its as abi
from kvm2.errors import KvmError
from kvm2.softkvm import guest_memory
from kvm2.softkvm.vgic.irq import MIN_LPI, PRIORITY_MASK, Irq

if TYPE_CHECKING:
    from kvm2.softkvm.vgic.state import Vgic, VgicCpu

MAX_ID_BITS: Final = 16  # INTERRUPT_ID_BITS_ITS

# GICR_PROPBASER and GICR_PENDBASER before the guest writes them: inner shareable, read-allocate write-back.
INITIAL_PROPBASER: Final = abi.LPI_INNER.put(abi.BASER_SHAREABILITY.put(0, abi.INNER_SHAREABLE), abi.READ_WRITE_BACK)
INITIAL_PENDBASER: Final = INITIAL_PROPBASER


class Lpi(Irq):
    """An LPI that an ITS has mapped. `references` counts the events that lead to it, of every ITS.

    One without references lives on only while it is on a vCPU's list, as in the kernel, where the list holds one.
    """

    __slots__ = ("references",)

    def __init__(self, intid: int, target: VgicCpu | None) -> None:
        super().__init__(intid, target)
        self.references = 0
        self.group = 1

    @property
    def dead(self) -> bool:
        """Nothing leads to it any more."""
        return not self.references and self.cpu is None


# ---- from the map of events to interrupts


def find(vgic: Vgic, intid: int) -> Lpi | None:
    """vgic_get_lpi: the LPI where it is mapped."""
    lpi = vgic.lpis.get(intid)
    if lpi is not None and lpi.dead:
        del vgic.lpis[intid]
        return None
    return lpi


def living(vgic: Vgic) -> list[Lpi]:
    """Every LPI that is mapped, in no order."""
    return [lpi for lpi in vgic.lpis.values() if not lpi.dead]


def add(vgic: Vgic, intid: int, target: VgicCpu | None) -> Lpi:
    """vgic_add_lpi: one more event leads to this LPI; a new one gets its configuration and pending state from the
    tables. KvmError(EFAULT) where these cannot be read (or a pending bit not be cleared): then nothing is mapped."""
    with vgic.lock:
        lpi = find(vgic, intid)
        if lpi is None:
            lpi = vgic.lpis[intid] = Lpi(intid, target)
            try:
                load_configuration(vgic, lpi)
                _take_pending(vgic, lpi)
            except KvmError:
                drop(vgic, lpi)
                raise
        lpi.references += 1
        return lpi


def remove(vgic: Vgic, lpi: Lpi) -> None:
    """An event leads to it no longer (vgic_put_irq)."""
    with vgic.lock:
        lpi.references -= 1
        drop(vgic, lpi)


def drop(vgic: Vgic, lpi: Lpi) -> None:
    """Forgets the LPI if nothing leads to it."""
    if lpi.dead:
        vgic.lpis.pop(lpi.intid, None)


def retarget(vgic: Vgic, lpi: Lpi, target: VgicCpu | None) -> None:
    """update_affinity: the LPI goes to another vCPU, also when it is pending."""
    with vgic.lock:
        lpi.target = target
        if lpi.pending_latch or lpi.cpu is not None:
            vgic.update(lpi)


def set_pending(vgic: Vgic, lpi: Lpi, pending: bool) -> None:
    """A message came, or the CLEAR command."""
    with vgic.lock:
        if lpi.pending_latch == pending:
            return
        lpi.pending_latch = pending
        if vgic.vm.observer is not None:
            cpu = lpi.target.vcpu.vcpu_id if lpi.target is not None else -1
            vgic.vm.observe("irq-line", intid=lpi.intid, level=int(pending), vcpu=cpu)
        vgic.update(lpi)


# ---- the configuration table: a byte for each LPI


def _configuration(vgic: Vgic, intid: int) -> int:
    """Where the LPI's byte lies."""
    return (vgic.propbaser & abi.PROPBASER_ADDRESS.mask) + intid - MIN_LPI


def _configure(vgic: Vgic, lpi: Lpi, byte: int) -> None:
    # The kernel keeps one bit of the priority more; the virtual CPU interface has not got it.
    priority, enabled = byte & abi.LPI_PRIORITY.mask & PRIORITY_MASK, bool(byte & abi.LPI_ENABLED)
    if priority != lpi.priority or enabled != lpi.enabled:
        lpi.priority, lpi.enabled = priority, enabled
        vgic.update(lpi)


def load_configuration(vgic: Vgic, lpi: Lpi) -> None:
    """update_lpi_config: priority and enable bit from the table. KvmError(EFAULT) where it cannot be read."""
    byte = guest_memory.read(vgic.vm, _configuration(vgic, lpi.intid), 1)[0]
    with vgic.lock:
        _configure(vgic, lpi, byte)


def invalidate(cpu: VgicCpu, intid: int) -> None:
    """A write of GICR_INVLPIR while LPIs are on: the LPI's configuration is read again."""
    vgic = cpu.vgic
    with vgic.lock:
        lpi = find(vgic, intid)
        if lpi is not None:
            _reload(vgic, [lpi])


def invalidate_all(cpu: VgicCpu) -> None:
    """A write of GICR_INVALLR while LPIs are on: the configuration of all LPIs of this vCPU is read again."""
    reload_all(cpu)


def reload_all(cpu: VgicCpu) -> int:
    """vgic_its_invall; how many LPIs were looked at."""
    vgic = cpu.vgic
    with vgic.lock:
        lpis = living(vgic)
        _reload(vgic, [lpi for lpi in lpis if lpi.target is cpu])
    return len(lpis)


def _reload(vgic: Vgic, lpis: list[Lpi]) -> None:
    reader = guest_memory.PageReader(vgic.vm)
    for lpi in lpis:
        at = _configuration(vgic, lpi.intid)
        page = reader.page(at)
        if page is not None:  # what cannot be read stays as it was
            _configure(vgic, lpi, page[at % reader.SIZE])


# ---- the pending tables: a bit for each interrupt, one table for each vCPU


def _pending_bit(cpu: VgicCpu, intid: int) -> tuple[int, int]:
    """(address of the byte, mask) in the vCPU's pending table."""
    return (cpu.pendbaser & abi.PENDBASER_ADDRESS.mask) + intid // 8, 1 << intid % 8


def _take_pending(vgic: Vgic, lpi: Lpi) -> None:
    """vgic_v3_lpi_sync_pending_status: the bit of the table becomes the state, and is cleared there."""
    if lpi.target is None:
        return
    at, bit = _pending_bit(lpi.target, lpi.intid)
    byte = guest_memory.read(vgic.vm, at, 1)[0]
    lpi.pending_latch = bool(byte & bit)
    vgic.update(lpi)
    if byte & bit:
        guest_memory.write(vgic.vm, at, bytes([byte & ~bit]))


def enable_lpis(cpu: VgicCpu) -> None:
    """GICR_CTLR.EnableLPIs becomes 1 (vgic_mmio_write_v3r_ctlr): the pending table is read, unless the guest said that
    it is all zeros."""
    vgic = cpu.vgic
    with vgic.lock:
        cpu.lpis_enabled = True
        if cpu.pendbaser & abi.PENDBASER_PTZ:
            return
        reader = guest_memory.PageReader(vgic.vm)
        for lpi in sorted(living(vgic), key=lambda lpi: lpi.intid):
            at, bit = _pending_bit(cpu, lpi.intid)
            page = reader.page(at)
            if page is None:
                return  # its_sync_lpi_pending_table gives up at the first that cannot be read
            if lpi.target is cpu:
                lpi.pending_latch = bool(page[at % reader.SIZE] & bit)
                vgic.update(lpi)


def disable_lpis(cpu: VgicCpu) -> None:
    """GICR_CTLR.EnableLPIs becomes 0: what was pending here is lost (vgic_flush_pending_lpis)."""
    vgic = cpu.vgic
    with vgic.lock:
        for irq in list(cpu.lpis.members.values()):
            irq.pending_latch = False
            vgic.update(irq)
        for its in vgic.vm.itses:
            its.forget_translations()
        cpu.lpis_enabled = False


def save_pending_tables(vgic: Vgic) -> None:
    """KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES (vgic_v3_save_pending_tables): the state of every LPI goes to the table of
    the vCPU that it is for. KvmError: ENXIO before the vGIC is initialised, EFAULT where a table is not memory.

    No vCPU runs meanwhile, and the caller holds the VM's lock.
    """
    if not vgic.initialized:
        raise KvmError(errno.ENXIO, "the vGIC was not initialised: there is no pending state")
    with vgic.lock:
        for lpi in sorted(living(vgic), key=lambda lpi: lpi.intid):
            if lpi.target is None:
                continue
            at, bit = _pending_bit(lpi.target, lpi.intid)
            byte = guest_memory.read(vgic.vm, at, 1)[0]
            wanted = byte | bit if lpi.pending_latch else byte & ~bit
            if wanted != byte:
                guest_memory.write(vgic.vm, at, bytes([wanted]))


# ---- GICR_PROPBASER and GICR_PENDBASER


def limit(propbaser: int) -> int:
    """max_lpis_propbaser: the first interrupt number that the configuration table has no byte for."""
    return 1 << min(abi.PROPBASER_ID_BITS.get(propbaser) + 1, MAX_ID_BITS)


def sanitise(register: int, inner: abi.Bits, outer: abi.Bits) -> int:
    """vgic_sanitise_field on the three attributes of a table's memory: it is not outer shareable, and inner cacheable;
    the outer cacheability is non-cacheable or the same as the inner one."""
    if abi.BASER_SHAREABILITY.get(register) == abi.OUTER_SHAREABLE:
        register = abi.BASER_SHAREABILITY.put(register, abi.INNER_SHAREABLE)
    if inner.get(register) in abi.NON_CACHEABLE:
        register = inner.put(register, abi.READ_WRITE_BACK)
    if outer.get(register) not in abi.OUTER_ALLOWED:
        register = outer.put(register, abi.SAME_AS_INNER)
    return register


def sanitise_propbaser(register: int) -> int:
    """vgic_sanitise_propbaser."""
    return sanitise(register, abi.LPI_INNER, abi.LPI_OUTER) & ~abi.PROPBASER_RES0


def sanitise_pendbaser(register: int) -> int:
    """vgic_sanitise_pendbaser."""
    return sanitise(register, abi.LPI_INNER, abi.LPI_OUTER) & ~abi.PENDBASER_RES0
