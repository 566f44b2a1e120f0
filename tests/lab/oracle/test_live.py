"""kvm2 on a live arm64 KVM: creation, slots, SVE lengths, guests, and the published answers once more."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvm2.lab import bundled
from kvm2.lab.compare import load_differences
from kvm2.lab.engine import PATIENCE_MS
from kvm2.lab.lowering import RUN_TIMEOUT_MS
from kvm2.lab.oracle.inside import KVM2, PYTHON
from kvm2.lab.oracle.machine import Job, Machine
from kvm2.lab.oracle.shapes import SHAPES, Shape, shape
from kvm2.lab.replay import Plan, replay
from kvm2.lab.scenarios import load_record, select

# Of every group some, among them each way in which a vCPU comes back; none waits.
SELECTION = (
    "sys/*",
    "create_vm/types",
    "ipa/0/*",
    "ipa/48/*",
    "slots/*",
    "vcpu/*",
    "cap/*",
    "run/mmio*",
    "run/hvc/*",
    "run/idregs/*",
    "vgic/types",
)

SVE_SELECTION = ("sve/vls/0x[137f]", "sve/mixed_features", "sve/vls_twice")

CREATE = """
import json, kvm2
from kvm2.abi.vm2 import Arm64PhysaddrSize
with kvm2.open("/dev/kvm") as kvm:
    for bits in (32, 33, 36, 40, 47, 48):
        with kvm.create_vm2(physaddr_bits=bits) as vm:
            top = 1 << bits
            ram = vm.map(top - (1 << 16), 1 << 16)
            try:
                vm.map(top, 1 << 16)
            except kvm2.KvmError as error:
                print(bits, error.name)
            print(json.dumps([bits, vm.get_attr(Arm64PhysaddrSize).physaddr_bits]), flush=True)
    for bits in (31, 49, 52, 53):
        try:
            kvm.create_vm2(physaddr_bits=bits)
        except kvm2.KvmError as error:
            print(bits, error.name, [finding.path for finding in error.findings], str(error))
"""

GUEST = """
import kvm2
with kvm2.open("/dev/kvm") as kvm:
    vm = kvm.create_vm2(physaddr_bits=36)
    ram = vm.map(0x4000_0000, 1 << 20)
    ram.write(0, bytes.fromhex("20008052" "000000b9" "020000d4"))  # mov w0, #1; str w0, [x0]; hvc #0
    vcpu = vm.create_vcpu()
    vcpu.init()
    vcpu.set_reg("pc", 0x4000_0000)
    print(vcpu.run_once())
"""


def run(machine: Machine, *words: str) -> tuple[int, str, str]:
    """A command inside: exit code, standard output, standard error."""
    out, err = bytearray(), bytearray()
    entry = {"kvm2": KVM2, "python": PYTHON}[words[0]]
    code = machine.run(Job(entry, words), None, out.extend, err.extend).code
    return code, out.decode(), err.decode()


def test_timers_are_alive(machine: Machine) -> None:
    """QEMU forgets the EL2 timer when it saves a machine: a restored kernel would sleep for ever."""
    code = "import threading, time; threading.Event().wait(0.3); time.sleep(0.1); print('awake')"
    assert run(machine, "python", "-c", code) == (0, "awake\n", "")


def test_every_size_up_to_the_limit_and_slots_up_to_its_end(machine: Machine) -> None:
    code, out, err = run(machine, "python", "-c", CREATE)
    assert code == 0, err
    lines = out.splitlines()
    assert [line for line in lines if "EFAULT" in line] == [f"{bits} EFAULT" for bits in (32, 33, 36, 40, 47, 48)]
    refused = [line.split(maxsplit=2) for line in lines if "physaddr_bits" in line and "[" in line and "E" in line]
    assert [int(words[0]) for words in refused] == [31, 49, 52, 53]
    assert all(words[1] in ("EOPNOTSUPP", "EINVAL") and "32..48" in words[2] for words in refused[1:]), refused


def test_a_guest_runs(machine: Machine) -> None:
    code, out, err = run(machine, "python", "-c", GUEST)
    assert (code, out) == (0, "Mmio(address=0x1, size=4, write, data=01000000)\n"), err


def test_the_demonstration_guest(machine: Machine) -> None:
    code, out, err = run(machine, "kvm2", "run", "--host", "/dev/kvm", "--ipa-bits", "36")
    assert code == 0, err
    assert "PARange 5, 48 bits" in out, "a Neoverse N1"
    assert "IPA size: 36 bits; the host could give 48; granule 4K" in out
    assert "last page below the IPA limit, at 0xffffff000: wrote 0x2018070a, read 0x2018070a" in out
    assert "read 0x1000000000, the first address beyond: fault: ESR 0x96000010" in out
    assert "ended: shutdown" in out


def test_a_refusal_inside_is_the_commands_own(machine: Machine) -> None:
    code, out, err = run(machine, "kvm2", "create", "--host", "/dev/kvm", "--ipa-bits", "52")
    assert (code, out) == (1, "") and "this host allows 32..48" in err
    code, out, err = run(machine, "kvm2", "create", "--host", "/dev/kvm", "--ipa-bits", "52", "--json")
    assert code == 1 and json.loads(out)["ok"] is False


def test_sve_lengths(sve_machine: Machine) -> None:
    for bits in (128, 512, 2048):
        code, out, err = run(sve_machine, "kvm2", "create", "--host", "/dev/kvm", "--sve", str(bits), "--json")
        assert code == 0, err
        told = next(row for row in json.loads(out)["attributes"] if row["name"] == "ARM64_SVE_VLS")
        assert told["vls"] == [(1 << bits // 128) - 1] + [0] * 7, f"{bits}: all lengths up to the longest"
    code, out, err = run(sve_machine, "kvm2", "create", "--host", "/dev/kvm", "--ipa-bits", "52")
    assert code == 0 and "physaddr_bits=52" in out, err


def check_records(shape: Shape, only: tuple[str, ...], patience_ms: int = PATIENCE_MS) -> int:
    """Plays scenarios on a machine; the number of steps, after all of them were found equal to the published ones."""
    report = replay(
        Plan(
            f"oracle:{shape.name}",
            select(bundled.scenarios(shape.page), only, ()),
            bundled.guests(),
            record=bundled.record(shape.name),
            untrusted=bundled.untrusted(),
            named=[rule for rule in load_differences() if rule.name == "recorder-too-slow"],
            patience_ms=patience_ms,
        )
    )
    assert report.ok, report.json()["differences"][:5]
    return report.totals()["steps"]


def test_the_published_answers(built: Callable[[str], Shape]) -> None:
    assert check_records(built("neoverse-n1-4k"), SELECTION) > 1500


def test_the_published_answers_about_sve(built: Callable[[str], Shape]) -> None:
    assert check_records(built("max-4k-6.12"), SVE_SELECTION) > 70


def test_recording_on_the_command_line(built: Callable[[str], Shape], tmp_path: Path) -> None:
    one = built("neoverse-n1-4k")
    file = tmp_path / "n1.jsonl"
    command = [sys.executable, "-m", "kvm2", "oracle", "record", one.name, "--only", "sys/*", "-o", str(file)]
    subprocess.run(command, check=True, env={**os.environ})
    record, published = load_record(file), bundled.record(one.name)
    assert published is not None
    assert (record.host, record.header["cpu"], record.header["page"]) == (one.name, one.cpu, 4096)
    assert record.header["kernel"].startswith("6.12.") and record.header["qemu"].startswith("QEMU emulator version")
    assert record.answers and all(published.answers[name] == answers for name, answers in record.answers.items())


def documented() -> list[tuple[str, str]]:
    """The commands of docs/oracle.md that need a machine, with what it says they print."""
    text = (Path(__file__).parents[3] / "docs" / "oracle.md").read_text()
    blocks = re.findall(r"^```text\n\$ (kvm2 oracle .*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [(command, output) for command, output in blocks]


@pytest.mark.parametrize(("command", "output"), documented())
def test_the_documentation_shows_what_happens(built: Callable[[str], Shape], command: str, output: str) -> None:
    words = shlex.split(command)
    built(words[words.index("--shape") + 1])
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    said = done.stdout + done.stderr + (f"[exit code {done.returncode}]\n" if done.returncode else "")
    lines = [
        r"(?:.*\n)*?" if line == "..." else ".*".join(map(re.escape, line.split("..."))) + "\n"
        for line in output.splitlines()
    ]
    assert re.fullmatch("".join(lines), said), said


def test_the_documentation_has_commands() -> None:
    assert len(documented()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, one in SHAPES.items() if one.published])
def test_all_published_answers(built: Callable[[str], Shape], name: str) -> None:
    """Every scenario, with the recorded patience."""
    assert check_records(built(name), (), RUN_TIMEOUT_MS) > 5000


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, one in SHAPES.items() if not one.published])
def test_the_other_machines_start(built: Callable[[str], Shape], name: str) -> None:
    from kvm2.lab.oracle.machine import open_machine

    with open_machine(built(name)) as machine:
        assert machine.info["page"] == shape(name).page
        code, out, err = run(machine, "kvm2", "run", "--host", "/dev/kvm")
        assert code == 0 and "ended: shutdown" in out, err
