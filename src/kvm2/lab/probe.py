"""Asks a KVM everything that a host file can say: `kvm2 probe`.

>>> from kvm2.softkvm import profile
>>> from kvm2.softkvm.door import SoftKvm
>>> probed = probe(SoftKvm(profile.load("cortex-a53-4k")), "cortex-a53-4k", guests=False)
>>> probed.facts["kernel"], probed.facts["mode"], hex(probed.facts["registers"]["MIDR_EL1"])
('6.12', 'nvhe', '0x410fd034')
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvm2.abi import caps as cap
from kvm2.errors import UsageError
from kvm2.kvm import Kvm
from kvm2.lab import probe_facts, probe_guest, probe_habits, probe_host, probe_registers, probe_verify
from kvm2.lab.probe_seen import Scratch, Seen, errno_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.hosts.backend import Backend
    from kvm2.softkvm.profile import Profile

# The name of an architecture in host files, by what uname calls the machine.
_MACHINES = {"aarch64": "arm64", "x86_64": "x86_64", "s390x": "s390x", "ppc64le": "powerpc", "ppc64": "powerpc"}


@dataclass(frozen=True)
class Probed:
    """A probed host: the keys of its host file, what could not be found out or said, and what was asked.

    `system` says whose KVM it was; `text` is the host file.
    """

    name: str
    facts: dict[str, Any]
    notes: tuple[str, ...]
    system: str

    @property
    def text(self) -> str:
        """The host file, TOML."""
        from kvm2.lab.probe_toml import host_file

        return host_file(self)

    def profile(self) -> Profile:
        """The host, as the file describes it. HostError where the facts contradict each other."""
        import tempfile

        from kvm2.softkvm import profile

        with tempfile.TemporaryDirectory(prefix="kvm2-") as directory:
            path = Path(directory) / f"{self.name}.toml"
            save(self.text, path)
            return profile.load(path)


def save(text: str, path: Path, *, force: bool = False) -> None:
    """Writes a host file, whole or not at all. UsageError where there is a file already, unless `force`."""
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        written.write_text(text, encoding="utf-8")
        if force:
            written.replace(path)
        else:
            os.link(written, path)
    except FileExistsError:
        raise UsageError(f"{path} is there already: give another name, or --force") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        written.unlink(missing_ok=True)


def probe_real(
    device: str = "/dev/kvm", *, guests: bool = True, mainline: bool = False, name: str | None = None
) -> Probed:
    """This machine's KVM. EnvironmentFault where there is none.

    The kernel itself is asked, but KVM_CAP_CREATE_VM2 is what kvm2 offers on it, unless `mainline` says: none.
    """
    from kvm2.abi.vm2 import KVM_CAP_CREATE_VM2
    from kvm2.errors import EnvironmentFault
    from kvm2.hosts import seen
    from kvm2.hosts.kernel import Kernel
    from kvm2.hosts.real import open_real, refusal

    why = refusal(device)
    if why:
        raise EnvironmentFault(why)
    offered = 0
    if not mainline:
        with Kvm(seen(open_real(device, seen)), device) as lowered:
            offered = lowered.check_extension(KVM_CAP_CREATE_VM2)
    uname = platform.uname()
    arch = _MACHINES.get(uname.machine, "")
    if not arch:
        raise EnvironmentFault(f"{device}: a host file cannot say {uname.machine}; it can say {', '.join(_MACHINES)}")
    shift = (os.sysconf("SC_PAGE_SIZE")).bit_length() - 1
    system = f"{uname.system} {uname.release} ({uname.version}) on {uname.machine}, {device}"
    node = uname.node.partition(".")[0]
    called = name or (node if node.isprintable() and node[:1].isalnum() else "this-machine")
    return _probe(seen(Kernel(device)), called, Seen(arch, shift, system, create_vm2=offered), guests)


def probe(backend: Backend, name: str, *, guests: bool = True) -> Probed:
    """Any KVM, by nothing but ioctls. Without `guests` nothing is run, and what only a guest can show is left open."""
    with Kvm(backend, name) as kvm:
        arch, shift = _arch(kvm)
        offered = max(0, _answer(kvm, cap.KVM_CAP_CREATE_VM2))
    return _probe(backend, name, Seen(arch, shift, f"the described host {name}", create_vm2=offered), guests)


def _answer(kvm: Kvm, number: int) -> int:
    found = [0]
    errno_of(lambda: found.append(kvm.check_extension(number)))
    return found[-1]


def _arch(kvm: Kvm) -> tuple[str, int]:
    """Architecture and page size by capabilities and by the shared area of a vCPU, whose pages differ; the page size of
    an arm64 host is found out later."""
    if any(_answer(kvm, number) > 0 for number in (cap.KVM_CAP_ARM_VM_IPA_SIZE, cap.KVM_CAP_ARM_PSCI_0_2)):
        return "arm64", 0
    size = kvm.vcpu_mmap_size()
    if size % 3 == 0:
        return "x86_64", (size // 3).bit_length() - 1
    if size == 1 << 12:
        return "s390x", 12
    return "powerpc", size.bit_length() - 2


def _probe(backend: Backend, name: str, seen: Seen, guests: bool) -> Probed:
    with Kvm(backend, name) as kvm:
        scratch = Scratch(kvm)
        seen.caps = probe_host.answers(kvm.check_extension)
        if seen.arch == "arm64":
            limit = seen.cap(cap.KVM_CAP_ARM_VM_IPA_SIZE)
            scratch.find_type((limit,) if limit > 0 else ())
            seen.page_shift = seen.page_shift or probe_host.page_shift(scratch)
            probe_host.look(seen, scratch)
            features = probe_registers.look(seen, scratch)
            probe_habits.look(seen, scratch, features)
            _look_at_guests(guests)(seen, scratch, features)
        else:
            scratch.find_type()
            with scratch.vm() as vm:
                seen.vm_caps = probe_host.answers(vm.check_extension)
    facts = probe_facts.facts_of(seen)
    probe_verify.agree(seen, facts)
    described = Probed(name, facts, (), seen.system).profile()
    return Probed(name, facts, (*seen.notes, *probe_verify.disagreements(seen, described)), seen.system)


def _look_at_guests(guests: bool) -> Callable[[Seen, Scratch, tuple[int, ...]], None]:
    return probe_guest.look if guests else probe_guest.skip
