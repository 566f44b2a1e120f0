"""Guest images: an ELF64, loaded by its physical addresses, or a flat binary, loaded where its architecture has it.

A position-independent ELF (ET_DYN) is moved to the RAM base (on x86-64 2 MiB above), if it needs no dynamic loader.

>>> architecture_of(bytes.fromhex("7f454c46020101") + bytes(11) + b"\\x3e\\0" + bytes(44)), architecture_of(b"flat")
('x86_64', None)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from kvm2.board.relocate import R_AARCH64_RELATIVE, R_X86_64_RELATIVE, Relocator
from kvm2.errors import GuestError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvm2.spec import MemoryRange
    from kvm2.vm import Vm

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
ET_EXEC, ET_DYN, PT_LOAD, PT_DYNAMIC = 2, 3, 1, 2
PN_XNUM = 0xFFFF
_TYPES = {0: "an ELF without a type", 1: "a relocatable object: link it", 4: "a core dump"}
_MACHINES = {3: "x86", 40: "32-bit Arm", 243: "RISC-V", 21: "PowerPC64", 22: "s390"}


@dataclass(frozen=True)
class Kind:
    """What an architecture's images are: e_machine and its name, where flat images and moved ones go, alignment.

    `flat` and `moved` count from the RAM base; `relative` is the relocation that needs no symbol, by number and name.
    """

    arch: str
    machine: int
    name: str
    compiler: str
    flat: int
    moved: int
    align: int
    relative: tuple[int, str]

    @property
    def what_runs(self) -> str:
        """What may be given instead of something that is refused."""
        return f"kvm2 runs a linked little-endian ELF64 for {self.name} ({self.compiler}), or a flat image"


KINDS = {
    kind.arch: kind
    for kind in (
        Kind("arm64", 183, "AArch64", "aarch64-linux-gnu-gcc -nostdlib", 0, 0, 4, R_AARCH64_RELATIVE),
        # A flat image is entered as a boot sector is; 2 MiB is a page of the tables that a moved one finds.
        Kind("x86_64", 62, "x86-64", "gcc -nostdlib -static", 0x7C00, 2 << 20, 1, R_X86_64_RELATIVE),
    )
}


class _Header(NamedTuple):
    type: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


@dataclass(frozen=True)
class Segment:
    """`data` at guest physical address `address`, then zeros up to `size` bytes."""

    address: int
    data: bytes
    size: int

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.address + self.size


@dataclass(frozen=True)
class Image:
    """A guest that can be loaded: where it is entered, what goes where."""

    name: str
    entry: int
    segments: tuple[Segment, ...]

    def load(self, vm: Vm) -> None:
        """Write every segment into the VM's memory, which is zero where nothing was loaded."""
        for segment in self.segments:
            vm.write(segment.address, segment.data)


def read_file(path: Path) -> bytes:
    """A guest's file; GuestError where it cannot be read."""
    try:
        if path.is_char_device() or path.is_block_device():  # may have no end
            raise GuestError(f"{path} is a device: a guest is a file, an ELF or a flat image")
        return path.read_bytes()
    except OSError as error:
        raise GuestError(f"{path}: {error.strerror}") from error


def architecture_of(data: bytes) -> str | None:
    """The architecture that an ELF is for ("arm64", "x86_64"); None: a flat image, or one that kvm2 does not run."""
    if data[:4] != b"\x7fELF" or len(data) < _EHDR.size:
        return None
    machine = _EHDR.unpack_from(data)[2]
    return next((kind.arch for kind in KINDS.values() if kind.machine == machine), None)


def read_image(path: Path, memory: Sequence[MemoryRange], arch: str = "arm64") -> Image:
    """The image in a file, checked against the memory map. GuestError: what it is, what is allowed, what to do."""
    return parse_image(path.name, read_file(path), memory, arch)


def parse_image(name: str, data: bytes, memory: Sequence[MemoryRange], arch: str = "arm64") -> Image:
    """The image in `data`, for guests of this architecture; see `read_image`."""
    kind = KINDS[arch]
    if not data:
        raise GuestError(f"{name} is empty. {kind.what_runs}")
    base = memory[0].base
    if data[:4] == b"\x7fELF":
        image = _elf(name, data, base + kind.moved, kind)
    else:
        image = Image(name, base + kind.flat, (Segment(base + kind.flat, data, len(data)),))
    for segment in image.segments:
        _check_memory(name, segment, memory, base + kind.moved)
    if not any(s.address <= image.entry < s.end for s in image.segments):
        raise GuestError(
            f"{name}: its entry point {image.entry:#x} lies in none of its segments: link it with an ENTRY"
        )
    if image.entry % kind.align:
        raise GuestError(
            f"{name}: its entry point {image.entry:#x} is not a multiple of 4, as every A64 instruction is"
        )
    return image


def _elf(name: str, data: bytes, base: int, wanted: Kind) -> Image:
    if len(data) > 4 and data[4] == 1:
        raise GuestError(f"{name} is a 32-bit ELF. {wanted.what_runs}")
    if len(data) < _EHDR.size:
        raise GuestError(f"{name} is cut off: {len(data)} bytes, and an ELF64 header has {_EHDR.size}")
    ident, kind, machine, version, entry, phoff, _, _, _, phentsize, phnum, *_ = _EHDR.unpack_from(data)
    _check_header(name, ident, kind, machine, version, wanted)
    if phnum in (0, PN_XNUM):
        raise GuestError(f"{name} has no program headers (e_phnum = {phnum}): link it, do not only assemble it")
    if phentsize != _PHDR.size:
        raise GuestError(f"{name}: its program headers are {phentsize} bytes each; ELF64 has {_PHDR.size}")
    if phoff + phnum * _PHDR.size > len(data):
        end = phoff + phnum * _PHDR.size
        raise GuestError(f"{name} is cut off: program headers end at byte {end}, the file at {len(data)}")
    headers = [_Header(*_PHDR.unpack_from(data, phoff + number * _PHDR.size)) for number in range(phnum)]
    loads = [header for header in headers if header.type == PT_LOAD and header.memsz]
    if not loads:
        raise GuestError(f"{name} has nothing to load (no PT_LOAD segment). {wanted.what_runs}")
    for header in loads:
        _check_header_range(name, header, len(data))
    if kind == ET_DYN:
        return _moved(name, data, headers, loads, entry, base, wanted)
    segments = [Segment(one.paddr, data[one.offset : one.offset + one.filesz], one.memsz) for one in loads]
    _check_overlap(name, segments)
    return Image(name, _physical_entry(entry, loads), tuple(segments))


def _moved(
    name: str, data: bytes, headers: list[_Header], loads: list[_Header], entry: int, base: int, wanted: Kind
) -> Image:
    """A position-independent image, moved so that its lowest byte lies at `base`."""
    lowest = min(one.vaddr for one in loads)
    align = max(one.align for one in loads)
    bias = base - lowest
    if align > 1 and bias % align:
        raise GuestError(f"{name} is aligned to {align:#x}, the RAM base {base:#x} is not: give --memory SIZE@ADDRESS")
    pieces = {one.vaddr: bytearray(data[one.offset : one.offset + one.filesz]) for one in loads}
    for one in headers:
        if one.type == PT_DYNAMIC:
            Relocator(name, pieces, bias, wanted.relative).apply(data[one.offset : one.offset + one.filesz])
    segments = [Segment(one.vaddr + bias, bytes(pieces[one.vaddr]), one.memsz) for one in loads]
    _check_overlap(name, segments)
    return Image(name, entry + bias, tuple(segments))


def _physical_entry(entry: int, loads: list[_Header]) -> int:
    """The entry point is a virtual address; the MMU is off when the guest is entered."""
    if any(one.paddr <= entry < one.paddr + one.memsz for one in loads):
        return entry
    return next((entry - one.vaddr + one.paddr for one in loads if one.vaddr <= entry < one.vaddr + one.memsz), entry)


def _check_header(name: str, ident: bytes, kind: int, machine: int, version: int, wanted: Kind) -> None:
    if ident[4] != 2:
        raise GuestError(
            f"{name} is {'a 32-bit ELF' if ident[4] == 1 else 'an ELF of unknown class'}. {wanted.what_runs}"
        )
    if ident[5] != 1:
        raise GuestError(f"{name} is a big-endian ELF; vCPUs start little-endian: build it with -mlittle-endian")
    if ident[6] != 1 or version != 1:
        raise GuestError(f"{name} is an ELF of version {version}; there is only version 1")
    if machine != wanted.machine:
        names = _MACHINES | {one.machine: one.name for one in KINDS.values()}
        raise GuestError(f"{name} is an ELF for {names.get(machine, f'machine {machine}')}. {wanted.what_runs}")
    if kind not in (ET_EXEC, ET_DYN):
        raise GuestError(f"{name} is {_TYPES.get(kind, f'an ELF of type {kind}')}. {wanted.what_runs}")


def _check_header_range(name: str, header: _Header, size: int) -> None:
    if header.filesz > header.memsz:
        raise GuestError(f"{name}: a segment has {header.filesz} bytes in the file for {header.memsz} in memory")
    if header.offset + header.filesz > size:
        end = header.offset + header.filesz
        raise GuestError(f"{name} is cut off: a segment ends at byte {end}, the file has {size} bytes")
    if header.paddr + header.memsz > 1 << 64 or header.vaddr + header.memsz > 1 << 64:
        raise GuestError(f"{name}: a segment at {header.paddr:#x} of {header.memsz:#x} bytes wraps around 64 bits")


def _check_overlap(name: str, segments: list[Segment]) -> None:
    ordered = sorted(segments, key=lambda segment: segment.address)
    for first, second in pairwise(ordered):
        if second.address < first.end:
            raise GuestError(
                f"{name}: the segments at {first.address:#x} and {second.address:#x} overlap: link them apart"
            )


def _check_memory(name: str, segment: Segment, memory: Sequence[MemoryRange], where: int) -> None:
    at = segment.address
    while at < segment.end:
        piece = next((one for one in memory if one.base <= at < one.end), None)
        if piece is None:
            have = ", ".join(f"{one.base:#x}..{one.end:#x}" for one in memory)
            raise GuestError(
                f"{name}: {segment.size:#x} bytes at {segment.address:#x} do not fit the guest's memory ({have}): "
                f"link it there (-Wl,-Ttext-segment={where:#x}), or give it memory "
                f"(--memory SIZE@{at & ~0xFFFF:#x})"
            )
        at = piece.end
