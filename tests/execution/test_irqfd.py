"""Interrupts from eventfds and KVM_IRQ_LINE, as a guest takes them; what a process holds of it afterwards."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import kvm2
from kvm2.exits import Interrupted, Mmio
from kvm2.irq_vm import cpu_line, pin_route, ppi_line, spi_line

from .rig import RAM, Bench, bench, flat

DEVICE = 0x0A00_0000
DIST, REDIST = 0x0800_0000, 0x080A_0000
HANDLER = RAM + 0x1000 + 0x280  # IRQ from the current level
FIQ = 0x80  # behind it
GRP_ADDR, GRP_DIST, GRP_CTRL = 0, 1, 4
CTLR, ISENABLER, ICFGR = 0x0, 0x100, 0xC00
WAIT_SECONDS = 30
SPI = 35

START = f"""
 ldr x0, ={RAM + 0x1000:#x}
 msr vbar_el1, x0
 mov x0, #0xff
 msr s3_0_c4_c6_0, x0 // ICC_PMR_EL1
 mov x0, #1
 msr s3_0_c12_c12_7, x0 // ICC_IGRPEN1_EL1
 isb
 msr daifclr, #3
 1: wfi
 b 1b
"""
# Tells userspace the number while the interrupt is active, then ends it.
TAKE = """
 mrs x0, s3_0_c12_c12_0 // ICC_IAR1_EL1
 str w0, [x1]
 msr s3_0_c12_c12_1, x0 // ICC_EOIR1_EL1
 eret
"""


class Guest:
    """A vCPU with a GICv3 that waits for SPIs; `level` makes them level-sensitive."""

    def __init__(self, b: Bench, level: bool) -> None:
        self.vm, self.vcpu = b.vm, b.vcpu
        self.gic = b.vm.create_device("vgic-v3")
        for kind, address in ((2, DIST), (3, REDIST)):
            self.gic.set_device_attr(GRP_ADDR, kind, struct.pack("<Q", address))
        self.gic.set_device_attr(GRP_CTRL, 0)
        for offset, value in ((CTLR, 2), (ISENABLER + 4, 0xFFFF_FFFF), (ICFGR + 8, 0 if level else 0xAAAA_AAAA)):
            self.gic.set_device_attr(GRP_DIST, offset, struct.pack("<I", value))
        b.ram.write(HANDLER - RAM, flat(TAKE))
        b.load(START, x1=DEVICE)

    def next(self, seconds: float = WAIT_SECONDS) -> int | None:
        """The next interrupt that the guest takes; None where it takes none."""
        timer = threading.Timer(seconds, self.vcpu.kick)
        timer.start()
        try:
            exit = self.vcpu.run_once()
        finally:
            timer.cancel()
        if isinstance(exit, Interrupted):
            return None
        assert isinstance(exit, Mmio), exit
        return exit.value


@contextlib.contextmanager
def guest(*, level: bool = False) -> Iterator[Guest]:
    with bench() as b:
        yield Guest(b, level)


@pytest.fixture
def eventfds() -> Iterator[list[int]]:
    made = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
    yield made
    for fd in made:
        os.close(fd)


def signalled(fd: int, seconds: float = WAIT_SECONDS) -> bool:
    """Waits for it, and reads it away."""
    found = bool(select.select([fd], [], [], seconds)[0])
    if found:
        os.eventfd_read(fd)
    return found


NOT_COMING = 0.1  # how long is waited for what must not come


def test_a_write_wakes_a_guest_that_waits(eventfds: list[int]) -> None:
    with guest() as g:
        g.vm.irqfd(eventfds[0], SPI - 32)
        for _ in range(3):
            timer = threading.Timer(0.02, os.eventfd_write, (eventfds[0], 1))
            timer.start()
            assert g.next() == SPI
            timer.join()
        assert g.next(NOT_COMING) is None


def test_a_write_before_the_run_is_there_in_it(eventfds: list[int]) -> None:
    """Nobody has to wait for the thread: the interrupt is taken at the first chance."""
    with guest() as g:
        g.vm.set_gsi_routing([pin_route(1000, SPI - 32)])
        g.vm.irqfd(eventfds[0], 1000)
        os.eventfd_write(eventfds[0], 3)
        assert g.next() == SPI
        g.vm.deassign_irqfd(eventfds[0], 1000)
        os.eventfd_write(eventfds[0], 1)
        assert g.next(NOT_COMING) is None


def test_a_resampler_is_told_at_the_end_and_the_line_goes_down(eventfds: list[int]) -> None:
    one, two, told, also = eventfds
    with guest(level=True) as g:
        g.vm.irqfd(one, SPI - 32, resample=told)
        g.vm.irqfd(two, SPI - 32, resample=also)
        for trigger in (one, two):
            os.eventfd_write(trigger, 1)
            assert g.next() == SPI
            assert not signalled(told, 0)
            assert g.next(NOT_COMING) is None  # it has ended: once
            assert signalled(told) and signalled(also) and not signalled(told, 0)


def test_a_device_that_still_has_a_reason_asserts_again(eventfds: list[int]) -> None:
    trigger, told = eventfds[:2]
    with guest(level=True) as g:
        g.vm.irqfd(trigger, SPI - 32, resample=told)
        reasons = iter(range(5))

        def device() -> None:
            for _ in reasons:
                os.eventfd_write(trigger, 1)
                assert signalled(told)

        thread = threading.Thread(target=device)
        thread.start()
        assert [g.next() for _ in range(5)] == [SPI] * 5
        assert g.next(NOT_COMING) is None
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()


def test_without_a_resampler_a_level_stays(eventfds: list[int]) -> None:
    """As kvm_arch_set_irq_inatomic has it: nobody lowers the line but KVM_IRQ_LINE."""
    with guest(level=True) as g:
        g.vm.irqfd(eventfds[0], SPI - 32)
        os.eventfd_write(eventfds[0], 1)
        assert [g.next() for _ in range(3)] == [SPI] * 3
        g.vm.irq_line(spi_line(SPI), False)
        assert g.next(NOT_COMING) is None


def test_an_edge_is_no_reason_to_resample(eventfds: list[int]) -> None:
    trigger, told = eventfds[:2]
    with guest() as g:
        g.vm.irqfd(trigger, SPI - 32, resample=told)
        os.eventfd_write(trigger, 1)
        assert g.next() == SPI
        assert g.next(NOT_COMING) is None and not signalled(told, 0)


def test_lines_of_a_gic(eventfds: list[int]) -> None:
    with guest(level=True) as g:
        g.vm.irq_line(spi_line(SPI), True)
        assert (g.next(), g.next()) == (SPI, SPI)
        g.vm.irq_line(spi_line(SPI), False)
        g.vm.irq_line(spi_line(SPI + 1), True)
        assert g.next() == SPI + 1
        g.vm.irq_line(spi_line(SPI + 1), False)
        g.vm.irq_line(ppi_line(20, 0), True)  # not enabled
        assert g.next(NOT_COMING) is None


@pytest.mark.parametrize("fiq", [False, True])
def test_the_inputs_of_a_vcpu_without_a_gic(fiq: bool) -> None:
    with bench() as b:
        for number, offset in ((1, 0), (2, FIQ)):
            b.ram.write(HANDLER - RAM + offset, flat(f"mov w0, #{number}\n str w0, [x1]\n eret"))
        b.load(START.replace("msr s3", "// s3"), x1=DEVICE)
        threading.Timer(0.02, b.vm.irq_line, (cpu_line(0, fiq=fiq), True)).start()
        for _ in range(3):
            exit = b.vcpu.run_once()
            assert isinstance(exit, Mmio) and exit.value == 1 + fiq
        b.vm.irq_line(cpu_line(0, fiq=fiq), False)
        threading.Timer(NOT_COMING, b.vcpu.kick).start()
        assert isinstance(b.vcpu.run_once(), Interrupted)
        # KVM_ARM_VCPU_INIT takes the lines down too.
        b.vm.irq_line(cpu_line(0, fiq=fiq), True)
        b.vcpu.init()
        b.load(START.replace("msr s3", "// s3"), x1=DEVICE)
        threading.Timer(NOT_COMING, b.vcpu.kick).start()
        assert isinstance(b.vcpu.run_once(), Interrupted)


# ---- what is held


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kvm2-irqfd"]


def gone(seconds: float = WAIT_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while watchers() and time.monotonic() < deadline:
        time.sleep(0.005)
    return not watchers()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def initialised(kvm: Any) -> tuple[Any, Any]:
    vm = kvm.create_vm()
    gic = vm.create_device("vgic-v3")
    gic.set_device_attr(GRP_CTRL, 0)
    return vm, gic


@pytest.mark.parametrize("how", ["close", "forget", "deassign"])
def test_nothing_is_left(how: str, eventfds: list[int]) -> None:
    gc.collect()
    assert gone()
    before = descriptors()
    with kvm2.open("max-4k-6.12") as kvm:
        for _ in range(5):
            vm, gic = initialised(kvm)
            vm.irqfd(eventfds[0], 1, resample=eventfds[1])
            vm.irqfd(eventfds[2], 1)
            vm.ioeventfd(eventfds[3], DEVICE, 4)
            vm.ioeventfd(eventfds[3], DEVICE, 4, port=True)
            with pytest.raises(kvm2.KvmError):
                vm.irqfd(eventfds[0], 2, resample=eventfds[1])
            with pytest.raises(kvm2.KvmError):
                vm.irqfd(eventfds[1], 2, resample=999)
            with pytest.raises(kvm2.KvmError):
                vm.ioeventfd(eventfds[0], DEVICE, 0)
            assert len(watchers()) == 1
            if how == "deassign":
                for fd in eventfds[:3]:
                    vm.deassign_irqfd(fd, 1)
                vm.deassign_ioeventfd(eventfds[3], DEVICE, 4)
            if how != "forget":
                gic.close()
                vm.close()
        del vm, gic
    gc.collect()
    assert gone() and descriptors() == before


def test_closing_the_vm_ends_its_irqfds_while_a_vcpu_keeps_it_alive(eventfds: list[int]) -> None:
    with guest() as g:
        g.vm.irqfd(eventfds[0], SPI - 32)
        g.vm.close()
        assert gone()
        os.eventfd_write(eventfds[0], 1)
        assert g.next(NOT_COMING) is None


def test_several_vms_and_one_thread(eventfds: list[int]) -> None:
    with guest() as first, guest() as second:
        first.vm.irqfd(eventfds[0], SPI - 32)
        second.vm.irqfd(eventfds[1], SPI - 31)
        assert len(watchers()) == 1
        os.eventfd_write(eventfds[1], 1)
        assert second.next() == SPI + 1
        os.eventfd_write(eventfds[0], 1)
        assert (first.next(), second.next(NOT_COMING)) == (SPI, None)


def test_a_forked_child_leaves_its_parents_irqfds_alone(eventfds: list[int]) -> None:
    with guest() as g:
        g.vm.irqfd(eventfds[0], SPI - 32)
        child = os.fork()
        if not child:
            code = 1
            try:
                try:
                    g.vm.deassign_irqfd(eventfds[0], SPI - 32)
                except kvm2.KvmError as error:
                    code = 0 if error.name == "EIO" else 2
                g.vm.close()
                with kvm2.open("max-4k-6.12") as kvm:  # and has its own
                    vm, _gic = initialised(kvm)
                    vm.irqfd(eventfds[1], 1)
                    vm.close()
            except BaseException:
                code = 3
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.eventfd_write(eventfds[0], 1)
        assert g.next() == SPI
