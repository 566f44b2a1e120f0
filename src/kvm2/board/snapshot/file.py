"""The file of a snapshot: memory without its zeros, and one JSON document about everything else.

    0        header: magic, version, where the document is and its checksum, checksum of the header
    4096     the memory's extents, each at a multiple of 4096
    ...      the document (UTF-8 JSON), whose "memory" names every extent with its place and checksum

Checksums are CRC-32. A file is written beside its place and renamed when it is whole: there is no half snapshot.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from kvm2.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MAGIC: Final = b"KVM2SNAP"
VERSION: Final = 1
_HEADER = struct.Struct("<8sIIQQI")  # magic, version, 0, offset and size of the document, its CRC
_CRC = struct.Struct("<I")
ALIGN: Final = 4096
BLOCK: Final = 1 << 16  # what is looked at for zeros
EXTENT: Final = 8 << 20  # the longest piece with one checksum
_ZEROS: Final = bytes(BLOCK)


@dataclass(frozen=True)
class Memory:
    """A range of guest memory in a snapshot: `extents` are (offset in the range, place in the file, bytes, CRC-32)."""

    base: int
    size: int
    extents: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot file says, without the memory itself. `state` is the document's "state"."""

    path: Path
    state: Mapping[str, Any]
    memory: tuple[Memory, ...]

    @property
    def bytes_of_memory(self) -> int:
        """How much of the memory is in the file: what was not zero."""
        return sum(extent[2] for piece in self.memory for extent in piece.extents)


def _runs(view: memoryview) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of what is not zero, in blocks, at most EXTENT long."""
    start = -1
    for at in range(0, len(view), BLOCK):
        block = bytes(view[at : at + BLOCK])  # a copy: comparing a memoryview takes a hundred times as long
        if block == (_ZEROS if len(block) == BLOCK else bytes(len(block))):
            if start >= 0:
                yield start, at - start
            start = -1
        elif start < 0:
            start = at
        elif at - start >= EXTENT:
            yield start, at - start
            start = at
    if start >= 0:
        yield start, len(view) - start


def check_place(path: Path) -> None:
    """UsageError, EnvironmentFault where no snapshot can be written to `path`: to be said before a guest has run."""
    target = path.resolve()
    if not target.parent.is_dir():
        raise UsageError(f"a snapshot cannot be written to {path}: there is no directory {target.parent}")
    if target.exists() and not target.is_file():  # the file that takes its place would be no device
        raise UsageError(f"a snapshot cannot be written to {path}: it is no file, and must not be replaced by one")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise EnvironmentFault(f"a snapshot cannot be written to {path}: this user may not write in {target.parent}")


def _not_written(path: Path, error: OSError) -> EnvironmentFault:
    return EnvironmentFault(f"a snapshot cannot be written to {path}: {error.strerror}; choose another place")


def _unnamed(directory: Path) -> int | None:
    """A new file without a name: nothing stays of it however this process ends. None where there are no such files."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
    except (AttributeError, OSError):  # not Linux; not on this file system
        return None


def _named(handle: int, target: Path) -> str:
    """Gives an `_unnamed` file a name beside `target`, that it may be renamed to."""
    name = str(target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}"))
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        # Only with a directory is it linkat(2), which follows the link that /proc has.
        os.link(f"/proc/self/fd/{handle}", name, src_dir_fd=directory, follow_symlinks=True)
    finally:
        os.close(directory)
    return name


def write(path: Path, state: Mapping[str, Any], memory: Sequence[tuple[int, memoryview]]) -> Snapshot:
    """Writes a snapshot of `state` (JSON-able) and the guest's memory, (address, bytes) of each range.

    What was at `path` is as it was where the file cannot be written: UsageError for a place that is none
    (`check_place`), EnvironmentFault where there is no room for it.
    """
    check_place(path)
    target = path.resolve()  # a symbolic link stays one
    handle, name = _unnamed(target.parent), ""
    try:
        if handle is None:
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with open(handle, "wb") as file:
            pieces = tuple(_write_memory(file, base, view) for base, view in memory)
            document = json.dumps({"state": state, "memory": [_as_json(piece) for piece in pieces]}).encode()
            place = _align(file)
            file.write(document)
            file.seek(0)
            header = _HEADER.pack(MAGIC, VERSION, 0, place, len(document), zlib.crc32(document))
            file.write(header + _CRC.pack(zlib.crc32(header)))
            file.flush()
            os.fsync(file.fileno())
            name = name or _named(file.fileno(), target)
            os.replace(name, target)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        if name:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
    return Snapshot(path, state, pieces)


def _align(file: BinaryIO) -> int:
    place = -(-max(file.tell(), 1) // ALIGN) * ALIGN
    file.seek(place)
    return place


def _write_memory(file: BinaryIO, base: int, view: memoryview) -> Memory:
    extents = []
    for offset, size in _runs(view):
        place = _align(file)
        data = view[offset : offset + size]
        file.write(data)
        extents.append((offset, place, size, zlib.crc32(data)))
    return Memory(base, len(view), tuple(extents))


def _as_json(piece: Memory) -> dict[str, Any]:
    return {"base": piece.base, "size": piece.size, "extents": [list(extent) for extent in piece.extents]}


def _wrong(path: Path, what: str) -> UsageError:
    return UsageError(f"{path} is not a snapshot that can be restored: {what}")


def read(path: Path) -> Snapshot:
    """Opens a snapshot; UsageError where it is none, is of another version, or is damaged."""
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER.size + _CRC.size)
            if not header.startswith(MAGIC) or len(header) < _HEADER.size + _CRC.size:
                raise _wrong(path, "it does not begin as one")
            _, version, _, place, size, checksum = _HEADER.unpack_from(header)
            if zlib.crc32(header[: _HEADER.size]) != _CRC.unpack_from(header, _HEADER.size)[0]:
                raise _wrong(path, "its header is damaged")
            if version != VERSION:
                raise _wrong(path, f"it has version {version} and this kvm2 reads version {VERSION}: save it anew")
            file.seek(place)
            document = file.read(size)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if len(document) != size or zlib.crc32(document) != checksum:
        raise _wrong(path, "its state is damaged")
    found = json.loads(document)
    pieces = tuple(
        Memory(piece["base"], piece["size"], tuple(tuple(extent) for extent in piece["extents"]))
        for piece in found["memory"]
    )
    return Snapshot(path, found["state"], pieces)


def load_memory(snapshot: Snapshot, views: Mapping[int, memoryview]) -> None:
    """Puts the memory into `views`, by address of each range: zeroed memory of the sizes that the snapshot has.

    UsageError where a part is damaged; what was loaded until then stays.
    """
    with open(snapshot.path, "rb", buffering=0) as file:
        for piece in snapshot.memory:
            view = views[piece.base]
            for offset, place, size, checksum in piece.extents:
                target = view[offset : offset + size]
                done = 0
                while done < size:
                    got = os.preadv(file.fileno(), [target[done:]], place + done)
                    if not got:
                        raise _wrong(snapshot.path, f"the memory at {piece.base + offset:#x} is cut off")
                    done += got
                if zlib.crc32(target) != checksum:
                    raise _wrong(snapshot.path, f"the memory at {piece.base + offset:#x} is damaged")
