"""Output: one JSON object, or text for people; refusals the same way."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, TextIO

import click

from kvm2.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvm2.abi.findings import Finding
    from kvm2.abi.layout import Structure

VERSION = 1


def emit(command: str, payload: dict[str, Any], *, ok: bool = True) -> None:
    """The command's one JSON object on stdout: schema, ok, and the payload."""
    print(json.dumps({"schema": f"kvm2.{command}/{VERSION}", "ok": ok, **payload}, indent=2, default=_json))


def _json(value: object) -> Any:
    if isinstance(value, bytes | bytearray):
        return bytes(value).hex()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{value!r} has no JSON form")


def refusal(words: Sequence[str], error: BaseException, kind: str = "") -> None:
    """The JSON object of a command that failed: what went wrong, with every finding."""
    command = next((word for word in words if not word.startswith("-")), "kvm2")
    emit(command, failure(error, kind), ok=False)


def failure(error: BaseException, kind: str = "") -> dict[str, Any]:
    """`error` and `findings`, as every JSON object of a failure has them."""
    if isinstance(error, KvmError):
        about = {"kind": "KvmError", "errno": error.name, "number": error.errno, "message": error.reason or str(error)}
        findings = [finding.to_dict() for finding in error.findings]
    else:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        about = {"kind": kind or type(error).__name__, "message": text}
        findings = []
    return {"error": about, "findings": findings}


def complaint(error: BaseException) -> None:
    """The same on stderr, for people."""
    if isinstance(error, KvmError):
        said = any(finding.message == error.reason for finding in error.findings)  # a host's error is its first finding
        print(f"kvm2: {error.name} ({error.strerror}){'' if said else ': ' + error.reason}", file=sys.stderr)
        show_findings(error.findings)
    elif isinstance(error, click.UsageError) and error.ctx is not None:
        print(f"{error.ctx.get_usage()}\nkvm2: {error.format_message()}", file=sys.stderr)
    else:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        print(f"kvm2: {text}", file=sys.stderr)


def program_failed(error: Exception, file: str) -> None:
    """The traceback of a user's program on stderr: the frames from `file` on, without ours above them."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    inside = next((i for i, frame in enumerate(frames) if frame.filename == file), len(frames))
    if frames[inside:]:
        print("Traceback (most recent call last):", file=sys.stderr)
        print("".join(traceback.format_list(frames[inside:])), end="", file=sys.stderr)
    print("".join(traceback.format_exception_only(error)), end="", file=sys.stderr)


def show_findings(findings: Iterable[Finding]) -> None:
    """Every finding on stderr, one a line."""
    for finding in findings:
        print(f"  {finding.name:<10} {finding.path}: {finding}", file=sys.stderr)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], file: TextIO | None = None) -> None:
    """Rows under headers, on stdout or in `file`: aligned text, or a Rich table where somebody looks at a terminal."""
    text = [[str(cell) for cell in row] for row in rows]
    out = file or sys.stdout
    if out.isatty():
        from rich.console import Console
        from rich.table import Table

        shown = Table(box=None, header_style="bold", pad_edge=False)
        for header in headers:
            shown.add_column(header, overflow="fold")
        for row in text:
            shown.add_row(*(cell.replace("[", r"\[") for cell in row))
        Console(file=out).print(shown)
        return
    widths = [max(len(row[i]) for row in [list(headers), *text]) for i in range(len(headers))]
    for row in [list(headers), *text]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), file=out)


def attribute_dict(attribute: Structure) -> dict[str, Any]:
    """An attribute's own fields (without type, size and padding), by name, after its name in the interface."""
    from kvm2.abi.vm2 import ATTRIBUTES

    number: int = attribute.type  # type: ignore[attr-defined]
    fields = [f.name for f in attribute.LAYOUT.fields if f.name not in ("type", "size", "flags", "pad")]
    row = ATTRIBUTES.get(number)
    return {"type": number, "name": row.macro if row else "?", **{name: getattr(attribute, name) for name in fields}}


def fields_text(values: dict[str, Any]) -> str:
    """`physaddr_bits=36`, without type and name."""
    shown = []
    for name, value in values.items():
        if name in ("type", "name"):
            continue
        if name == "vls":
            shown.append(f"vls={value[0]:#x} ({lengths_text(value[0]) or 'no length'})")
        elif isinstance(value, tuple):
            shown.append(f"{name}=" + ",".join(hex(word) for word in trimmed(value)))
        else:
            shown.append(f"{name}={value}")
    return " ".join(shown)


def trimmed(words: Sequence[int]) -> Sequence[int]:
    """The words up to the last that is not zero; at least one."""
    count = max((i + 1 for i, word in enumerate(words) if word), default=1)
    return words[:count]


def lengths_text(vls: int) -> str:
    """The vector lengths of a VLS word in bits: "128, 256 bits"; "" for none.

    >>> lengths_text(0b1011)
    '128, 256, 512 bits'
    """
    lengths = ", ".join(str(128 * (bit + 1)) for bit in range(64) if vls >> bit & 1)
    return f"{lengths} bits" if lengths else ""


def bits_text(mask: int) -> str:
    """The numbers of the bits that are set, as ranges: "32-36, 40".

    >>> bits_text(0b1110_0001)
    '0, 5-7'
    """
    parts, bit = [], 0
    while mask >> bit:
        if mask >> bit & 1:
            first = bit
            while mask >> (bit + 1) & 1:
                bit += 1
            parts.append(str(first) if first == bit else f"{first}-{bit}")
        bit += 1
    return ", ".join(parts)
