"""The timer around KVM_RUN: it rings for who sleeps or spins, and never after the run is over."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import pytest

from kvm2.errors import KvmError
from kvm2.lab import alarm
from kvm2.lab.alarm import Alarm


class Vcpu:
    """A KVM_RUN that ends when it is kicked, `deaf` kicks being lost."""

    def __init__(self, deaf: int = 0) -> None:
        self.kicked = threading.Event()
        self.deaf = deaf
        self.kicks = 0

    def open(self) -> int:
        return 0

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        return 0

    def kvm_run(self, fd: int) -> memoryview:
        return memoryview(b"")

    def kick(self, fd: int) -> None:
        self.kicks += 1
        if self.kicks > self.deaf:
            self.kicked.set()

    def memory_gone(self, address: int, size: int) -> None:
        return

    def close(self, fd: int) -> None:
        return


def test_who_sleeps_is_woken() -> None:
    vcpu = Vcpu()
    with Alarm(vcpu, 0, 30) as alarm:
        assert vcpu.kicked.wait(5)
    assert alarm.rang


def test_a_lost_kick_is_sent_again() -> None:
    vcpu = Vcpu(deaf=2)
    with Alarm(vcpu, 0, 10):
        assert vcpu.kicked.wait(5)
    assert vcpu.kicks >= 3


def test_who_spins_is_stopped_by_its_time_on_the_processor() -> None:
    vcpu = Vcpu()
    start = time.thread_time()
    with Alarm(vcpu, 0, 60):
        while not vcpu.kicked.is_set() and time.thread_time() - start < 5:
            pass
    assert vcpu.kicked.is_set()


def test_who_is_quick_never_hears_it() -> None:
    vcpu = Vcpu()
    with Alarm(vcpu, 0, 20) as alarm:
        pass
    time.sleep(0.06)
    assert not alarm.rang
    assert vcpu.kicks == 0


def test_a_descriptor_that_is_no_vcpu_is_left_alone() -> None:
    class Other(Vcpu):
        def kick(self, fd: int) -> None:
            self.kicked.set()
            raise KvmError(19)

    other = Other()
    with Alarm(other, 0, 10):
        assert other.kicked.wait(5)


def watchers() -> int:
    return sum(thread.name == "kvm2-alarm" for thread in threading.enumerate())


def test_one_thread_watches_all_and_ends_when_there_is_nothing_to_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alarm, "IDLE_LOOKS", 1)
    vcpus = [Vcpu() for _ in range(5)]
    with contextlib.ExitStack() as stack:
        for vcpu in vcpus:
            stack.enter_context(Alarm(vcpu, 0, 10))
        assert watchers() == 1
        assert all(vcpu.kicked.wait(5) for vcpu in vcpus)
    until = time.monotonic() + 5
    while watchers() and time.monotonic() < until:
        time.sleep(0.01)
    assert watchers() == 0
    test_who_sleeps_is_woken()


def test_an_alarm_rings_in_the_child_of_a_fork() -> None:
    with Alarm(Vcpu(), 0, 10):
        assert watchers() == 1
        child = os.fork()
        if child == 0:
            vcpu = Vcpu()
            with Alarm(vcpu, 0, 10):
                os._exit(0 if vcpu.kicked.wait(5) else 1)
        assert os.waitpid(child, 0)[1] == 0
