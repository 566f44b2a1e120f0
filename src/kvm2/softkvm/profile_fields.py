"""Keys of a host file that stand for fields of ID registers, and the checks that the fields make sense together.

One truth: whatever a key says is written into the ID registers, and every rule reads it from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvm2.softkvm import profile_registers as reg
from kvm2.softkvm import profile_rules as rules

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.softkvm.profile_file import Facts

_GRANULE_NAMES = {12: "4K", 14: "16K", 16: "64K"}


def _pa_bits(registers: dict[int, int], bits: int) -> None:
    reg.with_field(registers, reg.MMFR0, 0, rules.PA_BITS.index(bits))


def _granules(registers: dict[int, int], wanted: tuple[int, ...]) -> None:
    explicit = any(reg.field_of(registers, reg.MMFR0, lsb) for lsb in (32, 36, 40))
    for granule, lsb, none, yes, stage2 in ((12, 28, 0xF, 0, 40), (14, 20, 0, 1, 32), (16, 24, 0xF, 0, 36)):
        if granule in wanted and not rules.stage1_granule(registers, granule):
            reg.with_field(registers, reg.MMFR0, lsb, yes)
        elif granule not in wanted:
            reg.with_field(registers, reg.MMFR0, lsb, none)
        if rules.stage2_granule(registers, granule) != (granule in wanted) or (explicit and granule not in wanted):
            reg.with_field(registers, reg.MMFR0, stage2, 2 if granule in wanted else 1)


def _lpa2(registers: dict[int, int], on: bool) -> None:
    for granule, lsb, plain, large, stage2 in ((12, 28, 0, 1, 40), (14, 20, 1, 2, 32)):
        if not rules.stage2_granule(registers, granule):
            continue
        explicit = reg.field_of(registers, reg.MMFR0, stage2) != 0
        reg.with_field(registers, reg.MMFR0, lsb, large if on else plain)
        reg.with_field(registers, reg.MMFR0, stage2, 3 if on else 2 if explicit else 0)


def _vmid_bits(registers: dict[int, int], bits: int) -> None:
    reg.with_field(registers, reg.MMFR1, 4, 2 if bits == 16 else 0)


def _fwb(registers: dict[int, int], on: bool) -> None:
    reg.with_field(registers, reg.MMFR2, 40, int(on))


def _cnp(registers: dict[int, int], on: bool) -> None:
    reg.with_field(registers, reg.MMFR2, 0, int(on))


def _mode(registers: dict[int, int], mode: str) -> None:
    # kvm-arm.mode=nvhe forces the field to 0, and a core without VHE can run nothing else.
    if mode == "nvhe":
        reg.with_field(registers, reg.MMFR1, 8, 0)


def _sve_vqs(registers: dict[int, int], vqs: tuple[int, ...]) -> None:
    if not vqs:
        reg.with_field(registers, reg.PFR0, 32, 0)
        registers.pop(reg.encoding(reg.ZFR0), None)
    elif not reg.field_of(registers, reg.PFR0, 32):
        reg.with_field(registers, reg.PFR0, 32, 1)


def _gic(registers: dict[int, int], gic: tuple[str, ...]) -> None:
    system_registers = int("v3" in gic)
    reg.with_field(registers, reg.PFR0, 24, system_registers)
    if registers.get(reg.encoding(reg.AA32_PFR1)):
        reg.with_field(registers, reg.AA32_PFR1, 28, system_registers)


def _without(registers: dict[int, int], missing: tuple[str, ...]) -> None:
    if "pauth" in missing:
        for name, lsb in rules.APA + rules.GPA:
            reg.with_field(registers, name, lsb, 0)
    if "pmu" in missing:
        reg.with_field(registers, reg.DFR0, 8, 0)
        if registers.get(reg.encoding(reg.AA32_DFR0)):
            reg.with_field(registers, reg.AA32_DFR0, 24, 0)
    if "el1_32bit" in missing and reg.field_of(registers, reg.PFR0, 4) == 2:
        reg.with_field(registers, reg.PFR0, 4, 1)
    if "mte" in missing:
        reg.with_field(registers, reg.PFR1, 8, 0)
    if "aarch32" in missing:
        for lsb in (0, 4):
            reg.with_field(registers, reg.PFR0, lsb, 1)
        for enc in [enc for enc in registers if rules.is_aarch32_id(enc)]:
            del registers[enc]


_APPLY: dict[str, tuple[tuple[str, ...], Callable[[dict[int, int], Any], None]]] = {
    "pa_bits": ((reg.MMFR0,), _pa_bits),
    "granules": ((reg.MMFR0,), _granules),
    "lpa2": ((reg.MMFR0,), _lpa2),
    "vmid_bits": ((reg.MMFR1,), _vmid_bits),
    "mode": ((reg.MMFR1,), _mode),
    "fwb": ((reg.MMFR2,), _fwb),
    "cnp": ((reg.MMFR2,), _cnp),
    "sve_vqs": ((reg.PFR0, reg.ZFR0), _sve_vqs),
    "gic": ((reg.PFR0, reg.AA32_PFR1), _gic),
    "without": ((reg.ISAR1, reg.ISAR2, reg.DFR0, reg.AA32_DFR0, reg.AA32_PFR1, reg.PFR0, reg.PFR1), _without),
}


def apply(facts: Facts, own: dict[str, Any]) -> None:
    """Writes the keys of one file into the registers; a register that the same file gives must agree."""
    stated: dict[int, int] = own.get("registers", {})
    for key, (names, change) in _APPLY.items():
        if key not in own:
            continue
        change(facts.registers, own[key])
        for name in names:
            enc = reg.encoding(name)
            if enc in stated and facts.registers.get(enc, 0) != stated[enc]:
                raise facts.wrong(key, f"{own[key]!r} contradicts registers.{name} = {stated[enc]:#x} of the same file")


def check(facts: Facts, page_shift: int) -> None:
    """Refuses a host that no kernel could run on, or whose figures contradict each other."""
    registers, values = facts.registers, facts.values
    if reg.encoding(reg.MMFR0) not in registers:
        raise facts.wrong("registers", f"how many address bits? Give a base, pa_bits or registers.{reg.MMFR0}")
    parange = reg.field_of(registers, reg.MMFR0, 0)
    if parange >= len(rules.PA_BITS):
        raise facts.wrong("registers", f"{reg.MMFR0}.PARange = {parange:#x} is no size", "0 to 7")
    pages = _GRANULE_NAMES[page_shift]
    if not rules.stage1_granule(registers, page_shift):
        raise facts.wrong("page_shift", f"a kernel with {pages} pages does not boot: {reg.MMFR0} has no such granule")
    if not rules.stage2_granule(registers, page_shift):
        raise facts.wrong("page_shift", f"KVM does not start: {reg.MMFR0} has no {pages} granule at stage 2")
    if values.get("mode", "vhe") in ("vhe", "hvhe") and not reg.field_of(registers, reg.MMFR1, 8):
        raise facts.wrong("mode", f"{reg.MMFR1}.VH is 0: this core has no VHE", "nvhe, protected")
    gic = values.get("gic", ("v3", "its"))
    if "its" in gic and "v3" not in gic:
        raise facts.wrong("gic", "an ITS belongs to a GICv3", "v2; v3; v3, its; v2, v3, its")
    _check_sve(facts, values.get("sve_vqs", ()))


def _check_sve(facts: Facts, vqs: tuple[int, ...]) -> None:
    announced = reg.field_of(facts.registers, reg.PFR0, 32)
    if announced and not vqs:
        raise facts.wrong("sve_vqs", f"{reg.PFR0} announces SVE but no length is given", "a list of 1 to 16")
    if vqs and not announced:
        raise facts.wrong("sve_vqs", f"{reg.PFR0} announces no SVE")
    missing = [1 << bit for bit in range(4) if vqs and 1 << bit < vqs[-1] and 1 << bit not in vqs]
    if missing:
        raise facts.wrong("sve_vqs", f"every power of two below the largest must be there: {missing} too")
