"""A guest's memory as its debugger sees it: by virtual address, through the guest's own tables, without breakpoints.

Over ONE_REG and the VM's memory alone, so it is the same on any host. Permissions and the access flag are not looked
at; nothing in the tables is changed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

from kvm2.errors import UsageError
from kvm2.softkvm.cpu.walk import READ, SCTLR_EE, TCR_HA, Access, Regime, WalkFault, translate

if TYPE_CHECKING:
    from kvm2.vcpu import Vcpu
    from kvm2.vm import Vm

BRK: Final = struct.pack("<I", 0xD420_0000)  # BRK #0
PAGE: Final = 4096  # the smallest granule: within it, an address keeps its translation
_REGIME: Final = ("SCTLR_EL1", "TCR_EL1", "TTBR0_EL1", "TTBR1_EL1")


class Unmapped(Exception):
    """An address that the guest's tables, or the VM's memory, do not have."""


@dataclass
class _Patch:
    """A BRK in the guest's memory: what was there, and for which virtual addresses it is there."""

    original: bytes
    addresses: set[int] = field(default_factory=set)


class GuestMemory:
    """The memory behind the tables that a vCPU uses now. `forget` after anything ran or changed registers."""

    def __init__(self, vm: Vm, pa_bits: int) -> None:
        self._vm, self._pa_bits = vm, pa_bits
        self._regimes: dict[int, Regime] = {}
        self._patches: dict[int, _Patch] = {}

    def forget(self) -> None:
        """Registers may have changed."""
        self._regimes.clear()

    # ---- translation

    def ipa(self, vcpu: Vcpu, address: int) -> int:
        """The guest physical address of a virtual one; `Unmapped` where there is none."""
        regime = self._regimes.get(vcpu.id)
        if regime is None:
            sctlr, tcr, ttbr0, ttbr1 = (cast("int", vcpu.get_reg(name)) for name in _REGIME)
            # With hardware updates of the access flag no walk faults for it; what it would write is not written.
            regime = self._regimes[vcpu.id] = Regime(sctlr, tcr | TCR_HA, ttbr0, ttbr1, self._pa_bits)
        order = ">Q" if regime.sctlr & SCTLR_EE else "<Q"

        def descriptor(ipa: int, value: int | None) -> int:
            if value is not None:
                return value
            return int(struct.unpack(order, self._vm.read(ipa, 8))[0])

        try:
            return translate(regime, address, Access(READ, False), descriptor).ipa
        except WalkFault as fault:
            raise Unmapped(f"{address:#x} is not mapped (fault status {fault.status:#x})") from None
        except UsageError as error:
            raise Unmapped(f"the tables of {address:#x} are not in memory: {error}") from None

    def _pieces(self, vcpu: Vcpu, address: int, size: int) -> list[tuple[int, int]]:
        pieces = []
        while size:
            take = min(size, PAGE - address % PAGE)
            pieces.append((self.ipa(vcpu, address), take))
            address, size = address + take & (1 << 64) - 1, size - take
        return pieces

    # ---- reading and writing

    def read(self, vcpu: Vcpu, address: int, size: int) -> bytes:
        """Up to `size` bytes: as many as there are from `address` on. `Unmapped` where there is not one."""
        data = b""
        while len(data) < size:
            at = address + len(data) & (1 << 64) - 1
            take = min(size - len(data), PAGE - at % PAGE)
            try:
                data += self._read(self.ipa(vcpu, at), take)
            except (Unmapped, UsageError) as error:
                if data:
                    break
                raise Unmapped(str(error)) from None
        return data

    def _read(self, ipa: int, size: int) -> bytes:
        data = bytearray(self._vm.read(ipa, size))
        for place, patch in self._patches.items():
            for offset, byte in enumerate(patch.original):
                if ipa <= place + offset < ipa + size:
                    data[place + offset - ipa] = byte
        return bytes(data)

    def write(self, vcpu: Vcpu, address: int, data: bytes) -> None:
        """All of `data`, or nothing and `Unmapped`. Breakpoints stay where they are."""
        pieces = self._pieces(vcpu, address, len(data))
        try:
            for ipa, size in pieces:
                self._vm.read(ipa, size)
        except UsageError as error:
            raise Unmapped(str(error)) from None
        for ipa, size in pieces:
            part, data = bytearray(data[:size]), data[size:]
            for place, patch in self._patches.items():
                original = bytearray(patch.original)
                for offset in range(len(original)):
                    if ipa <= place + offset < ipa + size:
                        original[offset] = part[place + offset - ipa]
                        part[place + offset - ipa] = BRK[offset]
                patch.original = bytes(original)
            self._vm.write(ipa, bytes(part))

    # ---- software breakpoints

    def insert(self, vcpu: Vcpu, address: int) -> None:
        """A BRK at a virtual address; `Unmapped` where nothing is."""
        ipa = self.ipa(vcpu, address)
        patch = self._patches.get(ipa)
        if patch is None:
            try:
                patch = _Patch(self._vm.read(ipa, len(BRK)))
                self._vm.write(ipa, BRK)
            except UsageError as error:
                raise Unmapped(str(error)) from None
            self._patches[ipa] = patch
        patch.addresses.add(address)

    def remove(self, address: int) -> None:
        """The BRK of a virtual address goes; nothing happens where there is none."""
        for ipa, patch in list(self._patches.items()):
            patch.addresses.discard(address)
            if not patch.addresses:
                del self._patches[ipa]
                self._vm.write(ipa, patch.original)

    def remove_all(self) -> None:
        """No breakpoint is left."""
        for patch in self._patches.values():
            patch.addresses.clear()
        self.remove(0)

    def is_breakpoint(self, vcpu: Vcpu, address: int) -> bool:
        """Whether a BRK at this address is one of these, under any of its virtual addresses."""
        try:
            return self.ipa(vcpu, address) in self._patches
        except Unmapped:
            return False

    @property
    def has_breakpoints(self) -> bool:
        """Whether there is any."""
        return bool(self._patches)
