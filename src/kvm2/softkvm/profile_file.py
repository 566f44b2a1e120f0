"""Reads a host file: TOML, inheritance, checks; everything wrong is a HostError with file, key, reason and choices."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvm2.errors import HostError
from kvm2.softkvm import profile, profile_build, profile_fields, profile_sources
from kvm2.softkvm.profile_keys import KEYS, kernels

if TYPE_CHECKING:
    from pathlib import Path

_TABLES = ("registers", "firmware", "ccsidr", "caps", "vm_caps", "writable_masks", "sources")
_OWN = ("title", "base", "basis", "assumed", "without", "sources")  # what a file says about itself alone
_MOST_BASES = 16


@dataclass
class Facts:
    """What a file and its bases say, merged: the nearest file wins, tables merge entry by entry."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    registers: dict[int, int] = field(default_factory=dict)
    tables: dict[str, dict[Any, Any]] = field(default_factory=lambda: {name: {} for name in _TABLES})
    bases: tuple[str, ...] = ()
    own: dict[str, Any] = field(default_factory=dict)  # the keys of this file itself
    base_sources: dict[str, str] = field(default_factory=dict)

    def wrong(self, key: str, reason: str, allowed: str = "") -> HostError:
        """The error about one key of this file."""
        return HostError(f"{self.path}: {key}: {reason}" + (f"; allowed: {allowed}" if allowed else ""))


def unknown_host(name: str) -> HostError:
    """The error for a name that is no described host: with the nearest names."""
    near = difflib.get_close_matches(name, profile.names(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "`kvm2 hosts` lists them."
    return HostError(f"no described host {name!r}: {hint} A file of your own is given by its path")


def read_profile(path: Path) -> profile.Profile:
    """The profile that a host file describes."""
    facts = _facts(path, ())
    return profile_build.build(facts)


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HostError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise HostError(f"{path}: is not TOML: {error}") from None


def _facts(path: Path, below: tuple[Path, ...]) -> Facts:
    """Reads `path` on top of its bases; `below` are the files that led here."""
    facts = Facts(path)
    own = {key: _checked(facts, key, value) for key, value in _parse(path).items()}
    facts.own = own
    if "base" in own:
        _inherit(facts, own["base"], (*below, path))
    facts.registers |= own.get("registers", {})
    for key, value in own.items():
        if key in _TABLES:
            facts.tables[key] |= value
        else:
            facts.values[key] = value
    profile_fields.apply(facts, own)
    profile_sources.check(facts)
    return facts


def _checked(facts: Facts, key: str, value: object) -> Any:
    if key not in KEYS:
        near = difflib.get_close_matches(key, KEYS, n=1)
        raise facts.wrong(key, "unknown key" + (f": did you mean {near[0]}?" if near else ""), ", ".join(KEYS))
    try:
        checked = KEYS[key].check(value)
    except ValueError as error:
        raise facts.wrong(key, str(error), KEYS[key].allowed) from None
    if key == "kernel" and checked not in kernels():
        raise facts.wrong(key, f"{checked!r} is not described", KEYS[key].allowed)
    return checked


def _inherit(facts: Facts, base: str, chain: tuple[Path, ...]) -> None:
    if "/" in base or base.endswith(".toml"):
        path = facts.path.parent / base
    else:
        path = profile.HOSTS / f"{base}.toml"
        if not path.is_file():
            raise facts.wrong("base", str(unknown_host(base)))
    if len(chain) > _MOST_BASES:
        raise facts.wrong("base", f"more than {_MOST_BASES} hosts on each other")
    if path.resolve() in (known.resolve() for known in chain):
        raise facts.wrong("base", "the hosts are based on each other: " + " -> ".join(p.name for p in (*chain, path)))
    below = _facts(path, chain)
    facts.registers |= below.registers
    facts.bases = (path.stem, *below.bases)
    facts.base_sources = profile_sources.sources(below)
    facts.values |= {key: value for key, value in below.values.items() if key not in _OWN}
    for name in _TABLES:
        if name not in _OWN:
            facts.tables[name] |= below.tables[name]
