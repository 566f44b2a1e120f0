"""Whether a description answers like the KVM that was probed: what it gets wrong becomes a note, never a silence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm2.abi import caps as cap
from kvm2.abi import sysregs
from kvm2.abi.caps import name_of
from kvm2.softkvm import profile_registers as reg

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from kvm2.lab.probe_seen import Seen
    from kvm2.softkvm.profile import Profile

_GIC, _AA32_GIC = 24, 28


def agree(seen: Seen, facts: dict[str, Any]) -> None:
    """Makes the facts one story where the reader of host files would refuse them: the GIC fields of the ID registers
    follow from `gic`."""
    registers: dict[str, int] = facts.get("registers", {})
    wanted = int("v3" in facts.get("gic", ()))
    for name, lsb in ((reg.PFR0, _GIC), (reg.AA32_PFR1, _AA32_GIC)):
        has = registers.get(name, 0) >> lsb & 0xF
        if has != wanted and (name == reg.PFR0 or registers.get(name)):
            registers[name] = registers.get(name, 0) & ~(0xF << lsb) | wanted << lsb
            seen.notes.append(f"{name}.GIC is {has}, described as {wanted}: it follows from the vGICs of the host")


def disagreements(seen: Seen, profile: Profile) -> Iterator[str]:
    """What the description answers otherwise, one sentence each."""
    for number in sorted((seen.caps.keys() | profile.caps.keys()) - {cap.KVM_CAP_CREATE_VM2}):
        here, there = profile.caps.get(number, 0), seen.cap(number)
        if here != there:
            yield f"{name_of(number)} answers {there}, its description {here}"
    if profile.arch != "arm64":
        return
    if profile.preferred_target != seen.preferred_target:
        yield f"the preferred target is {seen.preferred_target}, its description's {profile.preferred_target}"
    if profile.enable_caps != seen.enable_caps:
        names = ", ".join(name_of(number) for number in sorted(profile.enable_caps ^ seen.enable_caps))
        yield f"KVM_ENABLE_CAP takes others than its description: {names}"
    for enc in sorted(profile.writable_masks.keys() | seen.writable_masks.keys()):
        here, there = profile.writable_masks.get(enc, 0), seen.writable_masks.get(enc, 0)
        if here != there:
            yield f"the writable mask of {sysregs.name_of(enc)} is {there:#x}, its description's {here:#x}"
