"""Linux kernels for arm64: the `Image`, also compressed, and the EFI zboot image that packs one.

`parse_kernel` gives the kernel as it is to lie in memory, and what its header asks for
(Documentation/arch/arm64/booting.rst, section 4). What is something else is refused by its name.

>>> header = bytes(8) + (0).to_bytes(8, "little") + (0x10000).to_bytes(8, "little") + (0b1010).to_bytes(8, "little")
>>> kernel = parse_kernel("Image", header + bytes(24) + b"ARM\\x64" + bytes(4))
>>> kernel.text_offset, kernel.image_size, kernel.page_size, kernel.anywhere, kernel.packed
(0, 65536, 4096, True, '')
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvm2.board.loader import read_file
from kvm2.errors import GuestError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# code0, code1, text_offset, image_size, flags, res2..4, magic, res5.
_HEADER = struct.Struct("<2I3Q24s4sI")
MAGIC = b"ARM\x64"
FLAG_BIG_ENDIAN = 1 << 0
FLAG_ANYWHERE = 1 << 3
_PAGE_SHIFT_AT, _PAGE_MASK = 1, 3
PAGE_SIZES = {0: None, 1: 4096, 2: 16384, 3: 65536}
OLD_TEXT_OFFSET = 0x80000  # where image_size is 0: before Linux 3.17
# drivers/firmware/efi/libstub/zboot-header.S: MZ, "zimg", payload's offset and size, reserved, compression type.
_ZBOOT = struct.Struct("<4s4sII8s32s")
_MZ, _ZIMG = b"MZ", b"zimg"
_BLOCK = 2 << 20
LARGEST = 1 << 29  # an unpacked kernel beyond this is none
_WHAT_BOOTS = (
    "kvm2 boots an arm64 Linux Image (arch/arm64/boot/Image, or a distribution's vmlinuz), plain, gzip, xz, lzma or "
    "bzip2, or an EFI zboot image of those"
)


class _Unpacker(Protocol):
    """What zlib, lzma and bz2 have in common."""

    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Packing(NamedTuple):
    """A compression: the bytes that a file of it starts with, and how to undo it, or None where Python cannot."""

    magic: bytes
    unpacker: Callable[[], _Unpacker] | None


_PACKINGS = {
    "gzip": _Packing(b"\x1f\x8b", lambda: zlib.decompressobj(31)),
    "xz": _Packing(b"\xfd7zXZ\0", lzma.LZMADecompressor),
    "lzma": _Packing(b"\x5d\0\0", lzma.LZMADecompressor),
    "bzip2": _Packing(b"BZh", bz2.BZ2Decompressor),
    "zstd": _Packing(b"\x28\xb5\x2f\xfd", None),
    "lz4": _Packing(b"\x02\x21\x4c\x18", None),
    "lz4 frame": _Packing(b"\x04\x22\x4d\x18", None),
    "lzo": _Packing(b"\x89LZO", None),
}
# The names that zboot headers have for them.
_ZBOOT_NAMES = {"xzkern": "xz", "zstd22": "zstd", "bzip2": "bzip2"}
# (offset, bytes, what the file is): things that are given for a kernel by mistake.
_OTHERS = (
    (0x202, b"HdrS", "an x86 Linux kernel (bzImage)"),
    (0x30, b"RISCV\0\0\0", "a RISC-V Linux Image"),
    (0x24, b"\x18\x28\x6f\x01", "a 32-bit Arm Linux kernel (zImage)"),
    (0x24, b"\x01\x6f\x28\x18", "a big-endian 32-bit Arm Linux kernel (zImage)"),
    (0, b"\x27\x05\x19\x56", "a U-Boot legacy image (uImage): take the Image that it was made of"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree, or a U-Boot FIT image"),
    (0, b"070701", "a cpio archive: an initramfs, which goes with --initrd"),
    (0, b"!<arch>\n", "an archive; a Debian package has the kernel at boot/vmlinuz-* of its data"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0x8001, b"CD001", "a CD image"),
    (0, b"MZ", "an EFI program without an arm64 kernel's header"),
)
_ELF_MACHINES = {3: "x86", 62: "x86-64", 40: "32-bit Arm", 183: "arm64", 243: "RISC-V"}


@dataclass(frozen=True)
class KernelImage:
    """A kernel to be booted. `data` goes to a 2 MiB boundary plus `text_offset`, where `image_size` bytes are its own.

    `page_size` is the kernel's translation granule in bytes, None where it does not say; `anywhere` says that it can
    use memory below itself; `packed` is how it came: "", "gzip", "zboot gzip", ...
    """

    name: str
    data: bytes = field(repr=False)
    text_offset: int
    image_size: int
    page_size: int | None
    anywhere: bool
    packed: str = ""

    @property
    def room(self) -> int:
        """Bytes that nothing else may lie in, from where it is loaded."""
        return max(self.image_size, len(self.data))


def read_kernel(path: Path) -> KernelImage:
    """The kernel in a file. GuestError: what the file is instead, and what boots."""
    return parse_kernel(path.name, read_file(path))


def parse_kernel(name: str, data: bytes) -> KernelImage:
    """The kernel in `data`; see `read_kernel`."""
    packed: list[str] = []
    if data[:2] == _MZ and data[4:8] == _ZIMG:
        data, how = _zboot(name, data)
        packed += ["zboot", how]
    elif (packing := _packing_of(data)) is not None:
        data = _unpack(name, data, packing)
        packed.append(packing)
    if len(data) < _HEADER.size or data[56:60] != MAGIC:
        raise GuestError(f"{name} is {_what_it_is(data, packed)}. {_WHAT_BOOTS}")
    _, _, text_offset, image_size, flags, _, _, _ = _HEADER.unpack_from(data)
    if flags & FLAG_BIG_ENDIAN:
        raise GuestError(f"{name} is a big-endian arm64 kernel (flags {flags:#x}); vCPUs start little-endian")
    if not image_size:
        text_offset, image_size = OLD_TEXT_OFFSET, len(data)
    if text_offset >= _BLOCK or text_offset % 4:
        raise GuestError(
            f"{name} wants to be {text_offset:#x} bytes behind a 2 MiB boundary: that is no place for code"
        )
    if image_size > LARGEST:
        raise GuestError(f"{name} wants {image_size:#x} bytes for itself; no kernel is larger than {LARGEST:#x}")
    page_size = PAGE_SIZES[flags >> _PAGE_SHIFT_AT & _PAGE_MASK]
    return KernelImage(name, data, text_offset, image_size, page_size, bool(flags & FLAG_ANYWHERE), " ".join(packed))


def _packing_of(data: bytes) -> str | None:
    return next((name for name, packing in _PACKINGS.items() if data.startswith(packing.magic)), None)


def _zboot(name: str, data: bytes) -> tuple[bytes, str]:
    if len(data) < _ZBOOT.size:
        raise GuestError(f"{name} is an EFI zboot image, cut off after {len(data)} bytes")
    _, _, offset, size, _, text = _ZBOOT.unpack_from(data)
    if offset + size > len(data):
        raise GuestError(f"{name} is an EFI zboot image whose payload ends at byte {offset + size}; it has {len(data)}")
    how = text.split(b"\0")[0].decode("ascii", "backslashreplace")
    how = _ZBOOT_NAMES.get(how, how)
    if how not in _PACKINGS:
        raise GuestError(f"{name} is an EFI zboot image packed with {how!r}, which kvm2 does not know. {_WHAT_BOOTS}")
    return _unpack(f"{name}, an EFI zboot image,", data[offset : offset + size], how), how


def _unpack(name: str, data: bytes, how: str) -> bytes:
    """The contents; what follows their end is not looked at."""
    packing = _PACKINGS[how]
    if packing.unpacker is None:
        tool = how.split()[0]
        unpack = f"unpack it (`{tool} -d`)"
        raise GuestError(f"{name} is packed with {tool}, which Python cannot undo: {unpack}. {_WHAT_BOOTS}")
    unpacker = packing.unpacker()
    try:
        found = unpacker.decompress(data, LARGEST + 1)
    except (zlib.error, lzma.LZMAError, OSError) as error:
        raise GuestError(f"{name} is packed with {how} and damaged: {error}") from error
    if len(found) > LARGEST:
        raise GuestError(f"{name} unpacks to more than {LARGEST:#x} bytes: no kernel is so large")
    if not unpacker.eof:
        raise GuestError(f"{name} is packed with {how} and cut off: its end is missing")
    return found


def _what_it_is(data: bytes, packed: list[str]) -> str:
    """In words, for the message: "x", or "x, packed with gzip"."""
    what = _plain(data)
    return what if not packed else f"{what}, packed with {packed[-1]}"


def _plain(data: bytes) -> str:
    if not data:
        return "empty"
    if data[:4] == b"\x7fELF" and len(data) >= 20:
        machine = int.from_bytes(data[18:20], "little" if data[5] == 1 else "big")
        kind = _ELF_MACHINES.get(machine, f"machine {machine}")
        hint = ": a vmlinux becomes an Image by `objcopy -O binary`" if machine == 183 else ""
        return f"an ELF for {kind}, not an Image{hint}"
    for offset, magic, what in _OTHERS:
        if data[offset : offset + len(magic)] == magic:
            return what
    how = _packing_of(data)
    return f"{how} data" if how else f"no kernel for arm64 (no 'ARM\\x64' at byte 56; {len(data)} bytes)"
