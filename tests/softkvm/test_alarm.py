"""The alarm: each sleeper once at its time, whatever the others do."""

from __future__ import annotations

import threading
import time

import pytest

from kvm2.softkvm.alarm import Alarm

MILLISECOND = 1_000_000


class Sleeper:
    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.woken, self.at = error, threading.Event(), 0

    def fired(self) -> None:
        self.at = time.monotonic_ns()
        self.woken.set()
        if self.error is not None:
            raise self.error


def test_an_earlier_wish_of_another_wakes_the_thread_and_none_comes_early() -> None:
    alarm, early, late, never = Alarm(), Sleeper(), Sleeper(), Sleeper()
    now = time.monotonic_ns()
    alarm.set(never, now + 40 * MILLISECOND)
    alarm.set(late, now + 60 * MILLISECOND)
    time.sleep(0.01)
    alarm.set(early, now + 30 * MILLISECOND)
    alarm.set(never, None)
    assert early.woken.wait(10) and late.woken.wait(10)
    assert now + 30 * MILLISECOND <= early.at and now + 60 * MILLISECOND <= late.at
    assert early.at <= late.at and not never.woken.is_set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_fails_keeps_nobody_asleep() -> None:
    alarm, bad, good = Alarm(), Sleeper(ValueError("bad")), Sleeper()
    now = time.monotonic_ns()
    alarm.set(bad, now)
    assert bad.woken.wait(10)
    alarm.set(good, now + 5 * MILLISECOND)
    assert good.woken.wait(10)
