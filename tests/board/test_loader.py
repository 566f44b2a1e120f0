import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm2.board.loader import parse_image, read_image
from kvm2.board.relocate import relr
from kvm2.errors import GuestError
from kvm2.spec import MemoryRange

RAM = (MemoryRange(1 << 30, 1 << 20), MemoryRange((1 << 30) + (1 << 20), 1 << 16))
CODE = b"\x02\x00\x00\xd4" * 4


def elf(loads=((0x40000000, 0x40000000, CODE, 16),), entry=0x40000000, **other):
    """An ELF64 with PT_LOAD segments of (vaddr, paddr, data, memsz)."""
    header = {"cls": 2, "data": 1, "type": 2, "machine": 183, "version": 1, "phentsize": 56} | other
    offset = 64 + 56 * len(loads)
    programs, body = b"", b""
    for vaddr, paddr, data, memsz in loads:
        programs += struct.pack("<IIQQQQQQ", 1, 7, offset + len(body), vaddr, paddr, len(data), memsz, 16)
        body += data
    ident = b"\x7fELF" + bytes([header["cls"], header["data"], 1]) + bytes(9)
    start = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(ident, header["type"], header["machine"], header["version"], entry, 64, 0, 0, 64),
        *(header["phentsize"], len(loads), 64, 0, 0),
    )
    return start + programs + body


def parse(data, memory=RAM):
    return parse_image("guest", data, memory)


def test_flat_images_lie_at_the_ram_base():
    image = parse(b"\x1f\x20\x03\xd5" * 3)
    assert image.entry == 1 << 30
    assert [(s.address, s.size, len(s.data)) for s in image.segments] == [(1 << 30, 12, 12)]


def test_elf_segments_lie_at_their_physical_addresses():
    image = parse(elf([(0x40000000, 0x40001000, CODE, 64), (0x80000000, 0x40002000, b"data", 4)], 0x40001004))
    assert image.entry == 0x40001004
    assert [(s.address, s.data, s.size) for s in image.segments] == [(0x40001000, CODE, 64), (0x40002000, b"data", 4)]


def test_a_virtual_entry_is_taken_to_its_physical_address():
    assert parse(elf([(0xFFFF000000080000, 0x40080000, CODE, 16)], 0xFFFF000000080008)).entry == 0x40080008


def test_a_segment_may_span_ranges_that_touch():
    parse(elf([(0x400FFFF0, 0x400FFFF0, CODE, 32)], 0x400FFFF0))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "is empty"),
        (elf(cls=1), "32-bit ELF"),
        (b"\x7fELF\x01\x01\x01" + bytes(45), "32-bit ELF"),
        (elf(cls=3), "unknown class"),
        (elf(data=2), "big-endian"),
        (elf(machine=62), "for x86-64"),
        (elf(machine=9999), "machine 9999"),
        (elf(type=1), "relocatable object"),
        (elf(type=4), "core dump"),
        (elf(type=0xFE00), "type 65024"),
        (elf(version=2), "version 2"),
        (elf(phentsize=32), "program headers are 32 bytes"),
        (elf([]), "no program headers"),
        (elf([(0, 0, b"", 0)]), "nothing to load"),
        (elf()[:40], "cut off: 40 bytes"),
        (elf()[:100], "program headers end at byte 120"),
        (elf()[:-1], "segment ends at byte 136"),
        (elf([(0x40000000, 0x40000000, CODE, 8)]), "16 bytes in the file for 8"),
        (elf([(0x400000, 0x400000, CODE, 16)], 0x400000), r"do not fit the guest's memory .*Ttext-segment=0x40000000"),
        (elf([(0x4010FFF8, 0x4010FFF8, CODE, 16)], 0x4010FFF8), "do not fit"),
        (elf([(0x40000000, (1 << 64) - 8, CODE, 16)]), "wraps around"),
        (elf(entry=0x40000010), "in none of its segments"),
        (elf(entry=0x40000002), "not a multiple of 4"),
        (elf([(0x40000000, 0x40000000, CODE, 64), (0x40000020, 0x40000020, CODE, 16)]), "overlap"),
        (bytes(1 << 21), "do not fit"),
    ],
)
def test_what_cannot_be_loaded_is_said(data, what):
    with pytest.raises(GuestError, match=what):
        parse(data)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(GuestError, match="No such file"):
        read_image(tmp_path / "none.elf", RAM)
    with pytest.raises(GuestError, match="directory"):
        read_image(tmp_path, RAM)


def test_a_device_that_has_no_end_is_not_read(monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", None)  # reading /dev/zero would take all memory
    with pytest.raises(GuestError, match="is a device: a guest is a file"):
        read_image(Path("/dev/zero"), RAM)


@given(st.data())
def test_no_bytes_crash_the_loader(data):
    image = bytearray(elf())
    for _ in range(data.draw(st.integers(1, 6))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(image)))
    try:
        found = parse(bytes(image[:cut]))
    except GuestError:
        return
    assert all(any(r.base <= s.address < r.end for r in RAM) for s in found.segments)


def test_relr_is_addresses_and_bitmaps():
    table = struct.pack("<4Q", 0x1000, 1 | 1 << 1 | 1 << 63, 3, 0x9000)
    assert list(relr(table)) == [0x1000, 0x1008, 0x1000 + 8 * 63, 0x1000 + 8 * 64, 0x9000]


SOURCE = """
	.globl _start
_start:	mov w0, #8
	movk w0, #0x8400, lsl #16
	hvc #0
	.data
pointer: .quad _start
"""


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-gcc"), reason="no aarch64-linux-gnu-gcc")
class TestWhatTheCompilerMakes:
    @pytest.fixture
    def build(self, tmp_path):
        def build(*flags, source=SOURCE):
            (tmp_path / "guest.S").write_text(source)
            made = tmp_path / "guest.elf"
            command = ["aarch64-linux-gnu-gcc", "-nostdlib", *flags, "guest.S", "-o", str(made)]
            subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
            return read_image(made, RAM)

        return build

    @pytest.mark.parametrize("flags", [("-pie",), ("-static-pie",), ("-pie", "-Wl,-z,pack-relative-relocs")])
    def test_position_independent_guests_are_moved_and_relocated(self, build, flags):
        image = build(*flags)
        assert min(s.address for s in image.segments) == 1 << 30
        assert any(image.entry.to_bytes(8, "little") in s.data for s in image.segments)

    def test_linked_to_the_ram_base(self, build):
        image = build("-static", "-no-pie", "-Wl,-Ttext-segment=0x40000000")
        assert any(s.address <= image.entry < s.end and s.data for s in image.segments)

    def test_linked_elsewhere(self, build):
        with pytest.raises(GuestError, match=r"--memory SIZE@0x400000"):
            build("-static", "-no-pie")

    def test_shared_libraries_are_refused(self, build):
        with pytest.raises(GuestError, match="needs shared libraries"):
            build("-pie", "-Wl,--no-as-needed", "-lc")

    def test_symbols_for_a_dynamic_loader_are_refused(self, build):
        with pytest.raises(GuestError, match="relocation of type 257"):
            build("-shared")

    def test_an_object_file_is_refused(self, build):
        with pytest.raises(GuestError, match="relocatable object"):
            build("-c")
