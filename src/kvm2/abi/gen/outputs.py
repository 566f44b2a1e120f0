"""Which file each generator writes, and the comparison with what is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _header() -> str:
    from kvm2.abi.gen.header import header

    return header()


def _check() -> str:
    from kvm2.abi.gen.header import check

    return check()


def _mainline_arm64() -> str:
    from kvm2.abi.gen.mainline import check

    return check("arm64")


def _mainline_x86_64() -> str:
    from kvm2.abi.gen.mainline import check

    return check("x86_64")


def _reference() -> str:
    from kvm2.abi.gen.reference import reference

    return reference()


def _syzlang() -> str:
    from kvm2.abi.gen.syzlang import syzlang

    return syzlang()


def _constants() -> str:
    from kvm2.abi.gen.syzlang import constants

    return constants()


def _schema() -> str:
    from kvm2.abi.gen.schema import schema

    return schema()


def _api() -> str:
    from kvm2.abi.gen.api import api

    return api()


OUTPUTS: Final[dict[str, Callable[[], str]]] = {
    "generated/kvm2.h": _header,
    "generated/kvm2_check.c": _check,
    "generated/mainline_arm64.c": _mainline_arm64,
    "generated/mainline_x86_64.c": _mainline_x86_64,
    "generated/kvm2.syz.txt": _syzlang,
    "generated/kvm2.syz.txt.const": _constants,
    "generated/kvm2.schema.json": _schema,
    "docs/reference.md": _reference,
    "docs/api.rst": _api,
}
"""Path inside the project -> what makes the text."""


def stale(root: Path) -> list[str]:
    """The outputs whose file is missing or differs from what the registry says."""
    found = []
    for path, make in OUTPUTS.items():
        file = root / path
        if not file.is_file() or file.read_text(encoding="utf-8") != make():
            found.append(path)
    return found


def write(root: Path) -> list[str]:
    """Writes every output that is stale; their paths."""
    changed = stale(root)
    for path in changed:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(OUTPUTS[path](), encoding="utf-8")
    return changed
