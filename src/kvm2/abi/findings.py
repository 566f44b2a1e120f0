"""A finding: one reason why a VM cannot be had as asked, or one note. What `struct kvm_vm2_finding` carries.

A program reads the numbers; a person reads `str(finding)`. `path` and `hint` are the library's: they follow from the
numbers, so a record written by any host gets them.

>>> f = Finding(0, 2, 95, 4, 48, 32, 36, 0x1F << 32, "physaddr_bits = 48: this host allows 32..36 (PARange 0b0001)")
>>> print(f)
physaddr_bits = 48: this host allows 32..36 (PARange 0b0001); ask for 36 or fewer, or use 'auto'
>>> f.path, len(f.record()), Finding.from_record(f.record()) == f
('attrs[0].physaddr_bits', 192, True)
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvm2.abi import vm2
from kvm2.errors import errno_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm2.abi.layout import Layout

NO_ATTR = vm2.KVM_VM2_FINDING_NO_ATTR
MESSAGE_SIZE = 144
RECORD_SIZE = vm2.Vm2Finding.SIZE

# How the message of a finding on a real kernel begins: who refused.
KERNEL, LIBRARY = "kernel: ", "library: "

_ALL_ONES = (1 << 64) - 1


@dataclass(frozen=True)
class Finding:
    """One finding. `error` is an errno, 0 for a note; `offset` counts bytes inside the attribute (or the fixed struct).

    `value` is what was asked; `min`, `max` and `mask` are what this host allows, 0 where they say nothing.
    """

    attr_index: int
    attr_type: int
    error: int
    offset: int
    value: int = 0
    min: int = 0
    max: int = 0
    mask: int = 0
    message: str = ""
    known_path: str = ""
    known_hint: str = ""

    @property
    def path(self) -> str:
        """The field, `attrs[0].physaddr_bits`: from the numbers, unless the host knew it better (`known_path`)."""
        return self.known_path or path_of(self.attr_index, self.attr_type, self.offset)

    @property
    def hint(self) -> str:
        """What to do: from the numbers, unless `known_hint` says it."""
        return self.known_hint or hint_of(self)

    @property
    def by(self) -> str:
        """Who refused, on a real kernel: "kernel" or "library" (which knew what the kernel offers); "" elsewhere."""
        return next((who[:-2] for who in (KERNEL, LIBRARY) if self.message.startswith(who)), "")

    @property
    def is_error(self) -> bool:
        """False for a note."""
        return self.error != 0

    @property
    def name(self) -> str:
        """The errno's name, "note" for a note."""
        return errno_name(self.error) if self.error else "note"

    def __str__(self) -> str:
        text = self.message or f"{self.path} = {self.value:#x}: {self.name}"
        return f"{text}; {self.hint}" if self.hint else text

    def record(self) -> bytes:
        """The 192 bytes of `struct kvm_vm2_finding`; a message beyond 143 characters is cut off."""
        text = self.message.encode("ascii", "replace")[: MESSAGE_SIZE - 1].ljust(MESSAGE_SIZE, b"\0")
        numbers = (self.value & _ALL_ONES, self.min & _ALL_ONES, self.max & _ALL_ONES, self.mask & _ALL_ONES)
        return vm2.Vm2Finding(self.attr_index, self.attr_type, self.error, self.offset, *numbers, text).pack()

    @classmethod
    def from_record(cls, data: bytes | bytearray | memoryview, offset: int = 0) -> Finding:
        """The finding in the 192 bytes from `offset`."""
        raw = vm2.Vm2Finding.unpack(data, offset)
        text = raw.message.split(b"\0", 1)[0].decode("ascii", "replace")
        return cls(raw.attr_index, raw.attr_type, raw.error, raw.offset, raw.value, raw.min, raw.max, raw.mask, text)

    def to_dict(self) -> dict[str, object]:
        """For JSON: every number, and the texts."""
        keys = ("attr_index", "attr_type", "offset", "value", "min", "max", "mask", "message", "path", "hint", "by")
        return {"error": self.name, "errno": self.error} | {key: getattr(self, key) for key in keys}


def read_records(data: bytes | bytearray | memoryview, count: int, capacity: int) -> tuple[Finding, ...]:
    """The findings in a report's record area, of which `count` exist and at most `capacity` were written."""
    return tuple(Finding.from_record(data, i * RECORD_SIZE) for i in range(min(count, capacity)))


def path_of(attr_index: int, attr_type: int, offset: int) -> str:
    """The field that a finding is about: `attrs[0].physaddr_bits`; without a position `physaddr_bits`, `nr_attrs`."""
    if attr_type == 0 and attr_index != NO_ATTR and offset == 0:
        return f"attrs[{attr_index}]"  # it could not be read
    if attr_index == NO_ATTR and attr_type == 0:
        return _field_at(vm2.CreateVm2.LAYOUT, offset) or f"byte {offset}"
    row = vm2.ATTRIBUTES.get(attr_type)
    layout = row.cls.LAYOUT if row is not None else vm2.AttrHdr.LAYOUT
    name = _field_at(layout, offset) or f"byte {offset}"
    return name if attr_index == NO_ATTR else f"attrs[{attr_index}].{name}"


def _field_at(layout: Layout, offset: int) -> str:
    """The field that byte `offset` lies in, with the index in an array (capabilities grow); "" beyond the structure."""
    for entry in layout.fields:
        within = offset - entry.offset
        step = getattr(entry.type, "item", None)
        if within < 0 or (step is None and within >= entry.size):
            continue
        if step is None:
            return entry.name
        if within < entry.size or entry.name == "capabilities":
            return f"{entry.name}[{within // 8}]"
    return ""


def hint_of(finding: Finding) -> str:
    """What to do about a finding, from its numbers."""
    return next(_hints(finding), "")


def _hints(f: Finding) -> Iterator[str]:
    if f.error == errno.EOPNOTSUPP:
        yield from _host_hints(f)
    elif f.error == errno.ENOENT:
        by_header = f.attr_type == 1 or f.attr_type > 2
        yield (
            "leave it out"
            + (", or set SKIP_UNKNOWN in its flags" if by_header else "")
            + "; KVM_DESCRIBE_VM2 lists what this host takes"
        )
    elif f.error == errno.EEXIST:
        yield "give each attribute once"
    elif f.error == errno.E2BIG:
        yield "this host is older than the program or the size is wrong: ask KVM_DESCRIBE_VM2 what it takes"
    elif f.error == errno.EFAULT:
        yield "pass the address of memory that this process may access"


def _host_hints(f: Finding) -> Iterator[str]:
    kind = f.attr_type
    if kind == vm2.KVM_CREATE_VM_ATTR_ARM64_PHYSADDR_SIZE and f.max:
        yield f"ask for {f.max}{' or fewer' if f.min < f.max else ''}, or use 'auto'"
    elif kind == vm2.KVM_CREATE_VM_ATTR_ARM64_SVE_VLS:
        yield "ask for a set that this host has, or for no SVE" if f.mask else "ask for no SVE"
    elif kind == vm2.KVM_CREATE_VM_ATTR_ARCH_CAPABILITIES:
        yield f"leave out bits {f.value & ~f.mask:#x}"
    elif kind == vm2.KVM_CREATE_VM_ATTR_MAX_VCPUS and f.max:
        yield f"ask for {f.max} or fewer"
    elif kind in (vm2.KVM_CREATE_VM_ATTR_ARM64_GRANULE, vm2.KVM_CREATE_VM_ATTR_MACHINE_TYPE) and f.mask:
        yield "ask for one of " + ", ".join(str(bit) for bit in range(64) if f.mask >> bit & 1)
    elif kind == 0:
        yield "use version 0"
