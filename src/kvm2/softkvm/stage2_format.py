"""The stage-2 page-table format of a VM: a pure function of the host, the IPA size and the granule.

The rules are `kvm_get_vtcr()` of the kernel (arch/arm64/kvm/hyp/pgtable.c) and VTCR_EL2 in the Arm ARM: a walk has
`levels` levels and starts with up to 16 concatenated tables, so four bits are resolved without a level of their own.

>>> from types import SimpleNamespace
>>> host = SimpleNamespace(page_shift=12, parange=6, lpa2=True, vmid_bits=16, lpa2_for=lambda shift: True)
>>> f = stage2_format(host, 40)
>>> hex(f.vtcr), f.start_level, f.concatenated, f.entries
('0x1802e3558', 1, 2, 1024)
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from kvm2.errors import KvmError

LAST_LEVEL = 3
MAX_CONCATENATED = 16
MIN_IPA_BITS, MAX_IPA_BITS = 32, 52
# What the emulated core walks by itself: classic descriptors, so 48 bits of IPA and PS = 48 bits.
CORE_IPA_BITS, CORE_PS = 48, 5
PA_BITS_OF = (32, 36, 40, 42, 44, 48, 52)

VTCR_RES1 = 1 << 31
VTCR_DS = 1 << 32
VTCR_HA = 1 << 21
VTCR_VS = 1 << 19
VTCR_SHARED = 3 << 12 | 1 << 10 | 1 << 8  # SH0 inner shareable, ORGN0 and IRGN0 write-back
TG0_OF = {12: 0, 14: 2, 16: 1}
# SL0 counts the levels of a walk from a base that depends on the granule.
SL0_BASE = {12: 2, 14: 3, 16: 3}


class FormatHost(Protocol):
    """What the format takes from a described host (`softkvm.profile.Profile`)."""

    @property
    def page_shift(self) -> int: ...
    @property
    def parange(self) -> int: ...
    @property
    def lpa2(self) -> bool: ...
    @property
    def vmid_bits(self) -> int: ...
    def lpa2_for(self, granule: int) -> bool: ...


@dataclass(frozen=True)
class Format:
    """A stage-2 format. Sizes are log2 in bits; `vtcr` is what the host's VTCR_EL2 holds, `core_vtcr` what the emulated
    core gets for the same tables (DS = 0, PS and T0SZ within its own 48 bits)."""

    ipa_bits: int
    page_shift: int
    start_level: int
    levels: int
    sl0: int
    t0sz: int
    concatenated: int
    pgd_pages: int
    entries: int
    ps: int
    ds: bool
    vtcr: int
    core_start_level: int
    core_vtcr: int

    @property
    def stride(self) -> int:
        """Address bits that one table resolves."""
        return self.page_shift - 3

    @property
    def page_size(self) -> int:
        """Bytes of a page, which is a table as well."""
        return 1 << self.page_shift

    @property
    def block_size(self) -> int:
        """Bytes of a level 2 block: 2 MiB, 32 MiB or 512 MiB."""
        return 1 << self.shift_at(2)

    @property
    def index_bits(self) -> int:
        """Address bits that the concatenated tables of the start level resolve."""
        return self.entries.bit_length() - 1

    @property
    def pgd_bytes(self) -> int:
        """Bytes of the entries of the start level (less than a page where IPA bits are few)."""
        return 8 * self.entries

    def shift_at(self, level: int) -> int:
        """log2 of what one entry of `level` spans, in bytes."""
        return self.page_shift + (LAST_LEVEL - level) * self.stride

    def encode_address(self, address: int) -> int:
        """The descriptor bits of an output or next-table address; ValueError where this format cannot hold it."""
        high = address >> CORE_IPA_BITS
        if not high:
            return address
        if address >> PA_BITS_OF[self.ps] or not (self.ds or self.page_shift == 16):
            raise ValueError(f"address {address:#x} does not fit a descriptor of {PA_BITS_OF[self.ps]} bits")
        low = address & ((1 << CORE_IPA_BITS) - 1)
        if self.ds:  # FEAT_LPA2: OA[49:48] in place, OA[51:50] where SH was
            return low | (high & 3) << CORE_IPA_BITS | (high >> 2) << 8
        return low | high << 12  # FEAT_LPA with 64K pages: OA[51:48]

    def decode_address(self, descriptor: int) -> int:
        """The output or next-table address in a descriptor."""
        page = self.page_size
        if self.ds:
            return descriptor & ((1 << 50) - page) | (descriptor >> 8 & 3) << 50
        address = descriptor & ((1 << CORE_IPA_BITS) - page)
        if self.page_shift == 16:
            address |= (descriptor >> 12 & 15) << CORE_IPA_BITS
        return address

    def fields(self) -> dict[str, int]:
        """VTCR_EL2 by field, TG0 in bytes: the form of a recorded dump."""
        return vtcr_fields(self.vtcr)


def vtcr_fields(vtcr: int) -> dict[str, int]:
    """Takes a VTCR_EL2 apart, TG0 in bytes.

    >>> vtcr_fields(0x80243558)["T0SZ"], vtcr_fields(0x80243558)["TG0"]
    (24, 4096)
    """
    granule = {0: 4096, 1: 65536, 2: 16384}[vtcr >> 14 & 3]
    bits = {"T0SZ": (0, 6), "SL0": (6, 2), "IRGN0": (8, 2), "ORGN0": (10, 2), "SH0": (12, 2), "TG0": (14, 2)}
    bits |= {"PS": (16, 3), "VS": (19, 1), "HA": (21, 1), "HD": (22, 1), "RES1": (31, 1), "DS": (32, 1), "SL2": (33, 1)}
    return {name: vtcr >> low & ((1 << width) - 1) for name, (low, width) in bits.items()} | {"TG0": granule}


def stage2_levels(ipa_bits: int, page_shift: int) -> int:
    """Levels of the walk: four bits come for free by concatenation; never fewer than two, so that the host's huge pages
    can stay blocks (`stage2_pgtable_levels()` and `kvm_get_vtcr()`)."""
    return max(2, (ipa_bits - 8) // (page_shift - 3))


def stage2_format(profile: FormatHost, ipa_bits: int, page_shift: int | None = None) -> Format:
    """The format of a VM with `ipa_bits` on this host; `page_shift` is the stage-2 granule, the host's page by default.

    Makes no tables. KvmError(EINVAL) for a size that no format of this host and granule can express.
    """
    shift = page_shift or profile.page_shift
    lpa2 = profile.lpa2 if shift == profile.page_shift else profile.lpa2_for(shift)
    return _format(profile.parange, lpa2 and shift != 16, profile.vmid_bits == 16, ipa_bits, shift)


@lru_cache(maxsize=1024)
def _format(parange: int, lpa2: bool, vmid16: bool, ipa_bits: int, shift: int) -> Format:
    ps = min(parange, 6 if lpa2 or shift == 16 else CORE_PS)
    _check(ps, ipa_bits, shift)
    levels = stage2_levels(ipa_bits, shift)
    start, stride = 4 - levels, shift - 3
    index_bits = ipa_bits - (shift + (LAST_LEVEL - start) * stride)
    concatenated = 1 << max(0, index_bits - stride)
    sl0, t0sz = SL0_BASE[shift] - start, 64 - ipa_bits
    fixed = VTCR_RES1 | VTCR_HA | (VTCR_VS if vmid16 else 0) | TG0_OF[shift] << 14 | VTCR_SHARED
    core_bits = min(ipa_bits, CORE_IPA_BITS)
    core_start = 4 - stage2_levels(core_bits, shift)
    core_vtcr = fixed | min(ps, CORE_PS) << 16 | (SL0_BASE[shift] - core_start) << 6 | 64 - core_bits
    return Format(
        ipa_bits=ipa_bits,
        page_shift=shift,
        start_level=start,
        levels=levels,
        sl0=sl0,
        t0sz=t0sz,
        concatenated=concatenated,
        pgd_pages=concatenated,
        entries=1 << index_bits,
        ps=ps,
        ds=lpa2,
        vtcr=fixed | (VTCR_DS if lpa2 else 0) | ps << 16 | sl0 << 6 | t0sz,
        core_start_level=core_start,
        core_vtcr=core_vtcr,
    )


def _check(ps: int, ipa_bits: int, shift: int) -> None:
    if shift not in TG0_OF:
        raise KvmError(errno.EINVAL, f"page_shift {shift}: a stage-2 granule is 12, 14 or 16 (4K, 16K, 64K)")
    limit = PA_BITS_OF[ps]
    if not MIN_IPA_BITS <= ipa_bits <= limit:
        raise KvmError(
            errno.EINVAL,
            f"{ipa_bits} bits of IPA space: with {1 << shift >> 10}K pages this host allows {MIN_IPA_BITS}..{limit}",
        )
