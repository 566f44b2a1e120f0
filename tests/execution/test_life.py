"""Life and death: threads, forks, closing in every order, and memory that comes back."""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import os
import threading
import time
import traceback

import pytest

import kvm2
from kvm2.abi import ioctls
from kvm2.errors import KvmError
from kvm2.exits import Interrupted, SystemEvent
from kvm2.hosts.soft import open_soft
from kvm2.kvm import Kvm

from .rig import RAM, Bench, bench, flat

OFF = "\n mov w0, #8\n movk w0, #0x8400, lsl #16\n hvc #0"
COUNT = f"mov x9, #0\n1: add x9, x9, #1\n str x9, [x1, x9, lsl #3]\n cmp x9, #100\n b.ne 1b{OFF}"
SPIN = "1: add x9, x9, #1\n str x9, [x1]\n b 1b"


def refused(number, call, *arguments):
    with pytest.raises(KvmError) as error:
        call(*arguments)
    assert error.value.errno == number, error.value


def test_many_threads_on_one_kvm():
    """VMs made, run and closed at once, by threads that share the descriptor of /dev/kvm."""
    code, failures = flat(COUNT), []
    with kvm2.open("neoverse-n1-4k") as kvm:

        def work(seed):
            try:
                for number in range(6):
                    with kvm.create_vm2() as vm:
                        ram = vm.map(RAM, 1 << 20)
                        ram.write(0, code)
                        vcpu = vm.create_vcpu()
                        vcpu.init()
                        vcpu.regs.pc, vcpu.regs.x1 = RAM, RAM + 0x8000
                        assert isinstance(vcpu.run_once(), SystemEvent)
                        assert ram[0x8000 + 800] == 100
                        if (seed + number) % 2:
                            vcpu.close()
            except BaseException:
                failures.append(traceback.format_exc())

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]


def test_many_vcpus_and_slot_changes_at_once():
    """vCPUs that switch each other on while slots come and go: no deadlock, and each call has its answer."""
    text = """
    1:  mov w0, #0x0003         // CPU_ON of vCPU 1
        movk w0, #0xc400, lsl #16
        mov x1, #1
        adr x2, 2f
        hvc #0
        ic ivau, x12
        ldr x9, [x10]
        add x9, x9, #1
        str x9, [x10]
        b 1b
        .balign 1024
    2:  mov w0, #0x0002         // CPU_OFF
        movk w0, #0x8400, lsl #16
        hvc #0"""
    with bench("cortex-a57-4k") as b:
        second = b.vm.create_vcpu(1)
        second.init(("psci_0_2", "power_off"))
        b.vcpus.append(second)
        b.load(text, x10=RAM + 0x8000, x12=RAM)
        threads = [threading.Thread(target=vcpu.run_once) for vcpu in b.vcpus]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 1.5
        changes = 0
        while time.monotonic() < end:
            b.vm.map(0x5000_0000, 1 << 20).unmap()
            changes += 1
        for vcpu, thread in zip(b.vcpus, threads, strict=True):
            while thread.is_alive():
                vcpu.kick()
                thread.join(0.05)
        assert changes > 20 and b.ram.view[0x8000:0x8008].cast("Q")[0] > 20


@pytest.mark.parametrize("ran", [False, True], ids=["unused", "ran"])
def test_every_order_of_closing(ran):
    """Whatever is still open works as far as it can; what is closed says EBADF."""
    for order in itertools.permutations(("kvm", "vm", "vcpu", "device", "ram")):
        kvm = kvm2.open("max-4k-6.12")
        vm = kvm.create_vm2()
        made = {"kvm": kvm, "vm": vm, "ram": vm.map(RAM, 1 << 20), "vcpu": vm.create_vcpu()}
        made["device"] = vm.create_device("vgic-its")  # an ITS alone does not hinder the vCPU
        made["vcpu"].init()
        made["ram"].write(0, flat(COUNT))
        made["vcpu"].regs.pc, made["vcpu"].regs.x1 = RAM, RAM + 0x8000
        if ran:
            assert isinstance(made["vcpu"].run_once(), SystemEvent)
        ram = made.pop("ram")
        for name in order:
            if name == "ram":
                del ram
                ram = None
                gc.collect(0)
                continue
            handle = made.pop(name)
            handle.close()
            handle.close()
            refused(errno.EBADF, handle.ioctl, ioctls.KVM_CHECK_EXTENSION)
            if "vcpu" in made and ram is not None and not ran and name == "vm":
                assert isinstance(made["vcpu"].run_once(), SystemEvent)
                assert ram[0x8000 + 800] == 100
        assert kvm._backend.fds() == []


def test_descriptors_in_every_order():
    for order in itertools.permutations(range(4)):
        soft = open_soft("cortex-a57-4k")
        kvm = Kvm(soft, "soft")
        vm = kvm.create_vm()
        first, second = vm.create_vcpu(0), vm.create_vcpu(1)
        vm.map(RAM, 1 << 16).write(0, flat(COUNT))
        for vcpu in (first, second):
            vcpu.init()
            vcpu.regs.pc, vcpu.regs.x1 = RAM, RAM + 0x8000
            assert isinstance(vcpu.run_once(), SystemEvent)
            vcpu.set_mp_state(0)
            first.set_mp_state(0)
        handles = [kvm, vm, first, second]
        for at in order:
            soft.close(handles[at].fd)
            refused(errno.EBADF, soft.close, handles[at].fd)
            refused(errno.EBADF, soft.ioctl, handles[at].fd, ioctls.KVM_RUN)
        for handle in handles:
            handle._close.detach()


def test_closing_under_a_running_vcpu():
    """The thread in KVM_RUN goes on with the VM it has; when it is out, everything is freed."""
    for number in range(6):
        kvm = kvm2.open("neoverse-n1-4k")
        vm = kvm.create_vm2()
        made = Bench(kvm, vm, RAM, 1 << 20)
        made.load(SPIN, x1=RAM + 0x8000)
        other = vm.create_vcpu(1)
        other.init()
        other.regs.pc, other.regs.x1 = RAM, RAM + 0x9000
        exits = []

        def run(vcpu, exits=exits):
            try:
                exits.append(vcpu.run_once())
            except KvmError as error:
                exits.append(error)

        threads = [threading.Thread(target=run, args=(vcpu,)) for vcpu in (made.vcpu, other)]
        for thread in threads:
            thread.start()
        time.sleep(0.02 * (number % 3))
        inside = kvm.backend.inspect(vm.fd)
        closing = [kvm.close, vm.close, made.vcpu.close, other.close]
        for close in closing[number % 4 :] + closing[: number % 4]:
            close()
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()
        assert len(exits) == 2 and all(isinstance(e, Interrupted) or e.errno == errno.EBADF for e in exits)
        assert inside.executions == [] and inside._stage2 is None


def test_descriptors_closed_under_a_running_vcpu():
    """As `close(fd)` of another thread: KVM_RUN does not end for that; a kick through its object ends it."""
    soft = open_soft("cortex-a57-4k")
    kvm = Kvm(soft, "soft")
    vm = kvm.create_vm()
    made = Bench(kvm, vm, RAM, 1 << 20)
    made.load(SPIN, x1=RAM + 0x8000)
    thread = threading.Thread(target=made.vcpu.run_once)
    thread.start()
    time.sleep(0.05)
    inside, vcpu_file = soft.inspect(vm.fd), soft._files[made.vcpu.fd]
    for handle in (made.vcpu, vm, kvm):
        handle._close.detach()
        soft.close(handle.fd)
    before = made.ram.read(0x8000, 8)
    time.sleep(0.05)
    assert thread.is_alive() and made.ram.read(0x8000, 8) != before
    assert inside.doomed and inside.executions
    vcpu_file.kick()
    thread.join(5)
    assert not thread.is_alive() and inside.executions == []


def test_fork():
    """A child gets EIO from what its parent made, and makes its own; the parent notices nothing."""
    with bench("max-4k-6.12") as b:
        b.load(COUNT, x1=RAM + 0x8000)
        b.vcpu.kick()
        assert isinstance(b.vcpu.run_once(), Interrupted)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                refused(errno.EIO, b.vcpu.run_once)
                refused(errno.EIO, lambda: b.vcpu.regs.pc)
                refused(errno.EIO, b.vm.create_vcpu, 1)
                refused(errno.EIO, b.vm.map, 0x5000_0000, 1 << 20)
                assert b.kvm.api_version() == 12
                with bench("max-4k-6.12") as own:
                    assert isinstance(own.run(COUNT, x1=RAM + 0x8000), SystemEvent)
                with b.kvm.create_vm2() as vm:
                    made = Bench(b.kvm, vm, RAM, 1 << 20)
                    assert isinstance(made.run(COUNT, x1=RAM + 0x8000), SystemEvent)
                    made.vcpu.close()
                b.vcpu.close()
                b.vm.close()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert isinstance(b.vcpu.run_once(), SystemEvent)
        assert b.ram[0x8000 + 800] == 100


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settled():
    """Resident bytes without what waits for the collector, or lies unused with the C library's allocator."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return resident()


def test_memory_comes_back():
    """300 VMs made, run and dropped, by close or by the collector: the process does not grow."""
    code = flat(COUNT)
    kvm = kvm2.open("cortex-a57-4k")

    def cycle(number):
        vm = kvm.create_vm2()
        ram = vm.map(RAM, 1 << 20)
        ram.write(0, code)
        vcpu = vm.create_vcpu()
        vcpu.init()
        vcpu.regs.pc, vcpu.regs.x1 = RAM, RAM + 0x8000
        assert isinstance(vcpu.run_once(), SystemEvent)
        if number % 2:
            vm.close()
            vcpu.close()

    for number in range(60):
        cycle(number)
    before, files = settled(), len(os.listdir("/proc/self/fd"))
    for number in range(240):
        cycle(number)
    after = settled()
    assert kvm.backend.fds() == [kvm.fd]
    assert len(os.listdir("/proc/self/fd")) <= files
    assert after - before < 240 * 1024, f"{(after - before) / 240:.0f} bytes a VM"
