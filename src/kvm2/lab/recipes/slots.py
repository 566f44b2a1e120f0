"""Memory slots: every rule of KVM_SET_USER_MEMORY_REGION, REGION2, many slots, dirty logs."""

from __future__ import annotations

from collections.abc import Iterator

from kvm2.abi import ioctls as io
from kvm2.abi.caps import KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
from kvm2.lab.recipes.recipe import SECOND_HVA, Recipe

LOG_DIRTY, READONLY = 1, 2
UNKNOWN_FLAGS = (4, 8, 16, 1 << 16, 1 << 31)
MOST_PAGES = (1 << 31) - 1
BITMAP_BYTES = 64
LOGGED_PAGES = 70  # more than a word of the bitmap, and no multiple of 64


def recipes(page: int) -> Iterator[Recipe]:
    """slots."""
    yield _rules(page)
    region = Recipe("slots/region2").vm().memory()
    for slot, flags, gpa, pad, note in (
        (0, 0, 0, 0, "plain"),
        (1, 4, page, 0, "GUEST_MEMFD flag, fd 0"),
        (1, 0, page, 1, "pad non-zero"),
    ):
        region.add("memslot2", vm="vm", slot=slot, flags=flags, gpa=gpa, size=page, mem="m", hva=0, pad=pad, note=note)
    yield region
    many = Recipe("slots/many").vm().memory()
    for slot in range(0, 600, 25):
        many.slot(slot, 2 * slot * page, page)
    yield many
    yield _dirty(page)


def _rules(page: int) -> Recipe:
    recipe = Recipe("slots/rules").vm().memory()
    _life(recipe, page)
    _flags(recipe, page)
    _alignment(recipe, page)
    _extremes(recipe, page)
    _addresses(recipe, page)
    _numbers(recipe, page)
    return recipe.add(
        "raw_bad_ptr", fd="vm", nr=io.KVM_SET_USER_MEMORY_REGION, note="SET_USER_MEMORY_REGION bad pointer"
    )


def _life(recipe: Recipe, page: int) -> None:
    """Create, change, move, overlap."""
    recipe.slot(0, 0, 4 * page, "create")
    recipe.slot(0, 0, 4 * page, "same again (no change)")
    recipe.slot(0, 0, 2 * page, "shrink")
    recipe.slot(0, 0, 8 * page, "grow")
    recipe.slot(0, 0, 4 * page, "change hva", hva=page)
    recipe.slot(0, 16 * page, 4 * page, "move")
    recipe.slot(1, 18 * page, page, "overlap other slot", hva=8 * page)
    recipe.slot(1, 15 * page, 2 * page, "overlap head", hva=8 * page)
    recipe.slot(1, 20 * page, page, "adjacent above", hva=8 * page)
    recipe.slot(2, 15 * page, page, "adjacent below", hva=9 * page)
    recipe.slot(1, 16 * page, page, "move onto other slot", hva=8 * page)


def _flags(recipe: Recipe, page: int) -> None:
    for flags, note in (
        (LOG_DIRTY, "flags: log dirty on"),
        (0, "flags: log dirty off"),
        (READONLY, "flags: set readonly on existing"),
    ):
        recipe.slot(0, 16 * page, 4 * page, note, flags=flags)
    recipe.slot(0, 17 * page, 4 * page, "move+flags (conflicts with slot 1)", flags=LOG_DIRTY)
    recipe.slot(0, 32 * page, 4 * page, "move+flags", flags=LOG_DIRTY)
    recipe.slot(9, 64 * page, page, "create readonly", flags=READONLY)
    recipe.slot(9, 64 * page, page, "readonly|logdirty", flags=READONLY | LOG_DIRTY)
    recipe.slot(9, 64 * page, page, "clear readonly")
    for flags in UNKNOWN_FLAGS:
        recipe.slot(10, 80 * page, page, "unknown flag", flags=flags)


def _alignment(recipe: Recipe, page: int) -> None:
    """Also what a host with larger pages must refuse although it is a multiple of 4096."""
    recipe.slot(10, 80 * page + 1, page, "gpa unaligned 1")
    recipe.slot(10, 80 * page + 512, page, "gpa unaligned 512")
    recipe.slot(10, 80 * page, page + 1, "size unaligned")
    recipe.slot(10, 80 * page, page, "hva unaligned", hva=1)
    recipe.slot(10, 80 * page, 4096, "4096 bytes")
    recipe.slot(11, 96 * page + 4096, page, "gpa at 4096 multiple")


def _extremes(recipe: Recipe, page: int) -> None:
    last = (1 << 64) - page
    recipe.slot(12, 112 * page, 0, "size 0 on absent slot")
    recipe.slot(12, last, 2 * page, "gpa+size wraps")
    recipe.slot(12, last, page, "gpa+size == 2^64")
    recipe.slot(12, 0, 1 << 63, "size 2^63")
    recipe.slot(12, 1 << 32, MOST_PAGES * page, "2^31-1 pages")
    recipe.slot(12, 1 << 32, (MOST_PAGES + 1) * page, "2^31 pages")


def _addresses(recipe: Recipe, page: int) -> None:
    """Where the client's memory may be said to lie, whether anything is there or not."""
    for slot, hva, note in (
        (13, 0, "hva 0 (unmapped)"),
        (14, 1 << 47, "hva 2^47 (unmapped user)"),
        (15, 1 << 52, "hva 2^52"),
        (16, 0xFFFF_8000_0000_0000, "hva kernel half"),
        (17, 0xFF00_0000_0000_0000, "hva tagged"),
    ):
        recipe.slot(slot, (128 + 2 * (slot - 13)) * page, page, note, mem=None, hva=hva)
    recipe.slot(18, 138 * page, page, "hva shared with slot 0")
    recipe.slot(0, 32 * page, 0, "delete")
    recipe.slot(0, 32 * page, 0, "delete twice")


def _numbers(recipe: Recipe, page: int) -> None:
    """Slot numbers around the limits; each gets an address of its own."""
    for slot in (508, 509, 511, 512, 32763, 32764, 32765, 32766, 32767, 32768, 65535):
        recipe.slot(slot, (200 + slot % 1000) * page, page, f"slot id {slot}")
    for slot in (1 << 16, 1 << 16 | 1, 1 << 17, 1 << 31):
        recipe.slot(slot, 2000 * page, page, f"slot id {slot:#x} (address space)")


def _dirty(page: int) -> Recipe:
    recipe = Recipe("slots/dirty_log").vm().memory().slot(0, 0, 16 * page, "no log")
    recipe.slot(1, 1 << 20, LOGGED_PAGES * page, hva=SECOND_HVA, flags=LOG_DIRTY)
    for slot in (0, 1, 2, 40000, 1 << 16 | 1):
        recipe.add("dirty_log", vm="vm", slot=slot, bytes=BITMAP_BYTES)
    _clear(recipe)
    recipe.enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1, "MANUAL_DIRTY_LOG_PROTECT2 =1")
    _clear(recipe)
    for value, note in ((2, "=2 (INITIALLY_SET alone)"), (3, "=3"), (4, "=4"), (0, "=0")):
        recipe.enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, value, note)
    return recipe


def _clear(recipe: Recipe) -> None:
    """Ranges that begin and end within a word, at the slot's end, and beyond it."""
    for first, count in ((0, 64), (0, 1), (64, 6), (64, 64), (0, 70), (1, 64), (128, 64), (0, 0)):
        recipe.add("clear_dirty", vm="vm", slot=1, first=first, n=count, bytes=BITMAP_BYTES)
