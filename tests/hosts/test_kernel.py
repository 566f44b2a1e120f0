"""The kernel as a backend, where no device is needed to see the rule: EINTR, errnos, descriptors."""

import ctypes
import errno
import os
import signal

import pytest

from kvm2.abi import ioctls as io
from kvm2.errors import KvmError
from kvm2.hosts import kernel as module
from kvm2.hosts.kernel import Kernel

pytestmark = pytest.mark.skipif(os.uname().sysname != "Linux", reason="the kernel backend is Linux's")


class Answers:
    """The C library with an `ioctl` of ours: numbers are results, negative ones errnos."""

    def __init__(self, libc, *answers):
        self._libc, self.answers, self.asked = libc, list(answers), []

    def __getattr__(self, name):
        return getattr(self._libc, name)

    def ioctl(self, fd, request, arg):
        self.asked.append((fd, request, arg))
        answer = self.answers.pop(0)
        if answer >= 0:
            return answer
        ctypes.set_errno(-answer)
        return -1


def answering(*answers):
    kernel = Kernel()
    kernel._libc = Answers(kernel._libc, *answers)
    return kernel


def test_an_interrupted_call_is_made_again():
    kernel = answering(-errno.EINTR, -errno.EINTR, 7)
    assert kernel.ioctl(3, io.KVM_CREATE_VM, 40) == 7
    assert kernel._libc.asked == [(3, io.KVM_CREATE_VM, 40)] * 3


@pytest.mark.parametrize("number", (errno.EINVAL, errno.EAGAIN, errno.ENOMEM, errno.EIO))
def test_any_other_errno_is_the_answer_at_once(number):
    kernel = answering(-number, 7)
    with pytest.raises(KvmError) as caught:
        kernel.ioctl(3, io.KVM_CREATE_VM)
    assert caught.value.errno == number and len(kernel._libc.asked) == 1


def test_addresses_of_64_bits_arrive_whole():
    kernel = answering(0)
    kernel.ioctl(3, io.KVM_SET_USER_MEMORY_REGION, 0xFFFF_8000_1234_5678)
    assert kernel._libc.asked == [(3, io.KVM_SET_USER_MEMORY_REGION, 0xFFFF_8000_1234_5678)]


def test_kvm_run_gives_its_errno_on_a_descriptor_that_is_none():
    read, write = os.pipe()
    try:
        with pytest.raises(KvmError) as caught:
            Kernel().ioctl(read, io.KVM_RUN)
        assert caught.value.errno == errno.ENOTTY
    finally:
        os.close(read)
        os.close(write)


def test_the_device_that_is_missing(tmp_path):
    with pytest.raises(KvmError) as caught:
        Kernel(str(tmp_path / "kvm")).open()
    assert caught.value.errno == errno.ENOENT


def test_a_reserved_descriptor_becomes_what_was_made():
    kernel = Kernel()
    reserved = kernel.reserve()
    read, write = os.pipe()
    os.write(write, b"kvm2")
    kernel.fill(reserved, read)
    assert os.read(reserved, 4) == b"kvm2" and not os.get_inheritable(reserved)
    with pytest.raises(OSError):
        os.fstat(read)
    os.close(write)
    kernel.close(reserved)
    with pytest.raises(KvmError) as caught:
        kernel.close(reserved)
    assert caught.value.errno == errno.EBADF


def test_a_handler_that_the_program_has_for_the_signal_stays():
    number = Kernel()._kick_signal
    got = []
    before = signal.signal(number, lambda *_: got.append(1))
    try:
        Kernel()
        signal.raise_signal(number)
        assert got == [1]
    finally:
        signal.signal(number, before or signal.SIG_DFL)
        Kernel()  # its own handler again
        signal.raise_signal(number)


def test_architectures_have_the_names_of_host_files(monkeypatch):
    for machine, arch in (("aarch64", "arm64"), ("x86_64", "x86_64"), ("ppc64le", "powerpc"), ("riscv64", "riscv64")):

        class Uname:
            pass

        Uname.machine = machine
        monkeypatch.setattr(module.os, "uname", Uname)
        assert module.machine_arch() == arch
