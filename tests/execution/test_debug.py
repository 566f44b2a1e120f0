"""Debug exceptions: the guest's own, and those that userspace asks for with KVM_SET_GUEST_DEBUG."""

from __future__ import annotations

import pytest

from .rig import play

BREAKPOINT, STEP, WATCHPOINT, BRK, SVC = 0x31, 0x33, 0x35, 0x3C, 0x15
IL = 1 << 25
DEBUG_FAULT = 0x22
HOSTS = [("neoverse-n1-4k", (0, 0, 5)), ("max-4k-6.12", (5, 3, 4)), ("cortex-a57-4k", (3, 2, 5))]


@pytest.mark.parametrize(("host", "numbers"), HOSTS, ids=[host for host, _ in HOSTS])
def test_the_guest_debugs_itself(host, numbers):
    options = tuple(f"-D{name}={number}" for name, number in zip(("BP", "WP", "CTX"), numbers, strict=True))
    ran = play("debug", host, options=options)
    sw, hw, hw_svc, hw_brk, step, sw_locked, in_context, _, *counts = ran.out()
    log = ran.log()
    assert [(t.esr, t.elr) for t in log[:6]] == [
        (BRK << 26 | IL | 0x42, sw),
        (BREAKPOINT << 26 | IL | DEBUG_FAULT, hw),
        (BREAKPOINT << 26 | IL | DEBUG_FAULT, hw_svc),
        (SVC << 26 | IL | 7, hw_svc + 4),
        (BREAKPOINT << 26 | IL | DEBUG_FAULT, hw_brk),
        (BRK << 26 | IL | 8, hw_brk),
    ]
    # The first instruction that is stepped is the one behind the MSR that turned it on: an ISB, then a few of C's.
    steps = [t for t in log if t.ec == STEP]
    assert [t.elr for t in steps][-4:] == [step, step + 4, step + 8, step + 12]
    assert {t.esr & 0x3F for t in steps} == {DEBUG_FAULT}
    rest = log[6 + len(steps) :]
    assert [(t.ec, t.elr) for t in rest] == [(BRK, sw_locked), (BREAKPOINT, in_context)]
    before = 6 + len(steps)
    assert counts == [1, 2, 4, 6, before, 0xA, before + 1, before + 1, before + 2, 0x1234560, 0x765430]
