"""The gdb stub, with gdb-multiarch in batch mode, and its packets by hand."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import kvm2
from kvm2.board import gdb
from kvm2.board.gdb_wire import escaped, framed, unescaped
from kvm2.board.loader import read_image
from kvm2.board.machine import Machine
from kvm2.errors import EnvironmentFault, UsageError
from kvm2.spec import MemoryRange, VmSpec

from .rig import RAM, RAM_SIZE, Ran, build

GDB = "gdb-multiarch"


@contextmanager
def served(rounds=2, cpus=1, high=False, host="neoverse-n1-4k", where=0, **spec):
    """A machine that runs guests/gdb.c in a thread, and its stub; at the end the guest has ended by itself."""
    options = (f"-DROUNDS={rounds}", f"-DSECOND={int(cpus > 1)}", "-g", "-fno-inline", *(["-DHIGH"] if high else []))
    image = build("gdb", RAM, *options)
    with (
        kvm2.open(host) as kvm,
        Machine(kvm, VmSpec(memory=(MemoryRange(RAM, RAM_SIZE),), **spec), cpus=cpus) as machine,
    ):
        machine.load(read_image(image, machine.memory))
        with gdb.serve(machine, where) as server:
            machine.results = []
            thread = threading.Thread(target=lambda: machine.results.append(machine.run(timeout=60)))
            thread.start()
            yield machine, server, image
            thread.join(70)
            assert not thread.is_alive()


def run_gdb(server, image, *commands):
    """What gdb prints for commands after it has connected; skipped where there is no gdb."""
    if not shutil.which(GDB):
        pytest.skip(f"needs {GDB} (Debian and Ubuntu: apt-get install {GDB})")
    settings = ("confirm off", "pagination off", "width 0", "print entry-values no")
    words = [*(f"set {setting}" for setting in settings), f"target remote {server.address}", *commands]
    arguments = [part for word in words for part in ("-ex", word)]
    command = [GDB, "-nx", "-batch", *arguments, str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


def test_break_continue_step_registers_memory():
    with served() as (machine, server, image):
        out = run_gdb(
            server,
            image,
            "print/x $pc",
            "break square",
            "continue",
            "print n",
            "print $x0",
            "backtrace",
            "continue",
            "print n",
            "stepi",
            "stepi",
            "print other",
            "finish",
            "set var rounds = 1",
            "print $cpsr",
            "print/x $sctlr_el1",
            "print $v0.q.u",
            "set $v1.d.u[0] = 0x1234",
            "print/x $v1.q.u[0]",
            "x/2xw $pc",
            "info breakpoints",
            "delete",
            "detach",
        )
    assert "_start () at" in out and f"$1 = {RAM:#x}"[:-4] in out
    assert "Breakpoint 1, square (n=1)" in out and "$2 = 1\n" in out and "$3 = 1\n" in out
    assert "#1 " in out and "add_up (count=4)" in out and "in main" in out
    assert "Breakpoint 1, square (n=2)" in out and "$4 = 2\n" in out
    assert "Value returned is" in out and "= 4\n" in out
    assert "EL=1" in out and "0x1234" in out and "breakpoint already hit 2 times" in out
    assert machine.results[0].ended == "shutdown", machine.results
    assert Ran(machine, machine.results[0], RAM).out() == [30]  # `rounds` was 1 when it went on


def test_memory_shows_no_breakpoints_and_writes_stay_under_them():
    with served(rounds=1) as (machine, server, image):
        square = subprocess.run(["nm", str(image)], capture_output=True, text=True).stdout
        at = next(int(line.split()[0], 16) for line in square.splitlines() if line.endswith(" T square"))
        original = machine.vm.read(at, 8)
        with Client(server) as client:
            assert client.ask(f"Z0,{at:x},4") == "OK"
            assert machine.vm.read(at, 4).hex() == "000020d4"
            assert bytes.fromhex(client.ask(f"m{at - 2:x},8")) == machine.vm.read(at - 2, 2) + original[:6]
            assert client.ask(f"M{at:x},2:{original[:2].hex()}") == "OK"
            assert machine.vm.read(at, 4).hex() == "000020d4"
            reply = client.ask("c")
            assert reply.startswith("T05swbreak:;20:" + at.to_bytes(8, "little").hex())
            assert client.ask(f"z0,{at:x},4") == "OK"
            assert machine.vm.read(at, 8) == original
            assert client.ask("c") == "W00"


@pytest.mark.parametrize("high", [False, True])
def test_watchpoints_and_hardware_breakpoints(high):
    with served(rounds=1, high=high) as (machine, server, image):
        out = run_gdb(
            server,
            image,
            "hbreak add_up",
            "continue",
            "delete",
            "watch watched",
            "continue",
            "continue",
            "rwatch other",
            "delete 2",
            "detach",
        )
    assert "Breakpoint 1, add_up (count=4)" in out
    assert "Hardware watchpoint 2: watched" in out
    assert "Old value = 0\nNew value = 1" in out and "Old value = 1\nNew value = 4" in out
    assert machine.results[0].ended == "shutdown"


def test_virtual_addresses_go_through_the_guests_tables():
    with served(rounds=1, high=True) as (machine, server, image):
        high = (1 << 64) - (1 << 39) + RAM
        out = run_gdb(
            server,
            image,
            "break square",
            "continue",
            "print $sctlr_el1 & 1",
            f"print/x *(unsigned int *){high:#x} == *(unsigned int *){RAM:#x}",
            f"monitor translate {high:#x}",
            "monitor translate 0x12345678000",
            "print *(int *)0x12345678000",
            "detach",
        )
    assert "Breakpoint 1, square (n=1)" in out and "$1 = 1" in out and "$2 = 0x1" in out
    assert f"{high:#x} is at guest physical address {RAM:#x}" in out
    assert "0x12345678000 is not mapped" in out and "Cannot access memory at address 0x12345678000" in out
    assert machine.results[0].ended == "shutdown"


def test_vcpus_are_threads_that_stop_together():
    with served(rounds=1, cpus=2) as (machine, server, image):
        out = run_gdb(
            server,
            image,
            "monitor vcpus",
            "break square",
            "continue",
            "info threads",
            "thread 2",
            "print second > 0",
            "stepi",
            "stepi",
            "backtrace 1",
            "monitor host",
            "monitor exits",
            "thread 1",
            "set scheduler-locking on",
            "next",
            "print $_thread",
            "set scheduler-locking off",
            "delete",
            "kill",
        )
    assert "vCPU 1: powered off, EL1" in out and "Breakpoint 1, square (n=1)" in out
    assert "vCPU 0: on, EL1" in out and "vCPU 1: on, EL1" in out
    assert "spin ()" in out and "$1 = 1" in out and "$2 = 1" in out
    assert "host neoverse-n1-4k" in out and "debug" in out
    assert machine.results[0].ended == "interrupted" and "gdb" in machine.results[0].reason


def test_interrupt_and_detach_leave_the_guest_as_it_was():
    with served(rounds=1 << 30) as (machine, server, _image):
        with Client(server) as client:
            client.send("c")
            for _ in range(3):
                client.socket.sendall(b"\x03")
                assert client.receive().startswith("T02")
                counter = client.ask("p20")
                assert client.ask("p20") == counter
                client.send("vCont;c")
            client.socket.sendall(b"\x03")
            client.receive()
        # gdb went without a word: the guest goes on, and another one may come.
        with Client(server) as client:
            assert client.ask("?").startswith("T05")
            assert client.ask("D") == "OK"
        machine.finish("timeout", "the test is over", 0)


class Client:
    """The protocol by hand."""

    def __init__(self, server):
        host, port = server.address.split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)
        self.data = b""

    def __enter__(self):
        assert "swbreak+" in self.ask("qSupported:swbreak+")
        return self

    def __exit__(self, *exc):
        self.socket.close()

    def send(self, text):
        self.socket.sendall(framed(text.encode("latin-1")))

    def receive(self):
        while True:
            start, end = self.data.find(b"$"), self.data.find(b"#")
            if 0 <= start < end and len(self.data) >= end + 3:
                body, self.data = self.data[start + 1 : end], self.data[end + 3 :]
                self.socket.sendall(b"+")
                return unescaped(body).decode("latin-1")
            more = self.socket.recv(1 << 16)
            assert more, "the stub closed the connection"
            self.data += more

    def ask(self, text):
        self.send(text)
        return self.receive()


def test_packets_that_make_no_sense_are_refused():
    with served(rounds=1) as (_, server, _image), Client(server) as client:
        for packet in (
            "pffff",
            "P0=00",
            "M40000000,4:00",
            "Z0,40000000,2",
            "Z2,40000000",
            "Z7,0,4",
            "mzz,1",
            "vCont;x",
        ):
            assert client.ask(packet) == "E16", packet
        assert client.ask("Tff") == "E03" and client.ask("Hg77") == "E03"
        assert client.ask("m1000,4") == client.ask("M1000,1:00") == client.ask("Z0,1000,4") == "E0e"
        for packet in ("qFoo", "vFoo", "!", "QFoo"):
            assert client.ask(packet) == ""
        assert client.ask("Z1,1000,4") == "OK" and client.ask("z1,1000,4") == "OK"
        for n in range(6):
            assert client.ask(f"Z1,{n * 16:x},4") == "OK"
        assert client.ask("Z1,1000,4") == "E1c"
        # A wrong checksum is asked for again.
        client.socket.sendall(b"$?#00")
        assert client.socket.recv(1) in (b"+", b"-")
        assert client.ask("?").startswith("T05")
        client.send("k")


def test_with_sve_the_v_registers_are_the_low_ends_of_the_z_registers():
    with served(rounds=1, host="graviton3", sve="vcpu") as (machine, server, _image), Client(server) as client:
        machine.vcpus[0].set_reg("z1", bytes(range(256))[:32] + bytes(224))
        assert client.ask("p23") == bytes(range(16)).hex()
        assert client.ask("P23=" + "ab" * 16) == "OK"
        assert machine.vcpus[0].get_reg("z1")[:32] == b"\xab" * 16 + bytes(range(16, 32))
        client.send("k")


def test_escapes():
    assert unescaped(escaped(bytes(range(256)))) == bytes(range(256))
    assert framed(b"") == b"$#00"


def test_where_nobody_can_listen(tmp_path):
    with kvm2.open("neoverse-n1-4k") as kvm, Machine(kvm, VmSpec(memory=(MemoryRange(RAM, 1 << 20),))) as machine:
        with pytest.raises(EnvironmentFault, match="70000"):
            gdb.serve(machine, 70000)
        taken = tmp_path / "socket"
        taken.touch()
        with pytest.raises(EnvironmentFault, match="is there already"):
            gdb.serve(machine, f"unix:{taken}")
        with gdb.serve(machine, f"unix:{tmp_path}/gdb") as server:
            assert server.address == f"{tmp_path}/gdb"
        assert not (tmp_path / "gdb").exists() and machine.debugger is None
        machine.kvm = SimpleNamespace(arch="x86_64")
        with pytest.raises(UsageError, match="arm64"):
            gdb.serve(machine, 0)
