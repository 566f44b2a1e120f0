"""vCPUs: ids, targets, features, initialising again; and KVM_ENABLE_CAP of everything."""

from __future__ import annotations

from collections.abc import Iterator

from kvm2.abi import caps, ioctls_x86
from kvm2.abi import ioctls as io
from kvm2.lab.recipes.recipe import PSCI, PSCI_SVE, PTRAUTH, SVE, Recipe
from kvm2.names import DEVICES

COMBINATIONS: tuple[tuple[str, ...], ...] = (
    *((name,) for name in PTRAUTH),
    PTRAUTH,
    SVE,
    (*SVE, *PTRAUTH),
    ("EL1_32BIT",),
    ("PMU_V3",),
    PSCI,
    ("POWER_OFF",),
    ("HAS_EL2",),
    ("HAS_EL2", "EL1_32BIT"),
    ("EL1_32BIT", "PMU_V3"),
)
BITS = tuple(bit for bit in range(32) if bit != 9)
IDS = (0, 0, 1, 511, 512, 513, 1023, 4096, 1 << 31, (1 << 32) - 1, 1 << 32)
TARGETS = (*range(8), (1 << 32) - 1)


def recipes() -> Iterator[Recipe]:
    """vcpu."""
    yield _numbered(Recipe("vcpu/ids").vm(), IDS)
    yield _numbered(Recipe("vcpu/many").vm(), range(0, 520, 8))
    after = Recipe("vcpu/ids_after_gicv3").vm().device(DEVICES["vgic-v3"])
    after.check(caps.KVM_CAP_MAX_VCPUS).check(caps.KVM_CAP_MAX_VCPU_ID)
    yield _numbered(after, (0, 511, 512, 513))
    yield Recipe("vcpu/pref_target").vm().add("pref_target", vm="vm")
    yield _uninit()
    targets = Recipe("vcpu/init_targets").vm()
    for target in TARGETS:
        targets.vcpu(target & 15, f"t{target}").init_words([0] * 7, f"target {target}", f"t{target}", target)
    yield targets
    for bit in BITS:
        recipe = Recipe(f"vcpu/init_feature/{bit}").vm().vcpu()
        yield recipe.init_words([1 << bit, *[0] * 6], f"feature bit {bit}").finalize().add("reg_list", vcpu="v0", n=0)
    words = Recipe("vcpu/init_words").vm().vcpu()
    for index in range(1, 7):
        words.init_words([int(at == index) for at in range(7)], f"bit in word {index}")
    yield words
    for names in COMBINATIONS:
        recipe = Recipe(f"vcpu/init_combo/{'+'.join(names)}").vm().vcpu()
        yield recipe.init(names).state().init(names, "again")
    yield _reinit()
    yield _reinit_after_run()


def _numbered(recipe: Recipe, ids: range | tuple[int, ...]) -> Recipe:
    for number in ids:
        recipe.vcpu(number, f"c{number}")
    return recipe


def _uninit() -> Recipe:
    """What a vCPU answers before KVM_ARM_VCPU_INIT."""
    recipe = Recipe("vcpu/uninit").vm().ram().vcpu().run("RUN before INIT").get("pc").set("pc", 0)
    recipe.add("reg_list", vcpu="v0", n=0).finalize().state().state(value=3).state(value=0)
    recipe.add("raw_buf", fd="v0", nr=io.KVM_GET_VCPU_EVENTS, n=64, note="GET_VCPU_EVENTS")
    recipe.add("raw_buf", fd="v0", nr=0x8138AE81, n=312, note="GET_REGS (x86-ish)")
    return recipe.raw("v0", ioctls_x86.KVM_NMI, "KVM_NMI")


def _reinit() -> Recipe:
    recipe = Recipe("vcpu/reinit").vm().vcpu().init(PSCI).init(PSCI, "same").init(PSCI_SVE, "add SVE")
    recipe.init((), "drop PSCI").init(("PSCI_0_2", "POWER_OFF"), "power off is ephemeral").state().init(PSCI).state()
    recipe.vcpu(1).init(SVE, "second vcpu, other features", "v1").init(PSCI, "second vcpu, same", "v1")
    return recipe.set("x0", 7).get("x0").init(PSCI, "re-init resets x0").get("x0")


def _reinit_after_run() -> Recipe:
    recipe = Recipe("vcpu/reinit_after_run").machine().load("off").run()
    return recipe.init(PSCI_SVE, "other features after run").init(PSCI).get("pc").load("off").run()


def capability_recipes() -> Iterator[Recipe]:
    """cap."""
    every = Recipe("cap/enable").vm()
    for cap in range(256):
        every.enable(cap)
    yield every.enable(caps.KVM_CAP_ARM_NISV_TO_USER, note="flags 1", flags=1).enable((1 << 32) - 1)
    on_vcpu = Recipe("cap/vcpu_enable").vm().vcpu().init()
    on_vcpu.enable(caps.KVM_CAP_ARM_NISV_TO_USER, note="vcpu ENABLE_CAP", fd="v0")
    yield on_vcpu.enable(caps.KVM_CAP_ARM_NISV_TO_USER, note="system ENABLE_CAP", fd="kvm")
    mte = Recipe("cap/mte_after_vcpu").vm().enable(caps.KVM_CAP_ARM_MTE, note="MTE").vcpu()
    yield mte.enable(caps.KVM_CAP_ARM_MTE, note="MTE after vcpu")
