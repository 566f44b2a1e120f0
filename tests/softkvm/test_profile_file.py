"""Host files: inheritance, and each way in which a file can be wrong, by itself: file, key, reason, what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm2.abi import caps as cap
from kvm2.abi import sysregs
from kvm2.errors import HostError
from kvm2.softkvm import profile
from kvm2.softkvm.profile_keys import KERNELS, KEYS, QUIRKS

Write = Callable[..., Path]
N1 = 'base = "neoverse-n1"\n'


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(text: str, name: str = "mine.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return make


WRONG = {
    "not TOML": ("page_shift = [", "is not TOML", ""),
    "unknown key": (N1 + "page_size = 4096", "page_size: unknown key: did you mean page_shift?", "pa_bits"),
    "unknown table": (N1 + "[cpu]\nname = 1", "cpu: unknown key", "registers"),
    "unknown base": ('base = "neoverse-n7"', "base: no described host 'neoverse-n7'", ""),
    "base is no text": ("base = 3", "base: 3 is not a text", ""),
    "empty title": (N1 + 'title = " "', "title: ' ' is not a text", ""),
    "basis": (N1 + 'basis = "guess"', "basis: 'guess' is not one of the choices", "recorded, sourced, rule, stated"),
    "arch": ('arch = "riscv"', "arch: 'riscv' is not one of the choices", "arm64, x86_64"),
    "kernel": (N1 + 'kernel = "6.13"', "kernel: '6.13' is not described", "6.1, 6.12"),
    "kernel is a number": (N1 + "kernel = 6.12", "kernel: 6.12 is not a text", "6.1, 6.12"),
    "mode": (N1 + 'mode = "hyp"', "mode: 'hyp' is not one of the choices", "protected"),
    "page_shift": (N1 + "page_shift = 13", "page_shift: 13 is not one of the choices", "12, 14, 16"),
    "page_shift is true": (N1 + "page_shift = true", "page_shift: True is not one of the choices", "12, 14, 16"),
    "pa_bits": (N1 + "pa_bits = 41", "pa_bits: 41 is not one of the choices", "32, 36, 40"),
    "pa_bits is a text": (N1 + 'pa_bits = "40"', "pa_bits: '40' is not one of the choices", "32, 36, 40"),
    "granules empty": (N1 + "granules = []", "granules: the list is empty", "12, 14, 16"),
    "granules not a list": (N1 + "granules = 12", "granules: 12 is not a list", ""),
    "granules unsorted": (N1 + "granules = [14, 12]", "granules: the list is not in ascending order", ""),
    "granules twice": (N1 + "granules = [12, 12]", "granules: an item is given twice", ""),
    "lpa2": (N1 + "lpa2 = 1", "lpa2: 1 is not true or false", "true, false"),
    "vmid_bits": (N1 + "vmid_bits = 12", "vmid_bits: 12 is not one of the choices", "8, 16"),
    "sve length": (N1 + "sve_vqs = [1, 17]", "sve_vqs: 17 is out of range", "1 to 16"),
    "sve length 0": (N1 + "sve_vqs = [0]", "sve_vqs: 0 is out of range", "1 to 16"),
    "sve text": (N1 + 'sve_vqs = ["1"]', "sve_vqs: '1' is not a whole number", ""),
    "sve gap": (N1 + "sve_vqs = [1, 4]", r"sve_vqs: every power of two below the largest must be there: [2] too", ""),
    "gic": (N1 + 'gic = ["v4"]', "gic: 'v4' is not one of the choices", "v2, v3, its"),
    "its alone": (N1 + 'gic = ["its"]', "gic: an ITS belongs to a GICv3", "v3, its"),
    "without": (N1 + 'without = ["sve"]', "without: 'sve' is not one of the choices", "pauth"),
    "cpus": (N1 + "cpus = 0", "cpus: 0 is out of range", "1 to 4096"),
    "max_vcpus": (N1 + "max_vcpus = 513", "max_vcpus: 513 is more than a VM can have here", "1 to 512"),
    "max_vcpus, GICv2": (N1 + 'gic = ["v2"]\nmax_vcpus = 9', "max_vcpus: 9 is more than a VM can have here", "1 to 8"),
    "max_vcpu_id": (N1 + "max_vcpu_id = 100", "max_vcpu_id: 100 leaves no ids for 512 vCPUs", "512"),
    "nr_memslots": (N1 + "nr_memslots = 32768", "nr_memslots: 32768 is out of range", "32767"),
    "type_word": (N1 + 'type_word = "log3"', "type_word: 'log3' is not one of the choices", "log2-v3"),
    "type_word of x86": (N1 + 'type_word = "x86-64"', "type_word: 'x86-64' does not exist on arm64", "delta5"),
    "create_vm2": (N1 + "create_vm2 = 16", "create_vm2: 16 is out of range", "15"),
    "create_vm2 negative": (N1 + "create_vm2 = -1", "create_vm2: -1 is out of range", "15"),
    "negotiation without list": (N1 + "create_vm2 = 4", "create_vm2: 4: the negotiation phase (4) needs", ""),
    "vm_types on arm64": (N1 + "vm_types = 1", "vm_types: exists on x86_64 only, not on arm64", ""),
    "quirk": (N1 + 'quirks = ["odd"]', "quirks: 'odd' is not one of the choices", "no-lpa2"),
    "register": (N1 + "[registers]\nID_AA64MMFR9_EL2 = 0", "registers: 'ID_AA64MMFR9_EL2' is not a register", ""),
    "register of no host": (N1 + "[registers]\nSCTLR_EL1 = 0", "registers: 'SCTLR_EL1' is not a register that", ""),
    "register of a vCPU": (N1 + "[registers]\nMPIDR_EL1 = 0", "registers: 'MPIDR_EL1' is not a register that", ""),
    "register too large": (N1 + f"[registers]\nCTR_EL0 = {1 << 64}", "registers: CTR_EL0: 18446744073709551616 is", ""),
    "register negative": (N1 + "[registers]\nCTR_EL0 = -1", "registers: CTR_EL0: -1 is out of range", ""),
    "register twice": (N1 + "[registers]\nCTR_EL0 = 1\nS3_3_C0_C0_1 = 1", "is given twice under two names", ""),
    "register no table": (N1 + "registers = 3", "registers: 3 is not a table", ""),
    "capability": (N1 + "[caps]\nKVM_CAP_WARP = 1", "caps: 'KVM_CAP_WARP' is not a KVM_CAP_ name", ""),
    "capability by rule": (N1 + "[caps]\nKVM_CAP_ARM_VM_IPA_SIZE = 40", "caps: KVM_CAP_ARM_VM_IPA_SIZE follows", ""),
    "capability too large": (N1 + f"[caps]\nKVM_CAP_PTP_KVM = {1 << 31}", "caps: KVM_CAP_PTP_KVM: 2147483648 is", ""),
    "firmware": (N1 + "[firmware]\nWORKAROUND_4 = 1", "firmware: 'WORKAROUND_4' is not WORKAROUND_1", ""),
    "ccsidr": (N1 + "[ccsidr]\n14 = 1", "ccsidr: '14' is not a CSSELR value", ""),
    "source of nothing": (N1 + '[sources]\nbits = "a book"', "sources: 'bits' is not a key of host files", "pa_bits"),
    "assumed of nothing": (N1 + 'assumed = ["bits"]', "assumed: 'bits' is not a key of host files", "pa_bits"),
    "contradiction": (
        N1 + "pa_bits = 36\n[registers]\nID_AA64MMFR0_EL1 = 0x101125",
        "pa_bits: 36 contradicts registers.ID_AA64MMFR0_EL1 = 0x101125 of the same file",
        "",
    ),
    "no address bits": ('arch = "arm64"', "registers: how many address bits? Give a base, pa_bits or", ""),
    "PARange": (N1 + "[registers]\nID_AA64MMFR0_EL1 = 0x101128", "ID_AA64MMFR0_EL1.PARange = 0x8 is no size", "0 to 7"),
    "pages that do not boot": ('base = "cortex-a53-4k"\npage_shift = 14', "page_shift: a kernel with 16K pages", ""),
    "no stage-2 granule": (N1 + "[registers]\nID_AA64MMFR0_EL1 = 0x10000101125", "page_shift: KVM does not start", ""),
    "no VHE": ('base = "cortex-a53-4k"\nmode = "vhe"', "mode: ID_AA64MMFR1_EL1.VH is 0", "nvhe, protected"),
    "SVE without lengths": (
        N1 + "[registers]\nID_AA64PFR0_EL1 = 0x1100000111111112",
        "sve_vqs: ID_AA64PFR0_EL1 announces SVE but no length",
        "",
    ),
    "arm64 key elsewhere": ('base = "x86-64"\npa_bits = 40', "pa_bits: exists on arm64 hosts only, not on x86_64", ""),
    "registers elsewhere": ('base = "s390x"\n[registers]\nCTR_EL0 = 1', "registers: exists on arm64 hosts only", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_refused(case: str, write: Write) -> None:
    text, message, allowed = WRONG[case]
    path = write(text)
    with pytest.raises(HostError) as caught:
        profile.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert allowed in str(caught.value).partition("allowed: ")[2]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(HostError, match="cannot be read"):
            profile.load(path)
    (tmp_path / "bytes.toml").write_bytes(b"title = '\xff'")
    with pytest.raises(HostError, match="is not TOML"):
        profile.load(tmp_path / "bytes.toml")
    with pytest.raises(HostError, match="cannot be read"):
        profile.load("nowhere/rack.toml")


def test_bases_in_a_circle(write: Write) -> None:
    write('base = "./b.toml"', "a.toml")
    path = write('base = "./a.toml"', "b.toml")
    with pytest.raises(HostError, match=r"based on each other: .*b.toml -> a.toml -> b.toml"):
        profile.load(path)
    with pytest.raises(HostError, match="based on each other"):
        profile.load(write('base = "./self.toml"', "self.toml"))


def test_too_many_bases(write: Write) -> None:
    write(N1, "h0.toml")
    paths = [write(f'base = "./h{number}.toml"', f"h{number + 1}.toml") for number in range(16)]
    assert profile.load(paths[12]).ipa_limit == 48
    with pytest.raises(HostError, match="base: more than 16 hosts on each other"):
        profile.load(paths[-1])


def test_inheritance(write: Write) -> None:
    write(N1 + 'title = "below"\npa_bits = 44\ncpus = 8\n[caps]\nKVM_CAP_STEAL_TIME = 0', "below.toml")
    path = write(
        'base = "./below.toml"\npa_bits = 42\n[caps]\nKVM_CAP_PTP_KVM = 0\n[registers]\nMIDR_EL1 = 7', "top.toml"
    )
    host = profile.load(path)
    assert (host.name, host.title, host.ipa_limit, host.cpus) == ("top", "top", 42, 8)
    assert host.bases == ("below", "neoverse-n1", "neoverse-n1-4k")
    assert host.caps[cap.KVM_CAP_STEAL_TIME] == host.caps[cap.KVM_CAP_PTP_KVM] == 0
    assert host.registers[sysregs.MIDR_EL1] == 7 and host.caps[cap.KVM_CAP_NR_VCPUS] == 8
    assert host.registers[sysregs.CTR_EL0] == profile.load("neoverse-n1").registers[sysregs.CTR_EL0]


def test_keys_change_the_registers(write: Write) -> None:
    text = "pa_bits = 52\nlpa2 = true\nvmid_bits = 8\nfwb = true\ncnp = false\nsve_vqs = [1]\n" + 'gic = ["v2"]\n'
    host = profile.load(write(N1 + text))
    assert (host.ipa_limit, host.lpa2, host.vmid_bits, host.fwb, host.cnp) == (52, True, 8, True, False)
    assert host.registers[sysregs.ID_AA64MMFR0_EL1] == 0x30310201126
    assert host.max_vcpus == 8 and host.registers[sysregs.ID_AA64PFR0_EL1] == 0x1100000110111112


def test_granules(write: Write) -> None:
    host = profile.load(write(N1 + "granules = [16]\npage_shift = 16"))
    assert host.granules == (16,) and host.registers[sysregs.ID_AA64MMFR0_EL1] == 0xF0001125
    explicit = profile.load(write('base = "neoverse-n2"\ngranules = [12, 16]'))
    assert explicit.granules == (12, 16) and explicit.registers[sysregs.ID_AA64MMFR0_EL1] == 0x22100001125


def test_without(write: Write) -> None:
    lines = 'base = "max-4k-mte"\nwithout = ["pauth", "pmu", "mte", "aarch32"]'
    host = profile.load(write(lines))
    assert host.features == {0, 2, 4}
    assert cap.KVM_CAP_ARM_MTE not in host.caps and cap.KVM_CAP_ARM_MTE not in host.enable_caps
    assert sysregs.ID_ISAR0_EL1 not in host.registers and sysregs.ID_ISAR0_EL1 not in host.writable_masks
    el1 = profile.load(write('base = "max-4k-6.12"\nwithout = ["el1_32bit"]'))
    assert 1 not in el1.features and cap.KVM_CAP_ARM_EL1_32BIT not in el1.caps
    assert sysregs.ID_ISAR0_EL1 in el1.registers


def test_a_capability_switched_off_cannot_be_enabled(write: Write) -> None:
    host = profile.load(write(N1 + "[caps]\nKVM_CAP_ARM_NISV_TO_USER = 0"))
    assert cap.KVM_CAP_ARM_NISV_TO_USER not in host.enable_caps
    assert cap.KVM_CAP_ARM_NISV_TO_USER in profile.load("neoverse-n1").enable_caps


def test_an_older_kernel(write: Write) -> None:
    host = profile.load(write('base = "lpa2-4k-52"\nkernel = "6.1"'))
    assert host.ipa_limit == 48 and not host.lpa2 and host.preferred_target == 5
    assert host.quirks == frozenset(QUIRKS) and not host.writable_masks
    assert cap.KVM_CAP_USER_MEMORY2 not in host.caps


def test_sources_of_a_sourced_host(write: Write) -> None:
    host = profile.load(write(N1 + 'basis = "sourced"\npa_bits = 44\n[sources]\nregisters = "a manual"'))
    assert host.sources["granules"] == "a manual" and "granules" not in host.assumed
    assert host.sources["pa_bits"] == "assumed" and "pa_bits" in host.assumed
    stated = profile.load(write(N1 + "pa_bits = 44"))
    assert stated.sources["pa_bits"] == "mine.toml" and stated.assumed == ()


def test_no_gic(write: Write) -> None:
    host = profile.load(write(N1 + "gic = []"))
    assert host.gic == () and cap.KVM_CAP_IRQCHIP not in host.caps and host.max_vcpus == 512


@given(
    key=st.sampled_from(sorted(KEYS)),
    value=st.sampled_from(["-1", '"x"', "[]", "[[1]]", "{ x = {} }", "1.5", "true", "1979-05-27"]),
)
def test_never_a_traceback(key: str, value: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    base = "" if key == "base" else N1
    path.write_text(f"{base}{key} = {value}\n")
    try:
        assert profile.load(path).name == "any"
    except HostError as error:
        assert key in str(error) or "registers" in str(error)


def test_every_kernel_file_names_known_quirks() -> None:
    import tomllib

    for path in KERNELS.glob("*.toml"):
        assert set(tomllib.loads(path.read_text())["quirks"]) <= set(QUIRKS)
