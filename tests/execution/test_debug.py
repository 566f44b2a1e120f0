"""Debug exceptions: the guest's own, and those that userspace asks for with KVM_SET_GUEST_DEBUG."""

from __future__ import annotations

import pytest

from kvm2.abi.structs import KVM_MP_STATE_RUNNABLE
from kvm2.abi.structs_arm64 import (
    KVM_DEBUG_ARCH_HSR_HIGH_VALID,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW,
    KVM_GUESTDBG_USE_SW_BP,
    GuestDebug,
    GuestDebugArch,
)
from kvm2.exits import Debug, Mmio, SystemEvent
from kvm2.softkvm.sysregs_table import table

from .rig import bench, flat, play

BREAKPOINT, STEP, WATCHPOINT, BRK, SVC = 0x31, 0x33, 0x35, 0x3C, 0x15
IL = 1 << 25
WNR = 1 << 6
DEBUG_FAULT = 0x22
HOSTS = [("neoverse-n1-4k", (0, 0, 5)), ("max-4k-6.12", (5, 3, 4)), ("cortex-a57-4k", (3, 2, 5))]


def numbered(numbers):
    return tuple(f"-D{name}={number}" for name, number in zip(("BP", "WP", "CTX"), numbers, strict=True))


@pytest.mark.parametrize(("host", "numbers"), HOSTS, ids=[host for host, _ in HOSTS])
def test_the_guest_debugs_itself(host, numbers):
    ran = play("debug", host, options=numbered(numbers))
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


@pytest.mark.parametrize(("host", "numbers"), HOSTS, ids=[host for host, _ in HOSTS])
def test_the_guest_watches_its_data(host, numbers):
    ran = play("debug", host, options=(*numbered(numbers), "-DWATCH"))
    out = ran.out()
    data, results = out[7], out[-11:]
    watched = [t for t in ran.log() if t.ec == WATCHPOINT]
    # Store, load, the pair that reaches into it; the store of byte 5; at the end of a range of 32; in the context.
    store, load = WATCHPOINT << 26 | IL | WNR | DEBUG_FAULT, WATCHPOINT << 26 | IL | DEBUG_FAULT
    assert [(t.esr, t.far - data) for t in watched] == [
        (store, 8), (load, 8), (store, 8), (store, 13), (store, 24), (store, 16)
    ]  # fmt: skip
    before = results[0] - 1
    assert [count - before for count in (results[0], *results[2:8])] == [1, 2, 3, 3, 3, 4, 5]
    assert results[1] == 5 and [results[8] - before, results[9] - before, results[10]] == [5, 6, 2]


# ---- userspace debugs

STEP_EXIT, BRK_EXIT, BREAKPOINT_EXIT, WATCHPOINT_EXIT = 0x32, 0x3C, 0x30, 0x34
SS = 1 << 21
MMIO = 0x0900_0000


def debug(vcpu, *flags, **arch):
    vcpu.set_guest_debug(GuestDebug(sum(flags), arch=GuestDebugArch(**arch)))


def first(*values):
    return (*values, *(0,) * (16 - len(values)))


def ec_and_pc(b, exit):
    assert isinstance(exit, Debug), exit
    return exit.hsr >> 26, b.vcpu.regs.pc - b.gpa


STEPS = """
    mov x0, #1              // 00
    mrs x1, midr_el1        // 04
    mrs x2, id_aa64pfr0_el1 // 08: trapped
    msr mdscr_el1, xzr      // 0c: trapped
    mrs x3, dbgbvr9_el1     // 10: not in the core
    str w0, [x20]           // 14: MMIO
    ldr w4, [x20]           // 18: MMIO
    udf #0                  // 1c: to the vector at 0x200
    nop
    .balign 0x200
    movz x0, #0x8400, lsl #16 // 200: PSCI VERSION
    hvc #0                  // 204
    mov x5, x0              // 208
    b .                     // 20c
"""


@pytest.mark.parametrize("host", ["neoverse-n1-4k", "max-4k-6.12"])
def test_userspace_steps(host):
    with bench(host) as b:
        b.load(STEPS, x20=MMIO)
        b.vcpu.set_reg("VBAR_EL1", b.gpa)
        before = b.vcpu.regs.pstate
        debug(b.vcpu, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP)
        seen = []
        while len(seen) < 15:
            exit = b.vcpu.run_once()
            if isinstance(exit, Mmio):
                seen.append("write" if exit.is_write else "read")
                if not exit.is_write:
                    exit.reply(0x55)
                continue
            assert b.vcpu.regs.pstate & SS == 0 and exit.hsr & 0x3F == DEBUG_FAULT
            seen.append(ec_and_pc(b, exit)[1])
        steps = [4, 8, 0xC, 0x10, 0x14, "write", 0x18, "read", 0x1C, 0x200, 0x204, 0x208, 0x20C, 0x20C, 0x20C]
        assert seen == steps
        assert b.vcpu.regs.x[4] == 0x55 and b.vcpu.regs.x[5] == 0x1_0001 and b.vcpu.regs.pstate & 0xF == before & 0xF
        b.vcpu.regs.pc = b.gpa
        debug(b.vcpu, KVM_GUESTDBG_ENABLE)  # on, without stepping
        assert isinstance(b.vcpu.run_once(), Mmio)


def test_a_step_that_is_made_is_not_made_twice():
    """The active-pending state (KVM selftest `test_single_step_from_userspace`): a hypercall's exit, then its step."""
    with bench() as b:
        b.load("movz w0, #8\n movk w0, #0x8400, lsl #16\n hvc #0\n mov x1, #1\n b .")
        debug(b.vcpu, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP)
        assert [ec_and_pc(b, b.vcpu.run_once()) for _ in range(2)] == [(STEP_EXIT, 4), (STEP_EXIT, 8)]
        assert isinstance(b.vcpu.run_once(), SystemEvent)
        b.vcpu.set_mp_state(KVM_MP_STATE_RUNNABLE)
        assert ec_and_pc(b, b.vcpu.run_once()) == (STEP_EXIT, 0xC) and b.vcpu.regs.x[1] == 0
        assert ec_and_pc(b, b.vcpu.run_once()) == (STEP_EXIT, 0x10) and b.vcpu.regs.x[1] == 1


def test_the_guests_own_step_bit_is_kept():
    with bench() as b:
        b.load("nop\n nop\n nop\n b .")
        b.vcpu.regs.pstate |= SS
        debug(b.vcpu, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP)
        for _ in range(2):
            b.vcpu.run_once()
            assert b.vcpu.regs.pstate & SS
        assert b.vcpu.regs.pc == b.gpa + 8


def test_breakpoints_in_software_and_hardware():
    code = "mov x0, #1\n brk #0x33\n mov x1, #2\n mov x2, #3\n b ."
    with bench() as b:
        b.load(code)
        debug(b.vcpu, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_SW_BP)
        exit = b.vcpu.run_once()
        assert (ec_and_pc(b, exit), exit.hsr & 0xFFFF) == ((BRK_EXIT, 4), 0x33)
        assert int.from_bytes(b.vcpu.kvm_run[14:16], "little") == KVM_DEBUG_ARCH_HSR_HIGH_VALID
        b.vcpu.regs.pc += 4
        hardware = {"dbg_bvr": first(0, b.gpa + 0xC), "dbg_bcr": first(0, 0x1E7)}
        debug(b.vcpu, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW, **hardware)
        for _ in range(2):  # the guest does not get past it
            assert ec_and_pc(b, b.vcpu.run_once()) == (BREAKPOINT_EXIT, 0xC)
        assert b.vcpu.regs.x[1] == 2 and b.vcpu.regs.x[2] == 0
        # The comparators stay until others are given with USE_HW; their use ends with the flag.
        debug(b.vcpu, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP)
        assert ec_and_pc(b, b.vcpu.run_once()) == (STEP_EXIT, 0x10) and b.vcpu.regs.x[2] == 3
        assert b.vcpu.get_reg("DBGBVR1_EL1") == 0 and b.vcpu.get_reg("MDSCR_EL1") == 0


def test_watchpoints_in_hardware():
    """Before the access; the guest's own are forgotten meanwhile; a neighbour's store in the same page goes through."""
    with bench() as b:
        b.load(
            "str x1, [x20]\n ldr x2, [x20, #16]\n stp x1, x1, [x20, #8]\n str w1, [x21]",
            x1=7,
            x20=b.gpa + 0x8000,
            x21=MMIO,
        )
        arch = {"dbg_wvr": first(b.gpa + 0x8010), "dbg_wcr": first(0xFF << 5 | 2 << 3 | 7)}  # stores
        debug(b.vcpu, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW, **arch)
        for _ in range(2):
            exit = b.vcpu.run_once()
            assert (*ec_and_pc(b, exit), exit.far) == (WATCHPOINT_EXIT, 8, b.gpa + 0x8010) and exit.hsr & WNR
        assert b.ram.read(0x8000, 24) == (7).to_bytes(8, "little") + bytes(16)
        debug(b.vcpu, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP)
        assert ec_and_pc(b, b.vcpu.run_once()) == (STEP_EXIT, 0xC)
        debug(b.vcpu, 0)
        assert isinstance(b.vcpu.run_once(), Mmio)
        assert b.ram.read(0x8008, 16) == (7).to_bytes(8, "little") * 2


def test_breakpoints_without_userspace_are_the_guests_again():
    with bench() as b:
        b.load("brk #1\n .balign 0x200\n mrs x0, esr_el1\n str w0, [x20]", x20=MMIO)
        b.vcpu.set_reg("VBAR_EL1", b.gpa)
        debug(b.vcpu, KVM_GUESTDBG_ENABLE)
        assert ec_and_pc(b, b.vcpu.run_once()) == (BRK_EXIT, 0)
        debug(b.vcpu, 0)
        exit = b.vcpu.run_once()
        assert isinstance(exit, Mmio) and exit.value == BRK << 26 | IL | 1


@pytest.mark.parametrize("host", ["neoverse-n1-4k", "max-4k-6.12"])
def test_every_debug_register_is_answered_as_the_table_says(host):
    """None is the core's own: MSR, MRS, and what userspace sees of it."""
    from kvm2.abi import sysregs

    registers = [row for row in table("6.12").values() if row.enc >> 14 == 2]
    assert len(registers) > 70
    with bench(host) as b:
        b.load(".balign 0x200\n mov x0, #0\n .balign 0x200\n hvc #0\n str w1, [x20]\n", x20=MMIO)
        b.vcpu.set_reg("VBAR_EL1", b.gpa)
        put = flat("mov x1, #0x1ef\n nop\n mov x1, #7\n str w1, [x20]")
        get = flat("mov x1, #7\n nop\n str w1, [x20]")
        for row in registers:
            move = 0xD510_0000 | (row.enc & 0x3FFF) << 5 | 1  # MSR s2_..., x1
            results = []
            for code, word in ((put, move), (get, move | 1 << 21)):
                b.ram.write(0x800, code[:4] + word.to_bytes(4, "little") + code[8:])
                b.vcpu.kick(), b.vcpu.run_once()  # the last access is over
                b.vcpu.regs.pc = b.gpa + 0x800
                results.append(b.vcpu.run_once())
            written, read = results
            if row.access == "rw":
                assert written.value == 7 and read.value == 0x1EF == b.vcpu.get_reg(sysregs.name_of(row.enc)), row
            elif row.access == "raz":
                assert (written.value, read.value) == (7, 0), row
    assert {row.access for row in registers} >= {"rw", "raz", "oslar", "oslsr"}
