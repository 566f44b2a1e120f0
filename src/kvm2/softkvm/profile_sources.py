"""Where each figure of a described host is from, and which figures nobody stated.

A file with `basis = "sourced"` describes a machine by published figures: what it does not source itself is assumed, and
said to be. Every other file passes on what its base says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm2.softkvm.profile_keys import KEYS

if TYPE_CHECKING:
    from kvm2.softkvm.profile_file import Facts

# The figures that decide what a host answers, and those of them that are fields of its ID registers.
_FIELDS = ("mode", "pa_bits", "granules", "lpa2", "vmid_bits", "sve_vqs")
FIGURES = ("kernel", "page_shift", *_FIELDS, "gic", "registers", "firmware")


def check(facts: Facts) -> None:
    """Refuses a source, or an assumption, about something that is no key."""
    for table, keys in (("sources", facts.tables["sources"]), ("assumed", facts.values.get("assumed", ()))):
        for key in keys:
            if key not in KEYS:
                raise facts.wrong(table, f"{key!r} is not a key of host files", ", ".join(KEYS))


def own_source(facts: Facts, key: str) -> str | None:
    """What this file itself says about the figure: its source, or that of the registers it is a field of."""
    stated: dict[str, str] = facts.tables["sources"]
    if key in stated:
        return stated[key]
    recorded = facts.values.get("basis") == "recorded"  # one record gives every figure
    if "registers" in stated and (recorded or (key in _FIELDS and key not in facts.own)):
        return stated["registers"]
    return None


def assumed(facts: Facts) -> tuple[str, ...]:
    """The figures that this file neither sources nor could: a machine's base or a default stands in."""
    listed = tuple(facts.values.get("assumed", ()))
    if facts.values.get("basis") != "sourced":
        return listed
    return tuple(dict.fromkeys((*listed, *(key for key in FIGURES if own_source(facts, key) is None))))


def sources(facts: Facts) -> dict[str, str]:
    """For every figure where it is from, and this file's other sources."""
    nearest = facts.bases[0] if facts.bases else ""
    found = dict(facts.tables["sources"])
    guesses = assumed(facts)
    for key in FIGURES:
        own = own_source(facts, key)
        if own is not None and key not in guesses:
            found[key] = own
        elif key in guesses:
            found[key] = f"assumed: as {nearest}" if nearest and key not in facts.own else "assumed"
        elif key in facts.own:
            found[key] = f"{facts.path.name}"
        else:
            found[key] = facts.base_sources.get(key, "the default")
    return found
