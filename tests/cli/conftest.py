"""A guest that looks like a Linux kernel, for the tests of what is around one."""

import struct
from pathlib import Path

import pytest

# Says "ready", sets the UART up, then sends back what it reads: `q` is PSCI SYSTEM_OFF as well, `r` SYSTEM_RESET.
#     adr x4, greeting; mov x9, #0x09000000
#  1: ldrb w0, [x4], #1; cbz w0, 2f; str w0, [x9]; b 1b
#  2: mov w1, #0x301; str w1, [x9, #0x30]; mov w1, #0x70; str w1, [x9, #0x2c]
#  3: ldr w1, [x9, #0x18]; tbnz w1, #4, 3b; ldr w0, [x9]; str w0, [x9]
#     cmp w0, #'q'; b.eq off; cmp w0, #'r'; b.eq reset; b 3b
# off: movz w0, #0x8400, lsl #16; movk w0, #8; hvc #0
# reset: movz w0, #0x8400, lsl #16; movk w0, #9; hvc #0
# greeting: .asciz "ready\r\n"
ECHO = bytes.fromhex(
    "24030010 0920a1d2 80144038 60000034 200100b9 fdffff17 21608052 213100b9 010e8052 212d00b9 211940b9 e1ff2737"
    "200140b9 200100b9 1fc40171 80000054 1fc80171 a0000054 f8ffff17 0080b052 00018072 020000d4 0080b052 20018072"
    "020000d4 72656164 790d0a00"
)
HEADER = 64
PAGE_4K, PAGE_16K = 0b0010, 0b0100  # flags of the header: little-endian, the page size


def image(flags: int = PAGE_4K) -> bytes:
    """An arm64 Image (Documentation/arch/arm64/booting.rst) of the guest above."""
    branch = 0x14000000 | HEADER // 4
    size = 1 << 16
    return struct.pack("<2I3Q24s4sI", branch, 0, 0, size, flags, bytes(24), b"ARM\x64", 0) + ECHO


@pytest.fixture
def echo_image(tmp_path: Path) -> str:
    """The file of an Image that echoes."""
    path = tmp_path / "Image"
    path.write_bytes(image())
    return str(path)
