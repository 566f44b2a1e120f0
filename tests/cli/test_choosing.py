"""Which host runs a guest: by architecture, and what is refused in words. Some run on an x86-64 KVM where one is."""

import json

import pytest

from kvm2.cli import choosing
from kvm2.cli.main import main
from kvm2.errors import EnvironmentFault
from kvm2.guests import DEMO, DEMO_X86
from kvm2.hosts import kernel, real


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("KVM2_HOST", raising=False)


def on(monkeypatch, arch, refusal=""):
    monkeypatch.setattr(kernel, "machine_arch", lambda: arch)
    monkeypatch.setattr(real, "refusal", lambda path="/dev/kvm": refusal)


def test_the_guests_architecture_decides(monkeypatch, capsys):
    on(monkeypatch, "x86_64")
    assert choosing.host_for(None, "x86_64") == "/dev/kvm"
    assert "host /dev/kvm (it runs x86-64; choose with --host" in capsys.readouterr().err
    for wanted in ("arm64", None):
        assert choosing.host_for(None, wanted) == "max-4k-6.12"
        assert "the default" in capsys.readouterr().err
    on(monkeypatch, "arm64")
    for wanted in ("arm64", None):
        assert choosing.host_for(None, wanted) == "/dev/kvm"
        assert "it runs AArch64" in capsys.readouterr().err
    assert choosing.host_for("apple-m1", "arm64") == "apple-m1" and capsys.readouterr().err == ""


def test_without_a_kvm_arm64_falls_back_and_x86_is_explained(monkeypatch):
    on(monkeypatch, "arm64", "cannot be opened")
    assert choosing.host_for(None, "arm64") == "max-4k-6.12"
    with pytest.raises(EnvironmentFault, match="this machine's architecture is arm64"):
        choosing.host_for(None, "x86_64")
    on(monkeypatch, "x86_64", "it cannot be opened")
    with pytest.raises(EnvironmentFault, match=r"needs the /dev/kvm of an x86-64 machine \(it cannot be opened\)"):
        choosing.host_for(None, "x86_64")


def asked(capsys, *words):
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--host", "apple-m1", str(DEMO_X86)), "no x86-64 guests on AArch64"),
        (("--host", "x86-64"), "the software KVM executes AArch64 only"),
        (("--host", "x86-64", str(DEMO_X86)), "the software KVM executes AArch64 only"),
        (("--host", "s390x"), "host s390x is s390x: kvm2 runs guests for AArch64 and x86-64"),
    ],
)
def test_guests_and_hosts_that_do_not_fit(capsys, words, what):
    code, found = asked(capsys, "run", *words)
    assert code == 1 and found["error"]["kind"] == "GuestError" and what in found["error"]["message"]
    assert main(["run", *words]) == 1
    assert what in capsys.readouterr().err


def test_the_real_host_runs_its_demonstration_guest(real_x86, capsys):
    code, found = asked(capsys, "run", "--host", "/dev/kvm", "--timeout", "30")
    assert code == 0 and found["ended"] == "shutdown" and found["arch"] == "x86_64" and found["host"] == "/dev/kvm"
    assert found["console"].startswith("kvm2 demonstration guest for x86-64\n") and found["top"]["size"] == 65536
    assert {one["space"] for one in found["unclaimed"]} == {"port", "memory"}
    assert main(["run", str(DEMO_X86), "--timeout", "30"]) == 0
    out, err = capsys.readouterr()
    assert "host /dev/kvm (it runs x86-64" in err and "(reads gave all ones)" in out and "physical address bits" in out


def test_the_real_host_refuses_what_it_cannot(real_x86, capsys, tmp_path):
    code, found = asked(capsys, "run", "--host", "/dev/kvm", str(DEMO))
    assert code == 1 and "no AArch64 guests on x86-64" in found["error"]["message"]
    assert "--host max-4k-6.12" in found["error"]["message"]
    assert asked(capsys, "run", "--host", "/dev/kvm", "--cpus", "2")[0] == 2
    assert asked(capsys, "run", "--host", "/dev/kvm", "--memory", "64M@1G")[0] == 2
    code, found = asked(capsys, "run", "--host", "/dev/kvm", "--ipa-bits", "40")
    assert code == 1 and found["findings"][0]["path"] == "attrs[0].type"
    guest = tmp_path / "halt.bin"
    guest.write_bytes(b"\xf4")
    code, found = asked(capsys, "run", "--host", "/dev/kvm", str(guest))
    assert code == 1 and found["ended"] == "halted" and "HLT before RIP 0x7c01" in found["reason"]
    guest.write_bytes(b"\xeb\xfe")
    code, found = asked(capsys, "run", "--host", "/dev/kvm", str(guest), "--timeout", "0.2")
    assert code == 1 and found["ended"] == "timeout"


def test_a_shell_on_the_real_host(real_x86, capsys):
    program = (
        "ram.write(0x1000, b'\\xe6\\x10'); vcpu.regs.rip = 0x1000; vcpu.regs.rax = 0x41; print(ram, hex(vcpu.regs.rip))"
    )
    code, found = asked(capsys, "shell", "--host", "/dev/kvm", "-c", program)
    assert code == 0 and found["output"] == "<Ram slot 0: 0x4000000 bytes at 0x0> 0x1000\n"
