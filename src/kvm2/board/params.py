"""The parameter block: what the runner tells a guest about its VM. docs/guest.md has the table.

>>> block = Params(ipa_bits=36, host_ipa_bits=36, page_shift=14, cpus=1, ranges=((1 << 30, 1 << 26),))
>>> len(block.pack()), block.pack()[:8]
(88, b'KVM2PARM')
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

MAGIC = b"KVM2PARM"
VERSION = 1
_FIXED = struct.Struct("<8sIIIIIIQQQQII")
_RANGE = struct.Struct("<QQ")


@dataclass(frozen=True)
class Params:
    """The block's contents. Addresses and sizes in bytes; `top` is what is mapped below the IPA limit, or zeros.

    `sve_vls` is the set of vector lengths as KVM has it (bit n-1: n * 128 bits), 0 without SVE.
    """

    ipa_bits: int
    host_ipa_bits: int
    page_shift: int
    cpus: int
    ranges: tuple[tuple[int, int], ...]
    sve_vls: int = 0
    uart: int = 0x0900_0000
    top: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        """Bytes of the packed block."""
        return _FIXED.size + _RANGE.size * len(self.ranges)

    def pack(self) -> bytes:
        """Little-endian bytes, a multiple of 8."""
        numbers = (self.ipa_bits, self.host_ipa_bits, self.page_shift, self.cpus)
        fixed = _FIXED.pack(
            MAGIC, VERSION, self.size, *numbers, self.sve_vls, self.uart, *self.top, len(self.ranges), 0
        )
        return fixed + b"".join(_RANGE.pack(*piece) for piece in self.ranges)
