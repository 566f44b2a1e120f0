"""What goes into an ioctl and what comes out of it, read from the caller's memory by the row that declares it.

Nothing here fails: an address that cannot be read is shown as such, an ioctl that nobody declared as its number.

>>> from kvm2.abi import ioctls
>>> from kvm2.abi.wire import Buffer
>>> row = ioctls.by_number(ioctls.KVM_CHECK_EXTENSION, "system")
>>> show.text(before(row, 165, Buffer(0, b"")))
'KVM_CAP_ARM_VM_IPA_SIZE'
>>> macro_text(0x4010AE55)
'_IOW(0xae, 0x55, 16)'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvm2.abi import exits, ioc, onereg, show, vm2
from kvm2.abi import ioctls as io
from kvm2.abi.attrs import HEADER, HEADER_SIZE
from kvm2.abi.findings import RECORD_SIZE, Finding, read_records
from kvm2.abi.layout import Scalar, Structure, extent
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm2.abi.attrs import Readable
    from kvm2.abi.ioc import Ioctl
    from kvm2.abi.show import Value

LISTS = (io.KVM_CREATE_VM2, io.KVM_VM2_SET_ATTRS, io.KVM_VM2_COMMIT)
MOST_FINDINGS = 1024
_MOST_TAIL = 4096
# The field that counts the items behind a head; struct kvm_signal_mask counts bytes.
_COUNTS = ("n", "nr", "nmsrs", "nent", "nevents")
_MACROS = {"": "_IO", "w": "_IOW", "r": "_IOR", "wr": "_IOWR"}


def unreadable(address: int) -> str:
    """What stands for memory that cannot be read."""
    return f"unreadable at {address:#x}" if address else "NULL"


def macro_text(request: int) -> str:
    """The number of an ioctl that no row declares, in the form of the macro that makes it."""
    parts = ioc.split(request & 0xFFFF_FFFF)
    size = f", {parts.size}" if parts.direction else ""
    return f"{_MACROS[parts.direction]}({parts.kind:#x}, {parts.nr:#04x}{size})"


def is_input(row: Ioctl) -> bool:
    """Whether the caller writes the payload. Three old requests say `r` and mean the contrary (KVM_SET_IRQCHIP)."""
    return row.direction != "r" or ("_GET_" not in row.name and "PREFERRED" not in row.name)


def is_output(row: Ioctl) -> bool:
    """Whether the kernel may write the payload."""
    return row.direction == "wr" or (row.direction == "r" and "_SET_" not in row.name)


def before(row: Ioctl, arg: int, memory: Readable, arch: str = "arm64") -> Value | None:
    """The argument as it goes in; None where there is nothing to show."""
    if row.payload is None:
        if "KVM_CAP_" in row.arg:
            return show.capability(arg)
        return arg if row.arg or arg else None
    if not is_input(row):
        return None
    if row.number in LISTS:
        return attribute_list(arg, memory, arch)
    value = _payload(row, arg, memory, arch)
    if isinstance(value, dict) and "items" in value and _is_room(row):
        del value["items"]
    if row.name == "KVM_SET_ONE_REG":
        return _with_register(value, arg, memory, arch)
    if row.name == "KVM_GET_ONE_REG" and isinstance(value, dict):
        value.pop("addr")
    return value


def after(row: Ioctl, arg: int, memory: Readable, arch: str, went_in: Value | None, ok: bool) -> Value | None:
    """What came back in memory; None where nothing did, or nothing that is not shown already."""
    if row.name == "KVM_GET_ONE_REG" and ok:
        value = _with_register({}, arg, memory, arch)
        return value["value"] if isinstance(value, dict) else value
    if not is_output(row) or row.payload is None:
        return None
    if ok and row.number == io.KVM_DESCRIBE_VM2:
        return _described(arg, memory, arch)
    if ok and row.number == io.KVM_VM2_GET_ATTR:
        return _got_attribute(arg, memory, arch)
    if not ok and row.direction == "r":
        return None
    value = _payload(row, arg, memory, arch)
    return None if value == went_in else value


def _got_attribute(arg: int, memory: Readable, arch: str) -> Value:
    try:
        asked = vm2.Vm2Attr.unpack(memory.read(arg, vm2.Vm2Attr.SIZE))
    except KvmError:
        return unreadable(arg)
    return attribute(asked.attr, memory, arch)


def _is_room(row: Ioctl) -> bool:
    """Whether the count goes in as the room that there is: what lies behind the head means nothing yet."""
    head: Any = row.payload
    return "_GET_" in row.name and any(f.name in _COUNTS and f.doc.startswith("in: room") for f in head.LAYOUT.fields)


def _payload(row: Ioctl, arg: int, memory: Readable, arch: str) -> Value:
    size = extent(row.payload)[0]
    try:
        data = memory.read(arg, size)
    except KvmError:
        return unreadable(arg)
    if isinstance(row.payload, Scalar):
        return int.from_bytes(data, "little", signed=row.payload.code.islower())
    structure: Structure = row.payload.unpack(data)  # type: ignore[union-attr]
    value = show.fields(structure, arch)
    if row.tail is not None:
        value["items"] = _tail(row, structure, arg + size, memory, arch)
    return value


def _tail(row: Ioctl, head: Structure, address: int, memory: Readable, arch: str) -> Value:
    size = extent(row.tail)[0]
    count = next((getattr(head, name) for name in _COUNTS if hasattr(head, name)), None)
    if count is None:
        count = getattr(head, "len", 0) // size
    try:
        data = memory.read(address, min(count, _MOST_TAIL) * size)
    except KvmError:
        return unreadable(address)
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    if isinstance(row.tail, Scalar):
        numbers = [int.from_bytes(part, "little") for part in parts]
        return [show.register(number) for number in numbers] if row.name == "KVM_GET_REG_LIST" else numbers
    return [show.fields(row.tail.unpack(part), arch) for part in parts]  # type: ignore[union-attr]


def _with_register(value: Value, arg: int, memory: Readable, arch: str) -> Value:
    """struct kvm_one_reg with the value behind it."""
    from kvm2.abi.structs import OneReg

    try:
        reg = OneReg.unpack(memory.read(arg, OneReg.SIZE))
    except KvmError:
        return unreadable(arg)
    if isinstance(value, dict):
        value.pop("addr", None)
    size = onereg.size_of(reg.id)
    try:
        data = memory.read(reg.addr, size)
    except KvmError:
        return {**value, "value": unreadable(reg.addr)}
    return {**value, "value": show.Hex(int.from_bytes(data, "little")) if size <= 8 else data}


def _described(arg: int, memory: Readable, arch: str) -> Value:
    try:
        asked = vm2.DescribeVm2.unpack(memory.read(arg, vm2.DescribeVm2.SIZE))
        data = memory.read(asked.entries, min(asked.count, vm2.KVM_CREATE_VM2_MAX_ATTRS) * vm2.Vm2AttrInfo.SIZE)
    except KvmError:
        return unreadable(arg)
    found = []
    for at in range(0, len(data), vm2.Vm2AttrInfo.SIZE):
        values = show.fields(vm2.Vm2AttrInfo.unpack(data, at), arch)
        kind = values.pop("type")
        row = vm2.ATTRIBUTES.get(kind.number if isinstance(kind, show.Named) else kind)
        found.append(show.Record(row.macro if row else f"attribute {show.text(kind)}", values))
    return found


# -- lists of attributes


def pointers(arg: int, memory: Readable) -> Iterator[int]:
    """The addresses of a list's attributes; KvmError(EFAULT) where the list cannot be read."""
    outer = vm2.CreateVm2.unpack(memory.read(arg, vm2.CreateVm2.SIZE))
    for index in range(min(outer.nr_attrs or vm2.KVM_CREATE_VM2_MAX_ATTRS, vm2.KVM_CREATE_VM2_MAX_ATTRS)):
        if not outer.attrs:
            return
        pointer = int.from_bytes(memory.read(outer.attrs + 8 * index, 8), "little")
        if not pointer and not outer.nr_attrs:
            return
        yield pointer


def attribute_list(arg: int, memory: Readable, arch: str = "arm64") -> Value:
    """Every attribute of the list whose struct kvm_create_vm2 is at `arg`."""
    try:
        outer = vm2.CreateVm2.unpack(memory.read(arg, vm2.CreateVm2.SIZE))
    except KvmError:
        return unreadable(arg)
    found: list[Value] = []
    try:
        found.extend(attribute(pointer, memory, arch) for pointer in pointers(arg, memory))
    except KvmError:
        found.append(unreadable(outer.attrs + 8 * len(found)))
    odd = {name: value for name, value in (("version", outer.version), ("pad", outer.pad)) if value}
    if outer.nr_attrs > vm2.KVM_CREATE_VM2_MAX_ATTRS:
        odd["nr_attrs"] = outer.nr_attrs
    return {**odd, "attrs": found} if odd else found


def attribute(pointer: int, memory: Readable, arch: str = "arm64") -> Value:
    """One attribute. Its size is shown where it is another than the declared one, its flags where there are some."""
    try:
        kind, size, flags = HEADER.unpack(memory.read(pointer, HEADER_SIZE))
    except KvmError:
        return unreadable(pointer)
    row = vm2.ATTRIBUTES.get(kind)
    if row is None:
        return show.Record(f"attribute {kind}", {"size": size, "flags": _flags(flags, arch)})
    sized = "size" in (f.name for f in row.cls.LAYOUT.fields)
    length = row.cls.SIZE
    if sized and row.known == row.cls.SIZE:
        length = max(HEADER_SIZE, min(size, row.cls.SIZE))
    try:
        data = memory.read(pointer, length)
    except KvmError:
        return show.Record(row.macro, {"size": size, "payload": unreadable(pointer + HEADER_SIZE)})
    values = show.fields(row.cls.unpack(data.ljust(row.cls.SIZE, b"\0")), arch)
    values.pop("type")
    if sized:
        values["flags"] = _flags(flags, arch)
        values = {k: v for k, v in values.items() if (k, v) not in (("flags", 0), ("size", row.known))}
    return show.Record(row.macro, values)


def _flags(flags: int, arch: str) -> Value:
    known = show.constants_of(vm2.AttrHdr, "flags", arch)
    return known.of(flags) if known else flags


def types_of(arg: int, memory: Readable) -> set[int]:
    """The types in a list, as far as it can be read."""
    found = set()
    try:
        for pointer in pointers(arg, memory):
            found.add(int.from_bytes(memory.read(pointer, 4), "little"))
    except KvmError:
        pass
    return found


def findings(arg: int, memory: Readable) -> tuple[Finding, ...]:
    """What the host wrote into the list's REPORT; () where there is none, or none that can be read."""
    try:
        for pointer in pointers(arg, memory):
            kind, size, _ = HEADER.unpack(memory.read(pointer, HEADER_SIZE))
            if kind == vm2.KVM_CREATE_VM_ATTR_REPORT and size >= vm2.Report.SIZE:
                report = vm2.Report.unpack(memory.read(pointer, vm2.Report.SIZE))
                count = min(report.count, report.capacity, MOST_FINDINGS)
                return read_records(memory.read(report.records, count * RECORD_SIZE), count, count)
    except KvmError:
        pass
    return ()


# -- KVM_RUN


def exit_of(area: memoryview, arch: str = "arm64") -> show.Record:
    """The exit that a kvm_run area describes."""
    reason = int.from_bytes(area[exits.EXIT_REASON_OFFSET : exits.EXIT_REASON_OFFSET + 4], "little")
    cls: Any = exits.payload_of(reason, arch)
    if cls is None:
        return show.Record(exits.name_of(reason), {})
    payload = cls.unpack(area, exits.UNION_OFFSET)
    values = show.fields(payload, arch)
    if isinstance(payload, exits.Mmio):
        values["data"] = payload.data[: min(payload.len, 8)]
        if not payload.is_write:
            del values["data"]
    elif isinstance(payload, exits.Io):
        values["data"] = _port_data(area, payload)
        if payload.direction != exits.KVM_EXIT_IO_OUT:
            del values["data"]
        del values["data_offset"]
    elif "ndata" in values:
        values["data"] = values["data"][: values.pop("ndata")]
    return show.Record(exits.name_of(reason), values)


def _port_data(area: memoryview, access: exits.Io) -> bytes:
    end = access.data_offset + access.size * access.count
    return bytes(area[access.data_offset : end]) if end <= len(area) else b""


def answer_of(area: memoryview) -> bytes | None:
    """What the caller put into the area for the guest's read that ended the last KVM_RUN; None where it was no read."""
    reason = int.from_bytes(area[exits.EXIT_REASON_OFFSET : exits.EXIT_REASON_OFFSET + 4], "little")
    if reason == exits.KVM_EXIT_MMIO:
        access = exits.Mmio.unpack(area, exits.UNION_OFFSET)
        return None if access.is_write else access.data[: min(access.len, 8)]
    if reason == exits.KVM_EXIT_IO:
        port = exits.Io.unpack(area, exits.UNION_OFFSET)
        return None if port.direction == exits.KVM_EXIT_IO_OUT else _port_data(area, port)
    return None
