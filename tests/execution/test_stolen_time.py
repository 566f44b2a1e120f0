"""Stolen time: two vCPUs that both want to run take time from each other, and the guest reads how much."""

from __future__ import annotations

import struct
import threading
import time

from kvm2.exits import Interrupted
from kvm2.softkvm.vcpu_attrs import PVTIME_GROUP, PVTIME_IPA

from .rig import RAM, bench

AT = RAM + 0x40000


def stolen(b) -> tuple[int, int, int]:
    revision, attributes, nanoseconds = struct.unpack("<IIQ", b.ram.read(AT - RAM, 16))
    return revision, attributes, nanoseconds


def test_time_that_another_vcpu_took_is_counted():
    with bench() as b:
        other = b.vm.create_vcpu(1)
        other.init()
        b.vcpus.append(other)
        b.ram.write(AT - RAM, b"\xff" * 64)
        b.vcpu.set_device_attr(PVTIME_GROUP, PVTIME_IPA, struct.pack("<Q", AT))
        b.load(
            """
            movz w0, #0xc500, lsl #16
            movk w0, #0x21              // PV_TIME_ST
            hvc #0
            mov x9, x0
            1: b 1b
            """
        )
        b.load("2: b 2b", 0x1000, vcpu=other)
        threads = [threading.Thread(target=vcpu.run_once) for vcpu in b.vcpus]
        began = time.monotonic_ns()
        for thread in threads:
            thread.start()
        while not 20_000_000 <= stolen(b)[2] < 1 << 62 and time.monotonic_ns() - began < 20e9:
            time.sleep(0.01)
        passed = time.monotonic_ns() - began
        for vcpu, thread in zip(b.vcpus, threads, strict=True):
            while thread.is_alive():
                vcpu.kick()
                thread.join(0.05)
        revision, attributes, nanoseconds = stolen(b)
        assert b.vcpu.regs.x[9] == AT
        assert (revision, attributes) == (0, 0), "the structure was zeroed"
        assert 20_000_000 <= nanoseconds < passed
        assert b.ram.read(AT - RAM + 16, 48) == bytes(48)


def test_a_vcpu_alone_loses_next_to_nothing():
    with bench() as b:
        b.vcpu.set_device_attr(PVTIME_GROUP, PVTIME_IPA, struct.pack("<Q", AT))
        b.load("movz w0, #0xc500, lsl #16\n movk w0, #0x21\n hvc #0\n wfi")
        timer = threading.Timer(0.2, b.vcpu.kick)
        timer.start()
        assert isinstance(b.vcpu.run_once(), Interrupted)
        timer.join()
        assert stolen(b)[2] < 100_000_000, "waiting in WFI is not stolen"
