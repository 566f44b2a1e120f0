"""create, describe, run and shell, on the software KVM."""

import json
import struct
import subprocess
import sys

import pytest

from kvm2.cli.main import main

HVC_OFF = struct.pack("<IIII", 0x52800100, 0x72B08000, 0xD4000002, 0x14000000)  # PSCI SYSTEM_OFF


def asked(capsys, *words):
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_create_refuses_with_every_finding(capsys):
    code, found = asked(
        capsys, "create", "--host", "neoverse-n1", "--ipa-bits", "52", "--sve", "256", "--max-vcpus", "9999"
    )
    assert code == 1 and found["error"]["errno"] == "EOPNOTSUPP"
    assert [f["path"] for f in found["findings"]] == ["attrs[0].physaddr_bits", "attrs[1].vls[0]", "attrs[2].max_vcpus"]
    assert main(["create", "--host", "apple-m1"]) == 1
    assert "physaddr_bits = 40 (default): this host allows 32..36" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "bits", "shift", "call"),
    [
        ((), 40, 12, "KVM_CREATE_VM2"),
        (("--ipa-bits", "max"), 52, 12, "KVM_CREATE_VM2"),
        (("--ipa-bits", "auto", "--memory", "1M@1T"), 41, 12, "KVM_CREATE_VM2"),
        (("--ipa-bits", "0x21", "--granule", "64k"), 33, 16, "KVM_CREATE_VM2"),
        (("--type", "0x28"), 40, 12, "KVM_CREATE_VM"),
        (("--fixed", "--ipa-bits", "48", "--sve", "256"), 48, 12, "KVM_CREATE_VM2_FIXED"),
    ],
)
def test_create_shows_what_the_vm_got(capsys, words, bits, shift, call):
    code, found = asked(capsys, "create", "--host", "max-4k-6.12", *words)
    assert code == 0 and found["schema"] == "kvm2.create/1" and found["call"] == call
    values = {one["name"]: one for one in found["attributes"]}
    assert values["ARM64_PHYSADDR_SIZE"]["physaddr_bits"] == found["stage2"]["ipa_bits"] == bits
    assert values["ARM64_GRANULE"]["page_shift"] == found["stage2"]["page_shift"] == shift
    assert found["stage2"]["t0sz"] == 64 - bits == found["stage2"]["vtcr_el2"] & 63
    assert main(["create", "--host", "max-4k-6.12", *words]) == 0
    text = capsys.readouterr().out
    assert call in text and f"stage 2: {bits} bits" in text and "VTCR_EL2 0x" in text


def test_sve_256_is_the_hosts_lengths_up_to_it(capsys):
    _, found = asked(capsys, "create", "--host", "max-4k-pow2vl", "--sve", "512")
    assert next(a for a in found["attributes"] if a["name"] == "ARM64_SVE_VLS")["vls"][0] == 0b1011
    code, found = asked(capsys, "create", "--host", "max-4k-pow2vl", "--sve", "384")
    assert code == 1 and found["findings"][0]["path"].endswith("vls[0]")
    _, found = asked(capsys, "create", "--host", "max-4k-6.12", "--sve", "vcpu")
    assert found["asked"] == [{"type": 1, "name": "ARCH_CAPABILITIES", "capabilities": [1]}]


def test_dry_run_creates_nothing(capsys):
    code, found = asked(capsys, "create", "--host", "apple-m1", "--ipa-bits", "33", "--dry-run")
    assert code == 0 and found["dry_run"] and "attributes" not in found and found["stage2"]["ipa_bits"] == 33
    assert asked(capsys, "create", "--host", "apple-m1", "--dry-run")[0] == 1


@pytest.mark.parametrize(
    "words",
    [
        ("--type", "40", "--ipa-bits", "40"),
        ("--type", "40", "--fixed"),
        ("--fixed", "--granule", "4k"),
        ("--dry-run", "--fixed"),
        ("--ipa-bits", "auto"),
        ("--sve", "100"),
        ("--granule", "8k"),
        ("--memory", "lots", "--ipa-bits", "auto"),
        ("--host", "no-such-host"),
        ("--host", "max-4k-6.12", "--on", "apple-m1"),
    ],
)
def test_create_usage(capsys, words):
    host = () if "--host" in words else ("--host", "max-4k-6.12")
    code, found = asked(capsys, "create", *host, *words)
    assert code == 2 and found["error"]["message"]


def test_the_host_that_is_used_is_said_aloud(capsys, monkeypatch):
    monkeypatch.delenv("KVM2_HOST", raising=False)
    assert main(["describe"]) == 0
    assert "the default" in capsys.readouterr().err
    monkeypatch.setenv("KVM2_HOST", "apple-m1")
    assert main(["describe"]) == 0
    out, err = capsys.readouterr()
    assert "apple-m1 (KVM2_HOST)" in err and out.startswith("apple-m1:")
    assert main(["describe", "--host", "apple-m2x"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_describe_lists_every_attribute(capsys):
    code, found = asked(capsys, "describe", "--host", "apple-m1")
    assert code == 0 and found["create_vm2"] == 15
    sizes = next(one for one in found["attributes"] if one["name"] == "ARM64_PHYSADDR_SIZE")
    assert (sizes["default"], sizes["min"], sizes["max"], sizes["mask"]) == (40, 32, 36, 0x1F << 32)
    assert [one["type"] for one in found["attributes"]] == sorted(one["type"] for one in found["attributes"])


def run(capsys, *words):
    return asked(capsys, "run", "--timeout", "20", *words)


@pytest.mark.parametrize(
    ("host", "words", "lines"),
    [
        (
            "apple-m1",
            ("--ipa-bits", "36"),
            [
                "PARange 1, 36 bits",
                "IPA size: 36 bits; the host could give 36; granule 16K",
                "last page below the IPA limit, at 0xffffff000: wrote 0x2018070a, read 0x2018070a\n",
                "read 0x1000000000, the first that the host lacks: fault: ESR 0x96000000 (address size fault, level 0)",
            ],
        ),
        (
            "neoverse-n1",
            ("--ipa-bits", "auto", "--memory", "64M@1T", "--memory", "1M@0"),
            [
                "IPA size: 41 bits; the host could give 48",
                "RAM: 0x10000000000, 65536 KiB",
                "read 0x20000000000, the first address beyond: fault: ESR 0x96000010 (synchronous external abort), "
                "FAR 0x20000000000",
                "read 0x1000000000000, the first that the host lacks: fault: ESR 0x96000000 (address size fault",
                "SVE: none",
            ],
        ),
        ("max-4k-6.12", ("--sve", "256"), ["SVE: rdvl says 256 bits, the VM's set is 0x3"]),
        ("max-4k-6.12", ("--sve", "vcpu"), ["SVE: rdvl says 2048 bits, the VM's set is 0xffff"]),
        ("max-4k-6.12", ("--parange-follows-ipa", "--ipa-bits", "36"), ["PARange 1, 36 bits"]),
        ("cortex-a53-4k", ("--type", "33"), ["IPA size: 33 bits"]),
        ("cortex-a53-4k", ("--cpus", "3"), ["cpu 1 is up: MPIDR_EL1 0x80000001", "cpu 2 is up: MPIDR_EL1 0x80000002"]),
        ("cortex-a53-4k", ("--no-params",), ["no parameter block"]),
    ],
)
def test_the_demonstration_guest(capsys, host, words, lines):
    code, found = run(capsys, "--host", host, *words)
    assert code == 0 and found["ended"] == "shutdown", found
    for line in lines:
        assert line in found["console"], found["console"]
    assert found["exits"]["system_event"] == 1 and found["unclaimed"] == []


def test_a_guest_of_ones_own_and_its_summary(capsysbinary, tmp_path):
    # x1 = 0x0a000000 (nothing there); w0 = [x1]; [x1] = w0; PSCI SYSTEM_OFF
    guest = tmp_path / "guest.bin"
    guest.write_bytes(struct.pack("<III", 0xD2A14001, 0xB9400020, 0xB9000020) + HVC_OFF)
    assert main(["run", "--host", "cortex-a53-4k", str(guest)]) == 0
    out = capsysbinary.readouterr().out.decode()
    assert "ended: shutdown" in out and "2 accesses to addresses with nothing behind them" in out
    assert "1 mmio_read, 1 mmio_write, 1 system_event" in out and "0xa000000" in out


def test_run_that_fails_is_one(capsys, tmp_path):
    guest = tmp_path / "guest.bin"
    guest.write_bytes(struct.pack("<II", 0xD2A14001, 0xA9400420))  # ldp x0, x1, [x1]: no syndrome, ENOSYS
    code, found = run(capsys, "--host", "cortex-a53-4k", str(guest))
    assert code == 1 and found["ended"] == "failed" and found["errno"] == "ENOSYS" and not found["ok"]
    guest.write_bytes(b"\x00\x00\x00\x14")
    code, found = asked(capsys, "run", "--host", "cortex-a53-4k", str(guest), "--timeout", "0.2")
    assert code == 1 and found["ended"] == "timeout"


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--host", "apple-m1"), 1, "this host allows 32..36"),
        (("--host", "apple-m1", "no-such.elf"), 1, "No such file"),
        (("--host", "apple-m1", "--memory", "64M@0x09000000"), 2, "covers the UART"),
        (("--host", "cortex-a53-4k", "--memory", "1M@0", "--memory", "1M@0"), 2, "overlap"),
        (("--host", "cortex-a53-4k", "--memory", "64M@1T"), 1, "EFAULT"),
        (("--host", "cortex-a53-4k", "--cpus", "9999"), 1, "EINVAL"),
        (("--host", "cortex-a53-4k", "--timeout", "nan"), 2, "numbers of seconds from 0 on"),
        (("--host", "cortex-a53-4k", "--timeout", "-1"), 2, "numbers of seconds from 0 on"),
    ],
)
def test_run_refusals(capsys, words, code, text):
    assert main(["run", *words]) == code
    assert text in capsys.readouterr().err


def test_shell_runs_a_program(capsys):
    program = "print(kvm.name, vm.get_attr(2).physaddr_bits, ram.size >> 20, vcpu.regs.pc)"
    assert main(["shell", "--host", "apple-m1", "-c", program]) == 0
    assert capsys.readouterr().out == "apple-m1 32 64 0\n"
    code, found = asked(capsys, "shell", "--host", "apple-m1", "-c", program)
    assert code == 0 and found["output"] == "apple-m1 32 64 0\n"
    assert asked(capsys, "shell", "--host", "apple-m1")[0] == 2


@pytest.mark.parametrize(
    ("program", "code", "kind", "said"),
    [
        (
            "print(1)\n1 / 0",
            1,
            "ZeroDivisionError",
            'Traceback (most recent call last):\n  File "<kvm2 shell>", line 2',
        ),
        ("print(1) +", 1, "SyntaxError", '  File "<kvm2 shell>", line 1'),
        ("print(1); vm.create_vcpu(0)", 1, "KvmError", "kvm2: EEXIST"),
        ("print(1); vm.create_vcpu('x')", 2, "UsageError", "kvm2: "),
        ("print(1); raise SystemExit('done')", 1, "SystemExit", "done"),
        ("print(1); raise SystemExit(7)", 7, "SystemExit", ""),
    ],
)
def test_a_program_that_fails_is_shown_without_our_frames(program, code, kind, said):
    words = [sys.executable, "-m", "kvm2", "shell", "--host", "apple-m1", "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stderr.startswith(said) and "click" not in done.stderr
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"], found["error"]["kind"]) == (code, False, kind)
    assert found["output"] == ("" if kind == "SyntaxError" else "1\n") and found["findings"] == []


def test_shell_prompts(capsys, monkeypatch):
    lines = iter(["print(vcpu.id, kvm2.__name__)"])

    def ask(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    assert main(["shell", "--host", "apple-m1"]) == 0
    assert "0 kvm2" in capsys.readouterr().out
