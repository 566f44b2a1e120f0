"""Stopping a running core: never lost, never in the middle of an instruction."""

from __future__ import annotations

import random
import signal
import threading
import time

import pytest

from kvm2.softkvm.cpu.stop import StopGate

from .machine import Machine

NODES = 1009
RING = 0x10000
CHASE = "1: ldr x1, [x1]; add x2, x2, #1; ldr x1, [x1]; add x2, x2, #1; b 1b"


def ring_machine() -> tuple[Machine, list[int]]:
    """x1 follows pointers, x2 counts: a load that runs twice shows at once."""
    machine = Machine()
    base = machine.arena.base + RING
    for node in range(NODES):
        machine.arena.put(base + 8 * node, base + 8 * ((node * 7 + 3) % NODES))
    order = [0]
    while (following := (order[-1] * 7 + 3) % NODES) != 0:
        order.append(following)
    machine.load(CHASE, x1=base, x2=0)
    return machine, [base + 8 * node for node in order]


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_stops_are_precise(count: int) -> None:
    machine, order = ring_machine()
    core = machine.core
    rng = random.Random(5)
    go, done = threading.Event(), threading.Event()

    def stopper() -> None:
        while not done.is_set():
            go.wait()
            go.clear()
            time.sleep(rng.random() * 2e-4)
            core.stop()

    thread = threading.Thread(target=stopper)
    thread.start()
    turns = 0
    try:
        for _ in range(count):
            go.set()
            assert core.run() == "stop"
            steps = core.x[2] + ((core.pc - machine.arena.base) in (4, 12))
            assert core.x[1] == order[steps % len(order)]
            assert core.pc - machine.arena.base < 20
            turns += core.x[2] > 0
    finally:
        done.set()
        go.set()
        thread.join()
    assert turns > count // 2
    machine.close()


def test_a_stop_before_the_run_ends_the_next_run_only() -> None:
    machine = Machine()
    machine.load("1: add x1, x1, #1; cmp x1, #9; b.ne 1b; hvc #1")
    machine.core.stop()
    machine.core.stop()
    assert machine.core.run() == "stop"
    assert machine.core.x[1] == 0
    assert machine.core.run() == "trap"
    assert machine.core.x[1] == 9
    machine.close()


@pytest.mark.parametrize("count", [2000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_stop_at_the_moment_of_entry_is_not_lost(count: int) -> None:
    """The stopper fires when it sees the core about to enter; the guest loops for ever, so a lost stop hangs."""
    machine = Machine()
    core = machine.core
    machine.load("1: b 1b")
    entering, done = threading.Event(), threading.Event()

    def stopper() -> None:
        while True:
            entering.wait()
            entering.clear()
            if done.is_set():
                return
            core.stop()

    thread = threading.Thread(target=stopper, daemon=True)
    thread.start()
    for _ in range(count):
        entering.set()
        assert core.run() == "stop"
    done.set()
    entering.set()
    thread.join(10)
    assert not thread.is_alive()
    machine.close()


def test_stop_from_several_threads_and_within_the_handler() -> None:
    machine = Machine()
    core = machine.core
    machine.answer = lambda trap: (core.stop(), True)[1]
    machine.load("hvc #1; 1: b 1b")
    assert core.run() == "stop"
    assert core.pc == machine.arena.base + 4
    threads = [threading.Thread(target=core.stop) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert core.run() == "stop"
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    machine.close()


def test_a_trap_and_a_stop_at_once_keep_both() -> None:
    machine = Machine()
    core = machine.core
    machine.answer = lambda trap: (core.stop(), False)[1]
    machine.load("smc #1; hvc #2")
    assert core.run() == "trap"
    assert core.run() == "stop"
    assert core.pc == machine.arena.base
    machine.close()


def test_stopping_does_not_wait_for_a_handler() -> None:
    """The handler may wait for a lock that the stopping thread holds."""
    machine = Machine()
    core = machine.core
    inside, lock = threading.Event(), threading.Lock()

    def answer(trap: object) -> bool:
        inside.set()
        with lock:
            return True

    machine.answer = answer
    machine.load("hvc #1; 1: b 1b")
    with lock:
        thread = threading.Thread(target=core.run)
        thread.start()
        inside.wait()
        core.stop()
    thread.join(10)
    assert not thread.is_alive()
    machine.close()


def test_the_gate_resends_until_the_core_is_out() -> None:
    requests = []
    gate = StopGate(lambda: requests.append(1))
    gate.stop()
    assert requests == []
    assert not gate.enter()
    assert gate.enter()

    def leave_after_three() -> None:
        requests.append(1)
        if len(requests) == 3:
            gate.running = False

    gate._request = leave_after_three
    thread = threading.Thread(target=gate.stop)
    thread.start()
    thread.join(10)
    assert len(requests) == 3
    assert gate.take()
    assert not gate.take()


def test_interrupts_while_running() -> None:
    """A line raised between runs is taken; work goes on where it was."""
    machine = Machine()
    core = machine.core
    machine.load("add x5, x5, #1; hvc #0; eret", at=0x8280)
    machine.load("1: add x2, x2, #1; b 1b", VBAR_EL1=machine.arena.base + 0x8000, pstate=0x345)

    def taken(trap: object) -> bool:
        core.set_irq(False)
        threading.Timer(0.0005, core.stop).start()
        return True

    machine.answer = taken
    for turn in range(1, 20):
        core.set_irq(True)
        assert core.run() == "stop"
        assert core.x[5] == turn
        assert core.pc - machine.arena.base in (0, 4, 0x8288)
    machine.close()


class Alarm(Exception):
    """What a signal handler of the application raises."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_of_a_signal_handler_ends_the_run_and_loses_nothing() -> None:
    """Each system call and hypercall of the guest happens exactly once, wherever the handler's exception strikes."""
    machine = Machine()
    core = machine.core
    calls = [0]

    def answer(trap: object) -> bool:
        core.answered = True  # otherwise a call comes again that the exception has struck
        calls[0] += 1
        return True

    core.on_trap = lambda: answer(None)
    machine.load("add x5, x5, #1; eret", at=0x8200)
    text = "1: add x1, x1, #1; svc #1; hvc #1; b 1b"
    machine.load(text, VBAR_EL1=machine.arena.base + 0x8000)

    def alarm(number: int, frame: object) -> None:
        raise Alarm

    previous = signal.signal(signal.SIGALRM, alarm)
    stops = 0
    try:
        for _ in range(200):
            try:
                # Again and again: Python drops an exception that strikes within the C library's own callback code.
                signal.setitimer(signal.ITIMER_REAL, 0.0004, 0.02)
                core.run()
            except Alarm:
                stops += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert stops > 150
    position = (core.pc - machine.arena.base) // 4
    turns = core.x[1]
    assert turns > 1000
    assert abs(core.x[5] - turns) <= 1, (position, turns)
    assert calls[0] - turns in range(-stops, 2), (position, turns)
    machine.close()
