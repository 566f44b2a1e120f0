"""A described host: everything that the software KVM has to know about a machine and its kernel to answer like it.

The facts of a host stand in a TOML file (`hosts/*.toml`, or your own: docs/hosts.md has every key); the rules that turn
them into KVM's answers are here and in `profile_rules`. A Profile never changes once it is loaded.

>>> m1 = load("apple-m1")
>>> m1.ipa_limit, 1 << m1.page_shift
(36, 16384)
>>> load("max-4k-6.12").ipa_limit_for(16)
52
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from kvm2.softkvm import profile_rules as rules

if TYPE_CHECKING:
    from collections.abc import Mapping

HOSTS = Path(__file__).parent / "hosts"


@dataclass(frozen=True)
class Profile:
    """A described host. Sizes are log2 (`page_shift`, granules), SVE lengths are in quadwords of 128 bits (`vq`).

    Register keys are encodings op0<<14 | op1<<11 | crn<<7 | crm<<3 | op2. `registers` holds what a vCPU with every
    feature of this host sees after KVM_ARM_VCPU_INIT: the kernel's sanitised ID registers and the other registers that
    differ from host to host. Fields of features that a vCPU does not have are hidden by the vCPU's rules.
    """

    name: str
    title: str = ""
    arch: str = "arm64"
    kernel: str = "6.12"
    mode: str = "vhe"
    basis: str = "stated"  # recorded, sourced, rule or stated: where the description comes from
    page_shift: int = 12
    parange: int = 5  # ID_AA64MMFR0_EL1.PARange
    pa_bits: int = 48
    stated_ipa_limit: int = 0  # of a kernel that is built for less than the host has; 0: by the rule
    lpa2: bool = False  # stage 1 and 2, at the host's page size: VTCR_EL2.DS, and the limit may exceed 48
    granules: tuple[int, ...] = (12,)
    vmid_bits: int = 8
    fwb: bool = False
    cnp: bool = False
    dic: bool = False
    sve_vqs: tuple[int, ...] = ()
    gic: tuple[str, ...] = ("v3", "its")
    cpus: int = 1
    max_vcpus: int = 512
    max_vcpu_id: int = 512
    nr_memslots: int = 32767
    type_word: str = "log2"
    create_vm2: int = 15
    vm_types: int = 0
    caps: Mapping[int, int] = field(
        default_factory=dict
    )  # KVM_CHECK_EXTENSION on /dev/kvm; a negative value is an errno
    vm_caps: Mapping[int, int] = field(default_factory=dict)  # where a VM fd answers otherwise
    enable_caps: frozenset[int] = frozenset()
    features: frozenset[int] = frozenset()
    targets: tuple[int, ...] = (5,)
    preferred_target: int = 5
    registers: Mapping[int, int] = field(default_factory=dict)
    writable_masks: Mapping[int, int] = field(default_factory=dict)
    firmware: Mapping[int, int] = field(
        default_factory=dict
    )  # KVM_REG_ARM_FW_REG number -> value at INIT (the SMCCC workarounds)
    ccsidr: Mapping[int, int] = field(
        default_factory=dict
    )  # CSSELR -> CCSIDR, on kernels that show the hardware's (6.1)
    quirks: frozenset[str] = frozenset()
    sources: Mapping[str, str] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()  # the files this one is built on, nearest first

    @property
    def ipa_limit(self) -> int:
        """KVM_CAP_ARM_VM_IPA_SIZE: the largest IPA size in bits (kvm_set_ipa_limit); 0 on a host that is not arm64."""
        return self.ipa_limit_for(self.page_shift)

    def ipa_limit_for(self, granule: int) -> int:
        """The largest IPA size in bits for a stage-2 granule (12, 14 or 16); 0 where the host has no such granule."""
        if self.arch != "arm64" or granule not in self.granules:
            return 0
        limit = rules.ipa_limit(self.parange, granule, self.lpa2_for(granule))
        return min(limit, self.stated_ipa_limit or limit)

    def lpa2_for(self, granule: int) -> bool:
        """Whether both stages have 52-bit addresses with this granule, and the kernel uses them (since 6.8)."""
        return "no-lpa2" not in self.quirks and rules.lpa2(self.registers, granule)

    @property
    def one_size(self) -> str:
        """Why every VM of this host gets its IPA limit; "" where a VM can choose."""
        return "protected host: one size" if self.arch == "arm64" and self.mode == "protected" else ""

    @property
    def parange_can_follow(self) -> bool:
        """Whether a vCPU's PARange can be made to follow the VM's IPA size; the software KVM can everywhere."""
        return True

    @property
    def vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE in bytes: kvm_run, the port I/O page of x86, the ring of coalesced MMIO."""
        return (1 + (self.arch == "x86_64") + (self.arch != "s390x")) << self.page_shift

    def not_executed(self) -> list[str]:
        """What this host announces to a guest and the emulated core of the software KVM does not execute."""
        from kvm2.softkvm.profile_core import not_executed

        return not_executed(self)


def names() -> list[str]:
    """The names of the described hosts that come with kvm2, sorted.

    >>> "apple-m1" in names()
    True
    """
    return sorted(path.stem for path in HOSTS.glob("*.toml"))


@lru_cache(maxsize=256)
def _load_named(name: str) -> Profile:
    from kvm2.softkvm.profile_file import read_profile

    return read_profile(HOSTS / f"{name}.toml")


def load(name_or_path: str | Path) -> Profile:
    """The described host of that name, or of a TOML file of yours (anything with a `/` or ending in `.toml`).

    Raises HostError: no such host or file, or a file that says something wrong (file, key, reason, what is allowed).
    """
    from kvm2.softkvm.profile_file import read_profile, unknown_host

    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith(".toml"):
        return read_profile(Path(name_or_path))
    if text not in names():
        raise unknown_host(text)
    return _load_named(text)
