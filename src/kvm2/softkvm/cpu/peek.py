"""Reading this process's own memory where an address may be none: the core looks for private fields that way."""

from __future__ import annotations

from kvm2.softkvm.memory import copy_in


def peek(address: int, size: int) -> bytes | None:
    """`size` bytes at `address` of this process, or None if any of them cannot be read.

    >>> import ctypes
    >>> text = ctypes.create_string_buffer(b"kvm2")
    >>> peek(ctypes.addressof(text), 4), peek(16, 8), peek(-1, 1)
    (b'kvm2', None, None)
    """
    return copy_in(address, size) if address > 0 else None


def peek_prefix(address: int, size: int, page: int = 4096) -> bytes:
    """As much of `size` bytes at `address` as can be read, page by page."""
    data = b""
    while len(data) < size:
        step = min(size - len(data), page - (address + len(data)) % page)
        part = peek(address + len(data), step)
        if part is None:
            break
        data += part
    return data
