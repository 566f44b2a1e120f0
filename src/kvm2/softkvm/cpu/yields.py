"""WFE and YIELD, where a hypervisor wants to know that the guest waits for another CPU.

The emulated core has no trap for WFE (HCR_EL2.TWE): like YIELD it is a hint to the emulator, which goes out of its
inner loop and in again. On the way in it calls a function that does nothing; ours stands there while it is wanted.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Final

from kvm2.softkvm.cpu import calibrate

if TYPE_CHECKING:
    from kvm2.softkvm.cpu.instance import Instance

_HINTS: Final = frozenset({0xD503205F, 0xD503203F})  # WFE, YIELD


class Yields:
    """The replaced function of one instance. `left` is called behind a WFE or YIELD, with PC behind it; `failed` takes
    what a signal handler raised in the meantime."""

    def __init__(self, instance: Instance, left: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        self._instance, self._left, self._failed = instance, left, failed
        self._cell = ctypes.c_void_p.from_address(instance.cpu + instance.layout.enter_in_cpu)
        self._nothing = self._cell.value
        self._handler = self._entries()
        next(self._handler)
        self._callback = calibrate.ENTER_CALLBACK(self._handler.send)
        self._ours = ctypes.cast(self._callback, ctypes.c_void_p).value
        self.entering = False  # set by who starts the emulator: that entry is none of the guest's doing

    def set(self, on: bool) -> None:
        """Watch or not."""
        self._cell.value = self._ours if on else self._nothing

    def close(self) -> None:
        """The core is about to be freed."""
        self._handler.close()

    def _entries(self) -> Generator[None, int, None]:
        instance = self._instance
        while True:
            try:
                while True:
                    yield
                    if self.entering:
                        self.entering = False
                    elif instance.read_code(instance.pc_cell.value - 4) in _HINTS:
                        self._left()
            except GeneratorExit:
                return
            except BaseException as failure:
                self._failed(failure)
