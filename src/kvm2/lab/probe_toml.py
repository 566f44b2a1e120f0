"""Writes a probed host as a host file: TOML with a comment for everything that it does not say."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm2.lab.probe import Probed

# Tables in which numbers are bits, not amounts.
_BITS = ("registers", "writable_masks", "ccsidr")
_WIDTH = 110


def host_file(probed: Probed) -> str:
    """The text of the file."""
    source = f"recorded by kvm2 probe: {probed.system}"
    own = {"title": f"{probed.name}, as kvm2 probe found it", **probed.facts}
    plain = {key: value for key, value in own.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in own.items() if isinstance(value, dict)}
    tables["sources"] = {"registers" if probed.facts["arch"] == "arm64" else "caps": source}
    lines = [*_comment(f"Written by kvm2 probe: {probed.system}. docs/hosts.md explains every key.")]
    if probed.notes:
        lines += ["#", "# Not found out, or not described:"]
        lines += [line for note in probed.notes for line in _comment(f"- {note}")]
    lines += [f"{key} = {_value(value, key == 'vm_types')}" for key, value in plain.items()]
    for name, table in tables.items():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {_value(value, name in _BITS)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> Iterator[str]:
    for line in textwrap.wrap(_plain(text), _WIDTH, subsequent_indent="  "):
        yield f"# {line}"


def _value(value: Any, bits: bool = False) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return hex(value) if bits and value >= 0 else str(value)
    if isinstance(value, list):
        return _list([_value(one, bits) for one in value])
    return _string(str(value))


def _list(items: list[str]) -> str:
    """On one line where it fits."""
    line = f"[{', '.join(items)}]"
    return line if len(line) <= _WIDTH else "[\n" + "".join(f"  {item},\n" for item in items) + "]"


def _string(text: str) -> str:
    """A TOML basic string: quotes, backslashes and control characters escaped."""
    escaped = "".join(_ESCAPES.get(c) or (c if c.isprintable() else f"\\u{ord(c):04X}") for c in text)
    return f'"{escaped}"'


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}


def _plain(text: str) -> str:
    """A text without control characters, which a TOML comment may not have."""
    return "".join(c if c.isprintable() else " " for c in text)
