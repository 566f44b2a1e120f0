"""QEMU: its command line for a shape, its monitor (QMP), and a process that never outlives this one.

Monitor and port are socket pairs that the process inherits, so there is nothing on disk to clean up. The machine's
memory is a file. While a machine is built that file is shared, so a saved state consists of it and of what little QEMU
writes besides; a restored machine maps it privately and copies the pages that it changes.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvm2.errors import EnvironmentFault
from kvm2.lab.packages import need

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvm2.lab.oracle.shapes import Shape

PROGRAM = "qemu-system-aarch64"
MEMORY_MIB = 1024
# What the published answers were recorded with: rodata=off and nokaslr only make the start shorter. A kernel that
# panics must end the machine.
APPEND = "console=ttyAMA0 quiet loglevel=0 rodata=off nokaslr audit=0 panic=-1"
QUIT_SECONDS = 10.0
PR_SET_PDEATHSIG = 1


def command_line(shape: Shape, kernel: str, initrd: str | None, memory: str, shared: bool) -> list[str]:
    """What starts a machine, without its monitor and its port. A restored one needs no `initrd`: its memory has it.

    >>> from kvm2.lab.oracle.shapes import shape
    >>> command_line(shape("max-4k-gicv2"), "K", "I", "M", False)[1:3]
    ['-M', 'virt,virtualization=on,gic-version=2,memory-backend=ram']
    """
    machine = ["virt", "virtualization=on", *shape.machine.split(",")]
    if "gic-version" not in shape.machine:
        machine.insert(2, "gic-version=3")
    share = "on" if shared else "off"
    backend = f"memory-backend-file,id=ram,size={MEMORY_MIB}M,mem-path={_value(memory)},share={share}"
    return [
        PROGRAM,
        *("-M", ",".join([*filter(None, machine), "memory-backend=ram"])),
        *("-object", backend),
        *("-accel", "tcg"),
        *("-cpu", shape.cpu),
        *("-smp", "1"),
        *("-m", f"{MEMORY_MIB}M"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", kernel),
        *(("-initrd", initrd) if initrd else ()),
        *("-append", f"{APPEND} {shape.append}".rstrip()),
    ]


def stub_kernel() -> bytes:
    """An arm64 Image without code (Documentation/arch/arm64/booting.rst), for a machine whose memory has its kernel.

    QEMU wants one, or else it makes the machine ready for firmware, with other rules for PSCI.
    """
    header = bytearray(64)
    header[56:60] = b"ARM\x64"
    return bytes(header).ljust(4096, b"\0")


def _value(text: str) -> str:
    return text.replace(",", ",,")


def version() -> str:
    """The first line of what QEMU says of its version; EnvironmentFault where there is no QEMU."""
    need(PROGRAM, whose="the oracle")
    done = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode or not re.match(r"QEMU emulator version \d", done.stdout):
        raise EnvironmentFault(f"{PROGRAM} --version failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout.splitlines()[0]


def _die_with_parent() -> None:
    # Where this process is killed, nobody is left to end the machine.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Qemu:
    """A running QEMU; `port` is a socket to the machine's agent. It ends with the thread that started it."""

    def __init__(self, command: Sequence[str], incoming: Path | None = None) -> None:
        if sys.platform != "linux":
            raise EnvironmentFault("the oracle needs Linux: it is built from Debian's packages by apt and dpkg")
        need(PROGRAM, whose="the oracle")
        state = os.open(incoming, os.O_RDONLY | os.O_CLOEXEC) if incoming is not None else None
        # What the kernel prints on its console, and QEMU on its standard error.
        self._said: int | None = os.memfd_create("kvm2-oracle")
        self._last_words: list[str] = []
        self.port, port = socket.socketpair()
        self._monitor, monitor = socket.socketpair()
        inherited = [port.fileno(), monitor.fileno(), self._said]
        words = [
            *command,
            *("-chardev", f"socket,id=monitor,fd={monitor.fileno()}", "-mon", "chardev=monitor,mode=control"),
            *("-chardev", f"file,id=console,path=/proc/self/fd/{self._said},append=on", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=port,fd={port.fileno()}"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port,name=agent"),
        ]
        if state is not None:
            inherited.append(state)
            words += ["-S", "-incoming", "defer"]
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._said,
                pass_fds=inherited, preexec_fn=_die_with_parent, start_new_session=True,
            )  # fmt: skip
        finally:
            port.close()
            monitor.close()
        self._lines = self._monitor.makefile("r", encoding="utf-8")
        try:
            self._greet()
            if state is not None:
                self._restore(state)
        except BaseException:
            self.kill()
            raise
        finally:
            if state is not None:
                os.close(state)

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def _greet(self) -> None:
        if not self._lines.readline():
            raise self.death("it did not start")
        self.ask("qmp_capabilities")

    def _restore(self, state: int) -> None:
        self._ignore_shared()
        self.ask("migrate-incoming", uri=f"fd:{state}")
        self._wait_for_migration("inmigrate")
        self.ask("cont")

    def _ignore_shared(self) -> None:
        self.ask("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])

    def _wait_for_migration(self, what: str) -> None:
        while (found := self.ask("query-migrate").get("status")) != "completed":
            if found in ("failed", "cancelled"):
                raise self.death(f"its state could not be moved ({what})")
            time.sleep(0.002)

    def save(self, state: Path) -> None:
        """Stops the machine and writes its state, all but the memory, which is in its file."""
        self.ask("stop")
        self._ignore_shared()
        self.ask("migrate", uri=f"exec:cat > {shlex.quote(str(state))}")
        self._wait_for_migration("save")

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """A command of the monitor and its answer."""
        try:
            self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
            for line in self._lines:
                answer = json.loads(line)
                if "error" in answer:
                    raise self.death(f"{command}: {answer['error'].get('desc')}")
                if "return" in answer:
                    found = answer["return"]
                    return found if isinstance(found, dict) else {}
        except OSError:
            pass
        raise self.death("it ended")

    def death(self, what: str) -> EnvironmentFault:
        """The error of a machine that is no more, with the last that it and its kernel said. Ends the process."""
        self.kill()
        return EnvironmentFault("\n  ".join([f"the emulated machine: {what}", *self._last_words]))

    def quit(self) -> None:
        """Ends the machine and waits until its process is gone."""
        try:
            self.ask("quit")
            self._process.wait(QUIT_SECONDS)
        except (EnvironmentFault, subprocess.TimeoutExpired):
            pass
        self.kill()

    def kill(self) -> None:
        """Ends the process at once and waits for it. Once is enough."""
        self._process.kill()
        self._process.wait()
        if self._said is None:
            return
        text = os.pread(self._said, 1 << 20, max(0, os.fstat(self._said).st_size - 2000)).decode(errors="replace")
        self._last_words = text.replace("\r", "").strip().splitlines()[-8:]
        os.close(self._said)
        self._said = None
        self._lines.close()
        self._monitor.close()
        self.port.close()
