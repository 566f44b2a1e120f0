import bz2
import gzip
import lzma
import os
import struct

import pytest

from kvm2.board.kernel_image import KernelImage, parse_kernel, read_kernel
from kvm2.errors import GuestError

BODY = bytes(range(256)) * 64


def image(flags=0b1010, size=0x40000, offset=0, magic=b"ARM\x64", body=BODY):
    return struct.pack("<2I3Q24s4sI", 0x91005A4D, 0x14000000, offset, size, flags, bytes(24), magic, 64) + body


def zboot(payload, kind, extra=b""):
    head = struct.pack("<4s4sII8s32s", b"MZ\0\0", b"zimg", 0x1000, len(payload), bytes(8), kind)
    return head.ljust(0x1000, b"\0") + payload + extra


@pytest.mark.parametrize(
    ("flags", "page_size", "anywhere"),
    [(0, None, False), (0b0010, 4096, False), (0b1100, 16384, True), (0b1110, 65536, True)],
)
def test_the_header_says_what_the_kernel_wants(flags, page_size, anywhere):
    kernel = parse_kernel("Image", image(flags))
    assert (kernel.page_size, kernel.anywhere, kernel.packed) == (page_size, anywhere, "")
    assert kernel.data == image(flags) and kernel.room == kernel.image_size == 0x40000


def test_a_text_offset_is_taken_as_it_is():
    assert parse_kernel("Image", image(offset=0x80000)).text_offset == 0x80000


def test_an_old_kernel_has_no_size_and_a_known_offset():
    kernel = parse_kernel("Image", image(size=0, offset=0x8000000000000))
    assert kernel.text_offset == 0x80000 and kernel.room == len(image())


def test_what_is_longer_than_it_says_keeps_its_room():
    assert parse_kernel("Image", image(size=0x100)).room == len(image())


@pytest.mark.parametrize(
    ("pack", "how"),
    [
        (gzip.compress, "gzip"),
        (lzma.compress, "xz"),
        (lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE), "lzma"),
        (bz2.compress, "bzip2"),
    ],
)
def test_packed_images_are_unpacked(pack, how):
    plain = parse_kernel("Image", image())
    kernel = parse_kernel(f"Image.{how}", pack(image()) + b"trailing")
    assert kernel.data == plain.data and kernel.packed == how
    with pytest.raises(GuestError, match=r"cut off|damaged"):
        parse_kernel("Image", pack(image())[:-20])


@pytest.mark.parametrize(
    ("payload", "kind", "packed"),
    [
        (gzip.compress(image()), b"gzip", "zboot gzip"),
        (lzma.compress(image(), check=lzma.CHECK_CRC32), b"xzkern", "zboot xz"),
        (lzma.compress(image(), format=lzma.FORMAT_ALONE), b"lzma", "zboot lzma"),
    ],
)
def test_zboot_images_hold_one(payload, kind, packed):
    kernel = parse_kernel("vmlinuz.efi", zboot(payload, kind, b"\0\0\4\0 and the EFI code"))
    assert kernel.data == image() and kernel.packed == packed


def test_a_damaged_stream_is_said():
    data = bytearray(gzip.compress(os.urandom(1000)))
    data[200] ^= 0xFF
    with pytest.raises(GuestError, match="gzip and damaged"):
        parse_kernel("Image.gz", bytes(data))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"hello", "no kernel for arm64"),
        (image(flags=1), "big-endian"),
        (image(magic=b"RSC\x05"), "no kernel for arm64|EFI program"),
        (image(size=1 << 40), "no kernel is larger"),
        (image(offset=1 << 40), "2 MiB boundary"),
        (image(offset=2), "2 MiB boundary"),
        (bytes(0x202) + b"HdrS" + bytes(100), "x86 Linux kernel"),
        (bytes(0x30) + b"RISCV\0\0\0" + bytes(100), "RISC-V"),
        (bytes(0x24) + struct.pack("<I", 0x016F2818) + bytes(100), "32-bit Arm Linux kernel"),
        (b"\x7fELF\2\1" + bytes(12) + struct.pack("<H", 183) + bytes(60), "ELF for arm64.*objcopy"),
        (b"\x7fELF\2\1" + bytes(12) + struct.pack("<H", 62) + bytes(60), "ELF for x86-64"),
        (b"\x7fELF\2\2" + bytes(12) + struct.pack(">H", 183) + bytes(60), "ELF for arm64"),
        (b"070701" + bytes(100), "--initrd"),
        (b"\xd0\x0d\xfe\xed" + bytes(100), "device tree"),
        (b"!<arch>\ndebian-binary" + bytes(100), "archive"),
        (b"MZ" + bytes(200), "EFI program"),
        (gzip.compress(b"\x7fELF\2\1" + bytes(12) + struct.pack("<H", 62) + bytes(60)), "x86-64.*packed with gzip"),
        (gzip.compress(gzip.compress(image())), "gzip data, packed with gzip"),
        (b"\x28\xb5\x2f\xfd" + bytes(50), "packed with zstd, which Python cannot undo.*zstd -d"),
        (b"\x04\x22\x4d\x18" + bytes(50), "packed with lz4,"),
        (zboot(b"\x28\xb5\x2f\xfd" + bytes(9), b"zstd22"), "zboot image, is packed with zstd"),
        (zboot(b"?", b"brotli"), "packed with 'brotli'"),
        (zboot(gzip.compress(image()), b"gzip")[:-9], "payload ends at byte"),
        (b"MZ\0\0zimg", "cut off"),
    ],
)
def test_what_is_something_else_is_named(data, words):
    with pytest.raises(GuestError, match=words):
        parse_kernel("file", data)


def test_what_unpacks_to_too_much_is_no_kernel(monkeypatch):
    monkeypatch.setattr("kvm2.board.kernel_image.LARGEST", 1 << 16)
    with pytest.raises(GuestError, match="unpacks to more"):
        parse_kernel("bomb", gzip.compress(bytes(1 << 20)))


def test_files_are_read_by_their_path(tmp_path):
    path = tmp_path / "vmlinuz"
    path.write_bytes(image())
    kernel = read_kernel(path)
    assert isinstance(kernel, KernelImage) and kernel.name == "vmlinuz" and "\\x" not in repr(kernel)
    with pytest.raises(GuestError, match="No such file"):
        read_kernel(tmp_path / "nothing")
