"""P2: random calls of KVM_SET_USER_MEMORY_REGION against a model that knows only intervals.

No two slots overlap, nothing lies beyond the limit, every page is found in its slot and in no other, every refusal has
the errno of the kernel's first rule that is broken, and what is refused changes nothing.

The normal test command runs a short version; all of it: python tests/batteries/test_p2_memslots.py [SEQUENCES]
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm2.abi.structs import UserspaceMemoryRegion
from kvm2.errors import KvmError
from kvm2.softkvm.memslots import MemSlots

IDS = (0, 1, 2, 3, 32766)
LIMIT_PAGES = 48  # the window of pages at both ends of the IPA space in which slots meet

flags = st.sampled_from([0, 0, 0, 1, 2, 3, 4, 1 << 31])
ids = st.sampled_from([*IDS, *IDS, 32767, 0x10000])
pages = st.integers(-2, LIMIT_PAGES)
calls = st.tuples(
    ids, flags, st.booleans(), pages, st.integers(0, 12), st.integers(0, 3), st.sampled_from([0] * 9 + [1, 512])
)


class Model:
    """Slots as a sorted list of (first byte, end, id, flags, userspace address)."""

    def __init__(self, ipa_bits, unit):
        self.limit, self.unit, self.slots = 1 << ipa_bits, unit, []

    def errno_of(self, r):
        """What the kernel answers, by the order of `__kvm_set_memory_region`."""
        if r.flags & ~3 or (r.memory_size | r.guest_phys_addr | r.userspace_addr) % self.unit:
            return "EINVAL"
        if r.slot > 32766 or r.guest_phys_addr + r.memory_size >= 1 << 64:
            return "EINVAL"
        mine = [slot for slot in self.slots if slot[2] == r.slot]
        if not r.memory_size:
            return "" if mine else "EINVAL"
        start, end = r.guest_phys_addr, r.guest_phys_addr + r.memory_size
        if mine:
            old = mine[0]
            if old[4] != r.userspace_addr or old[1] - old[0] != r.memory_size or (old[3] ^ r.flags) & 2:
                return "EINVAL"
            if (old[0], old[3]) == (start, r.flags):
                return ""
        if (not mine or mine[0][0] != start) and any(
            slot[0] < end and start < slot[1] for slot in self.slots if slot[2] != r.slot
        ):
            return "EEXIST"
        return "EFAULT" if end > self.limit else ""

    def set(self, r):
        self.slots = [slot for slot in self.slots if slot[2] != r.slot]
        if r.memory_size:
            end = r.guest_phys_addr + r.memory_size
            self.slots.append((r.guest_phys_addr, end, r.slot, r.flags, r.userspace_addr))
            self.slots.sort()


def apply(sequence, page_shift, ipa_bits, granule):
    host = SimpleNamespace(page_shift=page_shift, nr_memslots=32767, quirks=frozenset())
    slots = MemSlots(host, ipa_bits, granule)
    unit = 1 << max(page_shift, granule)
    model = Model(ipa_bits, unit)
    for slot, flag, high, page, count, hva, odd in sequence:
        base = (1 << ipa_bits) - (LIMIT_PAGES - 8) * unit if high else 0
        gpa = (base + page * unit + odd) % (1 << 64)
        region = UserspaceMemoryRegion(slot, flag, gpa, count * unit, 0x7F0000000000 + (hva << 32))
        before, expected = list(slots), model.errno_of(region)
        try:
            change, got = slots.set(region), ""
        except KvmError as error:
            got = error.name
            assert list(slots) == before, "a refused call changed something"
        assert got == expected, region
        if not got:
            old = next((s for s in before if s.slot == slot), None)
            moved = old is not None and (not count or old.guest_phys_addr != gpa)
            assert change.unmap == (((old.guest_phys_addr, old.memory_size),) if moved else ())
            model.set(region)
        compare(slots, model, page_shift, unit)


def compare(slots, model, page_shift, unit):
    held = [(s.guest_phys_addr, s.end, s.slot, s.flags, s.userspace_addr) for s in slots]
    assert held == model.slots
    assert len(slots) == len(model.slots)
    for (_, end, *_), (start, *_) in zip(model.slots, model.slots[1:], strict=False):
        assert end <= start
    for start, end, slot, *_ in model.slots:
        assert end <= model.limit
        assert slots.get(slot) is slots.find(start >> page_shift) is slots.find((end >> page_shift) - 1)
        for outside in (start - unit, end):
            inside = [s[2] for s in model.slots if s[0] <= outside < s[1]]
            found = slots.find(outside >> page_shift)
            assert [found.slot] == inside if found else inside == []


def check(examples):
    """Hypothesis searches `examples` sequences of calls."""

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(calls, max_size=30),
        st.sampled_from([12, 14, 16]),
        st.sampled_from([32, 36, 40, 52]),
        st.sampled_from([12, 14, 16]),
    )
    def search(sequence, page_shift, ipa_bits, granule):
        apply(sequence, page_shift, ipa_bits, granule)

    search()


def test_short():
    check(150)


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    start = time.monotonic()
    check(count)
    print(f"{count} sequences, {time.monotonic() - start:.0f} s: equal to the model")
