"""Timers without a vGIC: userspace is told of their output; WFI sleeps until they fire; counters and their offsets."""

from __future__ import annotations

import struct
import time

import pytest

from kvm2.abi.exits import KVM_SYSTEM_EVENT_WAKEUP, SYNC_REGS_OFFSET
from kvm2.abi.structs import KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SUSPENDED
from kvm2.exits import Interrupted, Mmio, SystemEvent

from .rig import bench

VTIMER, PTIMER = 1, 2
MMIO = 0x1000_0000
TICKS = 62_500  # 1 ms

ARM = """
    mrs x1, cnt{letter}ct_el0
    add x1, x1, x2
    msr cnt{letter}_cval_el0, x1
    mov x1, #{ctl}
    msr cnt{letter}_ctl_el0, x1
    isb
"""


def levels(vcpu) -> int:
    return struct.unpack_from("=Q", vcpu.kvm_run, SYNC_REGS_OFFSET)[0]


@pytest.mark.parametrize(("letter", "bit"), [("v", VTIMER), ("p", PTIMER)])
def test_userspace_is_told_when_a_timer_fires(letter, bit):
    with bench() as b:
        text = (
            ARM.format(letter=letter, ctl=1)
            + f"""
            wfi
            str x1, [x3]
            mrs x4, cnt{letter}_ctl_el0
            mov x1, #0
            msr cnt{letter}_ctl_el0, x1
            str x4, [x3]
        """
        )
        exit = b.run(text, x2=20 * TICKS, x3=MMIO)
        assert isinstance(exit, Interrupted) and levels(b.vcpu) == bit, "the output of the timer rose"
        exit = b.vcpu.run_once()
        assert isinstance(exit, Mmio) and levels(b.vcpu) == bit
        exit = b.vcpu.run_once()
        assert isinstance(exit, Mmio) and int.from_bytes(exit.data, "little") == 5, "ENABLE and ISTATUS"
        assert levels(b.vcpu) == 0, "switched off"


def test_wfi_sleeps_until_the_timer_fires_and_not_longer():
    with bench() as b:
        text = "mrs x10, cntvct_el0\n" + ARM.format(letter="v", ctl=1) + "wfi\n mrs x11, cntvct_el0\n str x1, [x3]"
        used = time.process_time()
        assert isinstance(b.run(text, x2=300 * TICKS, x3=MMIO), Interrupted)
        assert isinstance(b.vcpu.run_once(), Mmio)
        slept = (b.vcpu.regs.x[11] - b.vcpu.regs.x[10]) / TICKS
        assert slept >= 300, f"{slept} ms"
        assert time.process_time() - used < 0.2, "it waited without working"


def test_a_masked_timer_tells_nobody_and_wfi_goes_on_by_a_kick():
    with bench() as b:
        text = ARM.format(letter="v", ctl=3) + "mrs x4, cntv_ctl_el0\n str x4, [x3]"
        exit = b.run(text, x2=0, x3=MMIO)
        assert isinstance(exit, Mmio) and int.from_bytes(exit.data, "little") == 7
        assert levels(b.vcpu) == 0


def test_tval_counts_down_with_its_sign():
    with bench() as b:
        text = """
            mov x1, #-1000
            msr cntv_tval_el0, x1
            mrs x4, cntv_tval_el0
            mrs x5, cntv_cval_el0
            mrs x6, cntvct_el0
            movz x1, #0x7fff, lsl #16
            msr cntp_tval_el0, x1
            mrs x7, cntp_cval_el0
            mrs x8, cntpct_el0
            str x1, [x3]
        """
        b.run(text, x3=MMIO)
        x = b.vcpu.regs.x
        assert x[4] >> 31 == 1 and x[5] < x[6], "a negative value is in the past"
        assert 0 < x[7] - x[8] <= 0x7FFF0000


def test_a_physical_offset_shows_in_the_physical_counter():
    with bench() as b:
        # The second run first completes the store of the first one, which moves PC on.
        text = "nop\n mrs x4, cntpct_el0\n mrs x5, cntvct_el0\n str x1, [x3]"
        b.run(text, x3=MMIO)
        host = b.vcpu.regs.x[4]
        assert host - b.vcpu.regs.x[5] > 1000, "the virtual counter began with the VM"
        b.vm.set_counter_offset(host - 5)
        b.run(text, x3=MMIO)
        for number in (4, 5):
            assert 5 <= b.vcpu.regs.x[number] < 60_000 * TICKS


def test_a_suspended_vcpu_wakes_up_by_an_interrupt_line():
    with bench() as b:
        b.load("str x1, [x3]", x3=MMIO)
        b.vcpu.set_mp_state(KVM_MP_STATE_SUSPENDED)
        b.vm.irq_line(0, True)  # the IRQ input of vCPU 0: there is no vGIC
        exit = b.vcpu.run_once()
        assert isinstance(exit, SystemEvent) and exit.type == KVM_SYSTEM_EVENT_WAKEUP
        b.vcpu.set_mp_state(KVM_MP_STATE_RUNNABLE)
        assert isinstance(b.vcpu.run_once(), Mmio)


def test_the_line_of_a_vcpu_without_a_vgic_interrupts_the_guest():
    with bench() as b:
        vectors = 0x8000
        b.load("mov x9, #1\n str x9, [x3]\n eret", vectors + 0x280, x3=MMIO)  # IRQ, current EL with SP_ELx
        text = "msr vbar_el1, x5\n msr daifclr, #2\n isb\n 1: add x6, x6, #1\n b 1b"
        b.load(text, x3=MMIO, x5=b.gpa + vectors)
        b.vm.irq_line(0, True)
        exit = b.vcpu.run_once()
        assert isinstance(exit, Mmio) and exit.data[0] == 1
        assert b.vcpu.regs["spsr_el1"] & 0x80 == 0, "it was taken with IRQs unmasked"
        b.vm.irq_line(0, False)


def test_a_timer_that_userspace_set_before_the_first_run_fires():
    with bench() as b:
        b.load("wfi\n str x1, [x3]", x3=MMIO)
        b.vcpu.set_reg("KVM_REG_ARM_TIMER_CVAL", b.vcpu.get_reg("KVM_REG_ARM_TIMER_CNT") + 30 * TICKS)
        b.vcpu.set_reg("KVM_REG_ARM_TIMER_CTL", 1)
        assert isinstance(b.vcpu.run_once(), Interrupted) and levels(b.vcpu) == VTIMER
        assert isinstance(b.vcpu.run_once(), Mmio)


def test_reserved_bits_of_the_virtual_timers_control_stay_zero():
    with bench() as b:
        b.run(
            "mov x1, #-1\n msr cntv_cval_el0, x1\n msr cntv_ctl_el0, x1\n mrs x4, cntv_ctl_el0\n str x1, [x3]", x3=MMIO
        )
        assert b.vcpu.regs.x4 == 3
