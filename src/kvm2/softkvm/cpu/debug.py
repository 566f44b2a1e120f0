"""The core's debug exceptions: software steps and breakpoints, which the emulated core executes by itself.

It has MDCR_EL2.TDE, MDSCR_EL1, PSTATE.SS and sixteen breakpoint comparators, whatever its ID register says; two of them
compare contexts. Watchpoints it has not: `cpu.watch` makes them. The guest's accesses to the debug registers trap
(MDCR_EL2.TDA, TDOSA, TDRA), so that what is in the core is the hypervisor's alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_uint64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvm2.errors import EnvironmentFault
from kvm2.softkvm.cpu import instance as inst
from kvm2.softkvm.cpu import registers as reg

if TYPE_CHECKING:
    from kvm2.softkvm.cpu.engine import Engine
    from kvm2.softkvm.cpu.instance import Instance

MDSCR_SS, MDSCR_KDE, MDSCR_MDE = 1 << 0, 1 << 13, 1 << 15
MDSCR_USED: Final = MDSCR_SS | MDSCR_KDE | MDSCR_MDE
MDCR_TDE: Final = 1 << 8
PSTATE_SS: Final = 1 << 21
COMPARATORS: Final = 16

BCR_E: Final = 1
BCR_LBN_SHIFT, BCR_BT_SHIFT, FIELD = 16, 20, 0xF
BT_ADDRESS, BT_LINKED_ADDRESS, BT_LINKED_CONTEXT = 0, 1, 3

Pair = tuple[int, int]  # the value register and the control register of a comparator


@dataclass(frozen=True)
class Debugging:
    """What the core's debug logic does: bits of MDSCR_EL1, whether its exceptions go to EL2, the comparators in use.

    A breakpoint that is linked to a context names its partner by its place in `breakpoints`.
    """

    mdscr: int = 0
    to_el2: bool = False
    breakpoints: tuple[Pair, ...] = ()
    watchpoints: tuple[Pair, ...] = ()


IDLE: Final = Debugging()


@functools.cache
def _update_function(engine: Engine) -> Callable[[int], None]:
    """Makes the core look at its breakpoint registers again."""
    try:
        function = engine.FAST.hw_breakpoint_update_all_aarch64
    except AttributeError:
        raise EnvironmentFault(
            f"hardware breakpoints need the function hw_breakpoint_update_all_aarch64, and {engine.path} does not "
            "export it; install the official wheel: pip install unicorn==2.1.4"
        ) from None
    function.argtypes, function.restype = [c_void_p], None
    return function


class DebugLogic:
    """The debug logic of one instance."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self.now = IDLE
        self._mdcr = instance.read_sys(reg.MDCR_EL2)
        self._values = _cells(instance, 4)
        self._controls = _cells(instance, 5)

    def set(self, wanted: Debugging) -> None:
        """What holds from the next instruction on. Changed breakpoints cost the core its translated code."""
        now, instance = self.now, self._instance
        if wanted == now:
            return
        if wanted.breakpoints != now.breakpoints:
            for number, (value, control) in enumerate(placed(wanted.breakpoints)):
                self._values[number].value, self._controls[number].value = value, control
            _update_function(instance.engine)(instance.cpu)
        if wanted.to_el2 != now.to_el2:
            instance.write_sys(reg.MDCR_EL2, self._mdcr | (MDCR_TDE if wanted.to_el2 else 0))
        instance.write_sys(reg.MDSCR_EL1, wanted.mdscr & MDSCR_USED)
        instance.rebuild_flags()
        self.now = wanted


def _cells(instance: Instance, op2: int) -> list[c_uint64]:
    """DBGBVR<n>_EL1 (op2 4) or DBGBCR<n>_EL1 (5): an array of sixteen, of which the core names the first few."""
    first, second = (inst.register_info(instance, reg.enc(2, 0, 0, n, op2)).fieldoffset for n in (0, 1))
    if second - first != 8:
        raise EnvironmentFault("the emulated core's check failed: its breakpoint registers are not one array")
    return [c_uint64.from_address(instance.env + first + 8 * number) for number in range(COMPARATORS)]


# The core compares contexts with its last two named comparators only (ID_AA64DFR0_EL1: BRPs 5, CTX_CMPs 1).
CONTEXT_SLOTS: Final = (5, 4)


def placed(breakpoints: tuple[Pair, ...]) -> list[Pair]:
    """The core's sixteen comparators: address matches, unlinked and linked, and the contexts that those name.

    What the core does not know (contexts alone, VMIDs) is left out, and what links to a third context.

    >>> comparators = placed(((0x1000, 0x1E7), (7, 0x3001E7), (0x2000, 0x1101E7)))
    >>> [number for number, (value, control) in enumerate(comparators) if control]
    [0, 1, 5]
    """
    found: list[Pair] = [(0, 0)] * COMPARATORS
    free = [number for number in range(COMPARATORS) if number not in CONTEXT_SLOTS]
    contexts: dict[int, int] = {}
    for value, control in breakpoints:
        kind = control >> BCR_BT_SHIFT & FIELD
        if not control & BCR_E or kind not in (BT_ADDRESS, BT_LINKED_ADDRESS):
            continue
        if kind == BT_LINKED_ADDRESS:
            partner = control >> BCR_LBN_SHIFT & FIELD
            context = context_of(breakpoints, partner)
            if context is not None and context not in contexts and len(contexts) < len(CONTEXT_SLOTS):
                contexts[context] = CONTEXT_SLOTS[len(contexts)]
            if context is None or context not in contexts:
                continue
            slot = contexts[context]
            found[slot] = context, BT_LINKED_CONTEXT << BCR_BT_SHIFT | FIELD << 5 | control & 0xE006 | BCR_E
            control = control & ~(FIELD << BCR_LBN_SHIFT) | slot << BCR_LBN_SHIFT
        found[free.pop(0)] = value, control
    return found


def context_of(breakpoints: tuple[Pair, ...], number: int) -> int | None:
    """The CONTEXTIDR_EL1 that comparator `number` asks for, where it is one for linked contexts that is on."""
    if number >= len(breakpoints):
        return None
    value, control = breakpoints[number]
    if not control & BCR_E or control >> BCR_BT_SHIFT & FIELD != BT_LINKED_CONTEXT:
        return None
    return value & 0xFFFF_FFFF
