"""The file: what is written comes back, zeros are not in it, every damage is found, a failed write leaves what was."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm2.board.snapshot import file
from kvm2.errors import EnvironmentFault, UsageError

SIZE = 1 << 20


def view(content: bytes = b"", at: int = 0) -> memoryview:
    data = bytearray(SIZE)
    data[at : at + len(content)] = content
    return memoryview(data)


def back(path: Path, bases: list[int]) -> tuple[file.Snapshot, dict[int, bytes]]:
    found = file.read(path)
    views = {base: view() for base in bases}
    file.load_memory(found, views)
    return found, {base: bytes(one) for base, one in views.items()}


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "s"
    low, high = view(b"low", 3), view(b"high", SIZE - 4)
    written = file.write(path, {"a": [1, "two", None]}, [(1 << 30, low), (1 << 47, high)])
    found, memory = back(path, [1 << 30, 1 << 47])
    assert found == written and found.state == {"a": [1, "two", None]}
    assert memory == {1 << 30: bytes(low), 1 << 47: bytes(high)}
    assert found.bytes_of_memory == 2 * file.BLOCK, "two blocks that are not zero"


@settings(max_examples=40, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, SIZE - 1), st.binary(min_size=1, max_size=3000)), max_size=6),
    size=st.sampled_from((SIZE, SIZE - 4096, file.BLOCK + 1, 1)),
)
def test_any_memory_comes_back(tmp_path_factory: pytest.TempPathFactory, pieces: list, size: int) -> None:
    data = bytearray(size)
    for at, content in pieces:
        if at + len(content) <= size:
            data[at : at + len(content)] = content
    path = tmp_path_factory.mktemp("any") / "s"
    file.write(path, {}, [(0, memoryview(data))])
    target = memoryview(bytearray(size))
    file.load_memory(file.read(path), {0: target})
    assert target == data


def test_long_memory_is_in_several_extents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "EXTENT", 2 * file.BLOCK)
    data = os.urandom(SIZE)
    written = file.write(tmp_path / "s", {}, [(0, memoryview(data))])
    assert [extent[2] for extent in written.memory[0].extents] == [2 * file.BLOCK] * (SIZE // file.BLOCK // 2)
    assert back(tmp_path / "s", [0])[1][0] == data


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "s"
    file.write(path, {"state": 1}, [(0, view(os.urandom(file.BLOCK)))])
    whole = path.read_bytes()
    places = [0, 7, 8, 12, 16, 24, 32, 39, file.ALIGN, file.ALIGN + 999, len(whole) - 1, len(whole) - 30]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="not a snapshot that can be restored"):
            back(path, [0])
    for length in (0, 5, 43, 60, file.ALIGN + 10, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError):
            back(path, [0])


def test_another_version_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s"
    file.write(path, {}, [])
    data = bytearray(path.read_bytes())
    data[8] = 9
    header = bytes(data[: file._HEADER.size])
    data[len(header) : len(header) + 4] = zlib.crc32(header).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UsageError, match="version 9"):
        file.read(path)


def test_a_write_that_fails_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    file.write(path, {"old": True}, [])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file.os, "fsync", full)
    with pytest.raises(EnvironmentFault, match="No space left"):
        file.write(path, {"new": True}, [(0, view(b"x"))])
    assert file.read(path).state == {"old": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"], "nothing half-made stays"


def test_places_that_cannot_be_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        file.read(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UsageError, match="does not begin as one"):
        file.read(tmp_path / "text")


def test_a_place_that_is_no_file_is_refused_and_left_as_it_is(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(UsageError, match="it is no file, and must not be replaced by one"):
        file.write(fifo, {}, [])
    assert fifo.is_fifo()
    with pytest.raises(UsageError, match=f"there is no directory {tmp_path / 'none'}"):
        file.check_place(tmp_path / "none" / "x")


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    file.write(tmp_path / "link", {"a": 1}, [])
    assert (tmp_path / "link").is_symlink() and file.read(tmp_path / "real").state == {"a": 1}


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")
def test_a_process_that_is_killed_while_it_writes_leaves_nothing(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(file.os, "fsync", lambda descriptor: seen.append(list(tmp_path.iterdir())))
    if file._unnamed(tmp_path) is None:
        pytest.skip("this file system has no files without a name")
    file.write(tmp_path / "s", {"a": 1}, [(0, view(b"x"))])
    assert seen == [[]] and [entry.name for entry in tmp_path.iterdir()] == ["s"]
    assert file.read(tmp_path / "s").state == {"a": 1}


def test_where_files_must_have_names_it_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(file, "_unnamed", lambda directory: None)
    file.write(tmp_path / "s", {"a": 1}, [(0, view(b"x"))])
    assert file.read(tmp_path / "s").state == {"a": 1} and [entry.name for entry in tmp_path.iterdir()] == ["s"]
