"""P1: stage 2 of every described host, granule and IPA size, with random maps.

An independent walker, written from the Arm ARM's walk and told nothing but two register values, reads the tables out of
this process's memory. walk(map(ipa)) == pa for every page that is mapped, a fault for every other; the same through the
registers that the emulated core gets; the format equals an independent formula.

The normal test command runs a short version; all of it: python tests/batteries/test_p1_stage2.py [MAPS [SEED]]
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
import time

import pytest

from kvm2.softkvm import profile
from kvm2.softkvm.stage2 import Stage2, stage2_format

SHIFT_OF_TG0 = {0: 12, 1: 16, 2: 14}
# Arm ARM, VTCR_EL2.SL0: start level by granule (SL2 = 0)
START_OF_SL0 = {12: {0: 2, 1: 1, 2: 0}, 14: {0: 3, 1: 2, 2: 1, 3: 0}, 16: {0: 3, 1: 2, 2: 1}}
PA_BITS = (32, 36, 40, 42, 44, 48, 52)


class Walker:
    """A table walk by VTCR_EL2 and VTTBR_EL2 alone."""

    def __init__(self, vtcr, vttbr):
        self.shift = SHIFT_OF_TG0[vtcr >> 14 & 3]
        self.ds = vtcr >> 32 & 1
        self.ipa_bits = 64 - (vtcr & 63)
        self.start = START_OF_SL0[self.shift][vtcr >> 6 & 3]
        self.stride = self.shift - 3
        self.top_bits = self.ipa_bits - self.spans(self.start)
        assert 1 <= self.top_bits <= self.stride + 4, "S2InconsistentSL"
        assert self.ipa_bits <= PA_BITS[vtcr >> 16 & 7], "IPA size above the physical address size"
        self.base = vttbr & ((1 << 48) - 2)
        assert self.base % (8 << self.top_bits) == 0, "VTTBR_EL2.BADDR alignment"

    def spans(self, level):
        return self.shift + (3 - level) * self.stride

    def address(self, descriptor):
        if self.ds:
            return descriptor & ((1 << 50) - (1 << self.shift)) | (descriptor >> 8 & 3) << 50
        low = descriptor & ((1 << 48) - (1 << self.shift))
        return low | (descriptor >> 12 & 15) << 48 if self.shift == 16 else low

    def walk(self, ipa):
        """(physical address, writable, executable), or None for a fault."""
        if ipa >> self.ipa_bits:
            return None
        table = self.base
        for level in range(self.start, 4):
            below = self.spans(level)
            bits = self.top_bits if level == self.start else self.stride
            index = ipa >> below & ((1 << bits) - 1)
            (descriptor,) = struct.unpack("<Q", ctypes.string_at(table + 8 * index, 8))
            if not descriptor & 1 or (level == 3 and not descriptor & 2):
                return None
            if level < 3 and descriptor & 2:
                table = self.address(descriptor)
                continue
            assert descriptor & 1 << 10, "access flag"
            assert level != 0, "no blocks at level 0"
            offset = ipa & ((1 << below) - 1)
            assert self.address(descriptor) & ((1 << below) - 1) == 0, "block address"
            return self.address(descriptor) + offset, bool(descriptor & 1 << 7), not descriptor >> 54 & 1
        return None

    def leaves(self):
        """Bytes that are mapped, found by reading every table."""
        return self._count(self.base, self.start, 1 << self.top_bits)

    def _count(self, table, level, entries):
        total = 0
        for descriptor in struct.unpack(f"<{entries}Q", ctypes.string_at(table, 8 * entries)):
            if descriptor & 1 and level < 3 and descriptor & 2:
                total += self._count(self.address(descriptor), level + 1, 1 << self.stride)
            elif descriptor & 1:
                total += 1 << self.spans(level)
        return total


def independent_vtcr(host, bits, shift):
    """VTCR_EL2 by search: the fewest levels, but two, whose first has at most 16 tables."""
    stride = shift - 3
    levels = next(n for n in range(2, 6) if bits - shift - (n - 1) * stride <= stride + 4)
    sl0 = next(value for value, start in START_OF_SL0[shift].items() if start == 4 - levels)
    ds = int(shift != 16 and host.lpa2_for(shift))
    ps = min(host.parange, 6 if ds or shift == 16 else 5)
    tg0 = next(value for value, known in SHIFT_OF_TG0.items() if known == shift)
    vtcr = 64 - bits | sl0 << 6 | 1 << 8 | 1 << 10 | 3 << 12 | tg0 << 14 | ps << 16
    return vtcr | (host.vmid_bits == 16) << 19 | 1 << 21 | 1 << 31 | ds << 32


def random_range(rng, format, block):
    """A range of IPA, near an end or anywhere, of a few pages or (aligned) blocks."""
    unit = format.block_size if block else format.page_size
    total = (1 << format.ipa_bits) // unit
    count = rng.randint(1, 2 if block else 8)
    # a few places again and again, so that maps meet each other and table boundaries
    near = [0, total - count, (1 << format.ipa_bits - 1) // unit, (1 << 48) // unit - 1, format.block_size // unit - 1]
    start = rng.choice(near) + rng.randint(-4, 4) if rng.random() < 0.7 else rng.randrange(total)
    start = min(max(start, 0), total - count)
    return start * unit, count * unit


def one_map(rng, host, bits, shift, steps):
    """A random sequence of changes against a model: a dictionary of pages."""
    format = stage2_format(host, bits, shift)
    stage2 = Stage2(format, host, vmid=rng.randint(1, 255))
    page, model = format.page_size, {}
    for _ in range(steps):
        block = format.page_size < 65536 and rng.random() < 0.2
        ipa, size = random_range(rng, format, block)
        pages = range(ipa, ipa + size, page)
        action = rng.choice(("map", "map", "map", "unmap", "protect", "relax"))
        if action == "map":
            hva = rng.randrange(1 << 46) // format.block_size * format.block_size
            if not block:
                hva += ipa % format.block_size if rng.random() < 0.5 else rng.randrange(8) * page
            writable, executable = rng.random() < 0.5, rng.random() < 0.5
            stage2.map(ipa, hva, size, writable=writable, executable=executable)
            model.update({at: (hva + at - ipa, writable, executable) for at in pages})
        elif action == "unmap":
            stage2.unmap(ipa, size)
            for at in pages:
                model.pop(at, None)
        elif action == "protect":
            whole = {leaf.ipa: leaf for at in pages if (leaf := stage2.translate(at))}
            stage2.write_protect(ipa, size)
            for leaf in whole.values():  # a block loses the permission as a whole
                for at in range(leaf.ipa, leaf.ipa + leaf.size, page):
                    model[at] = (model[at][0], False, model[at][2])
        elif (leaf := stage2.translate(ipa)) is not None:
            stage2.relax(ipa, writable=True)
            for at in range(leaf.ipa, leaf.ipa + leaf.size, page):
                model[at] = (model[at][0], True, model[at][2])
    check(rng, stage2, model)
    stage2.unmap(0, 1 << bits)
    assert stage2.dump() == []
    assert stage2.stats().tables <= 3, "empty tables stay behind"
    stage2.close()


def check(rng, stage2, model):
    """Every page of the model, as many others, through three walks."""
    format = stage2.format
    host_walk, core_walk = Walker(stage2.vtcr, stage2.vttbr), Walker(stage2.core_vtcr, stage2.core_vttbr)
    assert stage2.core_vtcr >> 32 == 0
    assert (core_walk.ipa_bits, core_walk.shift) == (min(format.ipa_bits, 48), format.page_shift)
    page, total = format.page_size, 1 << format.ipa_bits
    others = [at + delta for at in model for delta in (-page, page)]
    others += [rng.randrange(total // page) * page for _ in range(64)]
    for at in {*model, *(other for other in others if 0 <= other < total)}:
        offset = rng.randrange(page)
        expected = None
        if at in model:
            pa, writable, executable = model[at]
            expected = pa + offset, writable, executable
        assert host_walk.walk(at + offset) == expected, hex(at)
        leaf = stage2.translate(at + offset)
        assert (leaf and (leaf.hva, leaf.writable, leaf.executable)) == expected, hex(at)
        if at >> 48 == 0:
            assert core_walk.walk(at + offset) == expected, f"core {at:#x}"
    assert stage2.translate(total) is None
    assert host_walk.leaves() == len(model) * page
    assert core_walk.leaves() == sum(at >> 48 == 0 for at in model) * page


def combinations():
    """Every described arm64 host with each granule and every IPA size; hosts with equal formats once."""
    found = {}
    for name in profile.names():
        host = profile.load(name)
        for shift in host.granules if host.arch == "arm64" else ():
            key = (
                host.parange,
                host.lpa2_for(shift),
                host.vmid_bits,
                host.fwb,
                host.cnp,
                shift,
                host.ipa_limit_for(shift),
            )
            found.setdefault(key, (host, shift))
    for host, shift in found.values():
        for bits in range(32, host.ipa_limit_for(shift) + 1):
            yield host, shift, bits


def run(maps, steps, seed, chosen):
    """`maps` random sequences for each combination; the number of sequences that were checked."""
    done = 0
    for number, (host, shift, bits) in enumerate(chosen):
        format = stage2_format(host, bits, shift)
        assert format.vtcr == independent_vtcr(host, bits, shift), (host.name, shift, bits)
        for again in range(maps):
            one_map(random.Random(f"{seed}/{number}/{again}"), host, bits, shift, steps)
            done += 1
    return done


@pytest.mark.parametrize("shift", [12, 14, 16])
def test_short(shift):
    chosen = [c for c in combinations() if c[1] == shift]
    assert {bits for _, _, bits in chosen} >= set(range(32, 49))
    sample = random.Random(shift).sample(chosen, min(len(chosen), 12)) + [c for c in chosen if c[2] > 48][:4]
    assert run(1, 12, "short", sample) == len(sample)


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    seed = sys.argv[2] if len(sys.argv) > 2 else "p1"
    start = time.monotonic()
    print(f"{run(count, 40, seed, combinations())} maps, seed {seed}, {time.monotonic() - start:.0f} s: all equal")
