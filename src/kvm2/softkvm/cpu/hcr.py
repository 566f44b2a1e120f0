"""HCR_EL2 of a core: the settled bits, and the virtual interrupt lines that can be hidden for a moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm2.softkvm.cpu import registers as reg

if TYPE_CHECKING:
    from kvm2.softkvm.cpu.instance import Instance


class HypervisorConfig:
    """The register's parts: `settled` traps and modes, and the lines VI and VF.

    The emulator looks at its interrupt lines on its way out of a run. An exit must leave the guest at the instruction
    that caused it, so the lines are hidden for the way out and shown again at the next entry.
    """

    __slots__ = ("_lines", "_register", "settled", "shown")

    def __init__(self, instance: Instance, settled: int) -> None:
        self._register = reg.Batch(instance.handle, (), (reg.HCR_EL2,))
        self._lines = 0
        self.settled = settled
        self.shown = True
        self._register.write([settled])

    # Everywhere the emulator first, the note of it afterwards: an exception in between repeats the write later.

    def set(self, bits: int, on: bool) -> None:
        """Settled bits on or off."""
        settled = self.settled | bits if on else self.settled & ~bits
        self._register.write([settled | (self._lines if self.shown else 0)])
        self.settled = settled

    def line(self, bit: int, pending: bool) -> None:
        """An interrupt line, VI or VF."""
        lines = self._lines | bit if pending else self._lines & ~bit
        if lines != self._lines:
            if self.shown:
                self._register.write([self.settled | lines])
            self._lines = lines

    def hide(self) -> None:
        """Take pending lines away from the emulator."""
        if self._lines and self.shown:
            self._register.write([self.settled])
            self.shown = False

    def show(self) -> None:
        """Give the lines back."""
        if not self.shown:
            self._register.write([self.settled | self._lines])
            self.shown = True
