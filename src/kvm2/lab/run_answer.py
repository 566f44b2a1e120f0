"""The `kvm_run` area after KVM_RUN, in the form in which the published answers have it."""

from __future__ import annotations

import struct

# The area's part that the recorded answers were made from.
AREA_BYTES = 120
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")

# Exit reasons that the answers name; others are given as numbers.
EXITS = {
    0: "UNKNOWN",
    4: "DEBUG",
    6: "MMIO",
    9: "FAIL_ENTRY",
    10: "INTR",
    17: "INTERNAL_ERROR",
    24: "SYSTEM_EVENT",
    28: "ARM_NISV",
    34: "HYPERCALL",
    39: "MEMORY_FAULT",
}


def describe(area: bytes, failed: bool) -> dict[str, object]:
    """The exit of a run: its reason, and what belongs to it; of a run that failed, the reason alone.

    >>> area = bytearray(120)
    >>> area[8], area[32], area[40], area[48], area[52] = 6, 8, 0xFF, 1, 1
    >>> describe(bytes(area), failed=False)
    {'exit': 'MMIO', 'gpa': 8, 'data': 'ff00000000000000', 'len': 1, 'write': 1}
    """
    reason = U32.unpack_from(area, 8)[0]
    name = EXITS.get(reason, reason)
    return {"exit": name} if failed else {"exit": name, **_details(area, reason)}


def _details(area: bytes, reason: int) -> dict[str, object]:
    def u32(offset: int) -> int:
        return int(U32.unpack_from(area, offset)[0])

    def u64(offset: int) -> int:
        return int(U64.unpack_from(area, offset)[0])

    if reason == 6:
        return {"gpa": u64(32), "data": area[40:48].hex(), "len": u32(48), "write": area[52]}
    if reason == 24:
        return {"type": u32(32), "ndata": u32(36), "data0": u64(40)}
    if reason == 28:
        return {"esr_iss": u64(32), "fault_ipa": u64(40)}
    if reason == 9:
        return {"reason": u64(32), "cpu": u32(40)}
    if reason == 39:
        return {"flags": u64(32), "gpa": u64(40), "size": u64(48)}
    return {}
