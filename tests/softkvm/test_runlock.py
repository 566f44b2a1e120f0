"""The run lock: who waits gets its turn, in order; a slice is asked back once it has passed, by one waiter."""

from __future__ import annotations

import sys
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


def _interrupted(lock: RunLock, point: int) -> bool:
    """Takes the lock, where a signal's exception comes at the `point`-th place that Python has for it: the start of a
    function, and behind one of C's. Whether one came."""
    seen = 0

    def at(frame: object, event: str, argument: object) -> None:
        nonlocal seen
        seen += event in ("call", "c_return")
        if seen == point:
            sys.setprofile(None)
            raise KeyboardInterrupt

    try:
        sys.setprofile(at)
        lock.acquire(lambda: None)
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    lock.release()
    return False


def test_a_signal_in_the_midst_of_taking_it_leaves_it_free() -> None:
    lock, point = RunLock(), 1
    while True:
        came = _interrupted(lock, point)
        taken: list[int] = []
        thread = _waiters_of(lock, taken)
        thread.join(10)
        assert taken == [1], f"interrupted at place {point}"
        if not came:
            break
        point += 1
    assert point > 2, "nothing was interrupted"


def _waiters_of(lock: RunLock, taken: list[int]) -> threading.Thread:
    def take() -> None:
        with lock:
            taken.append(1)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    return thread
