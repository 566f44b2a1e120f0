import threading
import time

import pytest

from kvm2.board.pl031 import CR, DR, ICR, IMSC, LR, MIS, MR, RIS, Pl031


class Clock:
    def __init__(self, now=1_700_000_000.25):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def host():
    return Clock()


@pytest.fixture
def told():
    return []


@pytest.fixture
def clock(host, told):
    clock = Pl031(told.append, host)
    yield clock
    clock.close()


def test_it_shows_the_machines_seconds_and_goes_on_from_what_was_loaded(clock, host):
    assert clock.read(DR, 4) == 1_700_000_000
    clock.write(LR, 4, 100)
    host.now += 7
    assert (clock.read(DR, 4), clock.read(LR, 4)) == (107, 100)
    clock.write(LR, 4, 0xFFFFFFFF)
    host.now += 2
    assert clock.read(DR, 4) == 1


def test_identification_is_a_pl031(clock):
    words = [clock.read(offset, 4) for offset in range(0xFE0, 0x1000, 4)]
    assert words[0] | (words[1] & 15) << 8 == 0x031 and words[4:] == [0x0D, 0xF0, 0x05, 0xB1]
    assert clock.read(0xFE2, 2) == 0 and clock.read(0x800, 8) == 0


def test_it_cannot_be_stopped(clock):
    clock.write(CR, 4, 0)
    assert clock.read(CR, 4) == 1


def test_the_match_interrupt_in_its_time(told):
    seen = threading.Event()
    clock = Pl031(lambda level: (told.append(level), seen.set()))
    try:
        clock.write(IMSC, 4, 1)
        clock.write(MR, 4, int(time.time()) + 1)
        assert told == []
        assert seen.wait(10)
        assert (clock.read(RIS, 4), clock.read(MIS, 4), told) == (1, 1, [True])
        clock.write(ICR, 4, 1)
        assert (clock.read(RIS, 4), told) == (0, [True, False])
    finally:
        clock.close()


def wait_until(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def test_a_match_with_now_is_due_at_once_masked_or_not(clock, told):
    clock.write(MR, 4, 1_700_000_000)
    wait_until(lambda: clock.read(RIS, 4) == 1)
    assert told == [] and clock.read(MIS, 4) == 0
    clock.write(IMSC, 4, 1)
    assert told == [True]
    clock.write(IMSC, 4, 0)
    assert told == [True, False]


def test_loading_the_match_value_is_a_match(clock, told):
    clock.write(IMSC, 4, 1)
    clock.write(MR, 4, 50)
    assert clock.read(RIS, 4) == 0
    clock.write(LR, 4, 50)
    wait_until(lambda: told == [True])


def test_an_alarm_that_passed_while_the_vm_was_away_is_due(clock, host, told):
    clock.write(IMSC, 4, 1)
    clock.write(MR, 4, 1_700_000_500)
    kept = clock.state()
    assert kept["due"] == 1_700_000_500 and kept["ris"] == 0
    later = Clock(host.now + 1000)
    heard = []
    other = Pl031(heard.append, later)
    try:
        other.restore(kept)
        wait_until(lambda: heard == [True])
        assert other.read(DR, 4) == 1_700_001_000 and told == []
    finally:
        other.close()


def test_alarms_set_over_and_over_are_one_thread(clock):
    before = threading.active_count()
    for value in range(300):
        clock.write(MR, 4, value)
    assert threading.active_count() <= before + 1
