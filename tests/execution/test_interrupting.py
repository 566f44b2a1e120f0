"""Getting a vCPU out of the guest: kicks, signals, immediate_exit, Ctrl-C."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kvm2
from kvm2.board.linux import LinuxMachine
from kvm2.exits import Interrupted, Mmio, SystemEvent
from kvm2.spec import MemoryRange, VmSpec

from .rig import RAM, RAM_SIZE, bench, flat

OFF = "\n mov w0, #8\n movk w0, #0x8400, lsl #16\n hvc #0"
SPIN = "1: add x9, x9, #1\n b 1b"
# A guest can be inside each of these when the signal comes.
BUSY = {
    "loop": SPIN,
    "wfi": "1: wfi\n b 1b",
    "hypercalls": "1: mov w0, #0x84000000\n hvc #0\n b 1b",
    "id registers": "1: mrs x9, id_aa64mmfr0_el1\n b 1b",
    "faults": f"1: ldr x9, ={1 << 45:#x}\n ldr x9, [x9]\n b 1b\n .ltorg\n .balign 2048\n .skip 0x200\n eret",
    "own exceptions": "adr x9, 2f\n msr vbar_el1, x9\n isb\n 1: svc #0\n b 1b\n .balign 2048\n 2: .skip 0x200\n eret",
}


@pytest.mark.parametrize("text", BUSY.values(), ids=BUSY.keys())
def test_kick(text):
    with bench("neoverse-n1-4k") as b:
        b.load(text)
        for _ in range(5):
            timer = threading.Timer(0.02, b.vcpu.kick)
            timer.start()
            start = time.monotonic()
            assert isinstance(b.vcpu.run_once(), Interrupted)
            assert time.monotonic() - start < 1
            timer.join()


@pytest.mark.parametrize("text", BUSY.values(), ids=BUSY.keys())
def test_signals_in_the_main_thread(text):
    """The handler runs, and KVM_RUN ends, at once: no thread of ours has to poll for it."""
    assert threading.current_thread() is threading.main_thread()
    seen = []
    old = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(time.monotonic()))
    try:
        with bench("neoverse-n1-4k") as b:
            b.load(text)
            for count in range(1, 6):
                due = time.monotonic() + 0.02
                signal.setitimer(signal.ITIMER_REAL, 0.02)
                assert isinstance(b.vcpu.run_once(), Interrupted)
                assert len(seen) == count
                assert seen[-1] - due < 0.5 and time.monotonic() - due < 0.5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def make_core(vcpu: Any) -> None:
    """The first KVM_RUN imports and looks at the library: not what the signals are to interrupt."""
    kicker = threading.Timer(0.02, vcpu.kick)
    kicker.start()
    while not isinstance(vcpu.run_once(), Interrupted):
        pass
    kicker.join()


def test_an_exception_of_a_handler_reaches_the_caller():
    """Ctrl-C is one. The vCPU is as the guest left it and goes on."""

    def handler(number, frame):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, handler)
    try:
        with bench() as b:
            b.load("1: ldr x10, [x1]\n add x10, x10, #1\n add x9, x9, #1\n str x10, [x1]\n b 1b", x1=RAM + 0x8000)
            make_core(b.vcpu)
            for _ in range(20):
                with pytest.raises(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, 0.005)  # a busy machine may take that long for a line
                    while True:
                        assert isinstance(b.vcpu.run_once(), Interrupted)
                # Within the loop's four instructions the counters differ by one at most: nothing ran twice or was lost.
                assert b.vcpu.regs.x9 - int.from_bytes(b.ram.read(0x8000, 8), "little") in (0, 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# Each keeps counting in x9, and goes to MMIO where something is not as it was left.
ACCESSES = {
    "virtual timer": "msr cntv_cval_el0, x9\n mrs x10, cntv_cval_el0",
    "physical timer": "msr cntp_cval_el0, x9\n mrs x10, cntp_cval_el0",
    "hypercalls": "mov w0, #0x84000000\n hvc #0\n movz x10, #1, lsl #16\n movk x10, #1\n"
    "cmp x0, x10\n csel x10, x9, xzr, eq",  # PSCI_VERSION
    "exits": "mov x10, x9\n str x9, [x2]",
}
LOOP = "1: add x9, x9, #1\n {}\n cmp x9, x10\n b.eq 1b\n 2: str x9, [x1]\n b 2b"
DEVICE, WRONG = 0x0A00_0000, 0x0B00_0000


@contextlib.contextmanager
def interruptions(count: int) -> Iterator[Callable[[Any], None]]:
    """Within it `until(vcpu)` runs a guest while `count` signals come, whose handler raises."""
    seen = 0

    def handler(number, frame):
        nonlocal seen
        seen += 1
        raise KeyboardInterrupt

    def until(vcpu: Any) -> None:
        make_core(vcpu)
        for number in range(count):
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.001 + number % 20 / 10_000)
                while seen == number:
                    exit = vcpu.run_once()
                    if isinstance(exit, Mmio):
                        assert exit.address != WRONG, (hex(vcpu.regs.x9), hex(vcpu.regs.x10))
            assert seen == number + 1

    old = signal.signal(signal.SIGALRM, handler)
    gc.disable()  # an exception in a callback of the collector (Hypothesis has one) is nobody's
    try:
        yield until
    finally:
        gc.enable()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("text", ACCESSES.values(), ids=ACCESSES.keys())
def test_a_handlers_exception_in_the_midst_of_an_access(text):
    """No access is lost, no lock is kept: neither the next KVM_RUN nor the end of the VM waits for ever."""
    with bench() as b, interruptions(200) as until:
        b.load("movz x9, #1, lsl #48\n" + LOOP.format(text), x1=WRONG, x2=DEVICE)
        until(b.vcpu)


GIC = """
    movz x11, #0x080b, lsl #16  // vCPU 0's SGIs: group 1, enabled
    mov w12, #-1
    str w12, [x11, #0x80]
    str w12, [x11, #0x100]
    movz x11, #0x0800, lsl #16
    mov w12, #0x12
    str w12, [x11]
    mov x12, #0xff
    msr S3_0_C4_C6_0, x12       // ICC_PMR_EL1
    mov x12, #1
    msr S3_0_C12_C12_7, x12     // ICC_IGRPEN1_EL1
    isb
    movz x13, #0x300, lsl #16
    movk x13, #1
1:  msr S3_0_C12_C11_5, x13     // ICC_SGI1R_EL1: 3, to itself
    isb
    mrs x10, S3_0_C12_C12_0     // ICC_IAR1_EL1
    msr S3_0_C12_C12_1, x10     // ICC_EOIR1_EL1
    mrs x9, S3_0_C12_C11_3      // ICC_RPR_EL1
    cmp x9, #0xff
    ccmp x10, #3, #0, eq
    b.eq 1b
    str x10, [x1]
    b 1b
"""


def test_a_handlers_exception_in_the_midst_of_an_interrupt():
    """None is acknowledged twice or ended twice: the guest would never get it again."""
    spec = VmSpec(memory=(MemoryRange(RAM, RAM_SIZE),))
    with kvm2.open("max-4k-6.12") as kvm, LinuxMachine(kvm, spec, its=False) as machine:
        machine.vm.write(RAM, flat(GIC))
        vcpu = machine.vcpus[0]
        vcpu.regs.pc, vcpu.regs.x1 = RAM, WRONG
        with interruptions(300) as until:
            until(vcpu)


def test_immediate_exit():
    """KVM_RUN ends before the guest runs, after completing what waited; it stays until userspace takes it away."""
    with bench() as b:
        b.load(f"mov x9, #1\n ldr x10, [x1]\n mov x9, #2{OFF}", x1=0x0A00_0000)
        b.vcpu.kick()
        assert isinstance(b.vcpu.run_once(), Interrupted) and b.vcpu.regs.x9 == 0
        exit = b.vcpu.run_once()
        assert isinstance(exit, Mmio)
        exit.reply(7)
        b.vcpu.kick()
        assert isinstance(b.vcpu.run_once(), Interrupted)
        assert (b.vcpu.regs.x9, b.vcpu.regs.x10) == (1, 7)
        assert isinstance(b.vcpu.run_once(), SystemEvent) and b.vcpu.regs.x9 == 2


def test_no_kick_is_lost():
    """Kicks from another thread at every moment of short runs."""
    with bench() as b:
        b.load("1: str x9, [x1]\n add x9, x9, #1\n b 1b", x1=0x0A00_0000)
        stop = threading.Event()

        def kicker():
            while not stop.is_set():
                b.vcpu.kick()
                time.sleep(0.0001)

        thread = threading.Thread(target=kicker)
        thread.start()
        interrupted, last = 0, -1
        end = time.monotonic() + 60  # a busy machine kicks less often, not never
        while min(interrupted, last) <= 50 and time.monotonic() < end:
            exit = b.vcpu.run_once()
            if isinstance(exit, Interrupted):
                interrupted += 1
            else:
                assert exit.value == last + 1
                last = exit.value
        stop.set()
        thread.join()
        assert interrupted > 50 and last > 50


@pytest.mark.parametrize("text", [SPIN, BUSY["wfi"]], ids=["loop", "wfi"])
def test_ctrl_c_of_the_command(tmp_path, text):
    guest = tmp_path / "spin.bin"
    guest.write_bytes(flat(text))
    command = [sys.executable, "-m", "kvm2", "run", str(guest), "--host", "cortex-a57-4k", "--memory", "16M@1G"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(1.0)
    assert process.poll() is None
    start = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 130, output
    assert time.monotonic() - start < 1
    assert "interrupted" in output and "Traceback" not in output
