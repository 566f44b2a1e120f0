"""HVC and SMC: the guest's registers to the SMC calling convention and back, and the exits that follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm2.abi import exits
from kvm2.softkvm import psci, smccc
from kvm2.softkvm.hypercall_result import U32, Hypercall, Result, SystemEvent

if TYPE_CHECKING:
    from ctypes import c_uint64

    from kvm2.softkvm.run import Execution

IMMEDIATE = 0xFFFF
# The calls that need to know the caller's byte order, which is not worth finding out for the others.
CPU_ON = frozenset({psci.CPU_ON, psci.CPU_ON | psci.BIT_64, psci.CPU_ON_0_1})


def hvc(ex: Execution) -> bool:
    """An HVC, with any immediate (`handle_hvc`). PC is behind it already. True: the guest goes on."""
    x = ex.core.x
    function = x[0] & U32
    order = function in CPU_ON and ex.core.big_endian()
    return _finish(ex, smccc.call(ex.vcpu, function, (x[1], x[2], x[3]), big_endian=order))


def smc(ex: Execution) -> bool:
    """An SMC, which HCR_EL2.TSC traps: PC is at it and goes on first (`handle_smc`)."""
    core = ex.core
    x = core.x
    core.pc += 4
    function = x[0] & U32
    order = function in CPU_ON and core.big_endian()
    immediate = core.syndrome & IMMEDIATE
    return _finish(ex, smccc.smc(ex.vcpu, immediate, function, (x[1], x[2], x[3]), big_endian=order))


def _finish(ex: Execution, result: Result) -> bool:
    x = ex.core.x
    if result.narrow:
        for number in (1, 2, 3):
            x[number] &= U32
    # At once: a signal's exception comes before both, and the call again, or behind them.
    values: list[c_uint64 | int] = list(result.values)
    count = len(values)
    x[:count] = values
    ex.core.answered = True
    if result.exit is not None:
        _prepare(ex, result.exit)
        return False
    if result.wait:
        ex.wait_for_interrupt = True
        return False
    # CPU_OFF leaves too: the loop sees that the vCPU is stopped.
    return not ex.vcpu.stopped()


def wake_up(ex: Execution) -> None:
    """The exit of a vCPU that was suspended, when an interrupt waits for it (`kvm_vcpu_suspend`)."""
    _prepare(ex, SystemEvent(exits.KVM_SYSTEM_EVENT_WAKEUP))


def _prepare(ex: Execution, leave: SystemEvent | Hypercall) -> None:
    if isinstance(leave, SystemEvent):
        payload = exits.SystemEvent(leave.type, leave.ndata, (leave.flags,) + (0,) * 15).pack()
        ex.exit_reason = exits.KVM_EXIT_SYSTEM_EVENT
    else:
        payload = exits.Hypercall(leave.nr, (0,) * 6, 0, leave.flags).pack()
        ex.exit_reason = exits.KVM_EXIT_HYPERCALL
    ex.run_area[exits.UNION_OFFSET : exits.UNION_OFFSET + len(payload)] = payload
