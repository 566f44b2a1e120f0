"""Memory slots against every recorded answer of real kernels about them, with nothing else of the software KVM."""

from __future__ import annotations

import errno
import json
import lzma

import pytest

from kvm2.abi.structs import UserspaceMemoryRegion
from kvm2.errors import KvmError
from kvm2.lab.bundled import DATA
from kvm2.softkvm import profile
from kvm2.softkvm.memslots import MemSlots

ORACLE = DATA
RESULTS = sorted((ORACLE / "results").glob("*.jsonl.xz"))
# Where mmap() puts memory on the recorded machines (48-bit user addresses, from the top).
MEMORY = 0xFFFF_8000_0000
ELSEWHERE = ("mem", "check_ext", "raw_bad_ptr")  # not a question to the slots


def read(path):
    return lzma.decompress(path.read_bytes()).decode()


def is_about_slots(name):
    return name.startswith("slots/") or (name.startswith("ipa/") and name.endswith("/slots"))


def answer(slots, step):
    """[return value, errno name or 0, bitmap where there is one], as recorded."""
    base = MEMORY if step.get("mem") else 0
    if step["op"] in ("memslot", "memslot2"):
        values = (step[name] for name in ("slot", "flags", "gpa", "size"))
        slots.set(UserspaceMemoryRegion(*values, base + step["hva"]))
    elif step["op"] == "dirty_log":
        return [0, 0, slots.get_dirty(step["slot"]).bitmap.ljust(step["bytes"], b"\0").hex()]
    elif step["op"] == "clear_dirty":
        slots.clear_dirty(step["slot"], step["first"], step["n"], lambda size: b"\xff" * size)
    elif step["op"] == "enable_cap":
        slots.enable_manual_protect(step["flags"], step["args"][0])
    else:
        raise AssertionError(step["op"])
    return [0, 0]


def replay(machine, steps, results):
    """Steps compared, for one scenario."""
    slots, compared = None, 0
    for step, recorded in zip(steps, results, strict=True):
        if step["op"] in ELSEWHERE or recorded == "skipped":
            continue
        if step["op"] == "create_vm":
            if recorded[0] < 0:
                return 0
            bits = machine.ipa_limit if machine.mode == "protected" else step["type"] or 40
            slots = MemSlots(machine, bits)
            continue
        try:
            got = answer(slots, step)
        except KvmError as error:
            got = [-1, errno.errorcode[error.errno], *recorded[2:]]  # the buffer, which nobody wrote
        assert got == recorded, step
        compared += 1
    return compared


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name.split(".jsonl")[0])
def test_recorded(path):
    header, *lines = (json.loads(line) for line in read(path).splitlines())
    scenarios = json.loads(read(ORACLE / f"scenarios-{header['page']}.json.xz"))
    steps = {scenario["sc"]: scenario["steps"] for scenario in scenarios}
    machine = profile.load(path.name.split(".jsonl")[0])
    compared = 0
    for line in lines:
        no_region2 = machine.kernel == "6.1" and line["sc"] == "slots/region2"  # an unknown ioctl there
        if is_about_slots(line["sc"]) and not no_region2:
            compared += replay(machine, steps[line["sc"]], line["r"])
    assert compared > 200
