"""examples/create_vm2.c: compiled for what is installed, run on the real kernel, and on described hosts.

For those the program is a library in this process, whose open, ioctl and close are Python's: a described host's door
takes the addresses that the C code passes, as a kernel would.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from kvm2.errors import KvmError
from kvm2.softkvm import profile
from kvm2.softkvm.door import SoftKvm

PROJECT = Path(__file__).parents[2]
SOURCE = PROJECT / "examples" / "create_vm2.c"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wpedantic", "-Wconversion", "-Wno-sign-conversion")
HEADERS = ("-I", str(PROJECT / "generated"))

DOUBLE = r"""
#include <errno.h>
#include <stdarg.h>
#include <sys/types.h>

/* Each answers a result, or -errno. */
int (*on_open)(const char *);
int (*on_ioctl)(int, unsigned long, unsigned long);
int (*on_close)(int);

static int answer(int result)
{
	if (result >= 0)
		return result;
	errno = -result;
	return -1;
}

int __wrap_open(const char *path, int flags, ...) { (void)flags; return answer(on_open(path)); }
int __wrap_close(int fd) { return answer(on_close(fd)); }

int __wrap_ioctl(int fd, unsigned long request, ...)
{
	va_list rest;
	unsigned long arg;

	va_start(rest, request);
	arg = va_arg(rest, unsigned long);
	va_end(rest);
	return answer(on_ioctl(fd, request, arg));
}
"""


def compiled(compiler: str, *arguments: str | Path) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    done = subprocess.run([compiler, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("compiler", "options"),
    [
        ("gcc", ("-std=gnu11",)),
        ("gcc", ("-std=gnu11", "-O2", "-D_FORTIFY_SOURCE=2")),
        ("aarch64-linux-gnu-gcc", ("-std=gnu11",)),
        ("clang", ("-std=gnu11",)),
        ("g++", ("-x", "c++", "-std=gnu++17")),
        ("aarch64-linux-gnu-g++", ("-x", "c++", "-std=gnu++17")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_compiles_without_a_warning(compiler: str, options: tuple[str, ...], tmp_path: Path) -> None:
    compiled(compiler, *options, *WARNINGS, *HEADERS, SOURCE, "-c", "-o", tmp_path / "create_vm2.o")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "create_vm2"
    compiled("gcc", "-std=gnu11", *WARNINGS, *HEADERS, SOURCE, "-o", path)
    return path


def run(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("words", [("forty",), ("",), ("40", "41"), ("-1",), ("40x",), ("256",), ("9" * 40,)])
def test_usage(program: Path, words: tuple[str, ...]) -> None:
    done = run(program, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")


def test_falls_back_on_a_real_kernel(program: Path) -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no accessible /dev/kvm on this machine")
    if os.uname().machine != "x86_64":
        pytest.skip("the expected words are those of an x86-64 kernel")
    done = run(program)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, third = done.stdout.splitlines()
    assert first == "no KVM_CREATE_VM2 here"
    assert second.startswith("KVM_CREATE_VM with type 0")
    assert int(third.removeprefix("a VM for up to ").removesuffix(" vCPUs")) > 0
    refused = run(program, "40")
    assert refused.returncode == 1
    assert refused.stderr == "40 bits: this host has no choice of the guest physical address size\n"


@pytest.mark.slow
def test_falls_back_on_a_real_arm64_kernel(tmp_path: Path) -> None:
    """In the emulated machine of `kvm2 oracle`: the host's limit, and a word that says a size."""
    from kvm2.lab.oracle.machine import built
    from kvm2.lab.oracle.shapes import shape

    if not built(shape("max-4k-6.12")):
        pytest.skip("the arm64 machine is not built (kvm2 oracle build)")
    program = tmp_path / "create_vm2"
    compiled("aarch64-linux-gnu-gcc", "-std=gnu11", "-static", *WARNINGS, *HEADERS, SOURCE, "-o", program)
    code = (
        "import os, subprocess\n"
        "os.chmod('/tmp/create_vm2', 0o755)\n"
        "for words in ([], ['48'], ['53']):\n"
        "    print(subprocess.run(['/tmp/create_vm2', *words]).returncode, flush=True)\n"
    )
    words = ("oracle", "exec", "--put", f"{program}=/tmp/create_vm2", "python", "-c", code)
    done = subprocess.run([sys.executable, "-m", "kvm2", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "no KVM_CREATE_VM2 here",
        "KVM_CREATE_VM with type 0 (the host's limit is 52 bits)",
        "a VM for up to 512 vCPUs",
        "0",
        "no KVM_CREATE_VM2 here",
        "KVM_CREATE_VM with type 0x30 (the host's limit is 52 bits)",
        "a VM for up to 512 vCPUs",
        "0",
        "no KVM_CREATE_VM2 here",
        "1",
    ]
    assert "53 bits of guest physical addresses: this host allows 32..52" in done.stderr


class Ran(NamedTuple):
    code: int
    out: str
    err: str
    ioctls: list[int]


Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The example with its main renamed, and with open, ioctl and close that can be answered from here."""
    place = tmp_path_factory.mktemp("library")
    (place / "double.c").write_text(DOUBLE)
    wrapped = [f"-Wl,--wrap={name}" for name in ("open", "ioctl", "close")]
    compiled(
        "gcc", "-std=gnu11", "-shared", "-fPIC", "-Dmain=create_vm2_main", *HEADERS, SOURCE, place / "double.c",
        *wrapped, "-o", place / "create_vm2.so",
    )  # fmt: skip
    return ctypes.CDLL(str(place / "create_vm2.so"))


def refusable(call: Callable[..., int | None]) -> Callable[..., int]:
    def answer(*arguments: int) -> int:
        try:
            return call(*arguments) or 0
        except KvmError as error:
            return -(error.errno or errno.EIO)

    return answer


@pytest.fixture
def on(library: ctypes.CDLL, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs the program on a described host: exit code, output, and the ioctls that it made."""

    def run(host: str, *words: str, interrupts: int = 0) -> Ran:
        door = SoftKvm(profile.load(host))
        made: list[int] = []

        def ioctl(fd: int, request: int, arg: int) -> int:
            made.append(request)
            if len(made) <= interrupts:
                raise KvmError(errno.EINTR)
            return door.ioctl(fd, request, arg)

        def open_device(path: bytes) -> int:
            assert path == b"/dev/kvm"
            return door.open()

        number = ctypes.c_int
        hooks = {
            "on_open": ctypes.CFUNCTYPE(number, ctypes.c_char_p)(refusable(open_device)),
            "on_ioctl": ctypes.CFUNCTYPE(number, number, ctypes.c_ulong, ctypes.c_ulong)(refusable(ioctl)),
            "on_close": ctypes.CFUNCTYPE(number, number)(refusable(door.close)),
        }
        for name, hook in hooks.items():
            ctypes.c_void_p.in_dll(library, name).value = ctypes.cast(hook, ctypes.c_void_p).value
        arguments = [b"create_vm2", *(word.encode() for word in words)]
        array = (ctypes.c_char_p * (len(arguments) + 1))(*arguments, None)
        capfd.readouterr()
        code = library.create_vm2_main(len(arguments), array)
        ctypes.CDLL(None).fflush(None)
        assert door.fds() == [], "the program leaves descriptors open"
        return Ran(code, *capfd.readouterr(), made)

    yield run


def test_the_default_of_40_is_refused_with_the_finding(on: Run) -> None:
    ran = on("apple-m1")
    assert ran.code == 1
    assert ran.out == "KVM_CREATE_VM2 (capability 0xf)\n"
    assert ran.err.splitlines() == [
        "KVM_CREATE_VM2: Operation not supported",
        "  Operation not supported: attribute 2, byte 4: 40, allowed 32..36: "
        "physaddr_bits = 40 (default): this host allows 32..36 (PARange 0b0001)",
    ]


@pytest.mark.parametrize("bits", ["36", "0x24", "33"])
def test_a_size_that_the_host_has(on: Run, bits: str) -> None:
    ran = on("apple-m1", bits)
    assert (ran.code, ran.err) == (0, "")
    assert f"guest physical addresses: {int(bits, 0)} bits\na VM for up to 512 vCPUs\n" in ran.out


def test_the_default_is_read_back(on: Run) -> None:
    assert "guest physical addresses: 40 bits\n" in on("max-4k-6.12").out


def test_a_size_that_no_host_has(on: Run) -> None:
    ran = on("max-4k-6.12", "20")
    assert ran.code == 1 and "Invalid argument: attribute 2, byte 4: 20, allowed 32..64: " in ran.err


def test_an_x86_host_knows_no_such_attribute(on: Run) -> None:
    assert on("x86-64").code == 0
    ran = on("x86-64", "40")
    assert ran.code == 1
    assert "No such file or directory: attribute 2, byte 0: 2: " in ran.err


@pytest.mark.parametrize(
    ("host", "words", "code", "says"),
    [
        ("mainline-6.12", (), 0, "KVM_CREATE_VM with type 0 (the host's limit is 52 bits)\n"),
        ("mainline-6.12", ("48",), 0, "KVM_CREATE_VM with type 0x30 (the host's limit is 52 bits)\n"),
        ("mainline-6.12", ("53",), 1, "53 bits of guest physical addresses: this host allows 32..52\n"),
        ("mainline-6.12", ("31",), 1, "31 bits of guest physical addresses: this host allows 32..52\n"),
    ],
)
def test_the_fallback(on: Run, host: str, words: tuple[str, ...], code: int, says: str) -> None:
    from kvm2.abi.ioctls import KVM_CREATE_VM, KVM_CREATE_VM2

    ran = on(host, *words)
    assert ran.code == code
    assert ran.out.startswith("no KVM_CREATE_VM2 here\n")
    assert says in ran.out + ran.err
    assert KVM_CREATE_VM2 not in ran.ioctls
    assert (KVM_CREATE_VM in ran.ioctls) == (code == 0), "what cannot be had is not even asked for"


def test_the_fallback_explains_the_default(on: Run) -> None:
    ran = on("mainline-m1")
    assert ran.code == 1
    assert ran.err == "40 bits of guest physical addresses (the default): this host allows 32..36\n"
    assert on("mainline-m1", "36").code == 0


def test_the_fallback_on_x86(on: Run, tmp_path: Path) -> None:
    host = tmp_path / "mainline-x86.toml"
    host.write_text('base = "x86-64"\ncreate_vm2 = 0\n')
    ran = on(str(host))
    assert (ran.code, ran.err) == (0, "")
    assert "KVM_CREATE_VM with type 0" in ran.out and "VM types are the mask 0x" in ran.out
    assert on(str(host), "40").err == "40 bits: this host has no choice of the guest physical address size\n"


def test_a_host_with_the_fixed_structure_only_takes_the_old_call(on: Run) -> None:
    ran = on("vm2-fixed-only")
    assert ran.code == 0 and "KVM_CREATE_VM with type 0" in ran.out


def test_an_interrupted_call_is_made_again(on: Run) -> None:
    assert on("apple-m1", "36", interrupts=3).code == 0
