"""`kvm2 run --kernel` and `kvm2 run linux`: what is refused, and a run with a guest that only echoes.

What a real Linux does of it is in tests/lab/linux.
"""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from kvm2.cli import linux_options, run_linux
from kvm2.cli.main import main
from kvm2.lab.linux import initramfs
from kvm2.lab.packages import FLAVOURS

from .conftest import PAGE_16K, image

HOST = "cortex-a72-4k"
RUN = [sys.executable, "-m", "kvm2", "run", "--host", HOST]
ENOUGH = 60
LOWERED = ["ID_AA64PFR0_EL1.EL0 2 -> 1", "ID_AA64PFR0_EL1.EL1 2 -> 1"]


def refused(capsys, *words):
    code = main(["run", *words])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--initrd", "I"), "--initrd: for Linux only, with --kernel FILE or as `kvm2 run linux`"),
        (("x.elf", "--disk", "d", "--gic", "v2"), "--disk, --gic: for Linux only"),
        (("x.elf", "more"), "more: a COMMAND runs in Linux only, as in `kvm2 run linux -- COMMAND`"),
        (("x.elf", "--kernel", "K"), "x.elf and --kernel K: give one guest"),
        (("linux", "--kernel", "K", "--initrd", "I"), "leave out --kernel and --initrd"),
        (("--kernel", "K", "--flavour", "6.1-4k"), "--flavour is a kernel of `kvm2 run linux`"),
        (("linux", "--top"), "--top: for ELF and flat images"),
        (("linux", "--no-reboot", "--", "true"), "with a COMMAND the guest never boots again"),
        (("linux", "--flavour", "5.10-4k"), "'5.10-4k' is not one of '6.12-4k', '6.12-16k', '6.1-4k'"),
        (("linux", "--gic", "v4"), "'v4' is not one of 'auto', 'v2', 'v3'"),
        (("linux", "--disk", ",ro"), "',ro': allowed are FILE and FILE,ro"),
        (("linux", "--gdb", "99999"), "'99999': allowed are a port up to 65535 (0: any that is free) and unix:PATH"),
        (("--restore", "F", "linux"), "leave GUEST and COMMAND out"),
        (("--restore", "F", "--memory", "1G", "--kernel", "K"), "--kernel, --memory: the snapshot says it"),
        (("--restore", "F", "--cpus", "1"), "--cpus: the snapshot says it"),
        (("--restore", "no-such-file"), "no-such-file"),
        (("--kernel", "K", "--type", "40", "--sve", "256"), "--type is the old KVM_CREATE_VM"),
    ],
)
def test_options_that_do_not_fit(capsys, words, text):
    code, err = refused(capsys, *words)
    assert code == 2 and text in err


def test_guests_that_do_not_boot(capsys, tmp_path, echo_image):
    elf = tmp_path / "x"
    elf.write_bytes(b"\x7fELF\x02\x01" + bytes(58))
    assert refused(capsys, "--host", HOST, "--kernel", str(elf))[0] == 1
    large = tmp_path / "Image16"
    large.write_bytes(image(PAGE_16K))
    code, err = refused(capsys, "--host", HOST, "--kernel", str(large))
    assert code == 1 and "has pages of 16K, which the vCPUs of cortex-a72-4k cannot translate" in err
    assert "ID_AA64MMFR0_EL1.TGran16 is 0x0" in err
    code, err = refused(capsys, "--host", HOST, "--kernel", echo_image, "--memory", "64M@128M")
    assert (code == 2 and "128" in err) or "0x8000000" in err
    code, err = refused(capsys, "--host", HOST, "--kernel", echo_image, "--disk", str(tmp_path / "none"))
    assert code == 2 and "none" in err
    code, err = refused(capsys, "--host", HOST, "--kernel", echo_image, "--net", "wlan0")
    assert code == 2 and "'wlan0': allowed are unix:PATH" in err
    code, err = refused(capsys, "--host", "raspberry-pi-4", "--kernel", echo_image, "--gic", "v3")
    assert code == 3 and "no vGICv3" in err
    code, err = refused(capsys, "--host", "raspberry-pi-4", "--kernel", echo_image, "--cpus", "9")
    assert code == 2 and "--cpus 9: a VM of raspberry-pi-4 has 8 at most" in err
    code, err = refused(capsys, "--host", HOST, "--kernel", echo_image, "--memory", "512")
    assert code == 1 and "memory 0x200@0x40000000: memory_size 0x200 is not a multiple of 0x1000" in err
    words = ("--memory", "64M@1G", "--memory", "64M@1P")
    code, err = refused(capsys, "--host", "max-4k-6.12", "--kernel", echo_image, *words)
    assert code == 2 and "memory 0x4000000@0x4000000000000 ends above 2^48: the emulated core has 48 bits" in err
    code, err = refused(capsys, "--host", "mainline-m1", "--kernel", echo_image)
    assert code == 1 and "on the command line --type 36, or" in err
    code, err = refused(capsys, "--host", HOST, "--kernel", echo_image, "--save", str(tmp_path / "none" / "snap"))
    assert code == 2 and "there is no directory" in err
    code, err = refused(capsys, "--host", "x86-64", "--kernel", echo_image)
    assert code == 1 and "x86-64" in err


def run(*words, given=b"", **options):
    done = subprocess.run(
        [*RUN, *words],
        input=given,
        capture_output=True,
        timeout=ENOUGH,
        env={**os.environ, "COLUMNS": "100"},
        **options,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_piped_input_is_read_as_the_guest_reads_it(echo_image):
    code, out, err = run("--kernel", echo_image, given=b"hello" * 300 + b"q never read")
    assert code == 0 and err.startswith(
        "kvm2: not shown to the guest, as the emulated core does not execute it: EL0, EL1 "
    )
    assert run("--kernel", echo_image, "--id-registers", "profile", given=b"q")[2] == ""
    said, _, summary = out.partition("\n\n")
    assert said == "ready\r\n" + "hello" * 300 + "q"
    assert re.match(rf"ended: shutdown, after [0-9.]+ s\nhost {HOST}, 32 IPA bits, 1 vCPU; ", summary)


class Piped:
    """`kvm2 run` with a pipe that stays open as its input."""

    def __init__(self, *words, **options):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.PIPE, **options}
        self.process = subprocess.Popen([*RUN, *words], **streams)
        self.said = b""

    def wait_for(self, what):
        """What is said up to `what`, which need not be at the end of a line."""
        while what not in self.said:
            new = os.read(self.process.stdout.fileno(), 4096)
            assert new, (self.said, self.process.communicate()[1])
            self.said += new
        before, _, self.said = self.said.partition(what)
        return before

    def type(self, data):
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def interrupt(self):
        """Ctrl-C: the exit code, and what was said on stderr."""
        self.process.send_signal(signal.SIGINT)
        return self.end()

    def end(self):
        _, err = self.process.communicate(timeout=ENOUGH)
        return self.process.returncode, err.decode()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.communicate()


def test_a_reset_boots_again_with_what_was_not_read_lost(echo_image):
    with Piped("--kernel", echo_image) as guest:
        guest.wait_for(b"ready\r\n")
        guest.type(b"arlost")
        assert guest.wait_for(b"ready\r\n") == b"ar"
        guest.type(b"q")
        assert guest.end()[0] == 0
        assert b"lost" not in guest.said
    code, out, _ = run("--kernel", echo_image, "--no-reboot", given=b"r")
    assert code == 0 and "ended: reset" in out and out.count("ready") == 1


def test_what_a_run_was_as_an_object(echo_image, tmp_path):
    tree = tmp_path / "x.dtb"
    code, out, err = run("--kernel", echo_image, "--dtb-out", str(tree), "--json", given=b"aq")
    found = json.loads(out)
    assert (code, err, found["ok"], found["schema"]) == (0, "", True, "kvm2.run/1")
    assert found["ended"] == "shutdown" and found["console"] == "ready\r\naq"
    assert found["linux"] == {"append": "console=ttyAMA0 earlycon", "gic": 3, "boots": 1, "lowered": LOWERED}
    assert found["guest"] == "Image" and found["memory"] == [{"base": 1 << 30, "size": 512 << 20}]
    assert tree.read_bytes()[:4] == b"\xd0\x0d\xfe\xed"


def test_the_end_of_the_input_is_not_the_end_of_the_guest(echo_image):
    with Piped("--kernel", echo_image) as guest:
        guest.type(b"abc")
        guest.process.stdin.close()
        guest.process.stdin = None
        guest.wait_for(b"ready\r\nabc")
        with pytest.raises(subprocess.TimeoutExpired):
            guest.process.wait(0.3)
        code, err = guest.interrupt()
        assert code == 130 and "ended: interrupted: Ctrl-C" in err
    # Without any input descriptor 0 becomes some other file's number: the guest must not read that.
    with Piped("--kernel", echo_image, stdin=None, preexec_fn=lambda: os.close(0)) as guest:
        guest.wait_for(b"ready\r\n")
        time.sleep(0.3)
        assert guest.interrupt()[0] == 130 and guest.said.strip() == b""


def test_memory_anywhere_and_a_gic_by_version(echo_image):
    words = (
        "--kernel",
        echo_image,
        "--memory",
        "64M@1T",
        "--memory",
        "64M@2T",
        "--cpus",
        "2",
        "--append",
        "x=y",
        "--json",
    )
    code, out, _ = run(*words, given=b"q")
    found = json.loads(out)
    assert (code, found["ipa_bits"], found["cpus"], found["linux"]["gic"]) == (0, 42, 2, 3)
    assert found["linux"]["append"] == "console=ttyAMA0 earlycon x=y"


def test_a_snapshot_goes_on_where_it_was_taken(echo_image, tmp_path):
    snapshot, disk = tmp_path / "snap", tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    words = ("--kernel", echo_image, "--memory", "64M@1T", "--disk", f"{disk},ro", "--save", str(snapshot))
    with Piped(*words) as guest:
        guest.type(b"one")
        guest.wait_for(b"ready\r\none")
        code, err = guest.interrupt()
        assert code == 130 and f"saved in {snapshot}" in err
    env = {name: value for name, value in os.environ.items() if name != "KVM2_HOST"}
    command = [sys.executable, "-m", "kvm2", "run", "--restore", str(snapshot), "--json"]
    done = subprocess.run(command, input=b"two q", capture_output=True, env=env, timeout=ENOUGH)
    found = json.loads(done.stdout)
    assert done.stderr.decode() == f"kvm2: host {HOST} (the snapshot's; choose with --host or KVM2_HOST)\n"
    assert done.returncode == 0 and found["host"] == HOST and found["console"] == "two q" and found["guest"] == "Image"
    assert found["memory"] == [{"base": 1 << 40, "size": 64 << 20}]
    code, _, err = run("--restore", str(snapshot), "--host", "cortex-a57-4k")
    assert code == 1 and f"{snapshot}, made on {HOST}, cannot go on on cortex-a57-4k: " in err
    disk.unlink()
    code, _, err = run("--restore", str(snapshot))
    assert code == 2 and str(disk) in err


def test_a_trace_is_written_and_gdb_is_waited_for(echo_image, tmp_path, capsys):
    trace, socket = tmp_path / "trace", tmp_path / "gdb"
    words = ("--kernel", echo_image, "--trace", str(trace), "--trace-format", "json")
    assert run(*words, given=b"q")[0] == 0
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert any("KVM_CREATE_DEVICE" in json.dumps(line) for line in lines) and len(lines) > 20
    assert refused(capsys, "--kernel", echo_image, "--trace-format", "json")[0] == 2
    with Piped("--kernel", echo_image, "--gdb", f"unix:{socket}", "--timeout", "0.5") as guest:
        code, err = guest.end()
        assert code == 1 and f"the guest waits for gdb: target remote {socket}" in err
        assert b"ready" not in guest.said and not socket.exists()


# -- a terminal


class Terminal:
    """`kvm2 run` with a terminal as its input and output; its standard error apart."""

    def __init__(self, *words):
        self.outer, self.inner = pty.openpty()
        self.before = termios.tcgetattr(self.inner)
        self.process = subprocess.Popen(
            [*RUN, *words], stdin=self.inner, stdout=self.inner, stderr=subprocess.PIPE, start_new_session=True
        )
        self.said = b""

    def wait_for(self, what):
        deadline = time.monotonic() + ENOUGH
        while what not in self.said:
            assert time.monotonic() < deadline and self.process.poll() is None, self.said
            if select.select([self.outer], [], [], 0.1)[0]:
                self.said += os.read(self.outer, 4096)
        before, _, self.said = self.said.partition(what)
        return before

    def type(self, data):
        os.write(self.outer, data)

    def end(self):
        _, err = self.process.communicate(timeout=ENOUGH)
        return self.process.returncode, err.decode()

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        os.close(self.outer)
        os.close(self.inner)


@pytest.fixture
def terminal(echo_image):
    with contextlib.closing(Terminal("--kernel", echo_image, "--timeout", "50")) as terminal:
        terminal.wait_for(b"ready\r\n")
        yield terminal


def test_a_terminal_is_the_guests_until_ctrl_a_x(terminal):
    assert not termios.tcgetattr(terminal.inner)[3] & termios.ICANON
    terminal.type(b"\x03\x1ahello\x01\x01")
    terminal.wait_for(b"\x03\x1ahello\x01")  # and not ^C: nothing echoes but the guest
    terminal.type(b"r")
    terminal.wait_for(b"ready\r\n")
    terminal.type(b"again")
    terminal.wait_for(b"again")
    terminal.type(b"\x01h\x01s\x01x")
    code, err = terminal.end()
    assert code == 0 and termios.tcgetattr(terminal.inner) == terminal.before
    assert err.startswith("kvm2: Ctrl-a x leaves, Ctrl-a h helps\n")
    assert "Ctrl-a Ctrl-a  send Ctrl-a to the guest\r\n" in err and "nowhere to save to; give --save FILE" in err
    assert "ended: left: Ctrl-a x, after" in err


def test_a_power_off_gives_the_terminal_back(terminal):
    terminal.type(b"q")
    code, err = terminal.end()
    assert code == 0 and "ended: shutdown" in err and termios.tcgetattr(terminal.inner) == terminal.before


def test_a_killed_run_gives_the_terminal_back(terminal):
    terminal.process.terminate()
    assert terminal.end()[0] == -15 and termios.tcgetattr(terminal.inner) == terminal.before


# -- facts that stand twice so that nothing heavy is imported


def test_what_stands_twice_is_the_same():
    assert tuple(FLAVOURS) == linux_options.FLAVOURS
    assert initramfs.PROMPT.encode() == run_linux.PROMPT
    assert find_spec("kvm2.lab.linux.session") is not None


def test_a_machine_is_not_closed_while_ctrl_a_s_saves_it(monkeypatch, tmp_path):
    wanted = {"save": tmp_path / "s", "timeout": 0, "no_reboot": False, "gdb": None, "id_registers": None}
    run = run_linux.Run(None, run_linux.Boot("x", None), None, "", 1, wanted, as_json=False)
    begun, closed, seen = threading.Event(), threading.Event(), []

    def save_to(machine, *more):
        begun.set()
        seen.append(closed.wait(0.3))
        return "saved"

    class Machine:
        def run(self, left, tick):
            self.saver = threading.Thread(target=run._save_now)
            self.saver.start()
            assert begun.wait(ENOUGH)
            return SimpleNamespace(ended="shutdown")

    @contextlib.contextmanager
    def made(sink):
        machine = Machine()
        yield machine
        closed.set()
        machine.saver.join()

    monkeypatch.setattr(run_linux, "save_to", save_to)
    monkeypatch.setattr(run, "_made", made)
    monkeypatch.setattr(run, "_say_lowered", lambda machine: None)
    assert run._run(SimpleNamespace(tick=None), None).ended == "shutdown" and seen == [False]


def test_who_closes_the_pipe_has_seen_enough(echo_image):
    with subprocess.Popen([*RUN, "--kernel", echo_image], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        process.stdin.write(b"a\n" * 1000)
        process.stdin.close()
        assert process.wait(ENOUGH) == 0


def test_a_snapshot_of_a_host_without_the_new_call_goes_on(echo_image, tmp_path):
    snapshot = tmp_path / "s"
    words = ("--host", "mainline-6.12", "--kernel", echo_image, "--type", "40", "--timeout", "0.2")
    assert run(*words, "--save", str(snapshot))[0] == 1
    code, out, _ = run("--host", "mainline-6.12", "--restore", str(snapshot), given=b"again q")
    assert code == 0 and "again q" in out


@pytest.mark.parametrize(("host", "words"), [("vm2-list-only", ()), ("vm2-fixed-only", ("--fixed",))])
def test_a_host_that_does_not_describe_the_call_boots_too(echo_image, host, words):
    """The size is the least that the memory needs, within what the old capability says."""
    code, out, err = run("--host", host, "--kernel", echo_image, *words, "--json", given=b"q")
    assert code == 0, err
    assert json.loads(out)["ipa_bits"] == 32
