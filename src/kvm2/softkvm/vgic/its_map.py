"""What an ITS has mapped: devices, their events, collections of interrupts; from a message to its LPI.

After `vgic-its.c` of arch/arm64/kvm/vgic. Whoever changes something holds the map's lock.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Final

from kvm2.abi import its as abi
from kvm2.errors import KvmError
from kvm2.softkvm import guest_memory
from kvm2.softkvm.vgic import lpi

if TYPE_CHECKING:
    from kvm2.softkvm.vgic.lpi import Lpi
    from kvm2.softkvm.vgic.state import Vgic, VgicCpu
    from kvm2.softkvm.vm import Vm

ID_BITS: Final = 16  # of device ids, event ids and collection ids
TABLE_PAGE: Final = 0x10000  # the one page size of tables, and the size of a second level
UNMAPPED: Final = 0xFFFFFFFF  # COLLECTION_NOT_MAPPED: the target of a collection that MAPTI made
# Events that one ITS maps at most, nine for each LPI that there can be: beyond, commands fail as in a kernel without
# memory.
MAX_EVENTS: Final = 1 << 19


class Collection:
    """Interrupts that go to one vCPU, by its id."""

    __slots__ = ("number", "target")

    def __init__(self, number: int, target: int = UNMAPPED) -> None:
        self.number, self.target = number, target

    @property
    def mapped(self) -> bool:
        """Whether MAPC gave it a target."""
        return self.target != UNMAPPED


class Event:
    """An entry of an interrupt translation table. MAPC with V = 0 takes its collection away."""

    __slots__ = ("collection", "lpi", "number")

    def __init__(self, number: int, collection: Collection, lpi: Lpi) -> None:
        self.number, self.lpi = number, lpi
        self.collection: Collection | None = collection


class Device:
    """A device that MAPD mapped: where its translation table lies, bits of its event ids, its events."""

    __slots__ = ("event_bits", "events", "itt", "number")

    def __init__(self, number: int, itt: int, event_bits: int) -> None:
        self.number, self.itt, self.event_bits = number, itt, event_bits
        self.events: dict[int, Event] = {}


def initial_baser(kind: int) -> int:
    """GITS_BASER<n> of a new ITS."""
    value = abi.BASER_PAGE_SIZE.put(abi.BASER_TYPE.put(0, kind), abi.PAGE_64K)
    value = abi.BASER_SHAREABILITY.put(abi.ITS_INNER.put(value, abi.READ_WRITE_BACK), abi.INNER_SHAREABLE)
    return abi.BASER_ENTRY_SIZE.put(value, abi.ENTRY_SIZE - 1)


def table_address(baser: int) -> int:
    """GITS_BASER_ADDR_48_to_52: where a table with pages of 64K lies."""
    return baser & abi.BASER_ADDRESS.mask | abi.BASER_ADDRESS_HIGH.get(baser) << 48


def table_size(baser: int) -> int:
    """Its size in bytes; of an indirect one, of the first level."""
    return (abi.BASER_PAGES.get(baser) + 1) * TABLE_PAGE


class ItsMap:
    """The map of one ITS, and what its tables' base registers hold.

    `lock` is taken before `Vgic.lock`, and after the VM's by whoever needs both.
    """

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.lock = threading.RLock()
        self.enabled = False
        self.device_table = initial_baser(abi.TYPE_DEVICE)
        self.collection_table = initial_baser(abi.TYPE_COLLECTION)
        self.devices: dict[int, Device] = {}
        self.collections: dict[int, Collection] = {}
        self.event_count = 0
        self.budget = 0  # LPIs and events that may still be looked at in this pass over the command queue
        # (device, event) of messages that arrived: the kernel's cache, which answers without the checks of a first one.
        self._translated: dict[tuple[int, int], Lpi] = {}

    @property
    def vgic(self) -> Vgic:
        """The vGIC that the LPIs belong to; only where there is an LPI."""
        assert self.vm.vgic is not None
        return self.vm.vgic

    # ---- what is mapped

    def event(self, device: int, number: int) -> Event | None:
        """find_ite."""
        found = self.devices.get(device)
        return None if found is None else found.events.get(number)

    def cpu(self, vcpu_id: int) -> VgicCpu | None:
        """The vCPU that a target address names: GITS_TYPER.PTA is 0, so it is the id."""
        vcpu = self.vm.vcpus.get(vcpu_id)
        return None if vcpu is None else vcpu.gic

    def target(self, collection: Collection | None) -> VgicCpu | None:
        """Where the interrupts of a collection go; None where it is not mapped."""
        return self.cpu(collection.target) if collection is not None and collection.mapped else None

    def map_device(self, number: int, itt: int, event_bits: int) -> Device:
        """vgic_its_alloc_device."""
        device = self.devices[number] = Device(number, itt, event_bits)
        return device

    def map_collection(self, number: int, target: int = UNMAPPED) -> Collection:
        """vgic_its_alloc_collection."""
        collection = self.collections[number] = Collection(number, target)
        return collection

    def map_event(self, device: Device, number: int, collection: Collection, intid: int) -> None:
        """An event becomes an LPI. KvmError: ENOMEM, EFAULT where the LPI's tables cannot be read."""
        if self.event_count >= MAX_EVENTS:
            raise KvmError(errno.ENOMEM, f"this ITS maps {MAX_EVENTS} events at most")
        if self.vm.vgic is None:
            raise KvmError(errno.EFAULT, f"LPI {intid}: without a vGICv3 there is no table that configures it")
        device.events[number] = Event(number, collection, lpi.add(self.vgic, intid, self.target(collection)))
        self.event_count += 1

    def unmap_event(self, device: Device, event: Event) -> None:
        """its_free_ite."""
        del device.events[event.number]
        self.event_count -= 1
        lpi.remove(self.vgic, event.lpi)

    def unmap_device(self, device: Device) -> None:
        """vgic_its_free_device, with all its events."""
        for event in list(device.events.values()):
            self.unmap_event(device, event)
        self.forget_translations()
        if self.devices.get(device.number) is device:
            del self.devices[device.number]

    def unmap_devices(self) -> None:
        """vgic_its_free_device_list."""
        for device in list(self.devices.values()):
            self.unmap_device(device)

    def events(self) -> list[Event]:
        """Of all devices."""
        return [event for device in self.devices.values() for event in device.events.values()]

    def unmap_collection(self, number: int) -> None:
        """vgic_its_free_collection: its events stay, and lead nowhere."""
        collection = self.collections.pop(number, None)
        if collection is not None:
            for event in self.events():
                if event.collection is collection:
                    event.collection = None
            self.spend(self.event_count)

    def unmap_collections(self) -> None:
        """vgic_its_free_collection_list."""
        self.collections.clear()
        for event in self.events():
            event.collection = None

    def forget_translations(self) -> None:
        """vgic_its_invalidate_cache."""
        self._translated.clear()

    def entry_address(self, baser: int, number: int) -> int | None:
        """vgic_its_check_id: where a device's or collection's entry lies; None where the table has none for it, or it
        is not memory."""
        if number >> ID_BITS:
            return None
        base, size = table_address(baser), table_size(baser)
        if not baser & abi.BASER_INDIRECT:
            address = base + number * abi.ENTRY_SIZE
            inside = number < size // abi.ENTRY_SIZE
            return address if inside and guest_memory.visible(self.vm, address) else None
        # The smallest first level, of one page, has room for more second levels than there are numbers.
        first, second = divmod(number, TABLE_PAGE // abi.ENTRY_SIZE)
        try:
            entry = self.read_entry(base + first * abi.ENTRY_SIZE)
        except KvmError:
            return None
        address = (entry & abi.L1_ADDRESS.mask) + second * abi.ENTRY_SIZE
        return address if entry & abi.VALID and guest_memory.visible(self.vm, address) else None

    def event_fits(self, device: Device, number: int) -> bool:
        """vgic_its_check_event_id."""
        return number < 1 << device.event_bits and guest_memory.visible(self.vm, device.itt + number * abi.ENTRY_SIZE)

    def read_entry(self, address: int) -> int:
        """An entry of a table; KvmError(EFAULT)."""
        return int.from_bytes(guest_memory.read(self.vm, address, abi.ENTRY_SIZE), "little")

    def write_entry(self, address: int, entry: int) -> None:
        """Writes an entry of a table; KvmError(EFAULT)."""
        guest_memory.write(self.vm, address, entry.to_bytes(abi.ENTRY_SIZE, "little"))

    def spend(self, work: int) -> None:
        """What a command costs, in LPIs and events looked at."""
        self.budget -= work

    # ---- messages

    def cached(self, device: int, event: int) -> Lpi | None:
        """vgic_its_check_cache: the LPI of a message that came before and to which nothing has changed."""
        return self._translated.get((device, event))

    def resolve(self, device: int, event: int) -> Lpi | None:
        """vgic_its_resolve_lpi: the LPI of a message; None where it is mapped to nothing. KvmError(EBUSY) while the
        ITS, or LPIs at the target, are off."""
        if not self.enabled:
            raise KvmError(errno.EBUSY, "the ITS is not enabled: the guest sets GITS_CTLR.Enabled")
        found = self.event(device, event)
        cpu = None if found is None else self.target(found.collection)
        if found is None or cpu is None:
            return None
        if not cpu.lpis_enabled:
            raise KvmError(errno.EBUSY, f"LPIs are off at vCPU {cpu.vcpu.vcpu_id}: the guest sets GICR_CTLR.EnableLPIs")
        self._translated[device, event] = found.lpi
        return found.lpi

    def trigger(self, device: int, event: int) -> bool:
        """vgic_its_trigger_msi: the LPI becomes pending; False where the message is mapped to nothing."""
        with self.lock:
            found = self.resolve(device, event)
            if found is None:
                return False
            lpi.set_pending(self.vgic, found, True)
            return True
