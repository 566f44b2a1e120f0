"""An archive in the form that the kernel unpacks as its first file system: cpio, "newc".

Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field

TRAILER = "TRAILER!!!"


@dataclass(slots=True)
class Tree:
    """Files, links and directories by their path, without a leading slash; a directory comes with what lies in it.

    >>> tree = Tree()
    >>> tree.file("etc/motd", b"hello")
    >>> sorted(tree.entries)
    ['etc', 'etc/motd']
    """

    entries: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A file with its contents; one that was there is replaced."""
        self._parents(path)
        self.entries[path] = (stat.S_IFREG | mode, data)

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._parents(path)
        self.entries[path] = (stat.S_IFLNK | 0o777, target.encode())

    def directory(self, path: str) -> None:
        """An empty directory."""
        self._parents(path)
        self.entries.setdefault(path, (stat.S_IFDIR | 0o755, b""))

    def read(self, path: str) -> bytes | None:
        """A file's contents, links followed; None where there is none."""
        for _ in range(8):
            mode, data = self.entries.get(path, (0, b""))
            if not stat.S_ISLNK(mode):
                return data if stat.S_ISREG(mode) else None
            target = data.decode()
            path = target.lstrip("/") if target.startswith("/") else _join(path.rpartition("/")[0], target)
        return None

    def _parents(self, path: str) -> None:
        parent = path.rpartition("/")[0]
        if parent and parent not in self.entries:
            self.directory(parent)

    def pack(self) -> bytes:
        """The archive."""
        out = bytearray()
        for number, path in enumerate(sorted(self.entries), 1):
            mode, data = self.entries[path]
            _entry(out, number, path, mode, data)
        _entry(out, 0, TRAILER, 0, b"")
        return bytes(out)


def _join(base: str, path: str) -> str:
    parts = base.split("/") if base else []
    for part in path.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def _entry(out: bytearray, number: int, path: str, mode: int, data: bytes) -> None:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # inode, mode, uid, gid, links, time, size, device (major, minor), device node (major, minor), name's size, checksum
    fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name), 0)
    out += b"070701" + b"".join(b"%08X" % value for value in fields) + name
    out += bytes(-len(out) % 4)
    out += data
    out += bytes(-len(out) % 4)
