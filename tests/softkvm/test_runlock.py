"""The run lock: who waits gets its turn, in order; a slice is asked back once it has passed, by one waiter."""

from __future__ import annotations

import threading
import time

from kvm2.softkvm.runlock import SLICE_SECONDS, RunLock


def _waiters(lock: RunLock, order: list[int], count: int) -> list[threading.Thread]:
    def wait(number: int) -> None:
        lock.acquire(lambda: None)
        order.append(number)
        lock.release()

    threads = []
    for number in range(count):
        threads.append(threading.Thread(target=wait, args=(number,)))
        threads[-1].start()
        while len(lock._waiting) < number + 1:
            time.sleep(0.001)
    return threads


def test_first_come_first_served_and_nobody_is_lost() -> None:
    lock, order = RunLock(), []
    lock.acquire(lambda: None)
    threads = _waiters(lock, order, 5)
    lock.release()
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3, 4] and not lock._waiting


def test_only_the_first_in_the_queue_asks_and_once_a_slice() -> None:
    lock, stops, order = RunLock(), [], []
    lock.acquire(lambda: stops.append(time.monotonic()))
    threads = _waiters(lock, order, 4)
    stops.clear()
    began = time.monotonic()
    time.sleep(25 * SLICE_SECONDS)
    asked = len(stops)
    passed = time.monotonic() - began
    lock.release()
    for thread in threads:
        thread.join(10)
    assert 1 <= asked <= passed / SLICE_SECONDS + 1, (asked, passed)


def test_a_new_holder_gets_a_slice_of_its_own() -> None:
    lock, order, stops = RunLock(), [], []
    lock.acquire(lambda: None)
    held = threading.Event()

    def second() -> None:
        lock.acquire(lambda: stops.append(time.monotonic()))
        held.set()
        while not stops:
            time.sleep(0.0001)
        lock.release()

    thread = threading.Thread(target=second)
    thread.start()
    while not lock._waiting:
        time.sleep(0.001)
    others = _waiters_behind(lock, order)
    lock.release()
    held.wait(10)
    began = time.monotonic()
    thread.join(10)
    for other in others:
        other.join(10)
    assert stops[0] - began >= SLICE_SECONDS / 2, "it was asked to go before its slice had passed"


def _waiters_behind(lock: RunLock, order: list[int]) -> list[threading.Thread]:
    def wait() -> None:
        lock.acquire(lambda: None)
        order.append(1)
        lock.release()

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(lock._waiting) < 4:
        time.sleep(0.001)
    return threads


def test_short_work_asks_at_once() -> None:
    lock, stopped = RunLock(), threading.Event()
    lock.acquire(stopped.set)

    def work() -> None:
        with lock:
            pass

    thread = threading.Thread(target=work)
    thread.start()
    assert stopped.wait(10)
    lock.release()
    thread.join(10)
    assert not thread.is_alive()
