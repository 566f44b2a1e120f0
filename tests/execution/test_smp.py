"""Several vCPUs of one guest: no update is lost, and what one changes (pages, instructions) the others see."""

from __future__ import annotations

import pytest

from .rig import play

ROUNDS = 500_000
NOT_SUPPORTED, INVALID_PARAMETERS, ALREADY_ON = (n % (1 << 64) for n in (-1, -2, -4))
ON, OFF, SUCCESS = 0, 1, 0


@pytest.mark.parametrize(("host", "cpus", "lse"), [("cortex-a57-4k", 2, False), ("max-4k-6.12", 4, True)])
def test_shared_counters_psci_and_broadcasts(host, cpus, lse):
    options = ("-DSHIFT=12", "-DVA=39", f"-DCPUS={cpus}", *(["-DLSE"] if lse else []))
    ran = play("smp", host, cpus=cpus, options=options)
    out = ran.out()
    assert out[:5] == [SUCCESS, NOT_SUPPORTED, OFF, ALREADY_ON, INVALID_PARAMETERS]
    assert out[5 : 5 + cpus - 1] == [SUCCESS] * (cpus - 1)
    assert out[4 + cpus : 6 + cpus] == [ALREADY_ON, ON]
    total, tenth = cpus * ROUNDS, cpus * ROUNDS // 10
    assert out[6 + cpus :] == [total, 0, tenth, total * lse, tenth * lse, SUCCESS, ON]
    assert ran.out(1) == [0x101, *(value for n in range(1, 9) for value in (3 * n, 7 * n))]
    for cpu in range(2, cpus):
        assert ran.out(cpu) == [0x100 + cpu]
    assert not any(ran.log(cpu) for cpu in range(cpus))
