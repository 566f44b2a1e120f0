"""Reading and writing the client's memory: every thread, every child, and nothing left of them."""

from __future__ import annotations

import ctypes
import os
import threading

import pytest

from kvm2.softkvm.memory import ADDRESS_LIMIT, BOUNCE_BYTES, copy_in, copy_out

needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="there is no /proc/self/fd")


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def round_trip(size: int) -> bool:
    data = os.urandom(size)
    there = ctypes.create_string_buffer(size)
    return copy_out(ctypes.addressof(there), data) and copy_in(ctypes.addressof(there), size) == data


@pytest.mark.parametrize("size", [1, BOUNCE_BYTES, BOUNCE_BYTES + 1, 3 * BOUNCE_BYTES])
def test_any_size(size: int) -> None:
    assert round_trip(size)


@pytest.mark.parametrize("address", [0, 16, ADDRESS_LIMIT - 8, ADDRESS_LIMIT])
def test_what_is_not_there(address: int) -> None:
    assert copy_in(address, 16) is None and not copy_out(address, bytes(16))


@needs_proc
def test_threads_leave_no_descriptor() -> None:
    assert round_trip(1)
    before = descriptors()
    together, done = threading.Barrier(5), []

    def work() -> None:
        done.append(round_trip(100))
        together.wait()

    for _ in range(3):
        threads = [threading.Thread(target=work) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert done == [True] * 15 and descriptors() == before
