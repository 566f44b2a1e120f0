"""The pytest plugin: tests that run on a list of hosts. docs/pytest.md is the guide; `-p no:kvm2` switches it off.

pytest loads this in every run of every project that has kvm2 installed: it imports pytest only, everything else when a
test wants it.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from kvm2.kvm import Kvm
    from kvm2.softkvm.profile import Profile
    from kvm2.vm import Vm

FIXTURES = ("kvm_host", "kvm", "kvm_vm", "kvm_profile")
ARCHES = ("arm64", "x86_64", "s390x", "powerpc")
BASES = ("recorded", "sourced", "rule", "stated")
DEFAULT = "max-4k-6.12"
MARKERS = (
    "kvm_hosts(*hosts, without=()): run the test on each of these hosts: names, globs, groups, TOML files, /dev/kvm",
    "kvm_arch(*arches): the test is for hosts of these architectures; it is skipped on others",
    "kvm_vm(**wanted): what the fixture kvm_vm asks for, in the words of kvm2.VmSpec",
)
_PASSED = pytest.StashKey[bool]()


class Wrong(Exception):
    """Hosts that are asked for in a way that cannot be: the text says what is known."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """--kvm2-hosts and the ini option kvm2_hosts."""
    group = parser.getgroup("kvm2", "hosts of KVM tests")
    group.addoption(
        "--kvm2-hosts",
        metavar="A,B",
        help="run tests that use kvm2's fixtures on these hosts: names, globs, all, recorded, TOML files, /dev/kvm; "
        "marked tests on those of theirs that are among them",
    )
    parser.addini("kvm2_hosts", "hosts for tests without a marker kvm_hosts", type="args", default=[])


def pytest_configure(config: pytest.Config) -> None:
    """The markers; and the options checked once, where somebody uses them."""
    for line in MARKERS:
        config.addinivalue_line("markers", line)
    for where in ("--kvm2-hosts", "kvm2_hosts"):
        try:
            _of_option(config, where)
        except Wrong as wrong:
            raise pytest.UsageError(f"{where}: {wrong}") from None


def _of_option(config: pytest.Config, where: str) -> list[str] | None:
    """The hosts that an option names; None where it is not given."""
    if where == "--kvm2-hosts":
        text = config.getoption("--kvm2-hosts")
        if text is None:
            return None
        return expanded([word.strip() for word in text.split(",")], config.invocation_params.dir)
    words = config.getini("kvm2_hosts")
    return expanded(words, config.inipath.parent if config.inipath else config.rootpath) if words else None


def expanded(words: Iterable[object], place: Path) -> list[str]:
    """The hosts that words stand for, each once; TOML files, relative to `place`, as absolute paths. Or `Wrong`."""
    from kvm2.hosts import host_names, is_real

    found: dict[str, None] = {}
    names = host_names()
    for word in words:
        if not isinstance(word, str) or not word:
            raise Wrong(f"{word!r} is not a host: give names as strings")
        if is_real(word):
            found["/dev/kvm"] = None
        elif word == "all":
            found |= dict.fromkeys(names)
        elif word in BASES:
            found |= dict.fromkeys(name for name in names if _profile(name).basis == word)
        elif "/" in word or word.endswith(".toml"):
            path = str((place / word).resolve())
            _profile(path)
            found[path] = None
        elif any(sign in word for sign in "*?["):
            found |= dict.fromkeys(_matching(word, names))
        else:
            _profile(word)
            found[word] = None
    if not found:
        raise Wrong("no host is left: give at least one")
    return list(found)


def _matching(pattern: str, names: list[str]) -> list[str]:
    import fnmatch

    from kvm2.softkvm.profile_file import unknown_host

    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        near = str(unknown_host(pattern.strip("*?"))).partition(": ")[2]
        raise Wrong(f"no described host fits {pattern!r}: {near}")
    return found


def _profile(host: str) -> Profile:
    from kvm2.errors import HostError
    from kvm2.softkvm import profile

    try:
        return profile.load(host)
    except HostError as error:
        raise Wrong(str(error)) from None


# -- which hosts a test runs on


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each host, where it uses a fixture of ours."""
    node = metafunc.definition
    marked = node.get_closest_marker("kvm_hosts")
    # Every fixture of ours needs this one; a project may have a `kvm` of its own.
    own = {mark.name for mark in node.own_markers}
    if "kvm_vm" in own and "kvm_vm" not in metafunc.fixturenames:
        raise _at(node, "marked kvm_vm, but it does not take the fixture kvm_vm")
    if "kvm_host" not in metafunc.fixturenames:
        useless = sorted(own & {"kvm_hosts", "kvm_arch"})
        if useless:
            raise _at(node, f"marked {', '.join(useless)}, but it takes none of the fixtures {', '.join(FIXTURES)}")
        return
    if any("kvm_host" in str(mark.args[0]).replace(",", " ").split() for mark in node.iter_markers("parametrize")):
        return  # the test says itself what kvm_host is
    try:
        _check_arches(node)
        hosts = _hosts_of(metafunc.config, marked, node.path.parent)
    except Wrong as wrong:
        raise _at(node, str(wrong)) from None
    if not hosts:
        skip = pytest.mark.skip(reason="none of its hosts is among those of --kvm2-hosts")
        metafunc.parametrize("kvm_host", [pytest.param("none", id="no-host", marks=skip)], indirect=True)
        return
    metafunc.parametrize("kvm_host", hosts, ids=[_id(host) for host in hosts], indirect=True)


def _at(node: pytest.Item, text: str) -> pytest.Collector.CollectError:
    return pytest.Collector.CollectError(f"{node.nodeid}: {text}")


def _id(host: str) -> str:
    return Path(host).stem if host.endswith(".toml") else host.replace("/dev/kvm", "dev-kvm")


def _hosts_of(config: pytest.Config, marked: pytest.Mark | None, place: Path) -> list[str]:
    """The marker's hosts, else the ini file's, else the default. --kvm2-hosts narrows the marker's, replaces others."""
    asked = _of_option(config, "--kvm2-hosts")
    hosts = asked or _of_option(config, "kvm2_hosts") or [DEFAULT]
    if marked is None:
        return hosts
    unknown = [name for name in marked.kwargs if name != "without"]
    if unknown:
        raise Wrong(f"kvm_hosts takes hosts and without=[...], not {', '.join(unknown)}")
    if marked.args:
        own = expanded(marked.args, place)
        hosts = own if asked is None else [host for host in own if host in asked]
    without = marked.kwargs.get("without", ())
    if isinstance(without, str):
        without = (without,)
    out = expanded(without, place) if without else []
    return [host for host in hosts if host not in out]


def _check_arches(node: pytest.Item) -> None:
    for mark in node.iter_markers("kvm_arch"):
        wrong = [arch for arch in mark.args if arch not in ARCHES]
        if wrong or not mark.args or mark.kwargs:
            raise Wrong(f"kvm_arch takes architectures: {', '.join(ARCHES)}; not {wrong or mark.kwargs or 'nothing'}")


# -- fixtures


@pytest.fixture
def kvm_host(request: pytest.FixtureRequest) -> str:
    """The name of the host that this run of the test is for: what `kvm2.open` takes."""
    host = str(request.param)
    arch = _arch(host)
    for mark in request.node.iter_markers("kvm_arch"):
        if arch not in mark.args:
            pytest.skip(f"for {', '.join(mark.args)} only; {host} is {arch}")
    return host


def _arch(host: str) -> str:
    from kvm2.hosts import is_real

    if is_real(host):
        from kvm2.hosts.kernel import machine_arch

        return machine_arch()
    return _profile(host).arch


@pytest.fixture
def kvm_profile(kvm_host: str) -> Profile:
    """The description of the host. Skipped on /dev/kvm, which has none."""
    from kvm2.hosts import is_real

    if is_real(kvm_host):
        pytest.skip(f"{kvm_host} is a real host: it has no description")
    return _profile(kvm_host)


@pytest.fixture
def kvm(kvm_host: str, request: pytest.FixtureRequest) -> Iterator[Kvm]:
    """An open `kvm2.Kvm` on the host, closed at the end. Skipped where this machine's /dev/kvm cannot be opened.

    A test that passed must have let go of the VMs and vCPUs that it made; that is checked where it can be told.
    """
    import kvm2

    try:
        opened = kvm2.open(kvm_host)
    except kvm2.EnvironmentFault as fault:
        pytest.skip(str(fault))
    with opened:
        before = _descriptors(opened)
        yield opened
        left = _left(opened, before, request.node)
    if left:
        pytest.fail(
            f"the test on {kvm_host} left {', '.join(left)} behind: something that outlives it holds the handle; "
            "close it, or use `with`",
            pytrace=False,
        )


@pytest.fixture
def kvm_vm(kvm: Kvm, request: pytest.FixtureRequest) -> Iterator[Vm]:
    """A VM, closed at the end: of the marker `kvm_vm(...)`'s words; without one as large as the host can."""
    mark = request.node.get_closest_marker("kvm_vm")
    if mark is not None:
        if mark.args:
            pytest.fail("the marker kvm_vm takes words: kvm_vm(physaddr_bits=36)", pytrace=False)
        vm = kvm.create_vm2(**mark.kwargs)
    elif not kvm.check_extension("CREATE_VM2"):
        vm = kvm.create_vm(kvm.check_extension("ARM_VM_IPA_SIZE"))  # 0 where the host is not arm64: the ordinary VM
    else:
        vm = kvm.create_vm2(physaddr_bits="max") if kvm.check_extension("ARM_VM_IPA_SIZE") else kvm.create_vm2()
    with vm:
        yield vm


# -- what a test leaves behind


def _descriptors(kvm: Kvm) -> dict[int, str]:
    """The descriptors of VMs, vCPUs and devices that are open now: number to what it is."""
    listed: Callable[[], list[int]] | None = getattr(kvm.backend, "fds", None)
    if listed is not None:
        inspect: Any = kvm.backend.inspect  # type: ignore[attr-defined]
        return {fd: f"a {type(inspect(fd)).__name__} (descriptor {fd})" for fd in listed() if fd != kvm.fd}
    found = {}
    for entry in Path("/proc/self/fd").iterdir() if Path("/proc/self/fd").is_dir() else ():
        try:
            link = os.readlink(entry)
        except OSError:
            continue  # closed since
        if link.startswith("anon_inode:kvm-v"):
            found[int(entry.name)] = f"a {link.removeprefix('anon_inode:')} (descriptor {entry.name})"
    return found


def _left(kvm: Kvm, before: dict[int, str], item: pytest.Item) -> list[str]:
    """What is open still. Nothing is said where a fixture of others may hold it rightly, or where the test failed: its
    traceback holds everything that it had."""
    if kvm.closed or not item.stash.get(_PASSED, False) or not _can_tell(item):
        return []
    left = set(_descriptors(kvm)) - set(before)
    if left:
        gc.collect()  # handles in a reference cycle are nobody's
    return [what for fd, what in _descriptors(kvm).items() if fd in left]


def _can_tell(item: pytest.Item) -> bool:
    """Whether no other fixture of the test has a value that could hold a handle: such are torn down later than ours."""
    values: dict[str, object] = getattr(item, "funcargs", None) or {}
    simple = (str, bytes, int, float, Path, type(None))
    harmless = ("_pytest.capture", "_pytest.fixtures", "_pytest.tmpdir", "_pytest.logging", "_pytest.recwarn")
    return all(
        name in FIXTURES or isinstance(value, simple) or type(value).__module__ in harmless
        for name, value in values.items()
    )


# -- reports


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """Remembers whether the test passed; a refusal's findings become a section of the report of its failure."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()
    if report.when == "call":
        item.stash[_PASSED] = report.passed
    if report.failed and call.excinfo is not None:
        text = refusal_text(call.excinfo.value)
        if text:
            report.sections.append(("kvm2: why it was refused", text))


def refusal_text(error: BaseException) -> str:
    """Every finding of a KvmError, one a line, or its reason; "" for what is no refusal or says nothing."""
    known = sys.modules.get("kvm2.errors")
    if known is None or not isinstance(error, known.KvmError):
        return ""
    lines = []
    for finding in error.findings:
        lines.append(f"{finding.name:<10} {finding.path}: {finding.message or finding.value}")
        if finding.min < finding.max:
            lines.append(f"{'':<10} asked for {finding.value}, allowed {finding.min}..{finding.max}")
        if finding.hint:
            lines.append(f"{'':<10} {finding.hint}")
    if not lines and error.reason:
        lines.append(f"{error.name:<10} {error.reason}")
    return "\n".join(lines)
