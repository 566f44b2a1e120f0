"""The pytest plugin, in runs of pytest of their own: what is collected, what passes, and every wrong use."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import kvm2
from kvm2.pytest_plugin import Wrong, expanded


class Done(NamedTuple):
    """A run: exit code, what became of each test by id, everything printed."""

    code: int
    outcomes: dict[str, str]
    text: str


Run = Callable[..., Done]
RECORDER = """
import json, pathlib
def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        with open("outcomes.txt", "a") as file:
            word = report.outcome if report.when == "call" or report.skipped else report.when + " failed"
            print(json.dumps([report.nodeid.partition("::")[2], word]), file=file)
"""


@pytest.fixture
def pytester_run(tmp_path: Path) -> Run:
    """Writes test_it.py and runs pytest on it, in a process of its own, as a user would."""

    def run(source: str, *words: str, ini: str = "", **files: str) -> Done:
        (tmp_path / "pytest.ini").write_text(f"[pytest]\naddopts = -p no:cacheprovider\n{ini}\n")
        (tmp_path / "test_it.py").write_text("import pytest\nimport kvm2\n" + source)
        (tmp_path / "conftest.py").write_text(RECORDER)
        for name, text in files.items():
            (tmp_path / name.replace("_toml", ".toml")).write_text(text)
        outcomes = tmp_path / "outcomes.txt"
        outcomes.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-W", "error", *words],
            cwd=tmp_path, env={**environment, "COLUMNS": "200"}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        lines = outcomes.read_text().splitlines() if outcomes.exists() else []
        return Done(done.returncode, dict(json.loads(line) for line in lines), done.stdout + done.stderr)

    return run


def test_is_installed_for_pytest() -> None:
    (entry,) = [one for one in importlib.metadata.entry_points(group="pytest11") if one.name == "kvm2"]
    assert entry.value == "kvm2.pytest_plugin"


def test_loading_it_is_cheap() -> None:
    script = (
        "import sys, pytest; before = set(sys.modules); import kvm2.pytest_plugin; print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"kvm2", "kvm2.pytest_plugin"}


def test_a_run_without_tests_of_ours_stays_light(pytester_run: Run) -> None:
    done = pytester_run(
        "import sys\ndef test_light():\n"
        "    assert not {'kvm2.hosts', 'kvm2.errors', 'unicorn', 'kvm2.softkvm.profile'} & set(sys.modules)\n"
    )
    assert done.outcomes == {"test_light": "passed"}


def test_every_host_is_a_test(pytester_run: Run) -> None:
    done = pytester_run(
        """
@pytest.mark.kvm_hosts("apple-m1", "max-4k-nosve", "./rack.toml", without=["max-4k-nosve"])
def test_limit(kvm, kvm_host, kvm_profile):
    assert kvm.check_extension("ARM_VM_IPA_SIZE") == kvm_profile.ipa_limit == 36
    assert kvm_host == "apple-m1" or kvm_host.endswith("rack.toml")

@pytest.mark.kvm_hosts("neoverse-n1-*", "apple-m1")
class TestMany:
    @pytest.mark.kvm_vm(physaddr_bits=36, max_vcpus=2)
    def test_asked(self, kvm_vm):
        assert kvm_vm.check_extension("MAX_VCPUS") == 2

    def test_largest(self, kvm_vm, kvm):
        assert kvm_vm.get_attr(2).physaddr_bits == kvm.check_extension("ARM_VM_IPA_SIZE")

    def test_other(self):
        pass

@pytest.mark.kvm_hosts("mainline-6.12", "x86-64")
def test_without_the_new_call(kvm_vm):
    assert kvm_vm.check_extension("MAX_VCPUS") > 0

def test_default(kvm_host):
    assert kvm_host == "max-4k-6.12"

@pytest.mark.parametrize("kvm_host", ["apple-m2"])
def test_own(kvm):
    assert kvm.name == "apple-m2"
""",
        rack_toml='base = "apple-m1"\n',
    )
    assert done.code == 0, done.text
    many = [f"{name}[{host}]" for name in ("test_asked", "test_largest")
            for host in ("neoverse-n1-16k", "neoverse-n1-4k", "neoverse-n1-64k", "apple-m1")]  # fmt: skip
    assert list(done.outcomes) == [
        "test_limit[apple-m1]",
        "test_limit[rack]",
        *[f"TestMany::{one}" for one in many],
        "TestMany::test_other",
        "test_without_the_new_call[mainline-6.12]",
        "test_without_the_new_call[x86-64]",
        "test_default[max-4k-6.12]",
        "test_own[apple-m2]",
    ]
    assert set(done.outcomes.values()) == {"passed"}


BOTH = """
@pytest.mark.kvm_hosts("apple-m1", "graviton3")
def test_marked(kvm_host): pass
def test_unmarked(kvm_host): pass
"""


def test_ini_and_command_line(pytester_run: Run) -> None:
    ini = "kvm2_hosts = apple-m2 rk3588"
    assert list(pytester_run(BOTH, ini=ini).outcomes) == [
        "test_marked[apple-m1]", "test_marked[graviton3]", "test_unmarked[apple-m2]", "test_unmarked[rk3588]"
    ]  # fmt: skip
    assert pytester_run(BOTH, "--kvm2-hosts", "graviton3, a64fx", ini=ini).outcomes == {
        "test_marked[graviton3]": "passed",
        "test_unmarked[graviton3]": "passed",
        "test_unmarked[a64fx]": "passed",
    }
    narrowed = pytester_run(BOTH, "--kvm2-hosts", "a64fx", "-rs")
    assert narrowed.outcomes == {"test_marked[no-host]": "skipped", "test_unmarked[a64fx]": "passed"}
    assert "none of its hosts is among those of --kvm2-hosts" in narrowed.text


def test_groups() -> None:
    every, recorded = expanded(["all"], Path()), expanded(["recorded"], Path())
    assert every == kvm2.host_names()
    assert 0 < len(recorded) < len(every) and set(recorded) < set(every)
    assert expanded(["apple-m1", "all", "kvm"], Path())[0] == "apple-m1"
    assert len(expanded(["apple-m1", "all", "/dev/kvm", "kvm"], Path())) == len(every) + 1


def test_architectures(pytester_run: Run) -> None:
    done = pytester_run(
        """
@pytest.mark.kvm_hosts("apple-m1", "x86-64", "s390x")
@pytest.mark.kvm_arch("arm64", "s390x")
def test_it(kvm): pass
""",
        "-rs",
    )
    assert list(done.outcomes.values()) == ["passed", "skipped", "passed"]
    assert "for arm64, s390x only; x86-64 is x86_64" in done.text


WRONG = [
    ('@pytest.mark.kvm_hosts("aple-m1")\ndef test_it(kvm): 1', "host 'aple-m1': did you mean apple-m1,"),
    ('@pytest.mark.kvm_hosts("max-5k*")\ndef test_it(kvm): 1', "host fits 'max-5k*': did you mean max-4k"),
    ('@pytest.mark.kvm_hosts("./no.toml")\ndef test_it(kvm): 1', "no.toml"),
    ("@pytest.mark.kvm_hosts(36)\ndef test_it(kvm): 1", "36 is not a host: give names as strings"),
    ('@pytest.mark.kvm_hosts("apple-m1", but="x")\ndef test_it(kvm): 1', "without=[...], not but"),
    ('@pytest.mark.kvm_hosts("apple-m1")\ndef test_it(): 1', "takes none of the fixtures kvm_host, kvm, "),
    ('@pytest.mark.kvm_arch("arm64")\ndef test_it(): 1', "marked kvm_arch, but it takes none of"),
    ("@pytest.mark.kvm_vm(max_vcpus=2)\ndef test_it(kvm): 1", "it does not take the fixture kvm_vm"),
    ('@pytest.mark.kvm_arch("arm")\ndef test_it(kvm): 1', "kvm_arch takes architectures: arm64, x86_64"),
    ("@pytest.mark.kvm_arch\ndef test_it(kvm): 1", "kvm_arch takes architectures: arm64, x86_64"),
]


def test_wrong_use_is_a_collection_error(pytester_run: Run) -> None:
    files = {f"test_{number}.py": "import pytest\n" + source for number, (source, _) in enumerate(WRONG)}
    done = pytester_run("def test_right(kvm): pass", **files)
    assert done.code == 2 and not done.outcomes and f"{len(WRONG)} errors" in done.text
    for number, (_, says) in enumerate(WRONG):
        said = done.text.partition(f"ERROR collecting test_{number}.py ")[2].splitlines()[1]
        assert said.startswith(f"test_{number}.py::test_it: ") and says in said
    assert "Traceback" not in done.text and "pytest_plugin.py" not in done.text


@pytest.mark.parametrize(("words", "ini"), [(("--kvm2-hosts", "aple-m1"), ""), ((), "kvm2_hosts = aple-m1")])
def test_a_wrong_option_is_a_usage_error(pytester_run: Run, words: tuple[str, ...], ini: str) -> None:
    done = pytester_run("def test_it(): pass", *words, ini=ini)
    assert done.code == 4 and "kvm2" in done.text and "did you mean apple-m1" in done.text
    assert "Traceback" not in done.text


def test_an_empty_list_of_hosts() -> None:
    with pytest.raises(Wrong, match="'' is not a host"):
        expanded([""], Path())
    with pytest.raises(Wrong, match="no host is left"):
        expanded([], Path())


def test_findings_are_in_the_report(pytester_run: Run) -> None:
    done = pytester_run(
        """
@pytest.mark.kvm_hosts("apple-m1", "graviton3")
def test_default_size(kvm):
    kvm.create_vm2()

@pytest.mark.kvm_hosts("apple-m1")
@pytest.mark.kvm_vm(max_vcpus=9999)
def test_fixture(kvm_vm): pass

@pytest.mark.kvm_hosts("apple-m1")
def test_bare(kvm):
    with kvm.create_vm(36) as vm:
        vm.create_vcpu(9999)
"""
    )
    assert done.outcomes == {
        "test_default_size[apple-m1]": "failed",
        "test_default_size[graviton3]": "passed",
        "test_fixture[apple-m1]": "setup failed",
        "test_bare[apple-m1]": "failed",
    }
    assert done.text.count("- kvm2: why it was refused -") == 3
    assert (
        "EOPNOTSUPP physaddr_bits: physaddr_bits = 40 (default): this host allows 32..36 (PARange 0b0001)\n"
        in done.text
    )
    assert "           asked for 40, allowed 32..36\n" in done.text
    assert "           ask for 36 or fewer, or use 'auto'\n" in done.text
    assert "EOPNOTSUPP attrs[0].max_vcpus: " in done.text


def test_what_a_test_leaves_behind(pytester_run: Run) -> None:
    done = pytester_run(
        """
kept = []

def test_keeps(kvm):
    vm = kvm.create_vm(0)
    kept.append(vm.create_vcpu(0))

def test_lets_go(kvm):
    vm = kvm.create_vm(0)
    vcpu = vm.create_vcpu(0)
    vm.cycle = vm

def test_closes(kvm):
    kept.append(kvm.create_vm(0))
    kept[-1].close()

@pytest.fixture
def mine(kvm):
    return kvm.create_vm(0)

def test_a_fixture_may_hold_it(mine): pass

def test_failed_ones_are_not_asked(kvm):
    kept.append(kvm.create_vm(0))
    assert not "this"

def test_with_harmless_fixtures(kvm, tmp_path, capsys, request, kvm_vm):
    kept.append(kvm.create_vm(0))

def test_that_closes_kvm_itself(kvm):
    kvm.close()
"""
    )
    assert done.outcomes == {
        "test_keeps[max-4k-6.12]": "teardown failed",
        "test_lets_go[max-4k-6.12]": "passed",
        "test_closes[max-4k-6.12]": "passed",
        "test_a_fixture_may_hold_it[max-4k-6.12]": "passed",
        "test_failed_ones_are_not_asked[max-4k-6.12]": "failed",
        "test_with_harmless_fixtures[max-4k-6.12]": "teardown failed",
        "test_that_closes_kvm_itself[max-4k-6.12]": "passed",
    }
    assert "left a Vm (descriptor 4), a Vcpu (descriptor 5) behind: something that outlives it holds" in done.text
    assert "left a Vm (descriptor 5) behind: " in done.text, "the VM of kvm_vm is not among them"


REAL = """
@pytest.mark.kvm_hosts("/dev/kvm", "apple-m1")
def test_it(kvm, kvm_host):
    assert (kvm.name == "/dev/kvm") == (kvm_host == "/dev/kvm")

@pytest.mark.kvm_hosts("/dev/kvm")
def test_description(kvm_profile): pass

@pytest.mark.kvm_hosts("/dev/kvm")
@pytest.mark.kvm_arch("arm64")
def test_arm(kvm): pass

@pytest.mark.kvm_hosts("/dev/kvm")
@pytest.mark.kvm_arch("x86_64")
def test_x86(kvm_vm):
    assert kvm_vm.check_extension("MAX_VCPUS") > 0

kept = []
@pytest.mark.kvm_hosts("/dev/kvm")
def test_keeps(kvm):
    kept.append(kvm.create_vm(0))
"""


def test_the_real_kernel(pytester_run: Run) -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK) or os.uname().machine != "x86_64":
        pytest.skip("no accessible /dev/kvm of x86-64 on this machine")
    done = pytester_run(REAL, "-rs")
    assert done.outcomes == {
        "test_it[dev-kvm]": "passed",
        "test_it[apple-m1]": "passed",
        "test_description[dev-kvm]": "skipped",
        "test_arm[dev-kvm]": "skipped",
        "test_x86[dev-kvm]": "passed",
        "test_keeps[dev-kvm]": "teardown failed",
    }, done.text
    assert "for arm64 only; /dev/kvm is x86_64" in done.text
    assert "left a kvm-vm (descriptor" in done.text


def test_a_device_that_cannot_be_opened_is_a_skip(pytester_run: Run) -> None:
    without = (
        "import kvm2.hosts.real\n"
        "@pytest.fixture(autouse=True)\ndef gone(monkeypatch):\n"
        "    monkeypatch.setattr(kvm2.hosts.real.open_real, '__defaults__', ('/dev/no-such-kvm', None))\n"
    )
    done = pytester_run(without + '@pytest.mark.kvm_hosts("/dev/kvm")\ndef test_it(kvm): pass\n', "-rs")
    assert done.outcomes == {"test_it[dev-kvm]": "skipped"}
    assert "/dev/no-such-kvm cannot be opened: No such file or directory" in done.text


def test_a_project_may_have_a_fixture_of_the_same_name(pytester_run: Run) -> None:
    done = pytester_run("@pytest.fixture\ndef kvm(): return 7\ndef test_it(kvm): assert kvm == 7")
    assert done.outcomes == {"test_it": "passed"}


def test_it_can_be_switched_off(pytester_run: Run) -> None:
    done = pytester_run("def test_it(kvm): pass", "-p", "no:kvm2")
    assert done.outcomes == {"test_it": "setup failed"}
    assert "fixture 'kvm' not found" in done.text


def test_under_xdist(pytester_run: Run) -> None:
    if importlib.util.find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed")
    done = pytester_run('@pytest.mark.kvm_hosts("neoverse-*")\ndef test_it(kvm, kvm_vm): pass\n', "-n", "2")
    assert done.code == 0 and set(done.outcomes.values()) == {"passed"}
    assert len(done.outcomes) == sum(name.startswith("neoverse-") for name in kvm2.host_names())


def test_the_example_of_the_guide(pytester_run: Run) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "pytest.md").read_text()
    example = guide.partition("```python\n")[2].partition("```")[0]
    done = pytester_run(example)
    assert done.code == 0, done.text
    assert done.outcomes["test_guest_memory_fits[apple-m1]"] == "passed"
    assert "test_guest_memory_fits[max-4k-protected]" not in done.outcomes
    assert done.outcomes["test_default_size[max-16k-6.12]"] == "passed"
