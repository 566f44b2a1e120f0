"""Reading attributes one by one where something is unusual: every check of the interface, every finding.

`abi.wire` reads plain lists by itself and comes here with the first entry that is not plain. The rules are those of
the kernel's copy_struct_from_user: a shorter attribute is filled up with zeros, a longer one must be zero beyond what
is known here. Checks are in the order of the bytes: type, size, flags, then the fields.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from kvm2.abi import vm2
from kvm2.abi.attrs import HEADER, HEADER_SIZE, NO_SIZE, POINTER_SIZE, Decoded, Entry, Found, Plan, ReportArea
from kvm2.abi.findings import NO_ATTR, Finding
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_ATTRS, MAX_SIZE = vm2.KVM_CREATE_VM2_MAX_ATTRS, vm2.KVM_CREATE_VM2_MAX_ATTR_SIZE
ARCH_CAPABILITIES, REPORT = vm2.KVM_CREATE_VM_ATTR_ARCH_CAPABILITIES, vm2.KVM_CREATE_VM_ATTR_REPORT
SKIP_UNKNOWN = vm2.KVM_CREATE_VM_ATTR_SKIP_UNKNOWN
_CAPABILITY_BITS = 64
_WORD = struct.Struct("=4xI")
_REPORT = struct.Struct("=QI4x")
_MASK = (1 << 64) - 1


class Walk:
    """A list while it is read: what is well-formed goes to `entries`, what is wrong to `found`."""

    def __init__(self, read: Callable[[int, int], bytes], plans: Mapping[int, Plan], entries: dict[int, Entry]) -> None:
        self.read, self.plans, self.entries = read, plans, entries
        self.seen = {entry.type: entry.position for entry in entries.values()}
        self.found: list[Found] = []
        self.broken: set[int] = set()
        self.complete = True
        self._payload_read = b""
        plain = entries.get(REPORT)
        self.report = ReportArea(plain.address, *plain.values[:2]) if plain else None

    def decoded(self) -> Decoded:
        """What was read so far, as a whole."""
        return Decoded(self.entries, self.found, self.report, self.plans, frozenset(self.broken), self.complete)

    def about_list(self, error: int, offset: int, value: int, limit: int, message: str, position: int = -1) -> None:
        """A finding about the list itself."""
        finding = Finding(NO_ATTR, 0, error, offset, value, 0, limit, 0, message)
        self.found.append(Found(position, offset, finding))

    def pointers(self, array: int, count: int | None) -> None:
        """The entries of the pointer array, read one by one; without a count up to a NULL."""
        for index in range(MAX_ATTRS + 1 if count is None else count):
            where = array + index * POINTER_SIZE
            try:
                (pointer,) = struct.unpack("=Q", self.read(where, POINTER_SIZE))
            except KvmError:
                self.complete = False
                message = f"entry {index} of attrs, at {where & _MASK:#x}, cannot be read"
                self.about_list(errno.EFAULT, 8, where & _MASK, 0, message, -1 if index == 0 else index)
                return
            if count is None and (not pointer or index == MAX_ATTRS):
                if pointer:
                    self._refuse(index, 0, errno.E2BIG, 0, pointer, 0, 0, f"attrs[{index}]: at most {MAX_ATTRS}")
                    self.complete = False
                return
            self.entry(index, pointer)

    def entry(self, index: int, pointer: int, header: bytes = b"", payload: bytes = b"") -> None:
        """One attribute; `header` and `payload` where these bytes of it were read already."""
        self._payload_read = payload
        if not pointer:
            self._lost(index, 0, f"attrs[{index}] is NULL, and nr_attrs says that there is an attribute")
            return
        if not header:
            try:
                header = self.read(pointer, HEADER_SIZE)
            except KvmError:
                self._lost(index, pointer, f"attrs[{index}], at {pointer:#x}, cannot be read")
                return
        kind, size, flags = HEADER.unpack(header)
        errors = len(self.found)
        first = self.seen.setdefault(kind, index)
        if first != index:
            self._refuse(
                index, kind, errno.EEXIST, 0, kind, 0, 0, f"type = {kind}: attrs[{first}] is the same attribute"
            )
        plan = self.plans.get(kind)
        if plan is None:
            self._unknown(index, kind, size, flags)
            return
        values: tuple[int, ...] | None
        if plan.known == NO_SIZE:
            values = _WORD.unpack(header)
        else:
            values = self._sized(index, pointer, plan, size, flags)
        if values is not None:
            self._rules(index, plan, values)
        if len(self.found) == errors and values is not None:
            self.entries[kind] = Entry(index, kind, flags, values, pointer)
        else:
            self.broken.add(kind)

    def _lost(self, index: int, address: int, message: str) -> None:
        self.complete = False
        self._refuse(index, 0, errno.EFAULT, 0, address, 0, 0, message)

    def _refuse(
        self, index: int, kind: int, error: int, offset: int, value: int, low: int, high: int, why: str, mask: int = 0
    ) -> None:
        finding = Finding(index, kind, error, offset, value, low, high, mask, why)
        self.found.append(Found(index, offset, finding))

    def _unknown(self, index: int, kind: int, size: int, flags: int) -> None:
        """Types 0 and 2 have no common header (2 never had one, 0 is no attribute): nothing of them can be skipped."""
        headed = kind not in (0, vm2.KVM_CREATE_VM_ATTR_ARM64_PHYSADDR_SIZE)
        if headed and flags & SKIP_UNKNOWN:
            self._refuse(index, kind, 0, 0, kind, 0, 0, f"type = {kind}: not known to this host, skipped")
        else:
            self._refuse(index, kind, errno.ENOENT, 0, kind, 0, 0, f"type = {kind}: this host knows no such attribute")
            self.broken.add(kind)
        if headed:
            self._size(index, kind, size, HEADER_SIZE)
            row = vm2.ATTRIBUTES.get(kind)
            self._flags(index, kind, flags, vm2.SKIP_FLAGS if row is None else row.skip)

    def _size(self, index: int, kind: int, size: int, published: int) -> bool:
        """Whether the size field is one that an attribute can have; `published` in bytes."""
        unit, low, high = (8, published, MAX_SIZE)
        if kind == ARCH_CAPABILITIES:
            unit, low, high = _CAPABILITY_BITS, (published - HEADER_SIZE) * 8, vm2.KVM_CREATE_VM2_MAX_CAPABILITIES
        what = "bits of capabilities" if kind == ARCH_CAPABILITIES else "bytes"
        if size < low or size % unit:
            why = f"size = {size} {what}: a multiple of {unit} from {low} to {high}"
            self._refuse(index, kind, errno.EINVAL, 4, size, low, high, why)
        elif size > high:
            self._refuse(index, kind, errno.E2BIG, 4, size, low, high, f"size = {size} {what}: at most {high}")
        else:
            return True
        return False

    def _flags(self, index: int, kind: int, flags: int, allowed: int) -> None:
        if flags & ~allowed:
            why = f"flags = {flags:#x}: bits {flags & ~allowed:#x} are not allowed here"
            self._refuse(index, kind, errno.EINVAL, 6, flags, 0, allowed, why, allowed)

    def _sized(self, index: int, pointer: int, plan: Plan, size: int, flags: int) -> tuple[int, ...] | None:
        """Size, flags and bytes of an attribute that has a size; None where the bytes cannot be had."""
        kind = plan.row.type
        fits = self._size(index, kind, size, plan.row.published)
        self._flags(index, kind, flags, plan.row.skip)
        length = HEADER_SIZE + size // 8 if kind == ARCH_CAPABILITIES else size
        if not fits:
            if kind == REPORT and size >= plan.row.published:
                self._payload(index, pointer, plan, plan.row.published)
            return None
        payload = self._payload(index, pointer, plan, length)
        if payload is None:
            return None
        self._tail(index, plan, payload[plan.rest :])
        return plan.codec.unpack(payload[: plan.rest].ljust(plan.rest, b"\0"))

    def _payload(self, index: int, pointer: int, plan: Plan, length: int) -> bytes | None:
        kind, rest = plan.row.type, length - HEADER_SIZE
        if not rest:
            return b""
        try:
            payload = self._payload_read or self.read(pointer + HEADER_SIZE, rest)
        except KvmError:
            where = pointer + HEADER_SIZE
            why = f"{rest} bytes of {plan.row.macro} at {where & _MASK:#x} cannot be read"
            self._refuse(index, kind, errno.EFAULT, HEADER_SIZE, where & _MASK, 0, 0, why)
            return None
        if kind == REPORT and self.report is None:
            self.report = ReportArea(pointer, *_REPORT.unpack_from(payload))
        return payload

    def _tail(self, index: int, plan: Plan, tail: bytes) -> None:
        """Bytes beyond what is known here must be zero; the finding names the first 8 of them that are not."""
        if not any(tail):
            return
        word = next(at for at in range(0, len(tail), 8) if any(tail[at : at + 8]))
        offset = HEADER_SIZE + plan.rest + word
        (value,) = struct.unpack("=Q", tail[word : word + 8])
        why = f"byte {offset} of {plan.row.macro} is not zero: this host knows {plan.row.cls.SIZE} bytes of it"
        self._refuse(index, plan.row.type, errno.E2BIG, offset, value, 0, 0, why)

    def _rules(self, index: int, plan: Plan, values: tuple[int, ...]) -> None:
        for field in plan.rules:
            value = field.of(values)
            if not field.rule.allows(value):
                number = value if isinstance(value, int) else value[0]
                why = f"{field.name} = {number}: must be {field.rule.text}"
                rule = field.rule
                self._refuse(
                    index, plan.row.type, errno.EINVAL, field.offset, number, rule.min, rule.max, why, rule.mask
                )
