import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time

import click
import pytest

from kvm2 import errors
from kvm2.abi.findings import Finding
from kvm2.cli import main as cli
from kvm2.cli.main import main


@pytest.fixture
def failing(monkeypatch):
    """A command that raises what it is given."""

    def install(error):
        @click.command("create")
        @click.option("--json", is_flag=True)
        def command(json):
            raise error

        monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: command)

    return install


FINDING = Finding(0, 2, errno.EOPNOTSUPP, 4, 48, 32, 36, 0x1F << 32, "physaddr_bits = 48: this host allows 32..36")

CASES = [
    (errors.KvmError(errno.EOPNOTSUPP, "", (FINDING, FINDING)), 1, "EOPNOTSUPP"),
    (errors.KvmError(errno.EINVAL, "bare"), 1, "EINVAL (Invalid argument): bare"),
    (errors.GuestError("truncated"), 1, "truncated"),
    (errors.UsageError("not like that"), 2, "not like that"),
    (errors.HostError("no such host"), 2, "no such host"),
    (click.UsageError("bad option"), 2, "bad option"),
    (errors.EnvironmentFault("no core"), 3, "no core"),
    (PermissionError(errno.EACCES, "Permission denied", "/nowhere"), 3, "Permission denied: '/nowhere'"),
    (OSError(errno.EMFILE, "Too many open files", "/nowhere"), 3, "Too many open files"),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.mark.parametrize(("error", "code", "text"), CASES)
def test_exit_codes_and_texts(failing, capsys, error, code, text):
    failing(error)
    assert main(["create"]) == code
    out, err = capsys.readouterr()
    assert out == "" and text in err and "Traceback" not in err
    if getattr(error, "findings", ()):
        assert err.count("attrs[0].physaddr_bits") == 2 and "ask for 36 or fewer" in err


@pytest.mark.parametrize(("error", "code", "text"), CASES)
def test_refusals_are_one_json_object_too(failing, capsys, error, code, text):
    failing(error)
    assert main(["create", "--json"]) == code
    out, _ = capsys.readouterr()
    found = json.loads(out)
    assert found["schema"] == "kvm2.create/1" and found["ok"] is False
    assert len(found["findings"]) == len(getattr(error, "findings", ()))


@pytest.mark.parametrize("defect", [ZeroDivisionError("ours"), OSError(errno.EBADF, "ours"), FileNotFoundError("ours")])
def test_a_defect_keeps_its_traceback(failing, defect):
    failing(defect)
    with pytest.raises(type(defect)):
        main(["create"])


@pytest.mark.parametrize("words", [["rnu"], ["--nonsense"], ["create", "--nonsense"], ["completion", "tcsh"]])
def test_usage_is_two(words, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Usage" in err


def test_a_mistyped_command_is_recognised(capsys):
    main(["rnu"])
    assert "Did you mean 'run'?" in capsys.readouterr().err


def test_usage_errors_in_json(capsys):
    assert main(["create", "--json", "--ipa-bits", "forty"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["error"]["kind"] == "BadParameter" and "'auto'" in found["error"]["message"]


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help_and_json(name, capsys):
    assert main([name, "--help"]) == 0
    if name not in ("abi", "oracle", "scenarios"):  # groups of commands, each with its own
        assert "--json" in capsys.readouterr().out


def test_help_names_every_command_and_version_is_one_line(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kvm2 ")


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from kvm2.cli.main import main; main(['--help']); "
        "heavy = ('dataclasses', 'rich', 'unicorn', 'numpy', 'ctypes', 'kvm2.abi', 'kvm2.kvm'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_import_kvm2_costs_almost_nothing():
    program = "import sys; before = set(sys.modules); import kvm2; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [name for name in eval(done.stdout) if name.startswith("kvm2")] == ["kvm2"]
    assert not {"dataclasses", "ctypes", "enum"} & set(eval(done.stdout))


def cpu_seconds(*command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_is_fast():
    bare = min(cpu_seconds(sys.executable, "-c", "pass") for _ in range(5))
    helped = min(cpu_seconds(sys.executable, "-m", "kvm2", "--help") for _ in range(5))
    assert helped <= 8 * bare, f"kvm2 --help took {helped / bare:.1f} times python -c pass"


def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m kvm2 --help | head -c 10"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == "" and len(done.stdout) == 10


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("create --host apple-m1 --ipa-bits 36 >/dev/full", 3, "standard output cannot be written: No space left"),
        ("create --host apple-m1 --ipa-bits 36 --json >/dev/full", 3, "standard output cannot be written"),
        ("create --host apple-m1 --ipa-bits 36 >&-", 0, ""),
        ("create --host apple-m1 --ipa-bits 33 2>&- | head -c 1", 0, ""),
        ("shell --host apple-m1 <&-", 2, "standard input is closed"),
    ],
)
def test_an_output_that_cannot_be_written_and_an_input_that_is_closed(words, code, said):
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m kvm2 {words}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == code and "Traceback" not in done.stderr
    assert said in done.stderr and bool(said) == bool(done.stderr)


@pytest.mark.parametrize("words", [[], ["scenarios"], ["oracle"]])
def test_a_group_without_a_subcommand_shows_its_help_once(words, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Usage: ") and err.count("Usage:") == 1 and "Commands:" in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_and_what_they_complete(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "_KVM2_COMPLETE" in capsys.readouterr().out
    environment = os.environ | {
        "_KVM2_COMPLETE": "bash_complete",
        "COMP_WORDS": "kvm2 run --host apple-",
        "COMP_CWORD": "3",
    }
    done = subprocess.run([sys.executable, "-m", "kvm2"], env=environment, capture_output=True, text=True, check=False)
    assert "plain,apple-m1" in done.stdout.split()


SPIN = b"\x00\x00\x00\x14"  # b .
# mov x1, #0x09000000 (the UART); mov w0, #10; str w0, [x1]; b .
SAYS_AND_SPINS = bytes.fromhex("0120a1d2 40018052 200000b9") + SPIN


@pytest.mark.parametrize("where", ["run", "shell"])
def test_ctrl_c_ends_it(tmp_path, where):
    guest = tmp_path / "spin.bin"
    guest.write_bytes(SAYS_AND_SPINS)
    program = f"ram[0:4] = {SPIN!r}; vcpu.regs.pc = ram.gpa; print('go', flush=True); vcpu.run_once(); vcpu.run_once()"
    words = {"run": ["run", str(guest)], "shell": ["shell", "-c", program]}[where]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvm2", *words, "--host", "neoverse-n1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None and process.stdout.readline() in (b"\n", b"go\n")  # the guest is about to spin
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err, err
    assert where == "shell" or b"ended: interrupted" in out
