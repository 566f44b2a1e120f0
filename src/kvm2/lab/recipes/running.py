"""KVM_RUN: guests that switch off, call PSCI, touch devices and memory, wait, fault, and read what they are on."""

from __future__ import annotations

from collections.abc import Iterator

from kvm2.abi.caps import KVM_CAP_ARM_NISV_TO_USER
from kvm2.lab.recipes.recipe import (
    FAULT,
    FAULT_BYTES,
    HOLE,
    PSCI,
    PSCI_SVE,
    PTRAUTH,
    RAM,
    RESULTS,
    SECOND_HVA,
    SECOND_RAM,
    SLOT,
    Recipe,
)

PSCI_VERSION, CPU_ON = 0x8400_0000, 0xC400_0003
# Function identifiers of the SMC Calling Convention and PSCI, and one of nobody. The arguments are x1 to x3.
HYPERCALLS = (
    ("VERSION", PSCI_VERSION, 1),
    ("SYSTEM_RESET", 0x8400_0009, 1),
    ("SYSTEM_RESET2", 0xC400_0012, 1),
    ("MIGRATE_INFO_TYPE", 0x8400_0006, 1),
    ("FEATURES", 0x8400_000A, 0x8400_0003),
    ("SMCCC_VERSION", 0x8000_0000, 1),
    ("SYSTEM_SUSPEND", 0xC400_000E, 1),
    ("unknown", 0x1234_5678, 1),
    ("CPU_ON self/absent", CPU_ON, 1),
    ("KVM PSCI 0.1 fn", 0x95C1_BA5E, 1),
    ("vendor uid", 0x8600_FF01, 1),
    ("TRNG version", 0x8400_0050, 1),
)
CONTEXT = 9
STORED = 0x1122334455667788
READ_DATA = "f1f2f3f4f5f6f7f8"
ID_REGISTERS = 19
SIZES = (0, 32, 36, 40, 44, 48, 52)
WAIT_MS, SPIN_MS = 400, 300
AARCH32_USER = 0x10
READONLY = 2


def recipes() -> Iterator[Recipe]:
    """run."""
    for name, features in (("psci02", PSCI), ("nopsci", ())):
        recipe = Recipe(f"run/off/{name}").machine(features).load("off").run().run("RUN again after SYSTEM_OFF")
        yield recipe.get("pc").get("x0")
    for name, function, argument in HYPERCALLS:
        recipe = Recipe(f"run/hvc/{name}").machine().load("hvc").arguments(function, argument, RAM, CONTEXT)
        yield recipe.run(name).state().results().get("x0")
    for guest in ("smc", "hvc_imm"):
        yield Recipe(f"run/{guest}").machine().load(guest).set("x0", PSCI_VERSION).run().results()
    yield from _devices()
    yield from _memory()
    yield from _interrupted()
    for guest in ("brk", "udf"):
        yield Recipe(f"run/{guest}").machine().load(guest).run().peek(FAULT, FAULT_BYTES)
    yield Recipe("run/fp").machine().load("fp").run().results()
    yield Recipe("run/pauth_off").machine().load("pauth").run().results(16)
    on = Recipe("run/pauth_on").machine((*PSCI, *PTRAUTH)).load("pauth").run()
    yield on.peek(RESULTS + 8, 8).peek(FAULT, FAULT_BYTES)  # the first word is signed with a key that nobody knows
    mode = Recipe("run/aarch32_pstate").machine().set("pstate", AARCH32_USER, "AArch32 user on AArch64 vcpu")
    yield mode.run(timeout_ms=SPIN_MS)
    for size in SIZES:
        recipe = Recipe(f"run/idregs/{size}").machine(type=size).load("idregs").run()
        yield recipe.results(8 * ID_REGISTERS).get("ID_AA64MMFR0_EL1")
    sve = Recipe("run/idregs_sve").machine(PSCI_SVE).finalize().load("idregs").run()
    yield sve.peek(RESULTS, 8 * ID_REGISTERS)
    yield _cpu_on()


def _devices() -> Iterator[Recipe]:
    """Loads and stores where no slot is."""
    for guest in ("store32", "store64", "str_post"):
        recipe = Recipe(f"run/mmio_{guest}").machine().load(f"mmio_{guest}").set("x1", HOLE).set("x2", STORED)
        yield recipe.run("mmio").get("pc", "pc at exit").run("continue").peek(RESULTS, 8)
    for guest in ("load32", "load64", "ldrsb"):
        recipe = Recipe(f"run/mmio_{guest}").machine().load(f"mmio_{guest}").set("x1", HOLE + 4)
        recipe.run("mmio").get("pc", "pc at exit").add("mmio_data", vcpu="v0", data=READ_DATA)
        yield recipe.run("continue").peek(RESULTS, 8)
    pair = Recipe("run/mmio_stp_nisv").machine().enable(KVM_CAP_ARM_NISV_TO_USER, note="NISV_TO_USER")
    yield pair.load("mmio_stp").set("x1", HOLE).run("no ISV, cap")


def _memory() -> Iterator[Recipe]:
    """Slots that are read-only, have nothing behind them, or go away; code where nothing is."""
    hole = Recipe("run/pc_unmapped").machine().set("pc", HOLE)
    yield hole.run("pc in hole, no vbar", WAIT_MS)
    readonly = Recipe("run/ro_slot").machine().slot(1, SECOND_RAM, SLOT, hva=SECOND_HVA, flags=READONLY).load("touch")
    readonly.set("x1", SECOND_RAM).set("x2", 0xABCD).run("read ok, write exits").run("continue")
    yield readonly.peek(RESULTS, 16).peek(SECOND_HVA, 8)
    absent = Recipe("run/hva_unmapped").machine().slot(1, SECOND_RAM, SLOT, "nothing mapped at hva", mem=None, hva=SLOT)
    yield absent.load("load").set("x1", SECOND_RAM).run("fault on unmapped hva")
    deleted = Recipe("run/slot_deleted").machine().slot(1, SECOND_RAM, SLOT, hva=SECOND_HVA).load("touch")
    deleted.set("x1", SECOND_RAM).set("x2", 0x77).run("present").slot(1, SECOND_RAM, 0, "delete")
    yield deleted.load("load").set("x1", SECOND_RAM).run("after delete -> mmio")


def _interrupted() -> Iterator[Recipe]:
    yield Recipe("run/wfi").machine().load("wfi").run("WFI without vgic", WAIT_MS).get("pc")
    spin = Recipe("run/spin_signal").machine().load("spin").run("signal", SPIN_MS)
    spin.add("immediate_exit", vcpu="v0", value=1).run("immediate_exit=1")
    yield spin.add("immediate_exit", vcpu="v0", value=0)


def _cpu_on() -> Recipe:
    recipe = Recipe("run/two_vcpus_cpu_on").vm().ram().vcpu(0).vcpu(1).init(PSCI)
    recipe.init(("PSCI_0_2", "POWER_OFF"), vcpu="v1").get("MPIDR_EL1").get("MPIDR_EL1", vcpu="v1")
    recipe.load("hvc").arguments(CPU_ON, 1, RAM + 0x40, CONTEXT).run("CPU_ON v1").peek(RESULTS, 8)
    return recipe.state("v1").get("pc", vcpu="v1").get("x0", vcpu="v1")
