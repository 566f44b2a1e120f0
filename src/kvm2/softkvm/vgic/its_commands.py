"""The commands of an ITS (Arm IHI 0069, chapter 5.3), with the checks of `vgic-its.c` of arch/arm64/kvm/vgic.

Each takes the ITS and the four words of the command, and returns 0 or a number of `abi.its.Error`; where guest memory
cannot be accessed, it raises KvmError. Neither is told to the guest: a command that fails is passed over. The ITS's
lock is held.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from kvm2.abi import its as abi
from kvm2.abi.its import Error
from kvm2.errors import KvmError
from kvm2.softkvm.vgic import lpi
from kvm2.softkvm.vgic.irq import MIN_LPI
from kvm2.softkvm.vgic.its_map import ID_BITS

if TYPE_CHECKING:
    from kvm2.softkvm.vgic.its_map import Collection, Event
    from kvm2.softkvm.vgic.its_map import ItsMap as Its

Words = tuple[int, ...]
_WORDS: Final = struct.Struct("<4Q")


def handle(its: Its, data: bytes) -> int:
    """vgic_its_handle_command: 0, an error of the command, or an errno as the kernel returns it (negative)."""
    words = _WORDS.unpack(data)
    opcode = abi.OPCODE.get(words[0])
    command = _COMMANDS.get(opcode)
    try:
        result = command(its, words) if command is not None else -errno.ENODEV
    except KvmError as refusal:
        result = -(refusal.errno or 0)
    if its.vm.observer is not None:
        its.vm.observe("its-command", opcode=opcode, result=result)
    return result


def _event(its: Its, words: Words) -> Event | None:
    return its.event(abi.DEVICE_ID.get(words[0]), abi.EVENT_ID.get(words[1]))


def _mapd(its: Its, words: Words) -> int:
    """Maps a device to its translation table, or unmaps it: what it had is gone in any case."""
    number, bits = abi.DEVICE_ID.get(words[0]), abi.ITT_SIZE.get(words[1]) + 1
    valid = bool(words[2] & abi.VALID)
    address = its.entry_address(its.device_table, number)
    if address is None:
        return Error.MAPD_DEVICE_OOR
    if valid and bits > ID_BITS:
        return Error.MAPD_ITTSIZE_OOR
    old = its.devices.get(number)
    if old is not None:
        its.spend(len(old.events))
        its.unmap_device(old)
    if valid:
        its.map_device(number, words[2] & abi.ITT_ADDRESS.mask, bits)
    else:
        its.write_entry(address, 0)
    return 0


def _mapc(its: Its, words: Words) -> int:
    """Maps a collection to a vCPU, or unmaps it."""
    number = abi.COLLECTION_ID.get(words[2])
    if not words[2] & abi.VALID:
        its.unmap_collection(number)
        its.forget_translations()
        return 0
    target = abi.TARGET.get(words[2])
    cpu = its.cpu(target)
    if cpu is None:
        return Error.MAPC_PROCNUM_OOR
    collection = its.collections.get(number)
    if collection is None:
        if its.entry_address(its.collection_table, number) is None:
            return Error.MAPC_COLLECTION_OOR
        its.map_collection(number, target)
        return 0
    collection.target = target
    its.spend(its.event_count)
    for event in its.events():
        if event.collection is collection:
            lpi.retarget(its.vgic, event.lpi, cpu)
    return 0


def _mapti(its: Its, words: Words) -> int:
    """MAPTI and MAPI: map an event of a device to an LPI in a collection, which need not be mapped yet."""
    number, device = abi.EVENT_ID.get(words[1]), its.devices.get(abi.DEVICE_ID.get(words[0]))
    if device is None:
        return Error.MAPTI_UNMAPPED_DEVICE
    if not its.event_fits(device, number):
        return Error.MAPTI_ID_OOR
    intid = abi.PHYSICAL_ID.get(words[1]) if abi.OPCODE.get(words[0]) == abi.MAPTI else number
    vgic = its.vm.vgic
    if vgic is None or not MIN_LPI <= intid < lpi.limit(vgic.propbaser):
        return Error.MAPTI_PHYSICALID_OOR
    if number in device.events:
        return 0  # unpredictable; here the first one stays
    collection = its.collections.get(abi.COLLECTION_ID.get(words[2]))
    made = collection is None
    if collection is None:
        collection_id = abi.COLLECTION_ID.get(words[2])
        if its.entry_address(its.collection_table, collection_id) is None:
            return Error.MAPC_COLLECTION_OOR
        collection = its.map_collection(collection_id)
    try:
        its.map_event(device, number, collection, intid)
    except KvmError:
        if made:
            its.unmap_collection(collection.number)
        raise
    return 0


def _movi(its: Its, words: Words) -> int:
    """Moves an event to another collection."""
    event = _event(its, words)
    if event is None:
        return Error.MOVI_UNMAPPED_INTERRUPT
    collection = its.collections.get(abi.COLLECTION_ID.get(words[2]))
    if not _mapped(event.collection) or collection is None or not collection.mapped:
        return Error.MOVI_UNMAPPED_COLLECTION
    event.collection = collection
    its.forget_translations()
    lpi.retarget(its.vgic, event.lpi, its.target(collection))
    return 0


def _mapped(collection: Collection | None) -> bool:
    return collection is not None and collection.mapped


def _discard(its: Its, words: Words) -> int:
    """Unmaps an event. What is pending on a vCPU's list already still arrives, as in the kernel."""
    event = _event(its, words)
    if event is None or not _mapped(event.collection):
        return Error.DISCARD_UNMAPPED_INTERRUPT
    device = its.devices[abi.DEVICE_ID.get(words[0])]
    its.forget_translations()
    its.unmap_event(device, event)
    its.write_entry(device.itt + event.number * abi.ENTRY_SIZE, 0)
    return 0


def _clear(its: Its, words: Words) -> int:
    """The interrupt is no longer pending."""
    event = _event(its, words)
    if event is None:
        return Error.CLEAR_UNMAPPED_INTERRUPT
    lpi.set_pending(its.vgic, event.lpi, False)
    return 0


def _int(its: Its, words: Words) -> int:
    """The same as a message of the device."""
    arrived = its.trigger(abi.DEVICE_ID.get(words[0]), abi.EVENT_ID.get(words[1]))
    return 0 if arrived else Error.INT_UNMAPPED_INTERRUPT


def _inv(its: Its, words: Words) -> int:
    """The configuration of one interrupt is read again."""
    event = _event(its, words)
    if event is None:
        return Error.INV_UNMAPPED_INTERRUPT
    lpi.load_configuration(its.vgic, event.lpi)
    return 0


def _invall(its: Its, words: Words) -> int:
    """The configuration of every LPI that goes to the collection's vCPU is read again."""
    cpu = its.target(its.collections.get(abi.COLLECTION_ID.get(words[2])))
    if cpu is None:
        return Error.INVALL_UNMAPPED_COLLECTION
    if its.vm.vgic is not None:
        its.spend(lpi.reload_all(cpu))
    return 0


def _movall(its: Its, words: Words) -> int:
    """Every LPI of one vCPU, mapped by whichever ITS, goes to another."""
    old, new = its.cpu(abi.TARGET.get(words[2])), its.cpu(abi.TARGET.get(words[3]))
    if old is None or new is None:
        return Error.MOVALL_PROCNUM_OOR
    if old is new or its.vm.vgic is None:
        return 0
    lpis = lpi.living(its.vgic)
    its.spend(len(lpis))
    for each in lpis:
        if each.target is old:
            lpi.retarget(its.vgic, each, new)
    its.forget_translations()
    return 0


def _sync(its: Its, words: Words) -> int:
    """Everything is done when the next command is looked at."""
    return 0


_COMMANDS: Final[dict[int, Callable[[Its, Words], int]]] = {
    abi.MAPD: _mapd,
    abi.MAPC: _mapc,
    abi.MAPTI: _mapti,
    abi.MAPI: _mapti,
    abi.MOVI: _movi,
    abi.DISCARD: _discard,
    abi.CLEAR: _clear,
    abi.INT: _int,
    abi.INV: _inv,
    abi.INVALL: _invall,
    abi.MOVALL: _movall,
    abi.SYNC: _sync,
}
