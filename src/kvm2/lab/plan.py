"""Which IPA size a memory map needs, and which described hosts can give it.

The smallest size that holds the map is the number of bits of its last byte's address, and at least 32.

>>> from kvm2.memorymap import parse_memory_map
>>> from kvm2.softkvm.profile import load
>>> made = plan(parse_memory_map(["512M@1G", "64G@1T"]), [load("apple-m1"), load("graviton3")])
>>> made.ipa_bits, [(host.name, host.fits) for host in made.hosts]
(41, [('apple-m1', False), ('graviton3', True)])
>>> made.hosts[0].reasons
('the memory needs 41 bits, this host has 36 (PARange)',)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvm2.abi.vm2 import ARM64_DEFAULT_IPA_BITS
from kvm2.softkvm.stage2_format import stage2_format
from kvm2.softkvm.typeword import word_of
from kvm2.spec import MemoryRange, smallest_ipa_bits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvm2.softkvm.profile import Profile

SCHEMA = "kvm2.plan/1"
SMALLEST_IPA_BITS = 32
MOST_SLOT_PAGES = (1 << 31) - 1  # KVM_MEM_MAX_NR_PAGES
_LIST_OR_FIXED = 0b11  # of KVM_CAP_CREATE_VM2


@dataclass(frozen=True)
class Tables:
    """The stage-2 format that the VM would get."""

    granule: int
    levels: int
    start_level: int
    concatenated: int
    t0sz: int
    sl0: int


@dataclass(frozen=True)
class HostPlan:
    """What one host says to the map. `call` and `type` say how to ask; `reasons` why it cannot be had."""

    name: str
    title: str
    fits: bool
    ipa_bits: int | None
    limit: int
    default_fits: bool  # KVM_CREATE_VM with type 0 would do
    call: str | None
    type: int | None
    tables: Tables | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The map, the smallest IPA size in bits that holds it, and every host's answer."""

    memory: tuple[MemoryRange, ...]
    granule: int | None
    ipa_bits: int
    hosts: tuple[HostPlan, ...]

    @property
    def fits(self) -> bool:
        """Whether every host can take it."""
        return all(host.fits for host in self.hosts)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, schema `kvm2.plan/1`."""
        return {
            "schema": SCHEMA,
            "memory": [{"address": piece.base, "size": piece.size} for piece in self.memory],
            "granule": self.granule,
            "ipa_bits": self.ipa_bits,
            "fits": [host.name for host in self.hosts if host.fits],
            "refused": [host.name for host in self.hosts if not host.fits],
            "hosts": [asdict(host) | {"reasons": list(host.reasons)} for host in self.hosts],
        }


def plan(memory: Sequence[MemoryRange], hosts: Sequence[Profile], granule: int | None = None) -> Plan:
    """Asks every host for the map; `granule` is log2 of the stage-2 granule, by default each host's page."""
    bits = max(SMALLEST_IPA_BITS, smallest_ipa_bits(memory))
    return Plan(tuple(memory), granule, bits, tuple(_host(memory, bits, host, granule) for host in hosts))


def _host(memory: Sequence[MemoryRange], bits: int, host: Profile, granule: int | None) -> HostPlan:
    shift = granule or host.page_shift
    limit = host.ipa_limit_for(shift)
    reasons = list(_reasons(memory, bits, host, shift))
    chosen = _chosen(bits, host, limit, granule) if not reasons else None
    if chosen is None and not reasons:
        said = word_of(host.type_word).range_text
        reasons.append(f"its only way to ask is the type word {host.type_word!r}, which cannot: it says {said}")
    default = limit if host.mode == "protected" else ARM64_DEFAULT_IPA_BITS
    return HostPlan(
        name=host.name,
        title=host.title,
        fits=not reasons,
        ipa_bits=chosen[0] if chosen else None,
        limit=limit,
        default_fits=not reasons and granule is None and bits <= default <= limit,
        call=chosen[1] if chosen else None,
        type=chosen[2] if chosen else None,
        tables=_tables(host, chosen[0], shift) if chosen else None,
        reasons=tuple(reasons),
    )


def _reasons(memory: Sequence[MemoryRange], bits: int, host: Profile, shift: int) -> Iterator[str]:
    """Everything about the map that this host refuses."""
    if host.arch != "arm64":
        yield f"an {host.arch} host has no IPA size"
        return
    if shift not in host.granules:
        have = ", ".join(_size(1 << granule) for granule in host.granules)
        yield f"no stage-2 granule of {_size(1 << shift)}: it has {have}"
        return
    if shift != host.page_shift and not host.create_vm2 & 1:
        yield f"a granule other than its page of {_size(1 << host.page_shift)} needs KVM_CREATE_VM2 with its list"
    limit = host.ipa_limit_for(shift)
    if bits > limit:
        why = "PARange" if limit == host.pa_bits else f"PARange {host.pa_bits}, but 48 without LPA2 or 64K pages"
        yield f"the memory needs {bits} bits, this host has {limit} ({why})"
    unit = 1 << max(shift, host.page_shift)
    for piece in memory:
        yield from _misaligned(piece, unit)
        if piece.size >> host.page_shift > MOST_SLOT_PAGES:
            yield f"{piece}: more than {MOST_SLOT_PAGES} pages in one slot: split it"
    if len(memory) > host.nr_memslots:
        yield f"{len(memory)} slots, this host has {host.nr_memslots}"


def _misaligned(piece: MemoryRange, unit: int) -> Iterator[str]:
    for what, value in (("address", piece.base), ("size", piece.size)):
        if value % unit:
            yield f"{piece}: the {what} {value:#x} is not a multiple of {_size(unit)}"


def _chosen(bits: int, host: Profile, limit: int, granule: int | None) -> tuple[int, str, int | None] | None:
    """(IPA bits, call, type word) that gives the map a home, or None: no way to say a size that fits."""
    size = limit if host.mode == "protected" else bits  # pKVM gives its limit whatever is asked for
    word = word_of(host.type_word)
    if host.create_vm2 & (1 if granule else _LIST_OR_FIXED):
        return size, "KVM_CREATE_VM2", None
    for larger in range(size, limit + 1):
        if word.can_say(larger):
            return larger, "KVM_CREATE_VM", word.encode(larger)
    return None


def _tables(host: Profile, bits: int, shift: int) -> Tables:
    made = stage2_format(host, bits, shift)
    return Tables(shift, made.levels, made.start_level, made.concatenated, made.t0sz, made.sl0)


def _size(number: int) -> str:
    """A power of two as people say it: 4K."""
    return f"{number >> 10}K"
