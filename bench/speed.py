"""Exits, hypercalls and plain guest code, against the bare emulator."""

from __future__ import annotations

from bench.a64 import ALU_LOOP, COPY_LOOP
from bench.measure import Figure, Measured, in_turns


def mmio_exit() -> Measured:
    """A store to a device, as an exit with its Python object, and back into the guest."""
    from bench import bare, guest

    ours, baseline = in_turns(guest.exits(), 3000, bare.exits(), 3000)
    return Measured(ours / baseline, ours * 1e6, baseline * 1e6, "us")


def psci_call() -> Measured:
    """PSCI_VERSION by HVC, from guest to guest."""
    from bench import bare, guest

    ours, baseline = in_turns(guest.psci_calls(), 5000, bare.exits(), 3000)
    return Measured(ours / baseline, ours * 1e6, baseline * 1e6, "us")


def _loop(program: bytes, ours_count: int, baseline_count: int, rounds: int) -> Measured:
    from bench import bare, guest

    ours, baseline = in_turns(guest.loop(program), ours_count, bare.loop(program), baseline_count, rounds)
    return Measured(baseline / ours, ours * 1e9, baseline * 1e9, "ns")


def alu() -> Measured:
    """A loop without memory accesses: does stage 2 cost anything?"""
    return _loop(ALU_LOOP, 10_000_000, 10_000_000, 11)


def copy() -> Measured:
    """Copying 64 KiB, over and over: pages that are executable are slow to store to."""
    return _loop(COPY_LOOP, 300, 30, 9)


FIGURES = (
    Figure("mmio-exit", "MMIO exit through the handles / bare emu_start, stop, reg_read", 2.0, mmio_exit),
    Figure("psci-call", "PSCI call by HVC, guest to guest / bare emu_start, stop, reg_read", 1.0, psci_call),
    Figure("alu", "speed of an ALU loop under stage 2 / bare Unicorn", 0.95, alu, at_least=True),
    Figure("copy", "speed of a copy loop under stage 2 / Unicorn with RWX memory", 5.0, copy, at_least=True),
)
