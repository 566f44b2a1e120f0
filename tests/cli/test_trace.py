"""kvm2 trace: of commands and scripts, on described hosts and on a real kernel."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvm2.cli.main import main

Capture = pytest.CaptureFixture[str]

SCRIPT = """
import sys
import kvm2

print(__name__, sys.argv[1:])
with kvm2.open("apple-m1") as kvm:
    vm = kvm.create_vm2(physaddr_bits=36)
    {then}
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "user.py"
    path.write_text(SCRIPT.format(then="vm.close()"))
    return path


def test_a_command_with_its_findings(capsys: Capture) -> None:
    assert main(["trace", "create", "--host", "apple-m1", "--max-vcpus", "9999"]) == 1
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0].startswith("open(/dev/kvm) = kvm#1 <0.")
    assert lines[1].startswith("kvm#1 KVM_CREATE_VM2([MAX_VCPUS{max_vcpus=9999}, REPORT{records=0x")
    assert ") = -1 EOPNOTSUPP (Operation not supported) <" in lines[1]
    assert lines[2].startswith("    EOPNOTSUPP attrs[0].max_vcpus: ") and "physaddr_bits: " in lines[3]
    assert lines[4].startswith("kvm#1 close() = 0")
    assert lines[5] == "kvm2: EOPNOTSUPP (Operation not supported)"


def test_the_commands_output_is_the_same(capsys: Capture) -> None:
    words = ["create", "--host", "max-4k-6.12", "--ipa-bits", "48"]
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert main(["trace", *words]) == 0
    assert capsys.readouterr().out == plain


def test_into_a_file_as_json(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    assert main(["trace", "--json", "-o", str(file), "--host", "apple-m1", "--", "describe", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["schema"] == "kvm2.describe/1" and err == "kvm2: host apple-m1 (KVM2_HOST)\n"
    objects = [json.loads(line) for line in file.read_text().splitlines()]
    assert {one["schema"] for one in objects} == {"kvm2.trace/1"}
    assert [one["name"] for one in objects if one["event"] == "ioctl"] == [
        "KVM_DESCRIBE_VM2", "KVM_DESCRIBE_VM2", "KVM_CHECK_EXTENSION"
    ]  # fmt: skip
    assert objects[1]["errno"] == "E2BIG"
    sizes = next(one for one in objects[2]["output"] if one["name"] == "ARM64_PHYSADDR_SIZE")
    assert (sizes["def"], sizes["max"]) == (40, 36)
    assert objects[-1] == {"schema": "kvm2.trace/1", "event": "end", "exit_code": 0, "calls": len(objects) - 1}
    assert "KVM2_HOST" not in os.environ


def test_a_host_given_in_the_environment_comes_back(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVM2_HOST", "apple-m2")
    assert main(["trace", "--host", "apple-m1", "describe"]) == 0
    assert "apple-m1: KVM_CAP_CREATE_VM2" in capsys.readouterr().out
    assert os.environ["KVM2_HOST"] == "apple-m2"


@pytest.mark.parametrize(("how", "most"), [((), 30), (("--exits", "all"), 100_000)])
def test_a_guests_exits(capsys: Capture, how: tuple[str, ...], most: int) -> None:
    assert main(["trace", *how, "run", "--host", "max-4k-6.12", "--timeout", "50"]) == 0
    out, err = capsys.readouterr()
    runs = [line for line in err.splitlines() if " KVM_RUN" in line]
    assert "powering off" in out and len(err.splitlines()) < most
    if how:
        console = [line for line in runs if "phys_addr=0x9000000, data=" in line]
        said = bytes(int(line.partition("data=")[2][:2], 16) for line in console)
        assert said.startswith(b"kvm2 demonstration guest\n")
    else:
        assert len(runs) == 1 and "KVM_SYSTEM_EVENT_SHUTDOWN" in runs[0]
        assert " x KVM_EXIT_MMIO write 0x9000000/" in runs[0]


def test_a_script(capsys: Capture, script: Path) -> None:
    assert main(["trace", str(script), "--json", "word"]) == 0
    out, err = capsys.readouterr()
    assert out == "__main__ ['--json', 'word']\n"
    assert "ARM64_PHYSADDR_SIZE{physaddr_bits=36}" in err and "vm#1 close()" in err


@pytest.mark.parametrize(
    ("then", "code", "says"),
    [
        ("sys.exit(7)", 7, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('no more')", 1, "no more\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("vm.create_vcpu(9999)", 1, "kvm2.errors.KvmError: EINVAL"),
    ],
)
def test_how_a_script_ends(capsys: Capture, script: Path, then: str, code: int, says: str) -> None:
    script.write_text(SCRIPT.format(then=then))
    assert main(["trace", str(script)]) == code
    err = capsys.readouterr().err
    assert says in err and "vm#1" in err
    if "Traceback" in err:
        assert "user.py" in err and "runpy" not in err and "cli/trace.py" not in err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "Missing argument"),
        (["nothing"], 2, "'nothing' is neither a command of kvm2 nor a script"),
        (["/no/such.py"], 2, "there is no script /no/such.py"),
        (["trace", "describe"], 2, "a trace of a trace"),
        (["--exits", "some", "describe"], 2, "'some' is not one of"),
        (["-o", "/no/such/place", "describe"], 3, "/no/such/place cannot be written"),
        (["describe", "--host", "aple-m1"], 2, "did you mean apple-m1"),
    ],
)
def test_wrong_use(capsys: Capture, words: list[str], code: int, says: str) -> None:
    assert main(["trace", *words]) == code
    out, err = capsys.readouterr()
    assert says in err and "Traceback" not in err and out == ""


def test_a_command_without_ioctls(capsys: Capture) -> None:
    assert main(["trace", "explain", "0xc"]) == 0
    assert capsys.readouterr().err.startswith("kvm2: explain made no ioctl in this process")


def real() -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK) or os.uname().machine != "x86_64":
        pytest.skip("no accessible /dev/kvm of x86-64 on this machine")


def test_a_real_kernel_gets_what_it_knows(capsys: Capture) -> None:
    real()
    assert main(["trace", "--json", "create", "--host", "/dev/kvm", "--max-vcpus", "3"]) == 0
    objects = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    made = next(one for one in objects if one["name"] == "KVM_CREATE_VM2")
    asked = [(one["on"], one["name"]) for one in made["inner"]]
    assert asked[-1] == ("kvm#1", "KVM_CREATE_VM") and "KVM_CREATE_VM2" not in dict(asked).values()
    assert made["made"] == made["inner"][-1]["made"] == "vm#1"
    limits = [one for one in objects if one.get("on") == "vm#1" and one["name"] == "KVM_CHECK_EXTENSION"]
    assert limits and limits[0]["result"] == 3, "the library's limit"


def test_a_real_kernels_guest(capsys: Capture, tmp_path: Path) -> None:
    real()
    script = tmp_path / "guest.py"
    script.write_text(
        "import kvm2\n"
        "with kvm2.open('/dev/kvm') as kvm, kvm.create_vm() as vm:\n"
        "    ram = vm.map(0, 1 << 16)\n"
        "    ram.write(0xfff0, bytes.fromhex('b041 ba f803 ee f4'))  # mov al, 'A'; mov dx, 0x3f8; out dx, al; hlt\n"
        "    with vm.create_vcpu(0) as vcpu:\n"
        "        sregs = vcpu.get_sregs()\n"
        "        code = type(sregs.cs)(**{**vars(sregs.cs), 'base': 0, 'selector': 0})\n"
        "        vcpu.set_sregs(type(sregs)(**{**vars(sregs), 'cs': code}))\n"
        "        for _ in range(2):\n"
        "            vcpu.run_once()\n"
    )
    assert main(["trace", "--exits", "all", str(script)]) == 0
    err = capsys.readouterr().err
    assert "vcpu#1.0 KVM_GET_SREGS() = 0 => {cs={base=0xffff0000, " in err
    assert "KVM_RUN() = 0 => KVM_EXIT_IO{direction=KVM_EXIT_IO_OUT, size=1, port=0x3f8, count=1, data=41} <" in err
    assert "vcpu#1.0 KVM_RUN() = 0 => KVM_EXIT_HLT <" in err
    assert main(["trace", str(script)]) == 0
    assert "vcpu#1.0 KVM_RUN x 2 => KVM_EXIT_IO out 0x3f8/1, KVM_EXIT_HLT <" in capsys.readouterr().err


def test_a_negotiated_vm_of_a_real_kernel_keeps_its_name(capsys: Capture, tmp_path: Path) -> None:
    real()
    script = tmp_path / "negotiate.py"
    script.write_text(
        "import kvm2\n"
        "from kvm2.abi.vm2 import MaxVcpus\n"
        "with kvm2.open('/dev/kvm') as kvm, kvm.create_vm2(negotiate=True) as vm:\n"
        "    vm.commit([MaxVcpus(max_vcpus=2)])\n"
        "    vm.create_vcpu(1).close()\n"
    )
    assert main(["trace", str(script)]) == 0
    lines = capsys.readouterr().err.splitlines()
    made = next(line for line in lines if " KVM_CREATE_VM2(" in line)
    assert made.startswith("kvm#1 ") and ") = vm#1 <" in made
    commit = next(i for i, line in enumerate(lines) if line.startswith("vm#1 KVM_VM2_COMMIT([MAX_VCPUS{max_vcpus=2}"))
    below = [line for line in lines[commit + 1 :] if line.startswith("    ")]
    assert any(" KVM_CREATE_VM(0) = vm#2 <" in line for line in below)
    assert any(line.startswith("    vm#2 dup2() = vm#1 <") for line in below)
    assert any(line.startswith("vm#1 KVM_CREATE_VCPU(1) = vcpu#1.1 <") for line in lines)
