"""The state of an ITS in guest memory: KVM_DEV_ARM_ITS_SAVE_TABLES and _RESTORE_TABLES, table ABI revision 0.

After `vgic_its_save_tables_v0` and `vgic_its_restore_tables_v0` of arch/arm64/kvm/vgic/vgic-its.c: what one of the two,
here or in the kernel, has written, the other reads. The device table and the translation tables are indexed, and each
entry says how far away the next one is; the collection table is a list. The ITS's lock is held.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from kvm2.abi import its as abi
from kvm2.errors import KvmError
from kvm2.softkvm import guest_memory
from kvm2.softkvm.vgic.irq import MIN_LPI
from kvm2.softkvm.vgic.its_map import ID_BITS, TABLE_PAGE, UNMAPPED, Device, table_address, table_size

if TYPE_CHECKING:
    from kvm2.softkvm.vgic.its_map import Collection, Event, ItsMap

MAX_DEVICE_STEP: Final = abi.DTE_NEXT.limit - 1  # what an entry can say of the next one's distance
MAX_EVENT_STEP: Final = abi.ITE_NEXT.limit - 1
PER_PAGE: Final = TABLE_PAGE // abi.ENTRY_SIZE

# What becomes of one entry: its number and value; how many entries on the next one is, 0 after the last.
Take = Callable[[int, int], int]


# ---- saving


def save(its: ItsMap) -> None:
    """Writes the tables. KvmError(EFAULT) where one is not memory that can be written."""
    _save_devices(its)
    _save_collections(its)


def _steps(numbers: list[int], most: int) -> list[int]:
    """From each number to the next, as far as an entry can say it; 0 for the last."""
    return [min(following - number, most) for number, following in pairwise(numbers)] + [0] * bool(numbers)


def _save_devices(its: ItsMap) -> None:
    if not its.device_table & abi.VALID:
        return
    # A device whose entry lies nowhere any more is left out: saving does not fail because of a guest.
    placed = [
        (device, address)
        for device in sorted(its.devices.values(), key=lambda device: device.number)
        if (address := its.entry_address(its.device_table, device.number)) is not None
    ]
    steps = _steps([device.number for device, _ in placed], MAX_DEVICE_STEP)
    for (device, address), step in zip(placed, steps, strict=True):
        _save_events(its, device)
        entry = abi.VALID | abi.DTE_NEXT.put(0, step) | abi.DTE_SIZE.put(0, device.event_bits - 1)
        its.write_entry(address, abi.DTE_ITT_ADDRESS.put(entry, abi.ITT_ADDRESS.get(device.itt)))


def _save_events(its: ItsMap, device: Device) -> None:
    numbers = sorted(device.events)
    for number, step in zip(numbers, _steps(numbers, MAX_EVENT_STEP), strict=True):
        its.write_entry(device.itt + number * abi.ENTRY_SIZE, _event_entry(device.events[number], step))


def _event_entry(event: Event, step: int) -> int:
    # Without a collection, and so without its id, an entry of zeros: not valid.
    if event.collection is None:
        return 0
    entry = abi.ITE_NEXT.put(abi.ITE_LPI.put(0, event.lpi.intid), step)
    return abi.ITE_COLLECTION.put(entry, event.collection.number)


def _save_collections(its: ItsMap) -> None:
    table = its.collection_table
    if not table & abi.VALID:
        return
    address = table_address(table)
    for collection in its.collections.values():
        entry = abi.CTE_TARGET.put(abi.VALID, collection.target)
        its.write_entry(address, abi.CTE_ID.put(entry, collection.number))
        address += abi.ENTRY_SIZE
    if address - table_address(table) != table_size(table):
        its.write_entry(address, 0)  # the end


# ---- restoring


def restore(its: ItsMap) -> None:
    """Reads the tables. KvmError: EFAULT where one is not memory, EINVAL and EEXIST where what they say contradicts
    itself; then nothing is mapped."""
    try:
        _restore_collections(its)
    except KvmError:
        its.unmap_collections()
        raise
    try:
        _restore_devices(its)
    except KvmError:
        its.unmap_devices()
        its.unmap_collections()
        raise


def _restore_collections(its: ItsMap) -> None:
    table = its.collection_table
    if not table & abi.VALID:
        return
    for address in range(table_address(table), table_address(table) + table_size(table), abi.ENTRY_SIZE):
        entry = its.read_entry(address)
        if not entry & abi.VALID:
            return
        target, number = abi.CTE_TARGET.get(entry), abi.CTE_ID.get(entry)
        if target != UNMAPPED and its.cpu(target) is None:
            raise _wrong(address, f"collection {number} goes to vCPU {target}, which there is not")
        if number in its.collections:
            raise KvmError(errno.EEXIST, f"the collection table has {number} twice, or it was mapped already")
        if its.entry_address(table, number) is None:
            raise _wrong(address, f"collection {number} does not fit into the table")
        its.map_collection(number, target)


def _wrong(address: int, what: str) -> KvmError:
    return KvmError(errno.EINVAL, f"the ITS's entry at {address:#x}: {what}")


def _restore_devices(its: ItsMap) -> None:
    table = its.device_table
    if not table & abi.VALID:
        return

    def take_device(number: int, entry: int) -> int:
        return _restore_device(its, number, entry)

    def take_page(index: int, entry: int) -> int:
        if not entry & abi.VALID:
            return 1
        page = entry & abi.L1_ADDRESS.mask
        return int(_scan(its, page, TABLE_PAGE, index * PER_PAGE, take_device))

    _scan(its, table_address(table), table_size(table), 0, take_page if table & abi.BASER_INDIRECT else take_device)


def _scan(its: ItsMap, base: int, size: int, first: int, take: Take) -> bool:
    """scan_its_table: gives the entries of a table to `take`, as far as it says. False after the last one, True where
    the table ended without. Entries of zeros, which are not valid anywhere, are passed over a page at a time."""
    at, reader = 0, guest_memory.PageReader(its.vm)
    while at < size:
        address = base + at
        page = reader.page(address)
        if page is None:
            raise KvmError(errno.EFAULT, f"the ITS's table at {address:#x} cannot be read")
        within = address % reader.SIZE
        rest = page[within:]
        empty = len(rest) - len(rest.lstrip(b"\0"))
        if empty >= abi.ENTRY_SIZE:
            at += empty // abi.ENTRY_SIZE * abi.ENTRY_SIZE
            continue
        step = take(first + at // abi.ENTRY_SIZE, int.from_bytes(rest[: abi.ENTRY_SIZE], "little"))
        if not step:
            return False
        at += step * abi.ENTRY_SIZE
    return True


def _restore_device(its: ItsMap, number: int, entry: int) -> int:
    """vgic_its_restore_dte."""
    if not entry & abi.VALID:
        return 1
    bits = abi.DTE_SIZE.get(entry) + 1
    if bits > ID_BITS:
        raise KvmError(errno.EINVAL, f"device {number:#x}: event ids of {bits} bits, this ITS has {ID_BITS}")
    if its.entry_address(its.device_table, number) is None:
        raise KvmError(errno.EINVAL, f"device {number:#x} does not fit into the device table")
    device = Device(number, abi.DTE_ITT_ADDRESS.get(entry) << abi.ITT_ADDRESS.low, bits)
    try:
        _restore_events(its, device)
    except KvmError:
        its.unmap_device(device)
        raise
    if number in its.devices:
        its.unmap_device(device)  # one that was there already is the one that is found
    else:
        its.devices[number] = device
    return abi.DTE_NEXT.get(entry)


def _restore_events(its: ItsMap, device: Device) -> None:
    def take(number: int, entry: int) -> int:
        """vgic_its_restore_ite."""
        intid, step = abi.ITE_LPI.get(entry), abi.ITE_NEXT.get(entry)
        if not intid:
            return 1
        collection = _collection(its, entry)
        if intid < MIN_LPI or collection is None or number + step >= 1 << device.event_bits:
            raise KvmError(errno.EINVAL, f"device {device.number:#x}, event {number:#x}: {entry:#x} is no entry")
        its.map_event(device, number, collection, intid)
        return step

    _scan(its, device.itt, abi.ENTRY_SIZE << device.event_bits, 0, take)


def _collection(its: ItsMap, entry: int) -> Collection | None:
    return its.collections.get(abi.ITE_COLLECTION.get(entry))
