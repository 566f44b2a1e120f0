"""Registers: dumps of vCPUs of every kind, core registers, malformed ids, and what may be changed of ID registers."""

from __future__ import annotations

from collections.abc import Iterator

from kvm2.abi import onereg
from kvm2.lab.recipes.recipe import PSCI, PSCI_SVE, PTRAUTH, SVE, Recipe
from kvm2.registers import register_id

DUMPED: tuple[tuple[str, ...], ...] = (
    (),
    PSCI,
    PSCI_SVE,
    (*PSCI, *PTRAUTH),
    (*PSCI, "PMU_V3"),
    (*PSCI_SVE, *PTRAUTH, "PMU_V3"),
)
CORE = (
    ("x0", 1),
    ("lr", (1 << 64) - 1),
    ("sp", 3),
    ("pc", 0x1003),
    ("sp_el1", 5),
    ("elr_el1", 6),
    ("spsr_el1", 7),
    ("v31", 5 | 1 << 127),
    ("fpsr", 0xFFFF_FFFF),
    ("fpcr", 0xFFFF_FFFF),
)
# EL1h, EL1t, EL0, impossible modes, AArch32 modes, EL2, every bit, and one that is reserved.
PSTATES = (0x3C5, 0x3C4, 0x3C0, 0x3C1, 0x3C9, 0x3CD, 0x10, 0x13, 0x1F, 0x0, 0x4, 0x5, 0x8, 0xFFFFFFFF, 0x1003C5)
X0 = onereg.core("regs.regs[0]")
MOST_BYTES = 256
FIELD = 0xF
SVE_FIELD, GIC_FIELD, EL0_FIELD = 32, 24, 0
ZFR0, PFR0, MMFR0 = "ID_AA64ZFR0_EL1", "ID_AA64PFR0_EL1", "ID_AA64MMFR0_EL1"


def recipes() -> Iterator[Recipe]:
    """regs."""
    for names in DUMPED:
        recipe = Recipe(f"regs/dump/{'+'.join(names) or 'none'}").vm().vcpu().init(names)
        if "SVE" in names:
            recipe.finalize()
        yield recipe.add("reg_dump", vcpu="v0")
    masks = Recipe("regs/writable_masks").vm()
    yield masks.add("writable_masks", vm="vm", range=0).add("writable_masks", vm="vm", range=1)
    yield _core()
    yield _id()
    sve = Recipe("regs/sve_vm_pfr0").vm().vcpu().init(SVE).get(PFR0).get(ZFR0)
    _change(sve, PFR0, SVE_FIELD, 0, "PFR0.SVE=0 on SVE vcpu")
    yield sve.set(ZFR0, 0, "ZFR0=0").finalize().get(ZFR0)
    listed = Recipe("regs/list").vm().vcpu().init()
    for room in (0, 10, 1000):
        listed.add("reg_list", vcpu="v0", n=room)
    yield listed


def _sized(number: int, size: int) -> int:
    return number & ~onereg.KVM_REG_SIZE_MASK | size


def _wrong() -> Iterator[tuple[int, str]]:
    """Ids that are malformed, of another architecture, or of nothing; and the two timer ids that are swapped."""
    class_of = onereg.KVM_REG_ARM64 | onereg.KVM_REG_SIZE_U64
    yield _sized(X0, onereg.KVM_REG_SIZE_U32), "x0 as U32"
    yield _sized(X0, onereg.KVM_REG_SIZE_U128), "x0 as U128"
    yield X0 + 1, "odd core offset"
    yield class_of | onereg.KVM_REG_ARM_CORE | 0xD8, "core past end"
    yield class_of | onereg.KVM_REG_ARM_CORE | 0xFFFF, "core far"
    for arch, note in ((0x20, "arch x86"), (0, "arch 0"), (0x40, "arch arm32")):
        yield X0 & ~onereg.KVM_REG_ARCH_MASK | arch << 56, note
    yield class_of | onereg.KVM_REG_ARM_DEMUX, "coproc unused"
    yield class_of | onereg.KVM_REG_ARM64_SYSREG | 0xFFFF, "unknown sysreg"
    yield _sized(register_id("SCTLR_EL1"), onereg.KVM_REG_SIZE_U32), "sysreg as U32"
    yield X0 | 1 << 32, "bit 32 set"
    yield _sized(register_id("v0"), onereg.KVM_REG_SIZE_U64), "V0 as U64"
    yield _sized(X0, onereg.KVM_REG_SIZE_U2048), "size U2048 x0"
    for index, note in ((0, "demux 0"), (2, "demux ccsidr 2")):
        yield onereg.KVM_REG_ARM64 | onereg.KVM_REG_SIZE_U32 | onereg.KVM_REG_ARM_DEMUX | index, note
    yield onereg.fw(0xFFFF), "fw unknown"
    yield onereg.fw_feat_bmap(0), "fw feat bmap 0"
    yield onereg.KVM_REG_ARM_TIMER_CNT, "timer cnt"
    yield onereg.KVM_REG_ARM_TIMER_CTL, "timer ctl"
    yield 0, "id 0"
    yield (1 << 64) - 1, "all ones"


def _core() -> Recipe:
    recipe = Recipe("regs/core").vm().vcpu().init(PSCI)
    for name, value in CORE:
        recipe.set(name, value).get(name)
    for value in PSTATES:
        recipe.set("pstate", value, f"pstate {value:#x}").get("pstate")
    for number, note in _wrong():
        recipe.get(number, note).set_bytes(number, bytes(MOST_BYTES), note)
    recipe.add("raw_reg_bad_ptr", vcpu="v0", id=X0, set=True)
    return recipe.add("raw_reg_bad_ptr", vcpu="v0", id=X0, set=False)


def _change(recipe: Recipe, register: str, shift: int, value: int, note: str) -> None:
    """Replaces one field of four bits."""
    fields = {"mask": FIELD << shift, "value": value << shift}
    recipe.add("rmw_reg", vcpu="v0", id=register_id(register), **fields, note=note)


def _id() -> Recipe:
    recipe = Recipe("regs/id").vm().vcpu().init(PSCI)
    names = ("MMFR0", "MMFR1", "MMFR2", "PFR0", "PFR1", "ZFR0", "DFR0", "ISAR0", "ISAR1", "ISAR2")
    for name in names:
        recipe.get(f"ID_AA64{name}_EL1", name)
    for name in ("MPIDR_EL1", "MIDR_EL1", "CTR_EL0", "CLIDR_EL1"):
        recipe.get(name, name.split("_")[0])
    for value in range(8):
        _change(recipe, MMFR0, 0, value, f"MMFR0.PARange={value}")
        recipe.get(MMFR0)
    for field, shift in (("TGRAN4", 28), ("TGRAN16", 20)):
        for value in range(16):
            _change(recipe, MMFR0, shift, value, f"MMFR0.{field}={value}")
    _change(recipe, PFR0, SVE_FIELD, 1, "PFR0.SVE=1 on non-SVE")
    _change(recipe, PFR0, SVE_FIELD, 0, "PFR0.SVE=0")
    _change(recipe, PFR0, GIC_FIELD, 1, "PFR0.GIC=1")
    _change(recipe, PFR0, EL0_FIELD, 1, "PFR0.EL0=1")
    recipe.set("MPIDR_EL1", 0x80000001, "MPIDR write").get("MPIDR_EL1").set("MIDR_EL1", 0, "MIDR write")
    recipe.set(ZFR0, 0).set(ZFR0, 1)
    return _psci_version(recipe)


def _psci_version(recipe: Recipe) -> Recipe:
    version = onereg.fw(0)
    recipe.get(version).set(version, 0x10000, "PSCI 1.0").get(version).set(version, 2, "PSCI 0.2")
    return recipe.set(version, 0x10003, "PSCI 1.3").set(version, 0x10001, "PSCI 1.1").set(version, 1)
