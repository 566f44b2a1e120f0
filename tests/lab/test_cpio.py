"""The archive, read back by the rules of buffer-format.rst."""

from __future__ import annotations

import stat

from hypothesis import given
from hypothesis import strategies as st

from kvm2.lab.cpio import TRAILER, Tree


def unpack(archive: bytes) -> list[tuple[str, int, bytes]]:
    found, at = [], 0
    while True:
        assert at % 4 == 0 and archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        start = at + 110
        name = archive[start : start + name_size]
        assert name.endswith(b"\0")
        data_at = (start + name_size + 3) // 4 * 4
        found.append((name[:-1].decode(), mode, archive[data_at : data_at + size]))
        at = (data_at + size + 3) // 4 * 4
        if name[:-1].decode() == TRAILER:
            assert at == len(archive)
            return found[:-1]


@given(st.dictionaries(st.text("ab/c", min_size=1, max_size=9).filter(lambda p: "//" not in p and p.strip("/") == p),
                       st.binary(max_size=9)))  # fmt: skip
def test_what_is_packed_comes_back(files: dict[str, bytes]) -> None:
    files = {path: data for path, data in files.items() if not any(o.startswith(path + "/") for o in files)}
    tree = Tree()
    for path, data in files.items():
        tree.file(path, data, 0o755)
    found = unpack(tree.pack())
    assert {name: data for name, mode, data in found if stat.S_ISREG(mode)} == files
    assert all(mode == stat.S_IFREG | 0o755 for name, mode, data in found if name in files)
    seen: set[str] = set()
    for name, mode, _ in found:  # a directory comes before what lies in it
        parent = name.rpartition("/")[0]
        assert not parent or parent in seen
        assert stat.S_ISDIR(mode) == (name not in files)
        seen.add(name)


def test_links() -> None:
    tree = Tree()
    tree.file("usr/lib/real.so.1", b"x")
    tree.link("usr/lib/real.so", "real.so.1")
    tree.link("lib/other.so", "../usr/lib/real.so")
    tree.link("abs", "/usr/lib/real.so")
    tree.link("round", "round")
    assert [tree.read(path) for path in ("usr/lib/real.so", "lib/other.so", "abs")] == [b"x"] * 3
    assert tree.read("round") is None and tree.read("nothing") is None and tree.read("usr") is None
    assert ("abs", stat.S_IFLNK | 0o777, b"/usr/lib/real.so") in unpack(tree.pack())
