"""Exceptions that a guest takes at EL1: from itself and from EL0, by instructions, aborts and alignment."""

from __future__ import annotations

import pytest

from .rig import play

IL = 1 << 25
SYNC_EL1, SYNC_EL0 = 4, 8
MODE = 0x3CF  # DAIF and the mode of SPSR
EL1H, EL0T = 0x3C5, 0x3C0
SVC, BRK, PC_ALIGNMENT = 0x15, 0x3C, 0x22
IABT_SAME, DABT_SAME, DABT_LOW = 0x21, 0x25, 0x24
EXTERNAL, ALIGNMENT = 0x10, 0x21


@pytest.mark.parametrize("host", ["cortex-a57-4k", "neoverse-n1-16k", "max-4k-6.12", "lpa2-16k-52"])
def test_el1_and_el0(host):
    ran = play("exceptions", host, options=("-DBITS=40",), physaddr_bits=40)
    (svc, brk, udf, ldr, store, exclusive, mrs, u_svc, u_brk, u_udf, u_msr, u_odd, result) = ran.out()
    log = ran.log()
    assert result == 42
    assert [(t.vector, t.esr, t.elr) for t in log[:3]] == [
        (SYNC_EL1, SVC << 26 | IL | 0xABC, svc + 4),
        (SYNC_EL1, BRK << 26 | IL | 0x1234, brk),
        (SYNC_EL1, IL, udf),
    ]
    assert all((t.vector, t.spsr & MODE) == (SYNC_EL1, EL1H) for t in log[:8])
    # Beyond the VM's IPA space but within the host's: an external abort, as KVM injects it.
    assert (log[3].esr, log[3].elr, log[3].far) == (DABT_SAME << 26 | IL | EXTERNAL, ldr, (1 << 40) + 8)
    assert (log[4].esr, log[4].elr, log[4].far) == (DABT_SAME << 26 | IL | EXTERNAL, store, (1 << 40) + 0xFF0)
    assert (log[5].ec, log[5].esr & 0x3F, log[5].elr, log[5].far & 0xFFF) == (DABT_SAME, ALIGNMENT, exclusive, 1)
    assert (log[6].esr, log[6].elr, log[6].far) == (IABT_SAME << 26 | IL | EXTERNAL, 1 << 40, 1 << 40)
    assert (log[7].esr, log[7].elr) == (IL, mrs)
    assert all((t.vector, t.spsr & MODE) == (SYNC_EL0, EL0T) for t in log[8:])
    assert [(t.esr, t.elr) for t in log[8:12]] == [
        (SVC << 26 | IL | 0x123, u_svc + 4),
        (BRK << 26 | IL | 0x77, u_brk),
        (IL, u_udf),
        (IL, u_msr),
    ]
    assert (log[12].esr, log[12].elr, log[12].far) == (DABT_LOW << 26 | IL | EXTERNAL, u_odd, 1 << 40)
    assert len(log) == 13


@pytest.mark.xfail(strict=True, reason="Unicorn 2.1.4 (QEMU 5.0) ignores SCTLR_EL1.A for A64 loads and stores")
def test_alignment_checks_of_data():
    (taken,) = play("alignment", options=("-DPART=0",)).log()
    assert taken.ec == DABT_SAME and taken.esr & 0x3F == ALIGNMENT


@pytest.mark.xfail(
    strict=True, reason="Unicorn 2.1.4 (QEMU 5.0) has no PC alignment fault: it executes what lies there"
)
def test_alignment_check_of_the_pc():
    (taken,) = play("alignment", options=("-DPART=1",)).log()
    assert taken.ec == PC_ALIGNMENT
