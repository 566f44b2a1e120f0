"""This machine's /dev/kvm: what cannot be opened is explained; on a real KVM creation, refusals, and no leaks."""

import errno
import gc
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

import kvm2
from kvm2.abi import ioctls as io
from kvm2.abi.structs import UserspaceMemoryRegion
from kvm2.cli.main import main
from kvm2.errors import EnvironmentFault, KvmError, UsageError
from kvm2.hosts import backend_of, figures, real
from kvm2.hosts.kernel import machine_arch

WHY_NOT = real.refusal()
needs_kvm = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
needs_x86 = pytest.mark.skipif(
    bool(WHY_NOT) or machine_arch() != "x86_64", reason=WHY_NOT or f"this machine is {machine_arch()}, not x86_64"
)


def descriptors():
    return sorted(os.listdir("/proc/self/fd"))


# ---- a KVM that cannot be opened


@pytest.mark.parametrize(
    ("number", "words"),
    ((errno.EACCES, ("usermod -aG kvm",)), (errno.ENOENT, ("described host",)), (errno.EIO, ("kernel's log",))),
)
def test_why_it_cannot_be_opened(monkeypatch, number, words):
    def refuse(path, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(real.os, "open", refuse)
    monkeypatch.setattr(real, "_group", lambda path: "kvm")
    with pytest.raises(EnvironmentFault) as caught:
        real.open_real()
    text = str(caught.value)
    assert os.strerror(number) in text and "kvm2 hosts" in text
    assert all(word in text for word in words)


@pytest.mark.parametrize(
    ("flags", "word"),
    (({"vmx"}, "kvm_intel"), ({"svm"}, "kvm_amd"), ({"hypervisor"}, "nested"), (set(), "firmware")),
)
def test_why_it_is_absent_on_x86(monkeypatch, flags, word):
    monkeypatch.setattr(real, "machine_arch", lambda: "x86_64")
    monkeypatch.setattr(real, "_cpu_flags", lambda: flags)
    assert word in real._absent()


def test_why_it_is_absent_on_arm64(monkeypatch):
    monkeypatch.setattr(real, "machine_arch", lambda: "arm64")
    assert "EL2" in real._absent()


def test_a_system_that_is_not_linux(monkeypatch):
    class Uname:
        sysname = "Darwin"

    monkeypatch.setattr(real.os, "uname", Uname)
    assert "KVM is part of Linux" in real.refusal()


def test_the_command_says_it_with_exit_code_3(monkeypatch, capsys):
    monkeypatch.setattr(real, "refusal", lambda path="/dev/kvm": "no KVM here")
    assert main(["create", "--host", "/dev/kvm"]) == 3
    assert "no KVM here" in capsys.readouterr().err


def test_working_caps_are_the_software_kvms():
    with pytest.raises(UsageError):
        backend_of("/dev/kvm", working_caps=True)


@pytest.mark.parametrize(
    ("mode", "gid", "advice"),
    ((0o660, 0, "as root chgrp kvm"), (0o600, 4242, "as root chgrp kvm"), (0o660, 424242, "usermod -aG 424242 USER")),
)
def test_nobody_is_sent_into_a_group_that_may_not_open_it(monkeypatch, mode, gid, advice):
    monkeypatch.setattr(real.Path, "stat", lambda path: os.stat_result((mode, 0, 0, 1, 0, gid, 0, 0, 0, 0)))
    assert advice in real._what_to_do("/dev/kvm", errno.EACCES)


# ---- a real one


@needs_kvm
def test_figures():
    host = real.open_real()
    found = {what: value for what, value, _ in figures.figures(host)}
    assert found["architecture"] == host.arch and found["kernel"].startswith("Linux ")
    assert figures.capabilities(host)["KVM_CAP_USER_MEMORY"] == 1
    data = CliRunner().invoke(_hosts(), ["/dev/kvm", "--json"])
    assert json.loads(data.output)["caps"]["KVM_CAP_USER_MEMORY"] == 1


def _hosts():
    from kvm2.cli.hosts import command

    return command


@needs_kvm
def test_no_descriptor_left_is_a_kvm_error_in_every_way_of_making_a_vm(monkeypatch):
    with kvm2.open("/dev/kvm") as kvm:
        kvm.create_vm2(negotiate=True).close()
        waiting = kvm.create_vm2(negotiate=True)

        def none_left(path, flags):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr("kvm2.hosts.kernel.os.open", none_left)
        for call in (lambda: kvm.create_vm2(negotiate=True), waiting.commit):
            with pytest.raises(KvmError, match="Too many open files") as caught:
                call()
            assert caught.value.errno == errno.EMFILE
        monkeypatch.undo()
        waiting.commit()
        waiting.create_vcpu()


@needs_kvm
def test_creation_with_every_call():
    with kvm2.open("/dev/kvm") as kvm:
        assert kvm.api_version() == 12
        with kvm.create_vm2(max_vcpus=2) as vm:
            assert vm.get_attr(9).max_vcpus == 2
            vm.create_vcpu(1)
            with pytest.raises(KvmError) as caught:
                vm.create_vcpu(2)
            assert (caught.value.name, "0..1" in caught.value.reason) == ("EINVAL", True)
        kvm.dry_run(max_vcpus=2)
        vm = kvm.create_vm2(negotiate=True)
        with pytest.raises(KvmError) as caught:
            vm.create_vcpu()
        assert caught.value.errno == errno.ENOEXEC
        vm.commit()
        vm.create_vcpu()
        assert vm.check_extension("USER_MEMORY") == 1


@needs_x86
def test_the_types_of_vms_are_the_kernels():
    with kvm2.open("/dev/kvm") as kvm:
        offered = kvm.check_extension("VM_TYPES") | 1
        for word in range(8):
            if offered >> word & 1 and word:
                continue  # a machine that has it may still lack what it needs
            try:
                kvm.create_vm2(machine_type=word).close()
            except KvmError as error:
                assert word and [f.by for f in error.findings] == ["library"], word
                assert "this kernel offers" in str(error)
            with pytest.raises(KvmError) if word else _nothing() as caught:
                kvm.create_vm(word).close()
            if word:
                assert caught.value.errno == errno.EINVAL and "this kernel offers" in caught.value.reason


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


@needs_x86
def test_every_wrong_use_is_explained():
    with kvm2.open("/dev/kvm") as kvm:
        vm = kvm.create_vm()
        ram = vm.map(0x10000, 0x10000)
        vcpu = vm.create_vcpu(0)
        wrong = {
            "arm64 attribute": (lambda: kvm.create_vm2(physaddr_bits=40), "is an attribute of arm64"),
            "arm64 call": (lambda: vm.ioctl(io.KVM_ARM_PREFERRED_TARGET), "is a call of arm64"),
            "wrong descriptor": (lambda: kvm.ioctl(io.KVM_CREATE_VCPU), "a call on a VM"),
            "unknown ioctl": (lambda: vm.ioctl(0xAEFE), "no ioctl of KVM that is known here"),
            "address": (lambda: vm.map(0x123, 4096), "guest_phys_addr"),
            "size": (lambda: vm.map(0x100000, 4095), "memory_size"),
            "overlap": (lambda: vm.map(0x18000, 0x10000), "overlap"),
            "slot": (lambda: vm.map(0x200000, 4096, slot=1 << 15), "slot"),
            "beyond": (lambda: vm.map((1 << 52) - 4096, 8192), "beyond"),
            "flags": (lambda: vm.set_memory_region(3, 0x300000, 4096, ram.hva, 0x80), "flags"),
            "nothing to delete": (lambda: vm.set_memory_region(7, 0, 0, 0), "deletes nothing"),
            "vCPU twice": (lambda: vm.create_vcpu(0), "exists already"),
            "vCPU id": (lambda: vm.create_vcpu(1 << 20), "this kernel takes 0.."),
            "no irqchip": (lambda: vm.irq_line(4, True), "create_irqchip"),
            "late irqchip": (lambda: vm.create_irqchip(), "before"),
            "dirty log": (lambda: ram.dirty_log(), "LOG_DIRTY_PAGES"),
            "nonsense capability": (lambda: vm.enable_cap(999), ""),
        }
        for what, (call, words) in wrong.items():
            with pytest.raises(KvmError) as caught:
                call()
            assert words in str(caught.value) and str(caught.value) != caught.value.name, (what, caught.value)
        region = UserspaceMemoryRegion(0, 0, 0x10000, 0x8000, ram.hva)
        with pytest.raises(KvmError) as caught:
            vm.ioctl(io.KVM_SET_USER_MEMORY_REGION, region)
        assert "size" in caught.value.reason
        vcpu.close()


@needs_kvm
def test_nothing_is_left_of_vms_that_came_and_went():
    with kvm2.open("/dev/kvm") as kvm:
        kvm.create_vm2().close()
        gc.collect()  # what earlier tests forgot to close
        before = descriptors()
        for turn in range(60):
            vm = kvm.create_vm2(max_vcpus=2, negotiate=turn % 3 == 0)
            if turn % 3 == 0:
                vm.commit()
            ram, vcpu = vm.map(0, 1 << 16), vm.create_vcpu()
            area = vcpu.kvm_run
            for handle in (vm, vcpu) if turn % 2 else (vcpu, vm):
                handle.close()
            assert area[0] == 0 and ram[0] == 0  # still there to look at, and no longer the kernel's
            with pytest.raises(KvmError):
                kvm.create_vm2(max_vcpus=1 << 20)
            kvm.dry_run()
        assert descriptors() == before
    with open("/proc/self/maps") as maps:
        assert "kvm-vcpu" not in maps.read()


@needs_kvm
def test_descriptors_are_not_inherited():
    with kvm2.open("/dev/kvm") as kvm, kvm.create_vm2() as vm, kvm.create_vm2(negotiate=True) as late:
        late.commit()
        vcpu = vm.create_vcpu()
        assert not any(os.get_inheritable(handle.fd) for handle in (kvm, vm, late, vcpu))


@needs_kvm
def test_a_process_without_room_for_descriptors():
    script = """
import errno, resource, kvm2
with kvm2.open("/dev/kvm") as kvm:
    kvm.create_vm2().close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (kvm.fd + 1, kvm.fd + 1))
    for make in (kvm.create_vm2, kvm.create_vm):
        try:
            make()
        except kvm2.KvmError as error:
            assert error.errno == errno.EMFILE and "ulimit" in str(error), error
        else:
            raise SystemExit("a VM without a descriptor")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_kvm
def test_a_child_of_fork_is_told():
    script = """
import os, kvm2
kvm = kvm2.open("/dev/kvm")
vm = kvm.create_vm2()
if os.fork() == 0:
    try:
        vm.create_vcpu()
    except kvm2.KvmError as error:
        os._exit(0 if error.name == "EIO" and "process" in str(error) else 1)
    os._exit(2)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
