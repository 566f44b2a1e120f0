"""A device in its frame, on fake memory, with the driver that works it."""

from __future__ import annotations

import pytest

from kvm2.board.virtio import VirtioMmio

from .driver import Driver, FakeMemory, Line


@pytest.fixture
def attach():
    """attach(device, size=1 MiB) -> Driver; frames are closed afterwards."""
    frames = []

    def attach(device, size=1 << 20):
        memory, line = FakeMemory(size), Line()
        frames.append(VirtioMmio(device, memory, line))
        return Driver(frames[-1], memory, line)

    yield attach
    for frame in frames:
        frame.close()
