"""The system and VM calls, every type word, and every IPA size: slots, GIC frames and accesses around its limit."""

from __future__ import annotations

from collections.abc import Iterator

from kvm2.abi import ioctls as io
from kvm2.abi.caps import KVM_CAP_ARM_VM_IPA_SIZE
from kvm2.abi.vm2 import ARM64_DEFAULT_IPA_BITS
from kvm2.lab.recipes.gic import frames
from kvm2.lab.recipes.recipe import PSCI, RAM, RESULTS, SECOND_HVA, SLOT, Recipe

UNKNOWN = 0xAEFF  # _IO(KVMIO, 0xff)
CAPABILITIES = 261
TYPES = (*range(257), 296, 4096, 1 << 16, 1 << 31, 1 << 31 | 40, 1 << 32, 1 << 32 | 40, 1 << 63, (1 << 64) - 1)
# 0 is the default; between the sizes of PARange others that are as good, and neighbours of its values.
SIZES = (0, 32, 33, 34, 36, 37, 38, 39, 40, 42, 43, 44, 45, 47, 48, 50, 51, 52)
# The last page below 4 GiB of a VM with 32 bits is where the published guest could not be put: it is not run there.
NO_TOP = 32
FAR_HVA = 0x1000_0000


def recipes(page: int) -> Iterator[Recipe]:
    """sys, create_vm and ipa."""
    yield _api()
    yield _capabilities("sys/check_ext_system", "kvm")
    yield _capabilities("sys/check_ext_vm", "vm")
    types = Recipe("create_vm/types")
    for type in TYPES:
        types.vm(type, "t").add("close", id="t")
    yield types
    for size in SIZES:
        yield _slots(size, page)
        yield frames(size)
        yield _access(size)


def bits_of(size: int) -> int:
    """The IPA size in bits that a type word of that size gives."""
    return size or ARM64_DEFAULT_IPA_BITS


def _api() -> Recipe:
    recipe = Recipe("sys/api")
    for name in ("KVM_GET_API_VERSION", "KVM_GET_VCPU_MMAP_SIZE"):
        request: int = getattr(io, name)
        recipe.raw("kvm", request, name).raw("kvm", request, f"{name} arg!=0", arg=1)
    recipe.raw("kvm", UNKNOWN, "unknown ioctl").raw("kvm", io.KVM_CREATE_VCPU, "vcpu ioctl on system fd").vm()
    return recipe.raw("vm", io.KVM_CREATE_VM, "KVM_CREATE_VM on vm fd").raw("vm", UNKNOWN, "unknown vm ioctl")


def _capabilities(name: str, fd: str) -> Recipe:
    recipe = Recipe(name)
    if fd == "vm":
        recipe.vm()
    # Also numbers whose low 16 or 32 bits would be others: they must not be cut off.
    for cap in (*range(CAPABILITIES), 1 << 16, (1 << 32) - 1, 1 << 32 | KVM_CAP_ARM_VM_IPA_SIZE):
        recipe.check(cap, fd)
    return recipe


def _slots(size: int, page: int) -> Recipe:
    limit = 1 << bits_of(size)
    recipe = Recipe(f"ipa/{size}/slots").vm(size).memory().check(KVM_CAP_ARM_VM_IPA_SIZE)
    recipe.slot(0, 0, page, "first page")
    recipe.slot(1, limit - page, page, "last page below limit")
    recipe.slot(2, limit - 3 * page, 2 * page, "below last page")
    recipe.slot(3, limit - 4 * page, 5 * page, "across limit")
    recipe.slot(3, limit - 4 * page, 2 * page, "overlap + below limit")
    recipe.slot(3, limit, page, "at limit")
    recipe.slot(3, limit + page, page, "beyond limit")
    recipe.slot(3, 2 * limit, page, "twice limit")
    recipe.slot(1, limit - 2 * page, page, "move down (overlaps slot 2)")
    recipe.slot(1, limit, page, "move slot beyond limit")
    recipe.slot(1, limit - page, page, "flags only at limit", flags=1)
    recipe.slot(1, limit - page, 0, "delete")
    recipe.slot(1, limit, 0, "delete again, gpa beyond limit")
    recipe.slot(2, limit, 0, "delete slot 2 with gpa beyond limit (gpa ignored)")
    recipe.slot(3, limit - page, 2 * page, "across limit, no overlap")
    recipe.slot(3, limit - page, 2 * page, "across limit, readonly", flags=2)
    return recipe.slot(3, page, limit - page, "rest of the whole IPA space", mem=None, hva=FAR_HVA)


def _access(size: int) -> Recipe:
    """A guest that touches the last 8 bytes below the limit, and guests that load beyond it."""
    limit = 1 << bits_of(size)
    recipe = Recipe(f"ipa/{size}/access").machine(type=size)
    recipe.slot(1, limit - SLOT, SLOT, "top 64K", hva=SECOND_HVA)
    if size != NO_TOP:
        recipe.load("touch").set("x1", limit - 8).set("x2", 0x1122334455667788).run("touch last 8 bytes")
        recipe.results(16).peek(SECOND_HVA + SLOT - 8, 8)
    for address, note in (
        (limit, "load at limit"),
        (2 * limit, "load at 2*limit"),
        ((1 << 48) - 8, "load 2^48-8"),
        ((1 << 52) - 8, "load 2^52-8"),
        (1 << 56, "load 2^56"),
    ):
        _load_beyond(recipe, size, address, note)
    return recipe


def _load_beyond(recipe: Recipe, size: int, address: int, note: str) -> None:
    recipe.vm(size, "w").memory("n", SLOT)
    recipe.add("memslot", vm="w", slot=0, flags=0, gpa=RAM, size=SLOT, mem="n", hva=0, note="")
    recipe.vcpu(0, "w0", "w").init(PSCI, vcpu="w0").load("load", "w0", "n").set("x1", address, vcpu="w0")
    recipe.run(note, vcpu="w0").peek(0x2800, 32, "n").peek(RESULTS, 8, "n")
    recipe.add("close", id="w0").add("close", id="w").add("close_mem", id="n")
