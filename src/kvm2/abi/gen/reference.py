"""`docs/reference.md`: every ioctl, attribute, structure, capability, register id and exit, from the declarations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvm2.abi import caps, exits, ioctls, onereg, sysreg_fields, sysregs, vm2
from kvm2.abi.gen import MARKER
from kvm2.abi.gen.cdecl import docstring, is_named, member_text, type_name
from kvm2.abi.gen.header import new_ioctls
from kvm2.abi.gen.mainline import structures
from kvm2.abi.layout import Structure, UnionOf

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvm2.abi.ioc import Ioctl


def _table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |\n"

    return line(headers) + line(["---"] * len(headers)) + "".join(line(row) for row in rows) + "\n"


def _kind(kind: Any, name: str) -> str:
    if isinstance(kind, UnionOf):
        return f"union {{ {'; '.join(member_text(n, k) for n, k in kind.members)} }} {name}"
    return member_text(name, kind)


def _field_rows(cls: type[Structure]) -> list[tuple[object, ...]]:
    return [(f.offset, f.size, f"`{_kind(f.type, f.c_name)}`", f.doc) for f in cls.LAYOUT.fields]


def _struct(cls: type[Structure]) -> str:
    name = f"struct {cls.LAYOUT.c_name}" if is_named(cls) else f"`{cls.__name__}`, a member without a tag"
    text = f"### {name}\n\n{docstring(cls)} {cls.SIZE} bytes.\n\n"
    return text + _table(("offset", "size", "field", ""), _field_rows(cls))


def _ioctl_rows(rows: Iterable[Ioctl]) -> str:
    cells = []
    for row in rows:
        payload = f"`{type_name(row.payload)}`" if row.payload else row.arg or "-"
        doc = row.doc + (f" Returns {row.returns}." if row.returns else "")
        cap = f"`{row.cap}`" if row.cap else "-"
        on = ", ".join({"system": "/dev/kvm"}.get(kind, kind) for kind in row.on)
        cells.append((f"`{row.name}`", f"`{row.number:#010x}`", on, payload, cap, ", ".join(row.arches), doc))
    return _table(("ioctl", "number", "on", "argument", "capability", "architectures", ""), cells)


def _attributes() -> str:
    text = "## Attributes\n\nThe entries of the list that `KVM_CREATE_VM2` takes; offsets are within an attribute.\n\n"
    for row in vm2.ATTRIBUTES.values():
        flags = []
        if not row.has_value:
            flags.append("it has no value to read back")
        if not row.negotiable:
            flags.append("not in the negotiation phase")
        if not row.skip:
            flags.append("a host that does not know it always refuses")
        arches = "every architecture" if len(row.arches) > 2 else ", ".join(sorted(row.arches))
        text += f"### {row.type}: {row.constant}\n\n{row.doc} For {arches}"
        text += f"; {'; '.join(flags)}.\n\n" if flags else ".\n\n"
        cells = []
        for f in row.cls.LAYOUT.fields:
            notes = [f.doc] if f.doc else []
            if f.name in row.rules:
                notes.append(f"Every host refuses what is not {row.rules[f.name].text} (EINVAL)")
            cells.append((f.offset, f.size, f"`{_kind(f.type, f.c_name)}`", ". ".join(notes)))
        text += f"`struct {row.c_name}`, {row.cls.SIZE} bytes:\n\n" + _table(("offset", "size", "field", ""), cells)
    return text


def _constants() -> str:
    from kvm2.abi.gen.header import constants

    rows = [(f"`{name}`", f"`{value:#x}`") for name, value in constants().items()]
    return "## Constants of the new interface\n\n" + _table(("name", "value"), rows)


def _exits() -> str:
    text = "## Exits\n\nWhat `kvm_run.exit_reason` says, and the member of the union at offset "
    text += f"{exits.UNION_OFFSET} of `struct kvm_run` ({exits.RUN_SIZE} bytes).\n\n"
    rows = [
        (row.number, f"`{row.name}`", f"`{row.member}`" if row.member else "-", ", ".join(row.arches) or "-", row.doc)
        for row in exits.EXITS.values()
    ]
    text += _table(("number", "name", "member", "architectures", ""), rows)
    text += _struct(exits.Run)
    payloads = {row.member: row.payload for row in exits.EXITS.values() if row.payload}
    for member, payload in payloads.items():
        text += f"### kvm_run.{member}\n\n{docstring(payload)} {payload.SIZE} bytes at {exits.UNION_OFFSET}; "
        text += "offsets are from there.\n\n" + _table(("offset", "size", "field", ""), _field_rows(payload))
    return text


def _registers() -> str:
    text = "## Registers\n\n`KVM_GET_ONE_REG` ids of arm64.\n\n### Core registers\n\n"
    rows = [(f"`{reg.name}`", f"`{reg.id:#018x}`", reg.size) for reg in onereg.CORE_REGS]
    text += _table(("register", "id", "bytes"), rows) + "### Firmware, SVE, timers\n\n"
    named = {k: v for k, v in vars(onereg).items() if isinstance(v, int) and v >> 56 == 0x60 and v & 0xFFFF0000}
    text += _table(("register", "id"), [(f"`{name}`", f"`{value:#018x}`") for name, value in named.items()])
    samples = {"Z0": onereg.sve_z(0), "P0": onereg.sve_p(0), "FFR": onereg.sve_ffr(), "CCSIDR[0]": onereg.ccsidr(0)}
    text += _table(("first of", "id"), [(f"`{name}`", f"`{value:#018x}`") for name, value in samples.items()])
    return text + _system_registers() + _fields()


def _system_registers() -> str:
    rows = []
    for name, value in sorted(sysregs.SYSREGS.items(), key=lambda pair: pair[1]):
        known = "yes" if value in sysregs.SYS_REG_DESCS else ""
        parts = ", ".join(str(part) for part in sysregs.split(value))
        rows.append((f"`{name}`", parts, f"`{onereg.sysreg(value):#018x}`", known))
    headers = ("register", "op0, op1, CRn, CRm, op2", "id", "in KVM's sys_reg_descs")
    return "### System registers\n\n" + _table(headers, rows)


def _fields() -> str:
    rows = []
    for register in sysreg_fields.REGISTERS:
        for f in reversed(sysreg_fields.fields(register)):
            bits = f"{f.lsb + f.width - 1}:{f.lsb}" if f.width > 1 else str(f.lsb)
            rows.append((f"`{register}`", f"`{f.name}`", bits, "signed" if f.signed else ""))
    return "### Fields\n\n" + _table(("register", "field", "bits", ""), rows)


def reference() -> str:
    """The text of reference.md."""
    arm, x86 = structures("arm64"), structures("x86_64")
    common = [cls for cls in arm if cls in x86]
    text = f"<!-- {MARKER.format('reference')} -->\n# Reference\n\n"
    text += "Sizes and offsets are bytes. Mainline is Linux 6.12.\n\n"
    text += "## The new ioctls\n\n" + _ioctl_rows(new_ioctls()) + _attributes() + _constants()
    text += "## Structures of the new interface\n\n"
    own = {row.cls for row in vm2.ATTRIBUTES.values()}
    text += "".join(_struct(cls) for cls in vm2.STRUCTURES if cls not in own)
    rest = [row for row in ioctls.ioctls() if row not in new_ioctls()]
    text += "## Mainline's ioctls\n\n" + _ioctl_rows(rest)
    rows = [(number, f"`{name}`", caps.MEANINGS.get(number, "")) for name, number in caps.CAPABILITIES.items()]
    text += "## Capabilities\n\nWhat the answer means is said of those that arm64 has.\n\n"
    text += _table(("number", "name", "answer"), rows)
    text += _exits()
    text += "## Mainline's structures: both architectures\n\n" + "".join(map(_struct, common))
    text += "## Mainline's structures: arm64\n\n" + "".join(_struct(cls) for cls in arm if cls not in common)
    text += "## Mainline's structures: x86-64\n\n" + "".join(_struct(cls) for cls in x86 if cls not in common)
    return text + _registers()
