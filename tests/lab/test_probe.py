"""kvm2 probe: a host, its file and the host of that file answer alike; nothing is left behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kvm2.abi import caps as cap
from kvm2.abi import sysregs as sr
from kvm2.errors import KvmError, UsageError
from kvm2.lab import bundled
from kvm2.lab.compare import load_differences, load_untrusted
from kvm2.lab.engine import find_guests, load_guests
from kvm2.lab.probe import Probed, probe, save
from kvm2.lab.replay import Plan, replay
from kvm2.lab.scenarios import select
from kvm2.softkvm import profile
from kvm2.softkvm.door import SoftKvm

from .alike import facts

MOST_IOCTLS = 2500
RECORDED = bundled.recorded_hosts()
DESCRIBED = [name for name in profile.names() if name not in RECORDED]


class Counting(SoftKvm):
    """A software KVM that counts ioctls."""

    count = 0

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        self.count += 1
        return super().ioctl(fd, request, arg)


def probed(name: str | Path) -> tuple[profile.Profile, Probed]:
    """A host and its probe, which left nothing behind and did not ask too much."""
    host = profile.load(name)
    kvm = Counting(host)
    found = probe(kvm, host.name)
    assert kvm.fds() == []
    assert 0 < kvm.count <= MOST_IOCTLS
    return host, found


@pytest.mark.parametrize("name", [*RECORDED, *DESCRIBED])
def test_the_file_is_the_host(name: str, tmp_path: Path) -> None:
    host, found = probed(name)
    path = tmp_path / f"{name}.toml"
    save(found.text, path)
    again = profile.load(path)
    assert facts(again) == facts(host)
    assert again.basis == "recorded" and again.name == name


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_host_is_found_to_the_last_field(name: str) -> None:
    """Not only what answers depend on: the registers too are those of the file, but for the core's own."""
    host, found = probed(name)
    again = found.profile()
    wanted = {enc: value for enc, value in host.registers.items() if value and enc != sr.DCZID_EL0}
    assert {enc: value for enc, value in again.registers.items() if value and enc != sr.DCZID_EL0} == wanted
    assert (again.kernel, again.quirks, again.caps) == (host.kernel, host.quirks, host.caps)


def plan(name: str, host: str, only: tuple[str, ...] = ()) -> Plan:
    """The records of a machine, to be played on a host."""
    record = bundled.record(name)
    assert record is not None
    file = bundled.DATA / f"scenarios-{record.header['page']}.json.xz"
    return Plan(
        host=host,
        scenarios=select(bundled.scenarios(record.header["page"]), only, ()),
        guests=load_guests(find_guests(file)),
        record=record,
        untrusted=load_untrusted(bundled.UNTRUSTED),
        named=tuple(rule for rule in load_differences() if not rule.arch),
        patience_ms=150,
        jobs=2,
    )


@pytest.mark.parametrize("name", ["a57-4k-6.1", "max-16k-6.12"])
def test_the_records_are_equal_on_the_saved_host(name: str, tmp_path: Path) -> None:
    save(probed(name)[1].text, tmp_path / f"{name}.toml")
    done = replay(
        plan(name, str(tmp_path / f"{name}.toml"), ("vcpu/*", "regs/*", "sve/*", "cap/*", "sys/*", "slots/*"))
    )
    assert done.ok and done.totals()["steps"] > 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_every_record_is_equal_on_the_saved_host(name: str, tmp_path: Path) -> None:
    save(probed(name)[1].text, tmp_path / f"{name}.toml")
    assert replay(plan(name, str(tmp_path / f"{name}.toml"))).ok


def test_without_guests_is_said() -> None:
    found = probe(SoftKvm(profile.load("max-4k-6.12")), "max", guests=False)
    assert any("no guest was run" in note for note in found.notes)
    assert "CNTFRQ_EL0" not in found.facts["registers"]
    assert "# - no guest was run" in found.text


def test_no_emulated_core_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe itself needs no Unicorn; a host that needs it and has it not is described without its guests."""
    from kvm2.errors import EnvironmentFault
    from kvm2.softkvm.vm import Vm

    def no_core(*args: object) -> None:
        raise EnvironmentFault("no emulated core here")

    monkeypatch.setattr(Vm, "make_core", no_core)
    found = probe(SoftKvm(profile.load("max-4k-6.1")), "max")
    assert any("no guest could be run (no emulated core here)" in note for note in found.notes)
    assert found.profile().quirks == profile.load("max-4k-6.1").quirks  # as the nearest kernel


class Odd(SoftKvm):
    """A kernel that answers as no rule says: a new capability, one without a name, a smaller IPA limit."""

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        from kvm2.abi import ioctls

        if request == ioctls.KVM_CHECK_EXTENSION:
            odd = {cap.KVM_CAP_ARM_VM_IPA_SIZE: 44, cap.KVM_CAP_PTP_KVM: 0, 250: 7, cap.KVM_CAP_GUEST_DEBUG_HW_BPS: 3}
            if arg in odd:
                return odd[arg]
        return super().ioctl(fd, request, arg)


def test_what_no_rule_gives_is_stated_and_what_no_key_says_is_noted() -> None:
    found = probe(Odd(profile.load("neoverse-n1-4k")), "odd")
    again = found.profile()
    assert again.ipa_limit == 44 and again.caps[cap.KVM_CAP_PTP_KVM] == 0
    assert again.caps[cap.KVM_CAP_ARM_VM_IPA_SIZE] == 44 and again.caps[250] == 7
    text = "\n".join(found.notes)
    assert "KVM_CAP_GUEST_DEBUG_HW_BPS answers 3, its description 6" in text


def test_a_newer_psci_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvm2.softkvm import psci

    monkeypatch.setattr(psci, "version", lambda vcpu: 0x10003)
    found = probe(SoftKvm(profile.load("neoverse-n1-4k")), "newer", guests=False)
    assert "KVM_REG_ARM_PSCI_VERSION is 0x10003, described as 0x10001 on every host" in found.notes


def test_a_host_that_takes_no_type_word_says_so(tmp_path: Path) -> None:
    path = tmp_path / "old.toml"
    path.write_text('base = "apple-m1"\ntype_word = "none"\n')
    with pytest.raises(KvmError, match="no type word from 0 to 255"):
        probe(SoftKvm(profile.load(path)), "old")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    save("one = 1\n", path)
    with pytest.raises(UsageError, match="is there already"):
        save("two = 2\n", path)
    assert path.read_text() == "one = 1\n"
    save("two = 2\n", path, force=True)
    assert path.read_text() == "two = 2\n"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UsageError, match="cannot be written"):
        save("x = 1\n", tmp_path / "nowhere" / "mine.toml")


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs a /dev/kvm that this user may open")
def test_this_machine() -> None:
    from kvm2.lab.probe import probe_real

    if os.uname().machine != "x86_64":
        pytest.skip(f"needs an x86-64 KVM, this machine is {os.uname().machine}")
    before = sorted(os.listdir("/proc/self/fd"))
    found = probe_real(name="mine")
    assert sorted(os.listdir("/proc/self/fd")) == before
    again = found.profile()
    assert again.arch == "x86_64" and again.page_shift == 12 and sys.byteorder == "little"
    from kvm2.hosts.kernel import Kernel
    from kvm2.kvm import Kvm

    with Kvm(Kernel(), "raw") as kvm, kvm.create_vm(0) as vm:
        for number in [*range(260)]:
            assert again.caps.get(number, 0) == kvm.check_extension(number) or number == cap.KVM_CAP_CREATE_VM2
            assert again.vm_caps.get(number, again.caps.get(number, 0)) == vm.check_extension(number)
    assert not probe_real(name="mine", mainline=True).profile().create_vm2
