"""Guests of a few bytes on the real /dev/kvm of an x86-64 machine: exits, registers, kicks, signals, leaks."""

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import kvm2
from kvm2.abi import structs_x86 as x
from kvm2.abi.structs_x86_vm import IoapicState, PicState

from .x86 import CODE_AT, HLT, OUT, SPIN, cycles, holdings, vcpu

MSRS = {0xC0000102: 0x1234_5678, 0x174: 8, 0x175: 0x7000, 0x176: 0x1000, 0xC0000081: 0x23001000000000}


def test_port_out_halt_and_on_again(real_x86):
    with vcpu(real_x86, OUT + HLT + OUT, rax=0x41) as running:
        exit = running.run_once()
        assert repr(exit) == "Io(port=0x10, size=1, write, data=41)" and exit.value == 0x41
        assert isinstance(running.run_once(), kvm2.Hlt) and running.regs.rip == CODE_AT + 3
        assert isinstance(running.run_once(), kvm2.Io)


@pytest.mark.parametrize(
    ("code", "size", "reply", "rax"),
    [("ec", 1, 0x5A, 0x5A), ("ed", 2, 0xBEEF, 0xBEEF), ("66ed", 4, b"\x01\x02\x03\x04", 0x04030201)],
)
def test_port_in_gets_the_reply(real_x86, code, size, reply, rax):
    with vcpu(real_x86, bytes.fromhex(code) + HLT, rdx=0xABCD) as running:
        exit = running.run_once()
        assert (exit.port, exit.size, exit.is_write, exit.count) == (0xABCD, size, False, 1)
        exit.reply(reply)
        assert isinstance(running.run_once(), kvm2.Hlt) and running.regs.rax == rax


def test_string_output_comes_as_one_exit_or_as_many_with_every_byte(real_x86):
    text = b"sixteen bytes..."
    with vcpu(real_x86, bytes.fromhex("f36e") + HLT, rdx=0x3F8, rsi=0x2000, rcx=len(text)) as running:
        running.vm.write(0x2000, text)
        found, count = b"", 0
        for exit in running.run():
            if not isinstance(exit, kvm2.Io):
                break
            found, count = found + exit.data, count + exit.count
        assert found == text and count == len(text) and isinstance(exit, kvm2.Hlt)


def test_string_input_takes_a_reply_of_every_byte(real_x86):
    with vcpu(real_x86, bytes.fromhex("f36c") + HLT, rdx=0x60, rdi=0x2000, rcx=8) as running:
        given = iter(b"abcdefgh")
        for exit in running.run():
            if not isinstance(exit, kvm2.Io):
                break
            exit.reply(bytes(next(given) for _ in range(exit.size * exit.count)))
        assert running.vm.read(0x2000, 9) == b"abcdefgh\0"


def test_mmio_write_and_read_with_reply(real_x86):
    code = bytes.fromhex("66a10080 66a30480 f4 f4")  # mov 0x8000, %eax; mov %eax, 0x8004; hlt
    with real_x86.create_vm() as vm:
        vm.map(0, 0x8000).write(CODE_AT, code)
        running = vm.create_vcpu()
        cs = running.regs.cs
        running.regs.update(cs=type(cs)(0, 0xFFFF, 0, cs.type, 1, s=1), rip=CODE_AT, rflags=2)
        read = running.run_once()
        assert (read.address, read.size, read.is_write) == (0x8000, 4, False)
        read.reply(0xDEADBEEF)
        write = running.run_once()
        assert (write.address, write.is_write, write.value) == (0x8004, True, 0xDEADBEEF)
        assert isinstance(running.run_once(), kvm2.Hlt) and running.regs.rax == 0xDEADBEEF


def test_a_triple_fault_ends_the_iteration(real_x86):
    with vcpu(real_x86, bytes.fromhex("0f0b")) as running:  # ud2, in protected mode without an IDT
        code = x.Segment(0, 0xFFFFFFFF, 8, 11, 1, db=1, s=1, g=1)
        data = x.Segment(0, 0xFFFFFFFF, 16, 3, 1, db=1, s=1, g=1)
        running.regs.update(cs=code, ss=data, ds=data, es=data, fs=data, gs=data, idt=x.Dtable(0, 0), cr0=0x11)
        exits = list(running.run())
        assert [type(exit) for exit in exits] == [kvm2.Shutdown] and exits[0].ends


def test_an_interrupt_is_taken_when_the_window_opens(real_x86):
    # sti; nop; jmp back; at 0x2000 the handler of vector 0x21: out %al, $0x21; iret
    with vcpu(real_x86, bytes.fromhex("fb 90 ebfd"), rsp=0x8000, rax=7) as running:
        running.vm.write(0x2000, bytes.fromhex("e621cf"))
        running.vm.write(0x21 * 4, bytes.fromhex("00200000"))
        running.request_irq_window()
        assert isinstance(running.run_once(), kvm2.IrqWindowOpen) and running.ready_for_interrupt
        running.request_irq_window(False)
        running.interrupt(0x21)
        exit = running.run_once()
        assert (exit.port, exit.value) == (0x21, 7)


def test_every_group_of_registers_comes_back_as_it_was_set(real_x86):
    rng = random.Random(3)
    word = lambda: rng.getrandbits(63)  # noqa: E731
    with vcpu(real_x86, HLT) as running:
        running.set_cpuid(real_x86.supported_cpuid())
        names = [field.name for field in x.Regs.LAYOUT.fields if field.name != "rflags"]
        regs = x.Regs(**{name: word() for name in names}, rflags=2)
        running.set_regs(regs)
        assert running.get_regs() == regs
        running.regs.update(
            cr2=word(), cr8=5, es=x.Segment(0x1230, 0xFFFF, 0x123, 3, 1, s=1), gdt=x.Dtable(0x100, 0x27)
        )
        sregs = running.get_sregs()
        assert (sregs.cr8, sregs.es.base, sregs.gdt.limit) == (5, 0x1230, 0x27)
        running.set_sregs(sregs)
        assert running.get_sregs() == sregs
        if real_x86.check_extension("SREGS2"):
            running.set_sregs2(running.get_sregs2())
            assert running.get_sregs2().cr2 == sregs.cr2
        xmm = bytes(rng.randrange(256) for _ in range(256))
        running.set_fpu(x.Fpu(fcw=0x37F, xmm=xmm, mxcsr=0x1F80))
        assert running.get_fpu().xmm == xmm and running.regs.xmm1 == int.from_bytes(xmm[16:32], "little")
        area = bytearray(running.get_xsave())
        area[160:416], area[512] = bytes(reversed(xmm)), 3  # the XMM registers; XSTATE_BV: x87 and SSE are not initial
        running.set_xsave(bytes(area))
        assert running.get_xsave() == area and running.get_fpu().xmm == bytes(reversed(xmm))
        with pytest.raises(kvm2.UsageError, match=f"this VM's has {len(area)}"):
            running.set_xsave(bytes(area[:-1]))
        running.set_debugregs(x.Debugregs((1, 2, 3, 4), dr6=0xFFFF0FF0, dr7=0x400))
        assert (running.regs.dr2, running.regs.dr7) == (3, 0x400)
        running.set_xcrs(running.get_xcrs())
        assert running.get_xcrs().xcrs[0].value & 1
        running.set_msrs(MSRS)
        assert {entry.index: entry.data for entry in running.get_msrs(MSRS)} == MSRS
        events = running.get_events()
        running.nmi()
        running.set_events(events)
        assert running.get_events() == events
        running.set_mp_state(0)
        assert running.get_mp_state() == 0 and running.get_tsc_khz() > 0
        found = running.translate(0x1234)
        assert (found.physical_address, found.valid) == (0x1234, 1)


def test_cpuid_and_msr_lists(real_x86):
    leaves = real_x86.supported_cpuid()
    assert {0, 1, 0x80000000} <= {leaf.function for leaf in leaves}
    with vcpu(real_x86, bytes.fromhex("0fa2") + HLT, rax=0) as running:  # cpuid
        running.set_cpuid(leaves)
        # Leaves of features that the process has no permission for (AMX) may be missing.
        seen = {(leaf.function, leaf.index) for leaf in running.get_cpuid()}
        assert seen <= {(leaf.function, leaf.index) for leaf in leaves} and {(0, 0), (1, 0), (0x80000008, 0)} <= seen
        running.run_once()
        first = next(leaf for leaf in leaves if leaf.function == 0)
        assert (running.regs.rax, running.regs.rbx) == (first.eax, first.ebx)
        with pytest.raises(kvm2.KvmError):
            running.set_cpuid(leaves * 9)
        indices = real_x86.msr_index_list()
        assert 0x10 in indices and len(set(indices)) == len(indices)
    features = real_x86.msr_feature_index_list()
    assert [entry.index for entry in real_x86.get_msrs(features)] == list(features)
    with pytest.raises(kvm2.KvmError, match="MSR 0x12345678, number 1 of 1"):
        real_x86.get_msrs([0x12345678])


def test_chips_timer_clock_and_local_apic(real_x86):
    with real_x86.create_vm() as vm:
        vm.set_identity_map_addr(0xFEFFC000)
        vm.set_tss_addr(0xFEFFD000)
        vm.create_irqchip()
        vm.create_pit(speaker=True)
        running = vm.create_vcpu()
        for chip, kind in (("pic-master", PicState), ("pic-slave", PicState), ("ioapic", IoapicState)):
            state = vm.get_irqchip(chip)
            changed = bytearray(state.chip)
            field = kind.LAYOUT.at("imr" if kind is PicState else "ioregsel")
            changed[field.offset] = 0x11
            vm.set_irqchip(type(state)(state.chip_id, chip=bytes(changed)))
            assert getattr(kind.unpack(vm.get_irqchip(chip).chip), field.name) == 0x11
        vm.irq_line(4, True)
        vm.irq_line(4, False)
        pit = vm.get_pit()
        vm.set_pit(pit)
        assert vm.get_pit().channels[2].mode == pit.channels[2].mode
        vm.set_pit_reinject(False)
        clock = vm.get_clock()
        vm.set_clock(type(clock)(clock=1 << 50))
        assert 0 <= vm.get_clock().clock - (1 << 50) < 1 << 40
        lapic = running.get_lapic()
        registers = bytearray(lapic.regs)
        registers[0x80] = 0x20  # the task priority register
        running.set_lapic(type(lapic)(bytes(registers)))
        assert running.get_lapic().regs[0x80] == 0x20
        with pytest.raises(kvm2.UsageError, match="did you mean"):
            vm.get_irqchip("pic-mister")
        with pytest.raises(kvm2.KvmError):
            vm.get_irqchip(7)


def test_a_single_step_is_a_debug_exit(real_x86):
    with vcpu(real_x86, bytes.fromhex("90 90") + HLT) as running:
        running.set_guest_debug(x.GuestDebug(1 | 2))  # KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP
        exit = running.run_once()
        assert isinstance(exit, kvm2.DebugException) and (exit.exception, exit.pc) == (1, CODE_AT + 1)


def test_a_kick_from_another_thread(real_x86):
    with vcpu(real_x86, SPIN) as running:
        for _ in range(20):
            timer = threading.Timer(0.01, running.kick)
            timer.start()
            assert isinstance(running.run_once(), kvm2.Interrupted)
            timer.join()
        running.kick()  # before a run it ends that run
        assert isinstance(running.run_once(), kvm2.Interrupted)


def test_no_kick_is_lost(real_x86):
    with vcpu(real_x86, OUT + bytes.fromhex("fec0 ebfa"), rax=0) as running:  # out; inc %al; back
        stop = threading.Event()

        def kicker():
            while not stop.is_set():
                running.kick()
                time.sleep(0.0002)

        thread = threading.Thread(target=kicker)
        thread.start()
        interrupted, value = 0, 0
        end = time.monotonic() + 60  # a busy machine kicks less often, not never
        while min(interrupted, value) <= 50 and time.monotonic() < end:
            exit = running.run_once()
            if isinstance(exit, kvm2.Interrupted):
                interrupted += 1
            else:
                assert exit.value == value & 0xFF
                value += 1
        stop.set()
        thread.join()
        assert interrupted > 50 and value > 50


def test_a_vcpu_may_be_run_by_one_thread_after_the_other_and_each_is_kicked(real_x86):
    """Threads' numbers are used again by the system: the kick must go to who is inside now."""
    with vcpu(real_x86, SPIN) as running:
        for _ in range(30):
            found = []
            thread = threading.Thread(target=lambda found=found: found.append(running.run_once()))
            thread.start()
            time.sleep(0.002)
            running.kick()
            thread.join(5)
            assert not thread.is_alive() and isinstance(found[0], kvm2.Interrupted)


def test_a_signal_gets_a_run_in_the_main_thread_back(real_x86):
    def interrupt(*_):
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with vcpu(real_x86, SPIN) as running:
            for _ in range(10):
                with pytest.raises(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, 0.005)
                    while True:
                        assert isinstance(running.run_once(), kvm2.Interrupted)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("code", [SPIN, OUT + bytes.fromhex("ebfc")], ids=["inside", "exits"])
def test_ctrl_c_of_the_command(real_x86, tmp_path, code):
    guest = tmp_path / "guest.bin"
    guest.write_bytes(bytes.fromhex("b00a baf803 ee") + code)  # a new line on the console, which says that it runs
    command = [sys.executable, "-m", "kvm2", "run", str(guest), "--host", "/dev/kvm"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None and process.stdout.readline() == "\n"
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 130 and "interrupted" in output and "Traceback" not in output, output


def test_close_gets_a_run_in_another_thread_back(real_x86):
    running = vcpu(real_x86, SPIN)
    found = []

    def run():
        try:
            found.extend(running.run())
        except kvm2.KvmError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.05)
    running.close()
    thread.join(5)
    assert not thread.is_alive() and isinstance(found[-1], kvm2.KvmError) and found[-1].errno == errno.EBADF
    with pytest.raises(kvm2.KvmError, match="this Vcpu is closed"):
        running.run_once()


def test_a_closed_vcpu_does_not_run_whoever_got_its_number(real_x86):
    """The system gives a descriptor's number to the next: an iterator that was left half-way must not use it."""
    with vcpu(real_x86, OUT + OUT + HLT) as old:
        half_way = old.run()
        next(half_way)
        number = old.fd
        old.close()
        with vcpu(real_x86, OUT + HLT, rax=1) as new:
            while new.fd != number and new.fd < number + 20:
                new = vcpu(real_x86, OUT + HLT, rax=1)
            rip = new.regs.rip
            with pytest.raises(kvm2.KvmError, match="EBADF"):
                next(half_way)
            assert new.regs.rip == rip


@pytest.mark.parametrize("order", ["kvc", "kcv", "vkc", "vck", "ckv", "cvk"])
def test_closing_in_any_order(order):
    if not os.access("/dev/kvm", os.R_OK | os.W_OK) or os.uname().machine != "x86_64":
        pytest.skip("needs an x86-64 /dev/kvm")
    kvm = kvm2.open("/dev/kvm")
    running = vcpu(kvm, OUT + HLT)
    handles = {"k": kvm, "v": running.vm, "c": running}
    ram = running.vm.rams[0]
    for letter in order:
        if not running.closed:
            assert isinstance(running.run_once(), kvm2.Io | kvm2.Hlt)
        handles[letter].close()
        handles[letter].close()
    assert bytes(running._area[:64]) == bytes(64) and ram.read(CODE_AT, 3) == OUT + HLT


def _leak(real_x86, count):
    cycles(real_x86, 20)  # what is made once
    gc.collect()
    before = holdings()
    cycles(real_x86, count)
    gc.collect()
    descriptors, mappings = holdings()
    assert descriptors == before[0]
    assert mappings <= before[1] + 8  # the allocator's own


def test_nothing_is_left_after_200_cycles(real_x86):
    _leak(real_x86, 200)


@pytest.mark.slow
def test_nothing_is_left_after_10000_cycles(real_x86):
    _leak(real_x86, 10_000)


def test_the_example_of_the_documentation(real_x86, capsys):
    """docs/python.md cannot run it everywhere, so it is a block that test_docs.py leaves alone."""
    text = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    example = text.partition("```py\n")[2].partition("```")[0]
    exec(compile(example, "docs/python.md", "exec"), {})
    assert capsys.readouterr().out == "0x10 b'B'\n"
