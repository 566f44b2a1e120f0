"""The calls that take or give attributes: KVM_CREATE_VM2, KVM_VM2_SET_ATTRS, KVM_VM2_COMMIT, KVM_VM2_GET_ATTR.

Each call carries a REPORT of its own, so that whoever answers, an exception has every finding.
"""

from __future__ import annotations

import ctypes
import errno
import struct
import threading
from typing import TYPE_CHECKING, Any, cast

from kvm2.abi import ioctls, vm2, wire
from kvm2.abi.findings import RECORD_SIZE, read_records
from kvm2.errors import KvmError, UsageError
from kvm2.handle import Buffer
from kvm2.softkvm.memory import Vouched

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvm2.abi.findings import Finding
    from kvm2.abi.layout import Structure
    from kvm2.handle import Handle

_REPORT = struct.Struct("=IHHQII")
_REPORT_HEADER = (vm2.KVM_CREATE_VM_ATTR_REPORT, vm2.Report.SIZE, 0)
MOST_IDLE = 64
_COUNT_OFFSET = next(entry.offset for entry in vm2.Report.LAYOUT.fields if entry.name == "count")


class AttributeList:
    """A list of attributes at an address, followed by room for the host's findings.

    `size` bytes from `address` on are the list itself. It can be sent again once `findings` were read.
    """

    def __init__(self, attributes: Sequence[bytes], reports: bool) -> None:
        packed = list(attributes)
        self.reports = reports
        self.capacity = 32 + 8 * len(packed) if reports else 0
        if reports:
            packed.append(bytes(vm2.Report.SIZE))  # last, so that every finding's attr_index is the caller's own
        self.size = wire.encoded_size(packed)
        self._buffer = Buffer(self.size + self.capacity * RECORD_SIZE)
        self.address = self._buffer.address
        if reports:
            packed[-1] = _REPORT.pack(*_REPORT_HEADER, self.address + self.size, self.capacity, 0)
        ctypes.memmove(self.address, wire.encode_packed(packed, self.address), self.size)
        self._count = ctypes.c_uint32.from_address(self.address + self.size - vm2.Report.SIZE + _COUNT_OFFSET)

    def findings(self) -> tuple[Finding, ...]:
        """What the host wrote; () where it wrote nothing."""
        if not self.reports or not self._count.value:
            return ()
        count, self._count.value = self._count.value, 0
        return read_records(self._buffer.bytes()[self.size :], count, self.capacity)


class _Idle(threading.local):
    """Lists of this thread that may be sent again, by their attributes: programs make many VMs alike."""

    def __init__(self) -> None:
        self.lists: dict[tuple[bytes, ...], AttributeList] = {}


_idle = _Idle()


def list_of(attributes: Sequence[Structure]) -> AttributeList:
    """A new list of attributes, with a REPORT of ours where there is room for one and none yet."""
    return AttributeList([one.pack() for one in attributes], _has_room(attributes))


def _has_room(attributes: Sequence[Structure]) -> bool:
    full = len(attributes) >= vm2.KVM_CREATE_VM2_MAX_ATTRS
    return not full and not any(isinstance(one, vm2.Report) for one in attributes)


def send(
    handle: Handle, request: int, attributes: Sequence[Any], *, dry_run: bool = False
) -> tuple[int, tuple[Finding, ...]]:
    """One call with a list of attributes: (what the ioctl returned, the notes). KvmError with every finding."""
    wrong = next((one for one in attributes if not hasattr(one, "pack")), None)
    if wrong is not None:
        raise UsageError(f"{wrong!r} is not an attribute: give objects of kvm2.abi.vm2, such as Arm64PhysaddrSize")
    if dry_run:
        attributes = [*attributes, cast("Structure", vm2.DryRun())]
    key = tuple([one.pack() for one in attributes])
    # Taken out while it is in use: a signal handler may send the same list.
    asked = _idle.lists.pop(key, None) or AttributeList(key, _has_room(attributes))
    try:
        with Vouched(asked.address, asked.size):
            result = handle.ioctl(request, asked.address)
    except KvmError as error:
        found = asked.findings() or error.findings
        if found:
            raise KvmError(error.errno or 0, error.reason, found) from None
        raise _explained(handle, error) from None
    found = asked.findings()
    if asked.reports and len(_idle.lists) < MOST_IDLE:
        _idle.lists[key] = asked
    return result, found


def _explained(handle: Handle, error: KvmError) -> KvmError:
    from kvm2.kvm import Kvm

    return handle._explained(error) if isinstance(handle, Kvm) and error.errno == errno.EINVAL else error


def get_attr(handle: Handle, attribute: type[Structure] | int) -> Structure:
    """KVM_VM2_GET_ATTR by class or type number."""
    if isinstance(attribute, int):
        row = vm2.ATTRIBUTES.get(attribute)
        number, cls = attribute, (row.cls if row else vm2.AttrHdr)
    else:
        cls = attribute
        number = next((row.type for row in vm2.ATTRIBUTES.values() if row.cls is attribute), -1)
        if number < 0:
            raise UsageError(f"{attribute!r} is not an attribute of KVM_CREATE_VM2")
    value = Buffer(cls.SIZE)
    asked = vm2.Vm2Attr(type=number, size=cls.SIZE, attr=value.address)
    handle.ioctl(ioctls.KVM_VM2_GET_ATTR, asked)
    return cls.unpack(value.bytes())
