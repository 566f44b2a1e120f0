"""SVE: the life of a vCPU that has it, every set of vector lengths, and vCPUs without."""

from __future__ import annotations

from collections.abc import Iterator

from kvm2.abi import onereg
from kvm2.lab.recipes.recipe import FAULT, FAULT_BYTES, PSCI, PSCI_SVE, RESULTS, SVE, Recipe

# Full sets, sets of powers of two, sets with holes, single lengths, beyond 16 quadwords, and none.
MASKS = (
    *(0x0, 0x1, 0x2, 0x3, 0x4, 0x5, 0x6, 0x7, 0x8, 0xB, 0xF, 0x8B, 0x808B, 0xFF, 0xFFFF, 0x1FFFF),
    *(0x8000000000000000, 0x8000, 0x3FFF, 0x80, 0x81, 0x9),
)
LENGTHS_BYTES = 136  # 16 answers of RDVL, and ZCR_EL1
ZCR_EL1, ZFR0, PFR0 = "ZCR_EL1", "ID_AA64ZFR0_EL1", "ID_AA64PFR0_EL1"
VLS = onereg.KVM_REG_ARM64_SVE_VLS


def recipes() -> Iterator[Recipe]:
    """sve."""
    yield _lifecycle()
    yield _no_feature()
    for mask in MASKS:
        recipe = Recipe(f"sve/vls/{mask:#x}").machine(PSCI_SVE).vls(mask, f"mask {mask:#x}").get_vls().finalize()
        yield _lengths(recipe.get_vls())
    twice = Recipe("sve/vls_twice").vm().vcpu().init(SVE).vls(3).vls(1, "shrink").get_vls().vls(3, "grow back")
    twice.get_vls().vls(0, "bad").get_vls("unchanged?").init(SVE, "re-init before finalize")
    yield twice.get_vls("VLS after re-init")
    high = Recipe("sve/vls_high_words").vm().vcpu().init(SVE).vls(1 | 1 << 64, "word 1")
    yield high.vls(1 | 1 << 511, "word 7 top bit").get_vls()
    mixed = Recipe("sve/mixed_features").vm().vcpu(0).vcpu(1).init(SVE)
    yield mixed.init((), "v1 without SVE", "v1")
    pointer = Recipe("sve/vls_bad_ptr").vm().vcpu().init(SVE)
    yield pointer.add("raw_reg_bad_ptr", vcpu="v0", id=VLS, set=True).add(
        "raw_reg_bad_ptr", vcpu="v0", id=VLS, set=False
    )


def _lengths(recipe: Recipe, note: str = "") -> Recipe:
    """A guest that asks for every length and notes what it got."""
    return recipe.load("sve_vls").run(note).peek(RESULTS, LENGTHS_BYTES).peek(FAULT, FAULT_BYTES)


def _lifecycle() -> Recipe:
    recipe = Recipe("sve/lifecycle").vm().ram().vcpu().get_vls("before init").init(PSCI_SVE).get_vls("default VLS")
    recipe.get("z0", "Z0 before finalize").set("p0", 0, "P0 before finalize").get("ffr")
    recipe.get("v0", "V0 core reg on SVE vcpu").get(ZCR_EL1).get(ZFR0).get(PFR0).get("x0").set("x0", 1)
    recipe.add("reg_list", vcpu="v0", n=0).run("RUN before finalize")
    for feature in (0, 5, -1, 16):
        recipe.finalize(feature)
    recipe.finalize().finalize(note="twice").get_vls("after finalize").vls(1, "set after finalize")
    recipe.get("z0").get("z31").get(onereg.sve_z(0, 1), "slice 1").get("p15").get("ffr").set("z3", 0x55).get("z3")
    # One past the last Z register, and right registers with a wrong size in their ids.
    recipe.get(onereg.sve_z(31) + 32, "Z32 id")
    recipe.get(_sized(onereg.sve_z(0), onereg.KVM_REG_SIZE_U512), "Z0 with U512 size")
    recipe.get(_sized(VLS, onereg.KVM_REG_SIZE_U1024), "VLS with wrong size")
    recipe.add("reg_list", vcpu="v0", n=0).add("reg_list", vcpu="v0", n=600).get("v0")
    recipe.init(PSCI_SVE, "re-init after finalize").get("z3", "Z3 after re-init").get_vls()
    recipe.finalize(note="finalize after re-init").init((), "re-init without SVE")
    return _lengths(recipe)


def _sized(number: int, size: int) -> int:
    return number & ~onereg.KVM_REG_SIZE_MASK | size


def _no_feature() -> Recipe:
    recipe = Recipe("sve/no_feature").machine(PSCI).get_vls().vls(1).get("z0").get(ZFR0).get(PFR0).get(ZCR_EL1)
    recipe.finalize().get("v0").set("v0", 0x1234, "V0").get("v0")
    return _lengths(recipe, "SVE insns in non-SVE vcpu")
