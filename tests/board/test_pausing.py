"""Holding a board's vCPUs between two instructions."""

import threading

import pytest

import kvm2
from kvm2.abi import exits as abi
from kvm2.board.loader import Image, Segment
from kvm2.board.machine import Machine
from kvm2.board.pausing import Pausing
from kvm2.spec import MemoryRange, VmSpec

RAM = 1 << 30
# vCPU 0 turns vCPU 1 on (PSCI CPU_ON 0xC4000003, target 1, entry RAM + 0x20); then x5 of one counts, x6 of the other.
ON = (0xD2800060, 0xF2B88000, 0xD2800021, 0xD2800402, 0xF2A80002, 0xD4000002)
COUNT_X5, COUNT_X6, BACK = 0x910004A5, 0x910004C6, 0x17FFFFFF
WORDS = (*ON, COUNT_X5, BACK, COUNT_X6, BACK)


@pytest.fixture
def counting():
    """A machine whose two vCPUs count, running in a thread."""
    code = b"".join(word.to_bytes(4, "little") for word in WORDS)
    with (
        kvm2.open("neoverse-n1-4k") as kvm,
        Machine(kvm, VmSpec(memory=(MemoryRange(RAM, 1 << 20),)), cpus=2) as machine,
    ):
        machine.load(Image("count", RAM, (Segment(RAM, code, len(code)),)))
        thread = threading.Thread(target=machine.run)
        yield machine, thread
        machine.finish("timeout", "the test is over", 0)
        thread.join(10)
        assert not thread.is_alive()


def progress(machine):
    return machine.vcpus[0].regs.x[5], machine.vcpus[1].regs.x[6]


def wait_until(what):
    for _ in range(1000):
        if what():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come")


def counts_on(machine, before, which):
    """Whether the vCPUs in `which`, and no others, have counted on since `before`."""

    def done():
        with machine.paused():
            now = progress(machine)
        return all((now[n] != before[n]) == (n in which) for n in (0, 1))

    return done


def test_paused_vcpus_stand_still_and_go_on(counting):
    machine, thread = counting
    thread.start()
    wait_until(lambda: counts_on(machine, (0, 0), {0, 1})())
    for _ in range(5):
        with machine.paused():
            first = progress(machine)
            threading.Event().wait(0.005)
            assert progress(machine) == first
        wait_until(counts_on(machine, first, {0, 1}))
    assert machine._result(0).exits.keys() == {"intr"}


def test_held_before_the_run_nothing_runs(counting):
    machine, thread = counting
    machine.pause()
    thread.start()
    wait_until(lambda: machine.pausing._out == {0, 1})
    assert machine.vcpus[0].regs.pc == RAM and progress(machine) == (0, 0)
    machine.resume()
    wait_until(counts_on(machine, (0, 0), {0, 1}))


def test_holders_are_independent_and_vcpus_too(counting):
    machine, thread = counting
    thread.start()
    wait_until(lambda: counts_on(machine, (0, 0), {0, 1})())
    machine.pause("gdb")
    before = progress(machine)
    with machine.paused():
        machine.pausing.release("gdb", {1})
        assert machine.pausing.holds("gdb") == {0}
        assert progress(machine) == before
    wait_until(counts_on(machine, before, {1}))
    assert progress(machine)[0] == before[0]
    machine.resume("gdb")
    wait_until(counts_on(machine, before, {0, 1}))


def test_the_end_of_the_run_frees_who_is_parked(counting):
    machine, thread = counting
    machine.pause()
    thread.start()
    wait_until(lambda: machine.pausing._out == {0, 1})
    machine.finish("interrupted", "", 0)
    thread.join(10)
    assert not thread.is_alive()


def test_an_answer_to_a_read_is_taken_up_before_the_vcpu_is_held():
    """KVM completes an MMIO read in the next KVM_RUN: one with `immediate_exit` set, which makes no step."""
    area, steps = bytearray(4096), []
    pausing = Pausing(lambda vcpu: area.__setitem__(abi.IMMEDIATE_EXIT_OFFSET, 1))
    in_exit, go_on = threading.Event(), threading.Event()

    def drive():
        with pausing.driving(0):
            pausing.park(0)
            steps.append("mmio")
            in_exit.set()
            go_on.wait()
            while not area[abi.IMMEDIATE_EXIT_OFFSET]:  # what a KVM_RUN does first
                pass
            steps.append("intr")
            pausing.park(0)
            steps.append("on")

    thread = threading.Thread(target=drive)
    thread.start()
    in_exit.wait()
    go_on.set()
    pausing.hold("me", [0])
    assert steps == ["mmio", "intr"]
    pausing.release("me")
    thread.join(10)
    assert steps[-1] == "on"


def test_a_vcpus_own_thread_does_not_wait_for_itself():
    pausing = Pausing(lambda vcpu: pytest.fail("nobody is in the guest"))
    with pausing.driving(0):
        pausing.hold("me", [0, 1])
    assert pausing.holds("me") == {0, 1} and pausing.holds("you") == frozenset()
